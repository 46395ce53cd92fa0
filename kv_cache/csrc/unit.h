// A unit: up to eight query rows, (token, head of the group) pairs of one KV head, from their activations to the output.
#ifndef PARETO_UNIT_H
#define PARETO_UNIT_H

#include "pages.h"

#define LOG2E 1.4426950408889634f

typedef struct {
    int rows, padded_rows;  // rows there are, and rows that the item's tiles have
    int first_row;
    int32_t first[UNIT_ROWS], last[UNIT_ROWS];  // positions whose codes a row sees, inclusive; last < first: none
    int32_t lowest_first, highest_first, lowest_last, highest_last;
    float step[16];        // of the fixed-point query
    float zero[16];        // what one of a key's zero byte adds to a product, in these steps
    float first_bias[16];  // query . centre of the first token's key
    float own[16];         // score of the row's own token, if that is not read from codes; else -infinity
    // Other centres: the coefficients at position 0 in steps, [8][2][pairs]; a step; what the current ones' sum adds.
    float *turn;
    float turn_step[16], turn_offset[16];
    uint8_t *query;         // activation chunks: one for 64 channels
    uint8_t *turned_query;  // one for 32 turned pairs
    // Softmax so far: maximum in base 2, sum, sum of weighted values.
    float max[16], sum[16];
    float *total;  // [8][dim]
} unit_t;

typedef struct {
    float max[16], sum[16];
    float shift[16];  // what the values' zeros take off every channel
    float *values;    // [8][dim]
} partial_t;

static int channel_chunks(const pareto_cache *c) { return (c->head_dim + 63) / 64; }
static int turned_chunks(const pareto_cache *c) { return c->pairs / 32; }
static int turn_floats(const pareto_cache *c) { return UNIT_ROWS * 2 * c->pairs; }

// 16 floats of a row of any dtype, widened.
INLINE v16f load_row16(const void *data, int64_t at, int dtype) {
    v16f x;
    if (dtype == PARETO_F32) return load16((const float *)data + at);
    if (dtype == PARETO_BF16) {
        typedef uint16_t v16h __attribute__((vector_size(32)));
        v16h h;
        memcpy(&h, (const uint16_t *)data + at, 32);
        return (v16f)(__builtin_convertvector(h, v16u) << 16);
    }
    for (int i = 0; i < 16; i++) x[i] = f16_to_float(((const uint16_t *)data)[at + i]);
    return x;
}

INLINE void store_row16(void *data, int64_t at, int dtype, v16f x) {
    if (dtype == PARETO_F32) {
        store16((float *)data + at, x);
        return;
    }
    uint16_t half[16];
    if (dtype == PARETO_BF16) {  // numeric.h, float_to_bf16
        typedef uint16_t v16h __attribute__((vector_size(32)));
        const v16u bits = (v16u)x, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        const v16h h = __builtin_convertvector((v16u)select16(x == x, (v16f)rounded, (v16f)(bits >> 16 | 0x40)), v16h);
        memcpy(half, &h, 32);
    } else {
        for (int i = 0; i < 16; i++) half[i] = float_to_f16(x[i]);
    }
    memcpy((uint16_t *)data + at, half, 32);
}

// Some rows of q times `n` vectors of a matrix [dim][dim].
INLINE void transform_columns(const float *q, const float *matrix, int dim, float *out, const int rows, const int n) {
    vf sums[2][4];
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < n; i++) sums[r][i] = part_splat(0);
    for (int j = 0; j < dim; j++, matrix += dim)
        for (int i = 0; i < n; i++) {
            const vf column = part_load(matrix + PART * i);
            for (int r = 0; r < rows; r++) sums[r][i] = part_fma(part_splat(q[r * dim + j]), column, sums[r][i]);
        }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < n; i++) part_store(out + r * dim + PART * i, sums[r][i]);
}

// q [rows][dim] times a matrix; two rows share what is loaded of it.
static void transform_queries(const float *q, int rows, const float *matrix, int dim, float *out) {
    for (int r = 0; r < rows; r += 2, q += 2 * dim, out += 2 * dim) {
        const int pair = rows - r > 1;
        int c = 0;
        for (; c + 4 * PART <= dim; c += 4 * PART)
            if (pair) transform_columns(q, matrix + c, dim, out + c, 2, 4);
            else transform_columns(q, matrix + c, dim, out + c, 1, 4);
        for (; c < dim; c += PART)
            if (pair) transform_columns(q, matrix + c, dim, out + c, 2, 1);
            else transform_columns(q, matrix + c, dim, out + c, 1, 1);
    }
}

// What a query makes of the keys' centres: turn[0][i] cos(angle) + turn[1][i] sin(angle), summed over the pairs i, is
// q . centre, cosine and sine in units of a table's byte. Returns the largest amplitude of a pair.
static float prepare_turn(const float *q, const pareto_cache *c, int kv_head, float *turn) {
    const int pairs = c->pairs;
    const float *mean = c->key_mean + (int64_t)kv_head * 2 * pairs;
    for (int i = 0; i < 2 * pairs; i++) turn[i] = q[c->pair_channels[i]];
    v16f largest = splat(0);
    for (int i = 0; i < pairs; i += 16) {
        const v16f x = load16(turn + i), y = load16(turn + pairs + i), unit = splat(1.0f / 127);
        const v16f mean_x = load16(mean + i), mean_y = load16(mean + pairs + i);
        const v16f even = (x * mean_x + y * mean_y) * unit, odd = (y * mean_x - x * mean_y) * unit;
        store16(turn + i, even);
        store16(turn + pairs + i, odd);
        largest = max16(largest, even * even + odd * odd);
    }
    return sqrtf(lanes_max(largest));
}

// Set the activations that meet the table to those of a chunk. A table's tile row i holds the cosines of pairs i and
// 16 + i and their sines, so that the vectors below are already in order.
static void unit_turn(unit_t *u, const pareto_cache *c, int chunk) {
    const int pairs = c->pairs;
    for (int r = 0; r < u->rows; r++) {
        vu sums[PARTS] = {{0}};
        for (int k = 0; k < pairs / 32; k++) {
            const float *anchor = c->turn_anchors + (int64_t)chunk * 2 * pairs + 32 * k;
            const float *turn = u->turn + r * 2 * pairs + 32 * k;
            for (int lane = 0; lane < 16; lane += PART) {
                vi x[4];
                for (int i = 0; i < 2; i++) {
                    const int at = 16 * i + lane;
                    const vf cos = part_load(anchor + at), sin = part_load(anchor + pairs + at);
                    const vf even = part_load(turn + at), odd = part_load(turn + pairs + at);
                    x[i] = (vi)(part_fma(even, cos, odd * sin) + part_splat(ROUND_MAGIC));
                    x[2 + i] = (vi)(part_fma(odd, cos, -(even * sin)) + part_splat(ROUND_MAGIC));
                }
                put_activations(u->turned_query + k * CHUNK_BYTES, u->padded_rows, r, lane, x);
                sums[lane / PART] += (vu)x[0] + (vu)x[1] + (vu)x[2] + (vu)x[3];
            }
        }
        v16u all;
        memcpy(&all, sums, 64);
        // ROUND_BITS was added twice for each pair, modulo 2**32.
        const int32_t sum = (int32_t)(lanes_sum_u(all) - (uint32_t)(2 * pairs) * ROUND_BITS);
        u->turn_offset[r] = (float)sum * -128 * u->turn_step[r];
    }
}

// The step of fixed-point numbers of that largest size, and its inverse.
static float fixed_point(float largest, float *inverse) {
    *inverse = largest > 1e-30f ? PARETO_ONE / largest : 0.0f;
    return largest / PARETO_ONE;
}

// c * tanh(score / c) in base 2, by exp2: tanh |x| = (1 - t) / (1 + t) where t = exp(-2 |x|).
INLINE vf soft_cap(vf score, float cap) {
    const vi sign = (vi)score & part_splat_i(INT32_MIN);
    const vf size = (vf)((vi)score ^ sign);
    const vf t = part_exp2(size * part_splat(-2.0f * LOG2E / cap));
    const vf capped = part_splat(cap * LOG2E) * ((part_splat(1) - t) / (part_splat(1) + t));
    return (vf)((vi)capped | sign);
}

// The score of a row's own token, in base 2.
static float own_score(const pareto_attention_args *a, int token, int kv_head, const float *plain) {
    const int64_t at = token * a->key_token_stride + kv_head * a->key_head_stride;
    v16f sum = splat(0);
    for (int i = 0; i < a->cache.head_dim; i += 16)
        sum = fma16(load16(plain + i), load_row16(a->key, at + i, a->dtype), sum);
    const float score = lanes_sum(sum);
    if (a->soft_cap <= 0) return score;
    const vf capped = soft_cap(part_splat(score), a->soft_cap);
    return capped[0];
}

// One query row as fixed-point activations, step * x: the row itself, which meets centres, and transformed, for codes.
static void prepare_row(unit_t *u, const pareto_cache *c, int kv_head, int r, const float *plain, const float *q) {
    const int dim = c->head_dim;
    const float *first = c->key_first + (int64_t)kv_head * dim;
    v16f largest = splat(0), bias = splat(0);
    for (int i = 0; i < dim; i += 16) {
        bias = fma16(load16(plain + i), load16(first + i), bias);
        largest = max16(largest, (v16f)((v16i)load16(q + i) & splati(0x7fffffff)));
    }
    u->first_bias[r] = lanes_sum(bias);
    float inverse;
    u->step[r] = fixed_point(lanes_max(largest), &inverse);
    int32_t x[256] = {0};
    v16u sum = (v16u)splati(0);
    for (int i = 0; i < dim; i += 16) {
        const v16u whole = (v16u)(load16(q + i) * splat(inverse) + splat(ROUND_MAGIC)) - ROUND_BITS;
        store16i(x + i, (v16i)whole);
        sum += whole;
    }
    // A zero's byte counts 256ths of the codes' range.
    u->zero[r] = -(float)(int32_t)lanes_sum_u(sum) * (float)(1 << side_bits(c, 0)) / 256;
    for (int k = 0; k < channel_chunks(c); k++) put_in_order(u->query + k * CHUNK_BYTES, u->padded_rows, r, x + 64 * k);
    float *turn = u->turn + r * 2 * c->pairs;
    u->turn_step[r] = fixed_point(prepare_turn(plain, c, kv_head, turn), &inverse);
    for (int i = 0; i < 2 * c->pairs; i += 16) store16(turn + i, load16(turn + i) * splat(inverse));
}

// Query rows first_row.. of one KV head: their activations, what each row sees, and an empty result.
static void unit_prepare(unit_t *u, const pareto_attention_args *a, int request, int kv_head, int first_row,
                         int padded_rows, int first_chunk) {
    const pareto_cache *c = &a->cache;
    const int dim = c->head_dim, group = a->num_heads / c->num_kv_heads, start = a->query_start[request];
    const int length = a->query_start[request + 1] - start, context = a->seq_lens[request] - length;
    const v16f factor = splat(a->soft_cap > 0 ? a->scale : a->scale * LOG2E);
    float plain[UNIT_ROWS * 256], q[UNIT_ROWS * 256];
    u->first_row = first_row;
    u->padded_rows = padded_rows;
    u->rows = length * group - first_row < UNIT_ROWS ? length * group - first_row : UNIT_ROWS;
    for (int r = 0; r < u->rows; r++) {
        const int token = (first_row + r) / group, place = context + token, last = place - (a->key != NULL);
        const int first = a->window > 0 && place - a->window + 1 > 0 ? place - a->window + 1 : 0;
        u->first[r] = first;
        u->last[r] = last;
        u->lowest_first = r && u->lowest_first < first ? u->lowest_first : first;
        u->highest_first = r && u->highest_first > first ? u->highest_first : first;
        u->lowest_last = r && u->lowest_last < last ? u->lowest_last : last;
        u->highest_last = r && u->highest_last > last ? u->highest_last : last;
        const int64_t at = (start + (int64_t)token) * a->query_token_stride
            + (kv_head * group + (first_row + r) % group) * a->query_head_stride;
        // Rows of a token's heads lie far from those of the next token.
        const int64_t later = at + 4 * a->query_token_stride;
        __builtin_prefetch((const char *)a->query + later * (a->dtype == PARETO_F32 ? 4 : 2));
        for (int i = 0; i < dim; i += 16) store16(plain + r * dim + i, load_row16(a->query, at + i, a->dtype) * factor);
        u->own[r] = a->key ? own_score(a, start + token, kv_head, plain + r * dim) : -INFINITY;
    }
    transform_queries(plain, u->rows, c->key_inverse + (int64_t)kv_head * dim * dim, dim, q);
    for (int r = 0; r < u->rows; r++) prepare_row(u, c, kv_head, r, plain + r * dim, q + r * dim);
    unit_turn(u, c, first_chunk);
    store16(u->max, splat(-INFINITY));
    store16(u->sum, splat(0));
    memset(u->total, 0, (size_t)dim * UNIT_ROWS * sizeof(float));
}

// Merge a chunk's result into the total. The larger maximum's factor is exactly 1, and a row that saw nothing in the
// chunk keeps its bits.
static void unit_merge(unit_t *u, const partial_t *p, int dim) {
    const v16f old = load16(u->max), new = load16(p->max), top = max16(old, new);
    const v16f keep = select16(old == top, splat(1), exp2_or_0(old - top));
    v16f add = select16(new == top, splat(1), exp2_or_0(new - top));
    add = select16(new == splat(-INFINITY), splat(0), add);
    store16(u->max, top);
    store16(u->sum, fma16(load16(u->sum), keep, load16(p->sum) * add));
    float keeps[16], adds[16];
    store16(keeps, keep);
    store16(adds, add);
    for (int r = 0; r < u->rows; r++) {
        float *total = u->total + r * dim;
        const float *values = p->values + r * dim;
        for (int i = 0; i < dim; i += PART) {
            const vf new_part = part_load(values + i) * part_splat(adds[r]);
            part_store(total + i, part_fma(part_load(total + i), part_splat(keeps[r]), new_part));
        }
    }
}

// What a unit of weight * code counts in the output (softmax.h).
static float value_factor(const pareto_cache *c, int kv_head) {
    const uint32_t unit = SCALE_FLOAT(0u, STEP_EXPONENT(side_bits(c, 1)));
    return c->value_decode[kv_head] * bits_to_float(unit) / WEIGHT_ONE;
}

// Sums and differences of lanes whose numbers differ in the bit `stride`.
INLINE v16f lanes_hadamard(v16f v, const int stride) {
    const v16i lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, second = (lane & stride) != 0;
    return __builtin_shuffle(v, lane ^ stride) + (v16f)((v16i)v ^ (second & INT32_MIN));
}

// kv_cache/transforms.py, hadamard_sums, times a factor.
static void mix_channels(float *x, int dim, float factor) {
    const int run = dim & -dim;
    for (int i = 0; i < dim; i += 16) {
        v16f v = lanes_hadamard(load16(x + i), 1);
        v = lanes_hadamard(v, 2);
        v = lanes_hadamard(v, 4);
        store16(x + i, lanes_hadamard(v, 8) * splat(factor));
    }
    for (int stride = 16; stride < run; stride *= 2)
        for (int i = 0; i < dim; i += 16) {
            if (i & stride) continue;
            const v16f a = load16(x + i), b = load16(x + i + stride);
            store16(x + i, a + b);
            store16(x + i + stride, a - b);
        }
}

// kv_cache/codec.py, reflect.
static void reflect_channels(float *x, const float *mirror, int dim) {
    v16f sum = splat(0);
    for (int i = 0; i < dim; i += 16) sum += load16(x + i) * load16(mirror + i);
    float along = 0;
    for (int i = 0; i < 16; i++) along += sum[i];
    for (int i = 0; i < dim; i += 16) store16(x + i, load16(x + i) - splat(along) * load16(mirror + i));
}

static void unit_finish(const unit_t *u, const pareto_attention_args *a, int request, int kv_head) {
    const pareto_cache *c = &a->cache;
    const int dim = c->head_dim, group = a->num_heads / c->num_kv_heads;
    for (int r = 0; r < u->rows; r++) {
        const int row = u->first_row + r;
        const int64_t at = ((int64_t)a->query_start[request] + row / group) * a->out_token_stride
            + (kv_head * group + row % group) * a->out_head_stride;
        float *total = u->total + r * dim, keep = 1, weight = 0;
        float sink_weight = 0;
        // The row's own token and the sink, merged like chunks of one token each.
        if (a->key || a->sinks) {
            const float sink = a->sinks ? a->sinks[kv_head * group + row % group] * LOG2E : -INFINITY;
            float top = u->max[r] > u->own[r] ? u->max[r] : u->own[r];
            top = top > sink ? top : sink;
            const v16f powers = exp2_or_0((v16f){u->max[r] - top, u->own[r] - top, sink - top});
            keep = u->max[r] == top ? 1 : powers[0], weight = u->own[r] == top ? 1 : powers[1];
            sink_weight = sink == top ? 1 : powers[2];
        }
        const float sum = u->sum[r] * keep + weight + sink_weight;
        mix_channels(total, dim, sum > 0 ? value_factor(c, kv_head) * keep / sum : 0.0f);
        reflect_channels(total, c->value_mirror + (int64_t)kv_head * dim, dim);
        if (!a->key) {
            for (int i = 0; i < dim; i += 16) store_row16(a->out, at + i, a->dtype, load16(total + i));
            continue;
        }
        const int64_t from = ((int64_t)a->query_start[request] + row / group) * a->value_token_stride
            + kv_head * a->value_head_stride;
        const v16f share = splat(weight / sum);
        for (int i = 0; i < dim; i += 16)
            store_row16(a->out, at + i, a->dtype,
                        fma16(load_row16(a->value, from + i, a->dtype), share, load16(total + i)));
    }
}

#endif
