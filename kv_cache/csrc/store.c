// Quantize new keys and values and scatter them into pages: kv_cache/codec.py, write_pages, bit for bit.
#include <math.h>

#include "numeric.h"
#include "pareto_cpu.h"

// Rounds to nearest, ties to even, by adding 1.5 * 2**23, which the compiler can do for many channels at once; a number
// is in range before it is rounded. NaN becomes code 0, as the comparisons are written.
static inline uint8_t to_code(float x, float top) {
    x = x > 0 ? x : 0;
    x = x < top ? x : top;
    return (uint8_t)float_to_bits(x + 12582912.0f);
}

static void load_row(const void *data, int64_t at, int dtype, int dim, float *x) {
    if (dtype == PARETO_BF16) {
        const uint16_t *from = (const uint16_t *)data + at;
        for (int i = 0; i < dim; i++) x[i] = bf16_to_float(from[i]);
    } else if (dtype == PARETO_F32) {
        memcpy(x, (const float *)data + at, (size_t)dim * 4);
    } else {
        for (int i = 0; i < dim; i++) x[i] = load_float(data, at + i, dtype);
    }
}

static void pack_row(uint8_t *page, int64_t token, int plane, int high, int bits, int dim, const uint8_t *codes) {
    if (bits == 8) {
        memcpy(page + plane + token * dim, codes, dim);
        return;
    }
    uint8_t *row = page + plane + token * (dim / 2);
    for (int j = 0; j < dim / 2; j++) row[j] = (uint8_t)((codes[j] & 15) | (codes[j + dim / 2] << 4));
    if (bits == 6) {
        uint8_t *pairs = page + high + token * (dim / 4);
        for (int j = 0; j < dim / 4; j++)
            pairs[j] = (uint8_t)((codes[j] >> 4) | (codes[j + dim / 4] >> 4 << 2) | (codes[j + dim / 2] >> 4 << 4)
                                 | (codes[j + dim / 4 * 3] >> 4 << 6));
    }
}

static void group_codes(const float *x, int dim, int group_size, int bits, uint8_t *codes, uint8_t *meta) {
    const float top = (float)((1 << bits) - 1), inverse_top = 1.0f / top;
    for (int from = 0; from < dim; from += group_size, meta += 4) {
        const int to = from + group_size < dim ? from + group_size : dim;
        float clean[256], low = INFINITY, high = -INFINITY;
        for (int i = from; i < to; i++) {
            float v = x[i] == x[i] ? x[i] : 0.0f;
            v = v > 65504.0f ? 65504.0f : v;
            v = v < -65504.0f ? -65504.0f : v;
            clean[i] = v;
            low = v < low ? v : low;
            high = v > high ? v : high;
        }
        const uint16_t minimum = float_to_f16(low);
        const float base = f16_to_float(minimum);
        float spread = (high - base) * inverse_top;
        spread = spread > 0 ? spread : 0;
        const uint16_t scale = float_to_f16(spread < 65504.0f ? spread : 65504.0f);
        const float step = f16_to_float(scale), inverse = step > 0 ? 1.0f / step : 0.0f;
        for (int i = from; i < to; i++) codes[i] = to_code((clean[i] - base) * inverse, top);
        memcpy(meta, &scale, 2);
        memcpy(meta + 2, &minimum, 2);
    }
}

int pareto_store(const pareto_store_args *a) {
    const pareto_cache *c = &a->cache;
    const int dim = c->head_dim, groups = c->group_size ? (dim + c->group_size - 1) / c->group_size : 0;
#pragma omp parallel for num_threads(a->num_threads) if (a->num_threads > 1 && a->num_tokens > 16)
    for (int64_t token = 0; token < a->num_tokens; token++) {
        const int64_t slot = a->slots[token];
        if (slot < 0) continue;
        const int64_t offset = slot % c->block_size;
        for (int head = 0; head < c->num_kv_heads; head++) {
            uint8_t *page = c->base + slot / c->block_size * c->block_stride + head * c->head_stride;
            for (int side = 0; side < 2; side++) {
                const int bits = side ? c->value_bits : c->key_bits;
                const int64_t at = side ? token * a->value_token_stride + head * a->value_head_stride
                                        : token * a->key_token_stride + head * a->key_head_stride;
                float x[256];
                uint8_t codes[256];
                load_row(side ? a->value : a->key, at, a->dtype, dim, x);
                if (groups) {
                    group_codes(x, dim, c->group_size, bits, codes,
                                page + (side ? c->value_meta_offset : c->key_meta_offset) + offset * groups * 4);
                } else {
                    const float *inverse = (side ? a->value_inverse : a->key_inverse) + (int64_t)head * dim;
                    const float *zero = (side ? c->value_zero : c->key_zero) + (int64_t)head * dim;
                    const float top = (float)((1 << bits) - 1);
                    for (int i = 0; i < dim; i++) codes[i] = to_code(x[i] * inverse[i] + zero[i], top);
                }
                pack_row(page, offset, side ? c->value_offset : c->key_offset,
                         side ? c->value_high_offset : c->key_high_offset, bits, dim, codes);
            }
        }
    }
    return 0;
}
