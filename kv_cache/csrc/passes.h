// What one work item does with a chunk of tokens: unpack it, and take units, in pairs, through scores, weights and values.
#ifndef PARETO_PASSES_H
#define PARETO_PASSES_H

#include <stdlib.h>

#include "softmax.h"

#define MAX_UNITS 16

typedef struct {
    uint8_t *keys;      // [64 channels][16 tiles of 16 tokens]; behind them the table of centred keys
    uint8_t *values;    // [block][tiles of 16 channels]
    // For each unit of a pair:
    uint8_t *weights;   // [2][block] activation chunks
    int32_t *scores;    // [2][8][CHUNK], int32 or float
    int32_t *products;  // [2][8][CHUNK]: one group's scores, or the weighted values [8][dim]
    float *meta;        // key scale, key minimum, value scale, value minimum: [4][groups][CHUNK]
    uint8_t *bytes;     // for pages.h
    partial_t partial[2];
    unit_t *units;
    uint8_t *memory;
    int tile_rows;  // that the tiles are set for
} scratch_t;

typedef struct {
    int request, kv_head, first_unit, units, first_chunk, chunks;
    int64_t partial;  // where this item's first chunk lies in the partial results, or -1
} item_t;

static int64_t partial_floats(const pareto_cache *c) { return 32 + UNIT_ROWS * c->head_dim; }

static int scratch_make(scratch_t *s, const pareto_cache *c) {
    const size_t dim = c->head_dim, groups = group_count(c), chunks = channel_chunks(c);
    const size_t turned = turned_chunks(c), query_bytes = (groups ? groups : chunks + turned) * CHUNK_BYTES;
    const size_t row_bytes = UNIT_ROWS * dim * sizeof(float);
    const size_t sizes[] = {
        (chunks + turned) * CHUNK * 64, dim * CHUNK, 2 * CHUNK_BLOCKS * CHUNK_BYTES, 2 * UNIT_ROWS * CHUNK * 4,
        2 * UNIT_ROWS * CHUNK * 4, groups * 4 * CHUNK * sizeof(float), 4 * 16 * 256, 2 * row_bytes,
        MAX_UNITS * sizeof(unit_t),
        MAX_UNITS * query_bytes, MAX_UNITS * row_bytes, MAX_UNITS * turn_floats(c) * sizeof(float),
    };
    enum { PARTS = sizeof sizes / sizeof *sizes };
    uint8_t *parts[PARTS];
    size_t bytes = 0;
    for (int i = 0; i < PARTS; i++) bytes += (sizes[i] + 63) / 64 * 64;
    s->memory = aligned_alloc(64, bytes);
    if (!s->memory) return -1;
    // Stale codes and activations are harmless, but tiles that no row fills (head sizes off 64) must be numbers.
    memset(s->memory, 0, bytes);
    parts[0] = s->memory;
    for (int i = 1; i < PARTS; i++) parts[i] = parts[i - 1] + (sizes[i - 1] + 63) / 64 * 64;
    s->keys = parts[0];
    s->values = parts[1];
    s->weights = parts[2];
    s->scores = (int32_t *)parts[3];
    s->products = (int32_t *)parts[4];
    s->meta = (float *)parts[5];
    s->bytes = parts[6];
    for (int i = 0; i < 2; i++) s->partial[i].values = (float *)(parts[7] + i * row_bytes);
    s->units = (unit_t *)parts[8];
    for (int u = 0; u < MAX_UNITS; u++) {
        s->units[u].query = parts[9] + u * query_bytes;
        s->units[u].total = (float *)(parts[10] + u * row_bytes);
        s->units[u].turn = (float *)parts[11] + u * turn_floats(c);
    }
    if (turned) memcpy(s->keys + chunks * CHUNK * 64, c->turn_tiles, turned * CHUNK * 64);
    return 0;
}

static float *s_meta(const scratch_t *s, int kind, int groups) { return s->meta + kind * groups * CHUNK; }

// One work item's way through the pages.
typedef struct {
    const pareto_attention_args *a;
    const item_t *item, *next;  // next: what this thread will probably do after it, or null
    scratch_t *s;
    const int32_t *table;
    int tokens, last;    // of the sequence; the last position that any row sees
    int chunk;           // first token of the current chunk
    unsigned packed[2];  // blocks of the chunk whose keys, values are unpacked
} walk_t;

// The rows that follow those at `token` by a chunk, here or in the item after this one; 0 if there are none.
static int find_ahead(const walk_t *w, int side, int token, rows_t *rows) {
    const pareto_attention_args *a = w->a;
    const item_t *item = w->item;
    if (token + CHUNK <= w->last) token += CHUNK;
    else if (!w->next) return 0;
    else item = w->next, token += item->first_chunk * CHUNK - w->chunk;
    const int tokens = a->seq_lens[item->request];
    if (token >= tokens) return 0;
    find_rows(rows, &a->cache, a->block_table + item->request * a->table_stride, tokens, item->kv_head, side, token);
    return 1;
}

// Unpack keys (side 0) or values (side 1) of a block of the current chunk, unless an earlier unit did.
static void need_block(walk_t *w, int side, int block) {
    if (w->packed[side] >> block & 1) return;
    w->packed[side] |= 1u << block;
    const pareto_cache *c = &w->a->cache;
    scratch_t *s = w->s;
    const int groups = group_count(c), token = w->chunk + BLOCK * block;
    rows_t rows, later;
    find_rows(&rows, c, w->table, w->tokens, w->item->kv_head, side, token);
    const rows_t *ahead = find_ahead(w, side, token, &later) ? &later : NULL;
    for (int j = 0; j < 4 && groups; j++)
        read_meta(&rows, j, w->tokens - token - 16 * j, s_meta(s, 2 * side, groups) + 16 * (4 * block + j),
                  s_meta(s, 2 * side + 1, groups) + 16 * (4 * block + j), CHUNK);
    if (side) pack_values(&rows, ahead, s->values + (int64_t)block * BLOCK * c->head_dim, s->bytes);
    else pack_keys(&rows, ahead, s->keys + 4 * block * TILE_BYTES, CHUNK * 64, s->bytes);
}

// The i-th unit's part of a buffer that both units of a pair have.
static int32_t *scores_of(const scratch_t *s, int i) { return s->scores + i * UNIT_ROWS * CHUNK; }
static int32_t *products_of(const scratch_t *s, int i) { return s->products + i * UNIT_ROWS * CHUNK; }
static uint8_t *weights_of(const scratch_t *s, int i) { return s->weights + i * CHUNK_BLOCKS * CHUNK_BYTES; }

// Scores of `blocks` blocks as int32 [rows][CHUNK], of one unit or of two.
static void scores_integers(walk_t *w, const unit_t *u, int count, int first_block, int blocks, int32_t *scores) {
    const pareto_cache *c = &w->a->cache;
    const uint8_t *keys = w->s->keys + 4 * first_block * TILE_BYTES;
    const int chunks = channel_chunks(c) + turned_chunks(c);
    if (count == 1) {
        product(u->query, keys, CHUNK * 64, chunks, 4 * blocks, u->padded_rows, scores, CHUNK);
    } else {
        const uint8_t *queries[2] = {u[0].query, u[1].query};
        int32_t *both[2] = {scores, scores + UNIT_ROWS * CHUNK};
        product_pair(queries, keys, CHUNK * 64, chunks, 4 * blocks, both, CHUNK);
    }
}

// The same as floats in base 2, -infinity where a row does not see.
static void scores_floats(walk_t *w, const unit_t *u, int first_block, int blocks, int32_t *integers) {
    const pareto_attention_args *a = w->a;
    scratch_t *s = w->s;
    const int groups = group_count(&a->cache), from = w->chunk + BLOCK * first_block, count = BLOCK * blocks;
    float *scores = (float *)integers;
    if (!groups) {
        scores_integers(w, u, 1, first_block, blocks, integers);
        for (int r = 0; r < u->rows; r++) {
            const v16f bias = splat(u->bias[r] - u->step[r] * (float)u->offset[r]);
            for (int t = 0; t < count; t += 16) {
                int32_t *at = integers + r * CHUNK + t;
                store16((float *)at, fma16(to_float(load16i(at)), splat(u->step[r]), bias));
            }
        }
    }
    for (int g = 0; g < groups; g++) {
        const uint8_t *keys = s->keys + g * a->cache.group_size / 64 * CHUNK * 64 + 4 * first_block * TILE_BYTES;
        const float *scales = s_meta(s, 0, groups) + g * CHUNK + BLOCK * first_block;
        const float *minima = s_meta(s, 1, groups) + g * CHUNK + BLOCK * first_block;
        product(u->query + g * CHUNK_BYTES, keys, 0, 1, 4 * blocks, u->padded_rows, s->products, CHUNK);
        for (int r = 0; r < u->rows; r++) {
            const v16f step = splat(u->step[r]), sum = splat(u->group_query[g][r]);
            for (int t = 0; t < count; t += 16) {
                const v16f dot = to_float(load16i(s->products + r * CHUNK + t)) * step;
                const v16f before = g ? load16(scores + r * CHUNK + t) : splat(0);
                store16(scores + r * CHUNK + t, fma16(dot, load16(scales + t), fma16(sum, load16(minima + t), before)));
            }
        }
    }
    const int masked = is_masked(u, from, from + count);
    for (int r = 0; r < u->rows; r++)
        for (int t = 0; t < count; t += 16) {
            v16f score = load16(scores + r * CHUNK + t);
            if (a->soft_cap > 0) score = soft_cap(score, a->soft_cap);
            if (masked) score = select16(seen_tokens(u, r, from + t), score, splat(-INFINITY));
            if (masked || a->soft_cap > 0) store16(scores + r * CHUNK + t, score);
        }
}

// What one or two units see of the current chunk together: `blocks` blocks from block `first` on; 0 if nothing.
typedef struct {
    int first, blocks;
} view_t;

static view_t view_chunk(const walk_t *w, const unit_t *u, int count) {
    const unit_t *v = u + count - 1;  // positions ascend with the units
    const int from = u->lowest_first > w->chunk ? u->lowest_first : w->chunk;
    const int to = v->highest_last + 1 < w->chunk + CHUNK ? v->highest_last + 1 : w->chunk + CHUNK;
    const int first = (from - w->chunk) / BLOCK;
    return (view_t){first, from < to ? (to - w->chunk + BLOCK - 1) / BLOCK - first : 0};
}

static void unit_scores(walk_t *w, const unit_t *u, int count, view_t v) {
    for (int b = v.first; b < v.first + v.blocks; b++) need_block(w, 0, b);
    if (integer_scores(w->a)) scores_integers(w, u, count, v.first, v.blocks, w->s->scores);
    else
        for (int i = 0; i < count; i++) scores_floats(w, u + i, v.first, v.blocks, scores_of(w->s, i));
}

// The i-th unit's scores to weights (or, for groups, to exponentials), with their maximum and sum.
static void unit_weights(walk_t *w, const unit_t *u, int i, view_t v, partial_t *p) {
    scratch_t *s = w->s;
    const int start = w->chunk + v.first * BLOCK, masked = is_masked(u, start, start + v.blocks * BLOCK);
    uint8_t *weights = weights_of(s, i);
    for (int r = 0; r < u->rows; r++) {
        int32_t *scores = scores_of(s, i) + r * CHUNK;
        if (integer_scores(w->a)) {
            int32_t top = masked ? weigh_integers(u, r, scores, start, v.blocks, weights, p->sum + r, 1)
                                 : weigh_integers(u, r, scores, start, v.blocks, weights, p->sum + r, 0);
            // The offset is the chunk's own: it cancels within, and counts between chunks.
            if (top != INT32_MIN) top -= u->offset[r];
            memcpy(p->max + r, &top, 4);
        } else if (!w->a->cache.group_size) {
            p->max[r] = weigh_floats(u, r, (float *)scores, v.blocks, weights, p->sum + r);
        } else {
            p->max[r] = exponentials((float *)scores, 4 * v.blocks, p->sum + r);
        }
    }
}

static void unit_values(walk_t *w, const unit_t *u, int count, view_t v, partial_t *partials) {
    const pareto_cache *c = &w->a->cache;
    scratch_t *s = w->s;
    const int dim = c->head_dim, groups = group_count(c);
    const int64_t block_bytes = (int64_t)BLOCK * dim;
    const uint8_t *values = s->values + v.first * block_bytes;
    for (int b = v.first; b < v.first + v.blocks; b++) need_block(w, 1, b);
    if (!groups) {
        if (count == 1) {
            product(s->weights, values, block_bytes, v.blocks, dim / 16, u->padded_rows, s->products, dim);
        } else {
            const uint8_t *weights[2] = {s->weights, weights_of(s, 1)};
            int32_t *both[2] = {s->products, products_of(s, 1)};
            product_pair(weights, values, block_bytes, v.blocks, dim / 16, both, dim);
        }
        for (int n = 0; n < count; n++)
            for (int i = 0; i < u[n].rows * dim; i += 16)
                store16(partials[n].values + i, to_float(load16i(products_of(s, n) + i)));
    }
    for (int g = 0; g < groups; g++) {  // one unit
        float unit[UNIT_ROWS], offset[UNIT_ROWS];
        const int channel = g * c->group_size, width = dim - channel < c->group_size ? dim - channel : c->group_size;
        for (int r = 0; r < u->rows; r++)
            weigh_group(u, r, (const float *)s->scores + r * CHUNK, s_meta(s, 2, groups) + g * CHUNK + v.first * BLOCK,
                        s_meta(s, 3, groups) + g * CHUNK + v.first * BLOCK, v.blocks, s->weights, unit + r, offset + r);
        product(s->weights, values + channel * BLOCK, block_bytes, v.blocks, width / 16, u->padded_rows, s->products,
                width);
        for (int r = 0; r < u->rows; r++)
            for (int i = 0; i < width; i += 16)
                store16(partials->values + r * dim + channel + i,
                        fma16(to_float(load16i(s->products + r * width + i)), splat(unit[r]), splat(offset[r])));
    }
}

#endif
