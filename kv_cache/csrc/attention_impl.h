// Paged attention over codes, compiled once for each instruction set.
//
// Query rows, (token, head of the group) pairs, are handled eight at a time (a unit); keys and values 64 tokens at a
// time (a block), unpacked to one byte a code for all units of a work item. Both products are exact integers:
//
//   score[t][r] = q_step[r] * sum_c q[r][c] * (code[t][c] - zero[c])      q: 16-bit fixed point of query * key scale
//   out[c][r]   = sum_t p[t][r] * code[t][c]                              p: 16-bit fixed point of exp2(score - max)
//
// so scales and zeros never touch a code: the key's fold into the query, the value's into the output. Formats with
// scales in the page multiply each group's integers by the token's scale, and quantize p * value scale instead of p.
//
// Every row's result is a function of its query and the codes alone: blocks and chunks start at multiples of 64 and 512
// tokens, a chunk's partial result starts from nothing, chunks merge in order, and a block that is hidden from a row
// leaves its numbers unchanged to the bit. So neither batching, nor how a prompt was cut into pieces, nor the number of
// threads changes a bit of the output.
#include <stdlib.h>

#include "gemm8.h"
#include "numeric.h"

#define BLOCK 64
#define CHUNK 512
#define UNIT_ROWS 8
#define MAX_UNITS 16
#define MAX_GROUPS 8  // 256 channels in groups of 32
#define LOG2E 1.4426950408889634f

typedef struct {
    float step[16];  // of the fixed-point query; lanes r and r + 8 are equal in all of these
    float bias[16];  // the key zeros' part of the score
    int32_t first[16], last[16];  // positions that the row sees, inclusive
    float max[16], sum[16];       // of the current chunk, exponents in base 2
    float total_max[16], total_sum[16];
    float group_query[MAX_GROUPS][16];  // step * sum of the group's fixed-point query
    int32_t lowest_first, highest_first, lowest_last, highest_last, rows;
    uint8_t *b;    // the query's activation chunks: [chunks], or one for each group
    float *acc;    // [dim][8]
    float *total;  // [dim][8]
} unit_t;

typedef struct {
    uint8_t *rows;      // [64][padded] one byte a code; the padding stays zero
    code_t *keys;       // [64][padded]
    uint8_t *columns;   // [dim][64]
    code_t *values;     // [dim][64]
    int32_t *scores;    // [64][8]
    int32_t *weights;   // [64][8]
    int32_t *products;  // [dim][8]
    float *floats;      // [64][8]
    float *meta;        // key scale, key minimum, value scale, value minimum: [4][groups][64]
    uint8_t *b;         // one chunk
    unit_t *units;
    uint8_t *memory;
} scratch_t;

typedef struct {
    int request, kv_head, first_unit, units, first_chunk, chunks;
    int64_t partial;  // where this item's first chunk lies in the partial results, or -1
} item_t;

static int padded_dim(int dim) { return (dim + 63) / 64 * 64; }

static int group_count(const pareto_cache *c) {
    return c->group_size ? (c->head_dim + c->group_size - 1) / c->group_size : 0;
}

static int scratch_make(scratch_t *s, const pareto_cache *c) {
    const size_t dim = c->head_dim, padded = padded_dim(c->head_dim), groups = group_count(c);
    const size_t query_bytes = groups ? groups * CHUNK_BYTES : padded / 64 * CHUNK_BYTES;
    const size_t sizes[] = {
        64 * padded, 64 * padded * sizeof(code_t), padded * 64, padded * 64 * sizeof(code_t), 64 * 32, 64 * 32,
        dim * 32, 64 * 32, (groups ? groups : 1) * 4 * 64 * 4, CHUNK_BYTES, MAX_UNITS * sizeof(unit_t),
        MAX_UNITS * query_bytes, MAX_UNITS * dim * 32, MAX_UNITS * dim * 32,
    };
    enum { PARTS = sizeof sizes / sizeof *sizes };
    size_t offsets[PARTS], bytes = 0;
    for (int i = 0; i < PARTS; i++) offsets[i] = bytes, bytes += (sizes[i] + 63) / 64 * 64;
    s->memory = aligned_alloc(64, bytes);
    if (!s->memory) return -1;
    memset(s->memory, 0, bytes);
    s->rows = s->memory + offsets[0];
    s->keys = (code_t *)(s->memory + offsets[1]);
    s->columns = s->memory + offsets[2];
    s->values = (code_t *)(s->memory + offsets[3]);
    s->scores = (int32_t *)(s->memory + offsets[4]);
    s->weights = (int32_t *)(s->memory + offsets[5]);
    s->products = (int32_t *)(s->memory + offsets[6]);
    s->floats = (float *)(s->memory + offsets[7]);
    s->meta = (float *)(s->memory + offsets[8]);
    s->b = s->memory + offsets[9];
    s->units = (unit_t *)(s->memory + offsets[10]);
    for (int u = 0; u < MAX_UNITS; u++) {
        s->units[u].b = s->memory + offsets[11] + u * query_bytes;
        s->units[u].acc = (float *)(s->memory + offsets[12]) + u * dim * 8;
        s->units[u].total = (float *)(s->memory + offsets[13]) + u * dim * 8;
    }
    return 0;
}

// Query rows first_row.. of one KV head as fixed-point activations, with what each row sees.
static void unit_prepare(unit_t *u, const pareto_attention_args *a, int request, int kv_head, int first_row) {
    const pareto_cache *c = &a->cache;
    const int dim = c->head_dim, group = a->num_heads / c->num_kv_heads, groups = group_count(c);
    const int start = a->query_start[request], length = a->query_start[request + 1] - start;
    const int context = a->seq_lens[request] - length, chunks = padded_dim(dim) / 64;
    const float *scale = groups ? NULL : c->key_scale + (int64_t)kv_head * dim;
    const float *zero = groups ? NULL : c->key_zero + (int64_t)kv_head * dim;
    const float factor = a->soft_cap > 0 ? a->scale : a->scale * LOG2E;
    u->rows = length * group - first_row < UNIT_ROWS ? length * group - first_row : UNIT_ROWS;
    memset(u->b, 0, (size_t)(groups ? groups : chunks) * CHUNK_BYTES);
    for (int r = 0; r < UNIT_ROWS; r++) {
        // Rows past the end repeat the last row's positions with a query of zeros.
        const int row = first_row + (r < u->rows ? r : u->rows - 1), token = row / group;
        const int last = context + token;
        const int first = a->window > 0 && last - a->window + 1 > 0 ? last - a->window + 1 : 0;
        u->first[r] = u->first[r + 8] = first;
        u->last[r] = u->last[r + 8] = last;
        u->lowest_first = r && u->lowest_first < first ? u->lowest_first : first;
        u->highest_first = r && u->highest_first > first ? u->highest_first : first;
        u->lowest_last = r && u->lowest_last < last ? u->lowest_last : last;
        u->highest_last = r && u->highest_last > last ? u->highest_last : last;
        float step = 0, bias = 0;
        if (r < u->rows) {
            const int64_t at = (start + (int64_t)token) * a->query_token_stride
                + (kv_head * group + row % group) * a->query_head_stride;
            float q[256], largest = 0;
            for (int i = 0; i < dim; i++) q[i] = load_float(a->query, at + i, a->dtype);
            for (int i = 0; i < dim; i++) q[i] *= scale ? factor * scale[i] : factor;
            for (int i = 0; i < dim; i++) largest = fabsf(q[i]) > largest ? fabsf(q[i]) : largest;
            const float inverse = largest > 1e-30f ? PARETO_ONE / largest : 0.0f;
            step = largest / PARETO_ONE;
            int32_t x[256];
            for (int i = 0; i < dim; i++) x[i] = (int32_t)rintf(q[i] * inverse);
            if (groups) {
                // A group's chunk holds the whole 64 channels around it, zero outside the group.
                for (int g = 0; g < groups; g++) {
                    const int from = g * c->group_size, to = from + c->group_size < dim ? from + c->group_size : dim;
                    int64_t total = 0;
                    for (int i = from; i < to; i++) {
                        total += x[i];
                        put_activation(u->b + g * CHUNK_BYTES, i % 64, r, x[i]);
                    }
                    u->group_query[g][r] = u->group_query[g][r + 8] = step * (float)total;
                }
            } else {
                double dot = 0;
                for (int i = 0; i < dim; i++) {
                    dot += (double)x[i] * zero[i];
                    put_activation(u->b, i, r, x[i]);
                }
                bias = (float)(-dot * step);
            }
        } else {
            for (int g = 0; g < groups; g++) u->group_query[g][r] = u->group_query[g][r + 8] = 0;
        }
        u->step[r] = u->step[r + 8] = step;
        u->bias[r] = u->bias[r + 8] = bias;
        u->total_max[r] = u->total_max[r + 8] = -INFINITY;
        u->total_sum[r] = u->total_sum[r + 8] = 0;
    }
    memset(u->total, 0, (size_t)dim * 32);
}

static void unit_start_chunk(unit_t *u, int dim) {
    store16(u->max, splat(-INFINITY));
    store16(u->sum, splat(0));
    memset(u->acc, 0, (size_t)dim * 32);
}

// Factors that bring (old, new) partial results to their common maximum, which is stored in `max`.
INLINE void merge_factors(float *max, v16f other, v16f *keep, v16f *add) {
    const v16f old = load16(max), top = max16(old, other);
    // Equal covers both being -infinity, where the difference would not be a number.
    *keep = select16(old == top, splat(1), exp2_16(old - top));
    *add = select16(other == splat(-INFINITY), splat(0), select16(other == top, splat(1), exp2_16(other - top)));
    store16(max, top);
}

// Merge a chunk's partial result into the total.
static void merge_chunk(unit_t *u, const float *max, const float *sum, const float *acc, int dim) {
    v16f keep, add;
    merge_factors(u->total_max, load16(max), &keep, &add);
    store16(u->total_sum, load16(u->total_sum) * keep + load16(sum) * add);
    for (int i = 0; i < dim * 8; i += 16)
        store16(u->total + i, load16(u->total + i) * keep + load16(acc + i) * add);
}

static void widen(const uint8_t *from, code_t *to, int64_t count) {
    if (sizeof(code_t) == 1) memcpy(to, from, count);
    else for (int64_t i = 0; i < count; i++) to[i] = from[i];
}

// Ask for the codes of a block to come, into the second-level cache, which has more requests in flight than the first.
static void prefetch_block(const pareto_attention_args *a, int request, int kv_head, int from, int count) {
    const pareto_cache *c = &a->cache;
    for (int t = 0; t < count;) {
        const int offset = (from + t) % c->block_size;
        const int run = c->block_size - offset < count - t ? c->block_size - offset : count - t;
        const int64_t block = a->block_table[request * a->table_stride + (from + t) / c->block_size];
        const uint8_t *page = c->base + block * c->block_stride + kv_head * c->head_stride;
        for (int side = 0; side < 2; side++) {
            const int bits = side ? c->value_bits : c->key_bits, row = bits == 8 ? c->head_dim : c->head_dim / 2;
            const uint8_t *plane = page + (side ? c->value_offset : c->key_offset) + (int64_t)offset * row;
            for (int i = 0; i < run * row; i += 64) __builtin_prefetch(plane + i, 0, 2);
            const uint8_t *high = page + (side ? c->value_high_offset : c->key_high_offset) + (int64_t)offset * c->head_dim / 4;
            for (int i = 0; bits == 6 && i < run * c->head_dim / 4; i += 64) __builtin_prefetch(high + i, 0, 2);
        }
        t += run;
    }
}

// Unpack a block's codes: keys row by row, values column by column, and what the page holds of scales.
static void load_block(scratch_t *s, const pareto_attention_args *a, int request, int kv_head, int from, int count) {
    const pareto_cache *c = &a->cache;
    const int dim = c->head_dim, padded = padded_dim(dim), groups = group_count(c);
    for (int side = 0; side < 2; side++) {
        const int bits = side ? c->value_bits : c->key_bits;
        // Tiles take codes of one byte as they are; the others are widened below.
        uint8_t *rows = !side && sizeof(code_t) == 1 ? (uint8_t *)s->keys : s->rows;
        for (int t = 0; t < count;) {
            const int position = from + t, offset = position % c->block_size;
            const int run = c->block_size - offset < count - t ? c->block_size - offset : count - t;
            const int64_t block = a->block_table[request * a->table_stride + position / c->block_size];
            const uint8_t *page = c->base + block * c->block_stride + kv_head * c->head_stride;
            const uint8_t *plane = page + (side ? c->value_offset : c->key_offset)
                + (int64_t)offset * (bits == 8 ? dim : dim / 2);
            const uint8_t *high = page + (side ? c->value_high_offset : c->key_high_offset) + (int64_t)offset * (dim / 4);
            unpack_rows(plane, high, bits, dim, run, rows + (int64_t)t * padded, padded);
            for (int g = 0; g < groups; g++) {
                const uint8_t *meta = page + (side ? c->value_meta_offset : c->key_meta_offset)
                    + ((int64_t)offset * groups + g) * 4;
                float *scales = s->meta + ((side * 2) * groups + g) * 64 + t;
                float *minima = s->meta + ((side * 2 + 1) * groups + g) * 64 + t;
                for (int i = 0; i < run; i++) {
                    uint16_t pair[2];
                    memcpy(pair, meta + (int64_t)i * groups * 4, 4);
                    scales[i] = f16_to_float(pair[0]);
                    minima[i] = f16_to_float(pair[1]);
                }
            }
            t += run;
        }
        // Tokens past the end weigh nothing, but what stands there must be a number.
        for (int g = 0; g < groups * 2; g++)
            for (int t = count; t < BLOCK; t++) s->meta[(side * 2 * groups + g) * 64 + t] = 0;
        if (side) transpose_rows(s->rows, padded, padded, sizeof(code_t) == 1 ? (uint8_t *)s->values : s->columns);
        if (sizeof(code_t) > 1) {
            if (side) widen(s->columns, s->values, (int64_t)dim * 64);
            else widen(s->rows, s->keys, (int64_t)64 * padded);
        }
    }
}

// Scores of 64 tokens for 8 rows, in base 2, as floats[64][8].
static void unit_scores(unit_t *u, scratch_t *s, const pareto_attention_args *a) {
    const pareto_cache *c = &a->cache;
    const int padded = padded_dim(c->head_dim), groups = group_count(c);
    const v16f step = load16(u->step);
    if (!groups) {
        gemm8(s->keys, padded, BLOCK, padded / 64, u->b, s->scores);
        const v16f bias = load16(u->bias);
        for (int i = 0; i < BLOCK * 8; i += 16)
            store16(s->floats + i, __builtin_convertvector(load16i(s->scores + i), v16f) * step + bias);
    }
    for (int g = 0; g < groups; g++) {
        gemm8(s->keys + g * c->group_size / 64 * 64, padded, BLOCK, 1, u->b + g * CHUNK_BYTES, s->scores);
        const float *scales = s->meta + g * 64, *minima = s->meta + (groups + g) * 64;
        const v16f sums = load16(u->group_query[g]);
        for (int t = 0; t < BLOCK; t += 2) {
            const v16f dot = __builtin_convertvector(load16i(s->scores + 8 * t), v16f) * step;
            const v16f part = dot * halves(scales[t], scales[t + 1]) + sums * halves(minima[t], minima[t + 1]);
            store16(s->floats + 8 * t, g ? load16(s->floats + 8 * t) + part : part);
        }
    }
    if (a->soft_cap > 0)
        for (int i = 0; i < BLOCK * 8; i++) s->floats[i] = a->soft_cap * LOG2E * tanhf(s->floats[i] / a->soft_cap);
}

static void unit_block(unit_t *u, scratch_t *s, const pareto_attention_args *a, int from) {
    const pareto_cache *c = &a->cache;
    const int dim = c->head_dim, groups = group_count(c);
    unit_scores(u, s, a);
    if (from + BLOCK - 1 > u->lowest_last || from < u->highest_first) {
        const v16i first = load16i(u->first), last = load16i(u->last);
        v16i token = splati(from) + (v16i){0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
        for (int i = 0; i < BLOCK * 8; i += 16, token += splati(2)) {
            const v16i seen = (token >= first) & (token <= last);
            store16(s->floats + i, select16(seen, load16(s->floats + i), splat(-INFINITY)));
        }
    }
    v16f top = load16(s->floats);
    for (int i = 16; i < BLOCK * 8; i += 16) top = max16(top, load16(s->floats + i));
    top = max16(top, swap_halves(top));
    // A row that sees nothing here: subtract 0, so that the exponents stay -infinity and the weights 0.
    const v16f base = select16(top == splat(-INFINITY), splat(0), top);
    v16f keep, add, sum;
    if (!groups) {
        v16i weight_sum = splati(0);
        for (int i = 0; i < BLOCK * 8; i += 16) {
            const v16f p = exp2_16(load16(s->floats + i) - base);
            const v16i weight = __builtin_convertvector(p * splat(PARETO_ONE) + splat(0.5f), v16i);
            store16i(s->weights + i, weight);
            weight_sum += weight;
        }
        weight_sum += swap_halves_i(weight_sum);
        sum = __builtin_convertvector(weight_sum, v16f);
        pack_activations(s->weights, s->b);
        gemm8(s->values, 64, dim, 1, s->b, s->products);
        merge_factors(u->max, top, &keep, &add);
        for (int i = 0; i < dim * 8; i += 16)
            store16(u->acc + i, load16(u->acc + i) * keep
                + __builtin_convertvector(load16i(s->products + i), v16f) * add);
    } else {
        sum = splat(0);
        for (int i = 0; i < BLOCK * 8; i += 16) {
            const v16f p = exp2_16(load16(s->floats + i) - base);
            store16(s->floats + i, p);
            sum += p;
        }
        sum += swap_halves(sum);
        merge_factors(u->max, top, &keep, &add);
        for (int g = 0; g < groups; g++) {
            const float *scales = s->meta + (2 * groups + g) * 64, *minima = s->meta + (3 * groups + g) * 64;
            const int width = dim - g * c->group_size < c->group_size ? dim - g * c->group_size : c->group_size;
            v16f largest = splat(0), offset = splat(0);
            for (int t = 0; t < BLOCK; t += 2) {
                const v16f p = load16(s->floats + 8 * t);
                largest = max16(largest, p * halves(scales[t], scales[t + 1]));
                offset += p * halves(minima[t], minima[t + 1]);
            }
            largest = max16(largest, swap_halves(largest));
            offset += swap_halves(offset);
            const v16f inverse = (v16f)((v16i)(splat(PARETO_ONE) / largest) & (largest > splat(1e-30f)));
            for (int t = 0; t < BLOCK; t += 2) {
                const v16f w = load16(s->floats + 8 * t) * halves(scales[t], scales[t + 1]) * inverse;
                store16i(s->weights + 8 * t, __builtin_convertvector(w + splat(0.5f), v16i));
            }
            pack_activations(s->weights, s->b);
            gemm8(s->values + (int64_t)g * c->group_size * 64, 64, width, 1, s->b, s->products);
            const v16f unit = largest * splat(1.0f / PARETO_ONE);
            float *acc = u->acc + (int64_t)g * c->group_size * 8;
            for (int i = 0; i < width * 8; i += 16)
                store16(acc + i, load16(acc + i) * keep
                    + (__builtin_convertvector(load16i(s->products + i), v16f) * unit + offset) * add);
        }
    }
    store16(u->sum, load16(u->sum) * keep + sum * add);
}

static void unit_finish(const unit_t *u, const pareto_attention_args *a, int request, int kv_head, int first_row) {
    const pareto_cache *c = &a->cache;
    const int dim = c->head_dim, group = a->num_heads / c->num_kv_heads;
    const float *scale = c->group_size ? NULL : c->value_scale + (int64_t)kv_head * dim;
    const float *zero = c->group_size ? NULL : c->value_zero + (int64_t)kv_head * dim;
    for (int r = 0; r < u->rows; r++) {
        const int row = first_row + r;
        const int64_t at = ((int64_t)a->query_start[request] + row / group) * a->out_token_stride
            + (kv_head * group + row % group) * a->out_head_stride;
        const float inverse = u->total_sum[r] > 0 ? 1.0f / u->total_sum[r] : 0.0f;
        for (int i = 0; i < dim; i++) {
            const float mean = u->total[i * 8 + r] * inverse;
            store_float(a->out, at + i, a->dtype, scale ? (mean - zero[i]) * scale[i] : mean);
        }
    }
}

static void run_item(const pareto_attention_args *a, const item_t *item, scratch_t *s, float *partials) {
    const int dim = a->cache.head_dim, partial_floats = dim * 8 + 32;
    int lowest_first = INT32_MAX, highest_last = 0;
    for (int n = 0; n < item->units; n++) {
        unit_t *u = s->units + n;
        unit_prepare(u, a, item->request, item->kv_head, (item->first_unit + n) * UNIT_ROWS);
        if (u->lowest_first < lowest_first) lowest_first = u->lowest_first;
        if (u->highest_last > highest_last) highest_last = u->highest_last;
    }
    for (int k = item->first_chunk; k < item->first_chunk + item->chunks; k++) {
        for (int n = 0; n < item->units; n++) unit_start_chunk(s->units + n, dim);
        for (int from = k * CHUNK; from < (k + 1) * CHUNK && from <= highest_last; from += BLOCK) {
            if (from + BLOCK <= lowest_first) continue;
            const int left = a->seq_lens[item->request] - from;
            load_block(s, a, item->request, item->kv_head, from, left < BLOCK ? left : BLOCK);
            const int next = from + BLOCK <= highest_last ? left - BLOCK : 0;
            prefetch_block(a, item->request, item->kv_head, from + BLOCK, next < BLOCK ? next : BLOCK);
            for (int n = 0; n < item->units; n++) {
                unit_t *u = s->units + n;
                if (from <= u->highest_last && from + BLOCK > u->lowest_first) unit_block(u, s, a, from);
            }
        }
        for (int n = 0; n < item->units; n++) {
            unit_t *u = s->units + n;
            if (item->partial < 0) {
                merge_chunk(u, u->max, u->sum, u->acc, dim);
                continue;
            }
            float *to = partials + (item->partial + (int64_t)(k - item->first_chunk) * item->units + n) * partial_floats;
            memcpy(to, u->max, 64);
            memcpy(to + 16, u->sum, 64);
            memcpy(to + 32, u->acc, (size_t)dim * 32);
        }
    }
    if (item->partial < 0)
        for (int n = 0; n < item->units; n++)
            unit_finish(s->units + n, a, item->request, item->kv_head, (item->first_unit + n) * UNIT_ROWS);
}

// Merge the chunks of an item that several threads computed. `item` spans all its chunks.
static void merge_item(const pareto_attention_args *a, const item_t *item, scratch_t *s, const float *partials) {
    const int dim = a->cache.head_dim, partial_floats = dim * 8 + 32;
    for (int n = 0; n < item->units; n++) {
        unit_t *u = s->units + n;
        unit_prepare(u, a, item->request, item->kv_head, (item->first_unit + n) * UNIT_ROWS);
        for (int k = 0; k < item->chunks; k++) {
            const float *from = partials + (item->partial + (int64_t)k * item->units + n) * partial_floats;
            merge_chunk(u, from, from + 16, from + 32, dim);
        }
        unit_finish(u, a, item->request, item->kv_head, (item->first_unit + n) * UNIT_ROWS);
    }
}

// Cut the batch into items of at most MAX_UNITS units; returns how many there are, filling `items` unless it is null.
static int64_t list_items(const pareto_attention_args *a, item_t *items) {
    const pareto_cache *c = &a->cache;
    const int group = a->num_heads / c->num_kv_heads;
    int64_t count = 0;
    for (int request = 0; request < a->num_reqs; request++) {
        const int length = a->query_start[request + 1] - a->query_start[request];
        const int units = (length * group + UNIT_ROWS - 1) / UNIT_ROWS;
        for (int kv_head = 0; kv_head < c->num_kv_heads; kv_head++)
            // Last tokens first: they see the longest context, so the threads finish together.
            for (int unit = (units - 1) / MAX_UNITS * MAX_UNITS; length > 0 && unit >= 0; unit -= MAX_UNITS, count++) {
                if (!items) continue;
                const int many = units - unit < MAX_UNITS ? units - unit : MAX_UNITS;
                const int context = a->seq_lens[request] - length;
                const int first = context + unit * UNIT_ROWS / group;
                const int rows_end = (unit + many) * UNIT_ROWS < length * group ? (unit + many) * UNIT_ROWS : length * group;
                const int last = context + (rows_end - 1) / group;
                const int seen = a->window > 0 && first - a->window + 1 > 0 ? first - a->window + 1 : 0;
                items[count] = (item_t){request, kv_head, unit, many, seen / CHUNK, last / CHUNK - seen / CHUNK + 1, -1};
            }
    }
    return count;
}

int PARETO_ENTRY(const pareto_attention_args *a) {
    const int64_t count = list_items(a, NULL);
    if (!count) return 0;
    item_t *items = malloc(sizeof(item_t) * count), *parts = items;
    if (!items) return -1;
    list_items(a, items);
    int64_t num_parts = count, chunks = 0, partial_units = 0;
    float *partials = NULL;
    for (int64_t i = 0; i < count; i++) chunks += items[i].chunks;
    if (a->num_threads > 1 && count < 2L * a->num_threads && chunks > count) {
        // Too few items to keep the threads busy: hand out single chunks and merge them in a second pass.
        parts = malloc(sizeof(item_t) * chunks);
        if (!parts) return free(items), -1;
        num_parts = 0;
        for (int64_t i = 0; i < count; i++) {
            items[i].partial = partial_units;
            for (int k = 0; k < items[i].chunks; k++, partial_units += items[i].units) {
                parts[num_parts] = items[i];
                parts[num_parts].first_chunk += k;
                parts[num_parts].chunks = 1;
                parts[num_parts++].partial = partial_units;
            }
        }
        partials = malloc(sizeof(float) * partial_units * (a->cache.head_dim * 8 + 32));
        if (!partials) return free(parts), free(items), -1;
    }
    int failed = 0;
#pragma omp parallel num_threads(a->num_threads) if (a->num_threads > 1)
    {
        scratch_t s = {0};
        if (scratch_make(&s, &a->cache)) {
#pragma omp atomic write
            failed = 1;
            s.memory = NULL;
        }
        tiles_begin();
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < num_parts; i++)
            if (s.memory) run_item(a, parts + i, &s, partials);
        if (partials) {
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < count; i++)
                if (s.memory) merge_item(a, items + i, &s, partials);
        }
        tiles_end();
        free(s.memory);
    }
    if (parts != items) free(parts);
    free(partials);
    free(items);
    return failed ? -1 : 0;
}
