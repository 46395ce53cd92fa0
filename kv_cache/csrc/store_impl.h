// Quantize new keys and values and scatter them into pages: kv_cache/codec.py, write_pages, bit for bit. Compiled once
// for each instruction set.
//
// Sixteen tokens go through together, one in each lane, and channels one after the other.
#ifndef PARETO_STORE_IMPL_H
#define PARETO_STORE_IMPL_H

#include "numeric.h"
#include "pareto_cpu.h"
#include "vector.h"

#define LANES 16
#define MAX_DIM 256

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

// Take the centre of keys at a position off a key (kv_cache/rotary.py).
static void subtract_centre(float *x, const pareto_cache *c, int head, int64_t position) {
    const int pairs = c->pairs, dim = c->head_dim;
    if (!position) {
        for (int i = 0; i < dim; i++) x[i] -= c->key_first[(int64_t)head * dim + i];
        return;
    }
    const float *mean = c->key_mean + (int64_t)head * 2 * pairs;
    const float *anchor = c->turn_anchors + position / TURN_SPAN * 2 * pairs;
    const float *fine = c->turn_fine + position % TURN_SPAN * 2 * pairs;
    float centre[2][MAX_DIM / 2];
    for (int i = 0; i < pairs; i++) {
        const float ax = mean[i] * anchor[i] - mean[pairs + i] * anchor[pairs + i];
        const float ay = mean[pairs + i] * anchor[i] + mean[i] * anchor[pairs + i];
        centre[0][i] = fine[i] * ax - fine[pairs + i] * ay;
        centre[1][i] = fine[i] * ay + fine[pairs + i] * ax;
    }
    for (int i = 0; i < dim / 2; i++) {
        x[c->pair_channels[i]] -= centre[0][i];
        x[c->pair_channels[pairs + i]] -= centre[1][i];
    }
}

// y[c] = sum_j matrix[c][j] * x[j], j ascending.
static void transform_lanes(const float *matrix, const float *x, float *y, int dim) {
    for (int lane = 0; lane < LANES; lane += PART)
        for (int c = 0; c < dim; c += 8) {
            const float *row = matrix + (int64_t)c * dim;
            vf sum[8];
            for (int i = 0; i < 8; i++) sum[i] = part_splat(0);
            for (int j = 0; j < dim; j++) {
                const vf v = part_load(x + LANES * j + lane);
                for (int i = 0; i < 8; i++) sum[i] = part_fma(part_splat(row[(int64_t)i * dim + j]), v, sum[i]);
            }
            for (int i = 0; i < 8; i++) part_store(y + LANES * (c + i) + lane, sum[i]);
        }
}

// kv_cache/codec.py, reflect.
static void reflect_lanes(float *x, const float *mirror, int dim) {
    int width = 1;
    while (4 * width < dim) width *= 2;
    for (int lane = 0; lane < LANES; lane += PART) {
        vf sum[MAX_DIM / 4];
        for (int i = 0; i < width; i++) sum[i] = part_splat(0);
        for (int i = 0; i < dim; i++)
            sum[i % width] = part_fma(part_splat(mirror[i]), part_load(x + LANES * i + lane), sum[i % width]);
        for (int n = width; n > 1; n /= 2)
            for (int i = 0; i < n / 2; i++) sum[i] = sum[2 * i] + sum[2 * i + 1];
        for (int i = 0; i < dim; i++) {
            float *at = x + LANES * i + lane;
            part_store(at, part_fma(part_splat(mirror[i]), -sum[0], part_load(at)));
        }
    }
}

// kv_cache/transforms.py, hadamard_sums, times a factor.
static void mix_lanes(float *x, int dim, float factor) {
    const int run = dim & -dim;
    for (int stride = 1; stride < run; stride *= 2)
        for (int c = 0; c < dim; c++) {
            if (c & stride) continue;
            float *first = x + LANES * c, *second = x + LANES * (c + stride);
            for (int lane = 0; lane < LANES; lane += PART) {
                const vf a = part_load(first + lane), b = part_load(second + lane);
                part_store(first + lane, a + b);
                part_store(second + lane, a - b);
            }
        }
    for (int i = 0; i < LANES * dim; i += PART) part_store(x + i, part_load(x + i) * part_splat(factor));
}

// What is even to codes, in place, their low bits being those of an integer; NaN counts as 0. meta: the bytes of scale
// and zero.
static void quantize_lanes(float *y, int dim, int bits, float range_factor, float zero_factor, float gain,
                           int32_t meta[2][LANES]) {
    const vf none = part_splat(0), magic = part_splat(ROUND_MAGIC), top = part_splat((float)((1 << bits) - 1));
    for (int lane = 0; lane < LANES; lane += PART, y += PART) {
        vf low = none, high = none;
        for (int c = 0; c < dim; c++) {
            const vf v = part_load(y + LANES * c), clean = part_select(v == v, v, none);
            part_store(y + LANES * c, clean);
            low = part_min(clean, low);
            high = part_max(clean, high);
        }
        const vi nearest = (vi)((high - low) * part_splat(range_factor)) + (1 << (SCALE_SHIFT - 1));
        const vi exact = (nearest >> SCALE_SHIFT) - ((127 + SCALE_EXPONENT) << 4), over = exact > 255;
        const vi scale = ((exact & ~over) | (over & 255)) & (exact > 0);
        const vf inverse = part_splat((float)(1 << (bits - 2))) / (vf)SCALE_FLOAT(scale, SCALE_EXPONENT);
        const vf place = part_min(-low * inverse * part_splat(zero_factor), part_splat(255));
        const vf zero = place + magic - magic;
        const vf shift = zero * part_splat((float)(1 << bits) / 256), factor = inverse * part_splat(gain);
        for (int c = 0; c < dim; c++) {
            const vf scaled = part_fma(part_load(y + LANES * c), factor, shift);
            part_store(y + LANES * c, part_min(part_max(scaled, none), top) + magic);
        }
        part_store_i(meta[0] + lane, scale);
        part_store_i(meta[1] + lane, __builtin_convertvector(zero, vi));
    }
}

// A plane's rows from codes, as int32 words of four bytes: bits k * width .. of byte j are those of channel j + k * row.
static void pack_lanes(const float *codes, int row, int width, int low, int32_t *words) {
    const vi mask = part_splat_i((1 << width) - 1);
    for (int lane = 0; lane < LANES; lane += PART)
        for (int j = 0; j < row; j += 4) {
            vi word = part_splat_i(0);
            for (int i = 0; i < 4; i++)
                for (int k = 0; k < 8 / width; k++) {
                    const vi code = part_load_i(codes + LANES * (j + i + k * row) + lane);
                    word |= (code >> low & mask) << (8 * i + k * width);
                }
            part_store_i(words + LANES * (j / 4) + lane, word);
        }
}

// One side of one head, for up to LANES tokens from `first` on.
static void store_head(const pareto_store_args *a, int64_t first, int count, int head, int side) {
    const pareto_cache *c = &a->cache;
    const int dim = c->head_dim, bits = c->planes[side][0].width + c->planes[side][1].width;
    float x[MAX_DIM * LANES] __attribute__((aligned(64))), y[MAX_DIM * LANES] __attribute__((aligned(64)));
    int32_t meta[2][LANES], words[MAX_DIM / 4 * LANES];
    uint8_t *pages[LANES];
    for (int l = 0; l < LANES; l++) {
        const int64_t token = first + l, slot = l < count ? a->slots[token] : -1;
        float row[MAX_DIM];
        pages[l] = slot < 0 ? NULL : c->base + slot / c->block_size * c->block_stride + head * c->head_stride;
        if (!pages[l]) {
            memset(row, 0, (size_t)dim * 4);
        } else {
            const int64_t at = side ? token * a->value_token_stride + head * a->value_head_stride
                                    : token * a->key_token_stride + head * a->key_head_stride;
            load_row(side ? a->value : a->key, at, a->dtype, dim, row);
            if (!side) subtract_centre(row, c, head, a->positions[token]);
        }
        for (int i = 0; i < dim; i++) x[LANES * i + l] = row[i];
    }
    if (side) {
        reflect_lanes(x, c->value_mirror + (int64_t)head * dim, dim);
        mix_lanes(x, dim, a->value_encode[head]);
    } else transform_lanes(a->key_transform + (int64_t)head * dim * dim, x, y, dim);
    float *even = side ? x : y;
    quantize_lanes(even, dim, bits, a->range_factor[side], a->zero_factor[side], a->gain[side], meta);
    for (int p = 0, low = 0; p < 2 && c->planes[side][p].width; low += c->planes[side][p++].width) {
        const int row = dim * c->planes[side][p].width / 8;
        pack_lanes(even, row, c->planes[side][p].width, low, words);
        for (int l = 0; l < count; l++) {
            if (!pages[l]) continue;
            uint8_t *to = pages[l] + c->planes[side][p].offset + a->slots[first + l] % c->block_size * row;
            for (int j = 0; j < row; j += 4) memcpy(to + j, words + LANES * (j / 4) + l, 4);
        }
    }
    for (int l = 0; l < count; l++) {
        if (!pages[l]) continue;
        uint8_t *to = pages[l] + c->meta_offset + a->slots[first + l] % c->block_size * 4 + 2 * side;
        for (int i = 0; i < 2; i++) to[i] = (uint8_t)meta[i][l];
    }
}

int PARETO_STORE(const pareto_store_args *a) {
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
