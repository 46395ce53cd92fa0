// Quantize new keys and values and scatter them into pages: kv_cache/codec.py, write_pages, bit for bit. Compiled once
// for each instruction set.
#ifndef PARETO_STORE_IMPL_H
#define PARETO_STORE_IMPL_H

#include "numeric.h"
#include "pareto_cpu.h"
#include "vector.h"

#define LANES 16  // tokens that go through matrices together, one in each lane

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

// The centre that rotary embedding gives to the keys of one position (kv_cache/rotary.py) is taken off a key.
static void subtract_centre(float *x, const pareto_cache *c, int head, int64_t position) {
    const int pairs = c->pairs;
    const float *mean = c->key_mean + (int64_t)head * 2 * pairs;
    const float *anchor = c->turn_anchors + position / TURN_SPAN * 2 * pairs;
    const float *fine = c->turn_fine + position % TURN_SPAN * 2 * pairs;
    for (int i = 0; i < pairs; i++) {
        const float ax = mean[i] * anchor[i] - mean[pairs + i] * anchor[pairs + i];
        const float ay = mean[pairs + i] * anchor[i] + mean[i] * anchor[pairs + i];
        x[c->pair_channels[i]] -= fine[i] * ax - fine[pairs + i] * ay;
        x[c->pair_channels[pairs + i]] -= fine[i] * ay + fine[pairs + i] * ax;
    }
}

// u[c] = zero[c] + sum_j matrix[c][j] * x[j], j ascending; lanes are tokens.
static void transform_lanes(const float *matrix, const float *zero, const float *x, float *u, int dim) {
    for (int c = 0; c < dim; c += 8) {
        v16f sum[8];
        for (int i = 0; i < 8; i++) sum[i] = splat(zero[c + i]);
        for (int j = 0; j < dim; j++) {
            const v16f v = load16(x + LANES * j);
            for (int i = 0; i < 8; i++) sum[i] = fma16(splat(matrix[(int64_t)(c + i) * dim + j]), v, sum[i]);
        }
        for (int i = 0; i < 8; i++) store16(u + LANES * (c + i), sum[i]);
    }
}

// Round the last channel first, and hand each channel's error on to those before it: u[t] += feedback[i][t] * error[i],
// i descending. Channels below a block of 16 take its errors together, which keeps their sums in registers.
static void feedback_codes(const float *feedback, float *u, float top, int dim, uint8_t *codes) {
    float errors[16 * LANES];
    for (int block = dim - 16; block >= 0; block -= 16) {
        for (int i = block + 15; i >= block; i--) {
            const float *row = feedback + (int64_t)i * dim;
            const v16f v = load16(u + LANES * i), magic = splat(ROUND_MAGIC);
            v16f clean = select16(v > splat(0), v, splat(0));  // NaN to 0
            clean = select16(clean < splat(top), clean, splat(top)) + magic;
            const v16i code = (v16i)clean;
            for (int l = 0; l < LANES; l++) codes[LANES * i + l] = (uint8_t)code[l];
            const v16f error = v - (clean - magic);
            store16(errors + LANES * (i - block), error);
            for (int t = block; t < i; t++) store16(u + LANES * t, fma16(splat(row[t]), error, load16(u + LANES * t)));
        }
        for (int t = 0; t < block; t += 4) {
            v16f sum[4];
            for (int k = 0; k < 4; k++) sum[k] = load16(u + LANES * (t + k));
            for (int i = 15; i >= 0; i--) {
                const float *row = feedback + (int64_t)(block + i) * dim + t;
                const v16f error = load16(errors + LANES * i);
                for (int k = 0; k < 4; k++) sum[k] = fma16(splat(row[k]), error, sum[k]);
            }
            for (int k = 0; k < 4; k++) store16(u + LANES * (t + k), sum[k]);
        }
    }
}

// One side of one head, for up to LANES tokens from `first` on.
static void store_head(const pareto_store_args *a, int64_t first, int count, int head, int side) {
    const pareto_cache *c = &a->cache;
    const int dim = c->head_dim, groups = c->group_size ? (dim + c->group_size - 1) / c->group_size : 0;
    const int bits = side ? c->value_bits : c->key_bits;
    const float top = (float)((1 << bits) - 1);
    const float *inverse = groups ? NULL : (side ? a->value_inverse : a->key_inverse) + (int64_t)head * dim;
    const float *zero = groups ? NULL : (side ? c->value_zero : c->key_zero) + (int64_t)head * dim;
    const int64_t square = (int64_t)head * dim * dim;
    const float *matrix = !side && a->key_encode ? a->key_encode + square : NULL;
    const float *feedback = side ? a->value_feedback : a->key_feedback;
    float lanes[256 * LANES] __attribute__((aligned(64))), scaled[256 * LANES] __attribute__((aligned(64)));
    uint8_t lane_codes[256 * LANES];
    if (feedback && count < LANES) memset(lanes, 0, sizeof lanes);
    for (int l = 0; l < count; l++) {
        const int64_t token = first + l, slot = a->slots[token];
        if (slot < 0) continue;
        const int64_t at = side ? token * a->value_token_stride + head * a->value_head_stride
                                : token * a->key_token_stride + head * a->key_head_stride;
        float x[256];
        load_row(side ? a->value : a->key, at, a->dtype, dim, x);
        if (!side && c->pairs) subtract_centre(x, c, head, a->positions[token]);
        if (feedback) {
            for (int i = 0; i < dim; i++) lanes[LANES * i + l] = matrix ? x[i] : x[i] * inverse[i] + zero[i];
            continue;
        }
        uint8_t codes[256];
        const int64_t offset = slot % c->block_size;
        uint8_t *page = c->base + slot / c->block_size * c->block_stride + head * c->head_stride;
        if (groups)
            group_codes(x, dim, c->group_size, bits, codes,
                        page + (side ? c->value_meta_offset : c->key_meta_offset) + offset * groups * 4);
        else
            for (int i = 0; i < dim; i++) codes[i] = to_code(x[i] * inverse[i] + zero[i], top);
        pack_row(page, offset, side ? c->value_offset : c->key_offset,
                 side ? c->value_high_offset : c->key_high_offset, bits, dim, codes);
    }
    if (!feedback) return;
    if (matrix) transform_lanes(matrix, zero, lanes, scaled, dim);
    feedback_codes(feedback + square, matrix ? scaled : lanes, top, dim, lane_codes);
    for (int l = 0; l < count; l++) {
        const int64_t slot = a->slots[first + l];
        if (slot < 0) continue;
        uint8_t codes[256];
        for (int i = 0; i < dim; i++) codes[i] = lane_codes[LANES * i + l];
        pack_row(c->base + slot / c->block_size * c->block_stride + head * c->head_stride, slot % c->block_size,
                 side ? c->value_offset : c->key_offset, side ? c->value_high_offset : c->key_high_offset, bits, dim, codes);
    }
}

int PARETO_STORE(const pareto_store_args *a) {
    if (a->cache.pairs)
        for (int64_t token = 0; token < a->num_tokens; token++)
            if (a->slots[token] >= 0
                && (a->positions[token] < 0 || a->positions[token] >= (int64_t)a->cache.num_anchors * TURN_SPAN))
                return -3;
#pragma omp parallel for num_threads(a->num_threads) if (a->num_threads > 1 && a->num_tokens > LANES)
    for (int64_t first = 0; first < a->num_tokens; first += LANES) {
        const int count = a->num_tokens - first < LANES ? (int)(a->num_tokens - first) : LANES;
        for (int head = 0; head < a->cache.num_kv_heads; head++)
            for (int side = 0; side < 2; side++) store_head(a, first, count, head, side);
    }
    return 0;
}

#endif
