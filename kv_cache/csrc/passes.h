// What one work item does with a chunk of tokens: unpack it, and take units, in pairs, through scores, weights, values.
#ifndef PARETO_PASSES_H
#define PARETO_PASSES_H

#include <stdlib.h>

#include "softmax.h"

#define MAX_UNITS 16

typedef struct {
    uint8_t *keys;      // [64 channels][16 tiles of 16 tokens]
    uint8_t *values;    // [block][tiles of 16 channels]
    // For each unit of a pair:
    uint8_t *weights;   // [2][block] activation chunks
    int32_t *scores;    // [2][8][CHUNK], int32 and then float
    int32_t *turns;     // [2][8][CHUNK], the product with the turn table
    int32_t *products;  // [2][8][dim], the weighted values
    meta_t *meta;       // [16 tokens]
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
    const size_t dim = c->head_dim, chunks = channel_chunks(c), turned = turned_chunks(c);
    const size_t query_bytes = (chunks + turned) * CHUNK_BYTES, row_bytes = UNIT_ROWS * dim * sizeof(float);
    const size_t score_bytes = UNIT_ROWS * CHUNK * sizeof(int32_t);
    const size_t sizes[] = {
        chunks * CHUNK * 64, dim * CHUNK, 2 * CHUNK_BLOCKS * CHUNK_BYTES, 2 * score_bytes, 2 * score_bytes,
        2 * row_bytes, CHUNK / 16 * sizeof(meta_t), BLOCK * 256, 2 * row_bytes, MAX_UNITS * sizeof(unit_t),
        MAX_UNITS * query_bytes, MAX_UNITS * row_bytes, MAX_UNITS * turn_floats(c) * sizeof(float),
    };
    enum { PARTS_OF_SCRATCH = sizeof sizes / sizeof *sizes };
    uint8_t *parts[PARTS_OF_SCRATCH];
    size_t bytes = 0;
    for (int i = 0; i < PARTS_OF_SCRATCH; i++) bytes += (sizes[i] + 63) / 64 * 64;
    s->memory = aligned_alloc(64, bytes);
    if (!s->memory) return -1;
    // Stale codes and activations are harmless, but tiles that no row fills (head sizes off 64) must be numbers.
    memset(s->memory, 0, bytes);
    parts[0] = s->memory;
    for (int i = 1; i < PARTS_OF_SCRATCH; i++) parts[i] = parts[i - 1] + (sizes[i - 1] + 63) / 64 * 64;
    s->keys = parts[0];
    s->values = parts[1];
    s->weights = parts[2];
    s->scores = (int32_t *)parts[3];
    s->turns = (int32_t *)parts[4];
    s->products = (int32_t *)parts[5];
    s->meta = (meta_t *)parts[6];
    s->bytes = parts[7];
    for (int i = 0; i < 2; i++) s->partial[i].values = (float *)(parts[8] + i * row_bytes);
    s->units = (unit_t *)parts[9];
    for (int u = 0; u < MAX_UNITS; u++) {
        s->units[u].query = parts[10] + u * query_bytes;
        s->units[u].turned_query = s->units[u].query + chunks * CHUNK_BYTES;
        s->units[u].total = (float *)(parts[11] + u * row_bytes);
        s->units[u].turn = (float *)parts[12] + u * turn_floats(c);
    }
    return 0;
}

// One work item's way through the pages.
typedef struct {
    const pareto_attention_args *a;
    const item_t *item, *next;  // next: what this thread will probably do after it, or null
    scratch_t *s;
    int last;                // the last position that any row sees
    int chunk;               // first token of the current chunk
    places_t places, ahead;  // of the current chunk, and of the one after it, here or in the next item
    unsigned packed[2];      // blocks of the chunk whose keys, values are unpacked
} walk_t;

static void places_of(const walk_t *w, places_t *places, const item_t *item, int chunk, int end) {
    const pareto_attention_args *a = w->a;
    find_places(places, &a->cache, a->block_table + item->request * a->table_stride, item->kv_head, chunk, end);
}

// Enter chunk k of the item.
static void walk_to(walk_t *w, int k) {
    const item_t *item = w->item;
    w->chunk = k * CHUNK;
    w->packed[0] = w->packed[1] = 0;
    if (k > item->first_chunk) w->places = w->ahead;
    else places_of(w, &w->places, item, w->chunk, w->last + 1);
    if (k + 1 < item->first_chunk + item->chunks) places_of(w, &w->ahead, item, w->chunk + CHUNK, w->last + 1);
    else if (w->next) places_of(w, &w->ahead, w->next, w->next->first_chunk * CHUNK, w->a->seq_lens[w->next->request]);
    else memset(&w->ahead, 0, sizeof w->ahead);
}

// Unpack keys (side 0) or values (side 1) of a block of the current chunk, unless an earlier unit did.
static void need_block(walk_t *w, int side, int block) {
    if (w->packed[side] >> block & 1) return;
    w->packed[side] |= 1u << block;
    const pareto_cache *c = &w->a->cache;
    scratch_t *s = w->s;
    rows_t rows, ahead;
    find_rows(&rows, c, &w->places, side, block, 1);
    find_rows(&ahead, c, &w->ahead, side, block, 0);
    if (side) {
        pack_values(&rows, &ahead, s->values + (int64_t)block * BLOCK * c->head_dim, s->bytes);
        return;
    }
    for (int j = 4 * block; j < 4 * block + 4; j++) {
        if (w->places.page[j]) read_meta(c, w->places.page[j], w->places.token[j], s->meta + j);
        if (w->ahead.page[j]) __builtin_prefetch(w->ahead.page[j] + c->meta_offset + 4 * w->ahead.token[j], 0, 2);
    }
    pack_keys(&rows, &ahead, s->keys + 4 * block * TILE_BYTES, CHUNK * 64, s->bytes);
}

// The i-th unit's part of a buffer that both units of a pair have.
static int32_t *scores_of(const scratch_t *s, int i) { return s->scores + i * UNIT_ROWS * CHUNK; }
static int32_t *turns_of(const scratch_t *s, int i) { return s->turns + i * UNIT_ROWS * CHUNK; }
static int32_t *products_of(const scratch_t *s, int i, int dim) { return s->products + i * UNIT_ROWS * dim; }
static uint8_t *weights_of(const scratch_t *s, int i) { return s->weights + i * CHUNK_BLOCKS * CHUNK_BYTES; }

// The product of one unit's activations, or of two units', with the same tiles.
static void multiply(int count, int rows, const uint8_t *const activations[2], const uint8_t *tiles, int64_t stride,
                     int chunks, int num_tiles, int32_t *const out[2], int64_t out_stride) {
    if (count == 1) product(activations[0], tiles, stride, chunks, num_tiles, rows, out[0], out_stride);
    else product_pair(activations, tiles, stride, chunks, num_tiles, out, out_stride);
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

// Products of queries with keys and with the turn table, as integers.
static void unit_scores(walk_t *w, const unit_t *u, int count, view_t v) {
    const pareto_cache *c = &w->a->cache;
    scratch_t *s = w->s;
    for (int b = v.first; b < v.first + v.blocks; b++) need_block(w, 0, b);
    const uint8_t *const queries[2] = {u[0].query, u[count - 1].query};
    const uint8_t *const turned[2] = {u[0].turned_query, u[count - 1].turned_query};
    int32_t *const scores[2] = {scores_of(s, 0), scores_of(s, 1)}, *const turns[2] = {turns_of(s, 0), turns_of(s, 1)};
    const int64_t from = 4 * v.first * TILE_BYTES;
    const int rows = u->padded_rows, tiles = 4 * v.blocks;
    multiply(count, rows, queries, s->keys + from, CHUNK * 64, channel_chunks(c), tiles, scores, CHUNK);
    multiply(count, rows, turned, c->turn_tiles + from, CHUNK * 64, turned_chunks(c), tiles, turns, CHUNK);
}

// The i-th unit's scores to weights, with their maximum and sums. Not inlined: its loops need all registers.
static __attribute__((noinline)) void unit_weights(walk_t *w, const unit_t *u, int i, view_t v, partial_t *p) {
    scratch_t *s = w->s;
    const meta_t *m = s->meta + 4 * v.first;
    const int token = w->chunk + v.first * BLOCK, special = is_special(u, token, token + v.blocks * BLOCK);
    const float cap = w->a->soft_cap;
    for (int r = 0; r < u->rows; r++) {
        int32_t *scores = scores_of(s, i) + r * CHUNK;
        const int32_t *turns = turns_of(s, i) + r * CHUNK;
#define SCORES(cap, special) score_row(u, r, scores, turns, m, token, 4 * v.blocks, cap, special)
        p->max[r] = cap > 0 ? SCORES(cap, 1) : special ? SCORES(0, 1) : SCORES(0, 0);
#undef SCORES
    }
    for (int r = 0; r < u->rows; r++) {
        const int32_t *scores = scores_of(s, i) + r * CHUNK;
        weigh_row(u, r, scores, m, v.blocks, p->max[r], weights_of(s, i), p->sum + r, p->shift + r);
    }
}

static void unit_values(walk_t *w, const unit_t *u, int count, view_t v, partial_t *partials) {
    const pareto_cache *c = &w->a->cache;
    scratch_t *s = w->s;
    const int dim = c->head_dim;
    const int64_t block_bytes = (int64_t)BLOCK * dim;
    for (int b = v.first; b < v.first + v.blocks; b++) need_block(w, 1, b);
    const uint8_t *const weights[2] = {weights_of(s, 0), weights_of(s, 1)};
    int32_t *const products[2] = {products_of(s, 0, dim), products_of(s, 1, dim)};
    const uint8_t *values = s->values + v.first * block_bytes;
    multiply(count, u->padded_rows, weights, values, block_bytes, v.blocks, dim / 16, products, dim);
    const float zero = (float)(1 << side_bits(c, 1)) / 256;  // a zero's byte counts 256ths of the codes' range
    for (int n = 0; n < count; n++)
        for (int r = 0; r < u[n].rows; r++)
            for (int i = r * dim; i < (r + 1) * dim; i += PART)
                part_store(partials[n].values + i,
                           part_float(part_load_i(products[n] + i)) - part_splat(partials[n].shift[r] * zero));
}

#endif
