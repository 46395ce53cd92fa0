// A unit: up to eight query rows, (token, head of the group) pairs of one KV head, from their activations to the output.
#ifndef PARETO_UNIT_H
#define PARETO_UNIT_H

#include "pages.h"

#define BLOCK 64
#define CHUNK 256  // tokens; sums of weights times codes over a chunk fit in int32
#define CHUNK_BLOCKS (CHUNK / BLOCK)
#define MAX_GROUPS 8  // 256 channels in groups of 32
#define LOG2E 1.4426950408889634f

typedef struct {
    int rows, padded_rows;  // rows there are, and rows that the item's tiles have
    int first_row;
    int32_t first[UNIT_ROWS], last[UNIT_ROWS];  // positions that a row sees, inclusive
    int32_t lowest_first, highest_first, lowest_last, highest_last;
    float step[16];  // of the fixed-point query
    float bias[16];  // the key zeros' part of the score, where it matters
    // Centred keys: the coefficients at position 0 in steps, [8][2][pairs], and 128 times the sum of the current ones.
    float *turn;
    int32_t offset[16];
    float group_query[MAX_GROUPS][16];  // step * sum of the group's fixed-point query
    uint8_t *query;  // activation chunks: one for 64 channels, or one for each group; then one for 32 turned pairs
    // Softmax so far: maximum in base 2 (the bits of an int32 where scores are integers), sum, sum of weighted values.
    float max[16], sum[16];
    float *total;  // [8][dim]
} unit_t;

typedef struct {
    float max[16], sum[16];
    float *values;  // [8][dim]
} partial_t;

static int group_count(const pareto_cache *c) {
    return c->group_size ? (c->head_dim + c->group_size - 1) / c->group_size : 0;
}

static int channel_chunks(const pareto_cache *c) { return (c->head_dim + 63) / 64; }
static int turned_chunks(const pareto_cache *c) { return c->pairs / 32; }
static int turn_floats(const pareto_cache *c) { return UNIT_ROWS * 2 * c->pairs; }

// Scores stay integers when nothing but one factor a row stands between them and the exponent: the key zeros' part
// shifts a whole row and cancels, unless a soft cap follows.
static int integer_scores(const pareto_attention_args *a) { return !a->cache.group_size && !(a->soft_cap > 0); }

// The maximum of rows that saw nothing.
static v16f nothing_seen(const pareto_attention_args *a) {
    return integer_scores(a) ? (v16f)splati(INT32_MIN) : splat(-INFINITY);
}

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
    } else {
        uint16_t half[16];
        for (int i = 0; i < 16; i++) half[i] = dtype == PARETO_BF16 ? float_to_bf16(x[i]) : float_to_f16(x[i]);
        memcpy((uint16_t *)data + at, half, 32);
    }
}

// Write the activations (their low 16 bits) of 64 channels, in channel order, skipping those outside from .. to - 1.
static void put_query(uint8_t *chunk, int rows, int r, const int32_t *x, int from, int to) {
    int32_t parts[4][16];
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 4; k++) parts[k][i] = 4 * i + k >= from && 4 * i + k < to ? x[4 * i + k] : 0;
    put_activations(chunk, rows, r, load16i(parts[0]), load16i(parts[1]), load16i(parts[2]), load16i(parts[3]));
}

// `n` vectors of q times a matrix [dim][dim], even and odd rows summed apart: 2 * n sums, none of which waits for another.
INLINE void transform_columns(const float *q, const float *matrix, int dim, float *out, const int n) {
    v16f even[4], odd[4];
    for (int i = 0; i < n; i++) even[i] = odd[i] = splat(0);
    for (int j = 0; j < dim; j += 2, matrix += 2 * dim)
        for (int i = 0; i < n; i++) {
            even[i] = fma16(splat(q[j]), load16(matrix + 16 * i), even[i]);
            odd[i] = fma16(splat(q[j + 1]), load16(matrix + dim + 16 * i), odd[i]);
        }
    for (int i = 0; i < n; i++) store16(out + 16 * i, even[i] + odd[i]);
}

static void transform_query(const float *q, const float *matrix, int dim, float *out) {
    int c = 0;
    for (; c + 64 <= dim; c += 64) transform_columns(q, matrix + c, dim, out + c, 4);
    for (; c < dim; c += 16) transform_columns(q, matrix + c, dim, out + c, 1);
}

// What a query makes of the keys' centres: turn[0][i] cos(angle) + turn[1][i] sin(angle), summed over the pairs i, is
// q . centre, cosine and sine in units of a table's byte. Returns the largest amplitude of a pair.
static float prepare_turn(const float *q, const pareto_cache *c, int kv_head, float *turn) {
    const int pairs = c->pairs;
    const float *mean = c->key_mean + (int64_t)kv_head * 2 * pairs;
    float largest = 0;
    for (int i = 0; i < pairs; i++) {
        const float x = q[c->pair_channels[i]], y = q[c->pair_channels[pairs + i]], mx = mean[i], my = mean[pairs + i];
        const float even = (x * mx + y * my) * (1.0f / 127), odd = (y * mx - x * my) * (1.0f / 127);
        const float square = even * even + odd * odd;
        turn[i] = even, turn[pairs + i] = odd;
        largest = square > largest ? square : largest;
    }
    return sqrtf(largest);
}

// Set the activations that meet the table to those of a chunk. A table's tile row i holds the cosines of pairs i and
// 16 + i and their sines, so that the vectors below are already in order.
static void unit_turn(unit_t *u, const pareto_cache *c, int chunk) {
    const int pairs = c->pairs, chunks = channel_chunks(c);
    if (!pairs) return;
    v16u sums[UNIT_ROWS];
    for (int r = 0; r < u->rows; r++) sums[r] = (v16u)splati(0);
    for (int k = 0; k < pairs / 32; k++) {
        const float *anchor = c->turn_anchors + (int64_t)chunk * 2 * pairs + 32 * k;
        const v16f cos[2] = {load16(anchor), load16(anchor + 16)};
        const v16f sin[2] = {load16(anchor + pairs), load16(anchor + pairs + 16)};
        for (int r = 0; r < u->rows; r++) {
            const float *turn = u->turn + r * 2 * pairs + 32 * k;
            v16i x[2][2];
            for (int i = 0; i < 2; i++) {
                const v16f even = load16(turn + 16 * i), odd = load16(turn + pairs + 16 * i);
                x[0][i] = (v16i)(fma16(even, cos[i], odd * sin[i]) + splat(ROUND_MAGIC));
                x[1][i] = (v16i)(fma16(odd, cos[i], -(even * sin[i])) + splat(ROUND_MAGIC));
            }
            put_activations(u->query + (chunks + k) * CHUNK_BYTES, u->padded_rows, r, x[0][0], x[0][1], x[1][0], x[1][1]);
            sums[r] += (v16u)x[0][0] + (v16u)x[0][1] + (v16u)x[1][0] + (v16u)x[1][1];
        }
    }
    // ROUND_BITS was added twice for each pair, modulo 2**32.
    for (int r = 0; r < u->rows; r++)
        u->offset[r] = 128 * (int32_t)(lanes_sum_u(sums[r]) - (uint32_t)(2 * pairs) * ROUND_BITS);
}

// One query row as fixed-point activations: q[i] * key scale[i] = step * x[i].
static void prepare_row(unit_t *u, const pareto_attention_args *a, int kv_head, int r, int64_t at) {
    const pareto_cache *c = &a->cache;
    const int dim = c->head_dim, groups = group_count(c), chunks = channel_chunks(c);
    const float *scale = groups || c->key_decode ? NULL : c->key_scale + (int64_t)kv_head * dim;
    const v16f factor = splat(a->soft_cap > 0 ? a->scale : a->scale * LOG2E);
    float q[256], plain[256];
    int32_t x[256] = {0};
    v16f largest16 = splat(0);
    for (int i = 0; i < dim; i += 16) {
        v16f v = load_row16(a->query, at + i, a->dtype);
        v *= scale ? factor * load16(scale + i) : factor;
        store16(c->key_decode ? plain + i : q + i, v);
    }
    if (c->key_decode) transform_query(plain, c->key_decode + (int64_t)kv_head * dim * dim, dim, q);
    for (int i = 0; i < dim; i += 16) largest16 = max16(largest16, (v16f)((v16i)load16(q + i) & splati(0x7fffffff)));
    float largest = lanes_max(largest16);
    if (c->pairs) {
        const float turned = prepare_turn(plain, c, kv_head, u->turn + r * 2 * c->pairs);
        largest = turned > largest ? turned : largest;
    }
    const float step = largest / PARETO_ONE;
    const v16f inverse = splat(largest > 1e-30f ? PARETO_ONE / largest : 0.0f);
    for (int i = 0; i < dim; i += 16)
        store16i(x + i, (v16i)(load16(q + i) * inverse + splat(ROUND_MAGIC)) - splati(ROUND_BITS));
    u->step[r] = step;
    for (int i = 0; i < 2 * c->pairs; i += 16) {
        float *turn = u->turn + r * 2 * c->pairs + i;
        store16(turn, load16(turn) * inverse);
    }
    u->offset[r] = 0;
    u->bias[r] = 0;
    for (int g = 0; g < groups; g++) {
        // A group's chunk holds the whole 64 channels around it, zero outside the group.
        const int from = g * c->group_size, to = from + c->group_size < dim ? from + c->group_size : dim;
        int64_t sum = 0;
        for (int i = from; i < to; i++) sum += x[i];
        u->group_query[g][r] = step * (float)sum;
        put_query(u->query + g * CHUNK_BYTES, u->padded_rows, r, x + from / 64 * 64, from % 64, from % 64 + to - from);
    }
    if (groups) return;
    for (int k = 0; k < chunks; k++) put_query(u->query + k * CHUNK_BYTES, u->padded_rows, r, x + 64 * k, 0, 64);
    if (a->soft_cap > 0) {
        double dot = 0;
        for (int i = 0; i < dim; i++) dot += (double)x[i] * c->key_zero[(int64_t)kv_head * dim + i];
        u->bias[r] = (float)(-dot * step);
    }
}

// Query rows first_row.. of one KV head: their activations, what each row sees, and an empty result.
static void unit_prepare(unit_t *u, const pareto_attention_args *a, int request, int kv_head, int first_row,
                         int padded_rows, int first_chunk) {
    const pareto_cache *c = &a->cache;
    const int group = a->num_heads / c->num_kv_heads, start = a->query_start[request];
    const int length = a->query_start[request + 1] - start, context = a->seq_lens[request] - length;
    u->first_row = first_row;
    u->padded_rows = padded_rows;
    u->rows = length * group - first_row < UNIT_ROWS ? length * group - first_row : UNIT_ROWS;
    for (int r = 0; r < u->rows; r++) {
        const int token = (first_row + r) / group, last = context + token;
        const int first = a->window > 0 && last - a->window + 1 > 0 ? last - a->window + 1 : 0;
        u->first[r] = first;
        u->last[r] = last;
        u->lowest_first = r && u->lowest_first < first ? u->lowest_first : first;
        u->highest_first = r && u->highest_first > first ? u->highest_first : first;
        u->lowest_last = r && u->lowest_last < last ? u->lowest_last : last;
        u->highest_last = r && u->highest_last > last ? u->highest_last : last;
        prepare_row(u, a, kv_head, r, (start + (int64_t)token) * a->query_token_stride
                                          + (kv_head * group + (first_row + r) % group) * a->query_head_stride);
    }
    unit_turn(u, c, first_chunk);
    store16(u->max, nothing_seen(a));
    store16(u->sum, splat(0));
    memset(u->total, 0, (size_t)c->head_dim * UNIT_ROWS * sizeof(float));
}

// Merge a chunk's result into the total. The larger maximum's factor is exactly 1, and a row that saw nothing in the
// chunk keeps its bits.
static void unit_merge(unit_t *u, const partial_t *p, int dim, int integers) {
    const v16f old = load16(u->max), new = load16(p->max), step = load16(u->step);
    v16f keep, add;
    if (integers) {
        const v16i a = (v16i)old, b = (v16i)new, top = max16i(a, b), none = splati(INT32_MIN);
        // Differences of two scores fit; those with a row that saw nothing wrap, and are not used.
        keep = exp2_16(to_float((v16i)((v16u)a - (v16u)top)) * step);
        keep = select16(a == top, splat(1), select16(a == none, splat(0), keep));
        add = exp2_16(to_float((v16i)((v16u)b - (v16u)top)) * step);
        add = select16(b == none, splat(0), select16(b == top, splat(1), add));
        store16i(u->max, top);
    } else {
        const v16f top = max16(old, new);
        keep = select16(old == top, splat(1), exp2_or_0(old - top));
        add = select16(new == splat(-INFINITY), splat(0), select16(new == top, splat(1), exp2_or_0(new - top)));
        store16(u->max, top);
    }
    store16(u->sum, fma16(load16(u->sum), keep, load16(p->sum) * add));
    float keeps[16], adds[16];
    store16(keeps, keep);
    store16(adds, add);
    for (int r = 0; r < u->rows; r++) {
        float *total = u->total + r * dim;
        for (int i = 0; i < dim; i += 16)
            store16(total + i, fma16(load16(total + i), splat(keeps[r]), load16(p->values + r * dim + i) * splat(adds[r])));
    }
}

static void unit_finish(const unit_t *u, const pareto_attention_args *a, int request, int kv_head) {
    const pareto_cache *c = &a->cache;
    const int dim = c->head_dim, group = a->num_heads / c->num_kv_heads;
    const float *scale = c->group_size ? NULL : c->value_scale + (int64_t)kv_head * dim;
    const float *zero = c->group_size ? NULL : c->value_zero + (int64_t)kv_head * dim;
    for (int r = 0; r < u->rows; r++) {
        const int row = u->first_row + r;
        const int64_t at = ((int64_t)a->query_start[request] + row / group) * a->out_token_stride
            + (kv_head * group + row % group) * a->out_head_stride;
        const v16f inverse = splat(u->sum[r] > 0 ? 1.0f / u->sum[r] : 0.0f);
        for (int i = 0; i < dim; i += 16) {
            v16f mean = load16(u->total + r * dim + i) * inverse;
            if (scale) mean = (mean - load16(zero + i)) * load16(scale + i);
            store_row16(a->out, at + i, a->dtype, mean);
        }
    }
}

#endif
