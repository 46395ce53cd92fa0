// Paged attention over codes, compiled once for each instruction set.
//
// Query rows, (token, head of the group) pairs, are handled up to eight at a time (a unit, unit.h), tokens 256 at a time
// (a chunk), unpacked once for all units of a work item (pages.h). Both products are exact integers (product.h):
//
//   score[r][t] = step[t] * (q[r] . code[t] - zero[t] * sum(q[r])) + bias[r][position]    q: query in 16-bit fixed point
//   out[r][c]   = sum_t p[r][t] * step[t] * (code[t][c] - zero[t])        p * step: 16-bit fixed point (softmax.h)
//
// where q has the keys' inverse transform folded in, and the output still has to be mixed back. Scales and zeros are a
// token's, for all channels of a head, so that they never touch a code. A token's own key and value, if given, are not
// read from codes: their score and their share of the output are added when a row is complete, and so is a head's sink.
//
// bias is q . centre(position) (kv_cache/rotary.py). In one chunk that is a sum over pairs of channels of a cosine and a
// sine of the position in the chunk times two coefficients, which turn from chunk to chunk: one more product, of the
// coefficients and tiles that are the same for everything, with the coefficients' own fixed point. Position 0 has a centre
// of its own, and bias is q . key_first there.
//
// Every row's result is a function of its query, its own key and value and the codes alone: chunks start at multiples of 256 tokens, a chunk's
// partial result starts from nothing, chunks merge in order, and tokens that are hidden from a row leave its numbers
// unchanged to the bit. So neither batching, nor how a prompt was cut into pieces, nor the number of threads changes a
// bit of the output; nor does the instruction set, as all round alike (vector.h).

#include "passes.h"

static void prepare_units(const pareto_attention_args *a, const item_t *item, scratch_t *s) {
    const int group = a->num_heads / a->cache.num_kv_heads;
    const int rows = (a->query_start[item->request + 1] - a->query_start[item->request]) * group;
    const int padded_rows = rows < UNIT_ROWS ? rows : UNIT_ROWS;
    for (int n = 0; n < item->units; n++)
        unit_prepare(s->units + n, a, item->request, item->kv_head, (item->first_unit + n) * UNIT_ROWS, padded_rows,
                     item->first_chunk);
    if (padded_rows != s->tile_rows) tiles_begin(s->tile_rows = padded_rows);
}

// What unit n made of the current chunk: merged into its total, or kept for merge_item.
static void deliver(walk_t *w, int n, const partial_t *p, float *partials) {
    const pareto_cache *c = &w->a->cache;
    const item_t *item = w->item;
    if (item->partial < 0) {
        unit_merge(w->s->units + n, p, c->head_dim);
        return;
    }
    const int64_t chunk = w->chunk / CHUNK - item->first_chunk;
    float *at = partials + (item->partial + chunk * item->units + n) * partial_floats(c);
    memcpy(at, p->max, 64);
    memcpy(at + 16, p->sum, 64);
    memcpy(at + 32, p->values, (size_t)c->head_dim * UNIT_ROWS * sizeof(float));
}

// The values of a pair (or one) of units whose weights are there.
static void finish_values(walk_t *w, int n, int count, view_t v, float *partials) {
    partial_t *p = w->s->partial;
    unit_values(w, w->s->units + n, count, v, p);
    for (int i = 0; i < count; i++) deliver(w, n + i, p + i, partials);
}

static void run_item(const pareto_attention_args *a, const item_t *item, const item_t *next, scratch_t *s,
                     float *partials) {
    prepare_units(a, item, s);
    walk_t w = {.a = a, .item = item, .next = next, .s = s};
    for (int n = 0; n < item->units; n++)
        if (s->units[n].highest_last > w.last) w.last = s->units[n].highest_last;
    for (int k = item->first_chunk; k < item->first_chunk + item->chunks; k++) {
        walk_to(&w, k);
        // Units go through in pairs. A pair's scores come before the pair before it meets the values, so that no product
        // waits for the weights that it reads to be written.
        int pending = -1, pending_count = 0;
        view_t pending_view = {0, 0};
        partial_t *p = s->partial;
        for (int n = 0; n < item->units; n += 2) {
            unit_t *u = s->units + n;
            const int count = item->units - n < 2 ? 1 : 2;
            const view_t v = view_chunk(&w, u, count);
            if (v.blocks) unit_scores(&w, u, count, v);
            if (pending >= 0) finish_values(&w, pending, pending_count, pending_view, partials);
            pending = -1;
            for (int i = 0; i < count; i++) {
                store16(p[i].max, splat(-INFINITY));
                store16(p[i].sum, splat(0));
            }
            if (v.blocks) {
                for (int i = 0; i < count; i++) unit_weights(&w, u + i, i, v, p + i);
                pending = n, pending_count = count, pending_view = v;
            } else if (item->partial >= 0) {
                for (int i = 0; i < count; i++) deliver(&w, n + i, p + i, partials);
            }
            // Long before the product reads what this writes.
            if (k + 1 < item->first_chunk + item->chunks)
                for (int i = 0; i < count; i++) unit_turn(u + i, &a->cache, k + 1);
        }
        if (pending >= 0) finish_values(&w, pending, pending_count, pending_view, partials);
    }
    if (item->partial < 0)
        for (int n = 0; n < item->units; n++) unit_finish(s->units + n, a, item->request, item->kv_head);
}

// Merge the chunks of an item that several threads computed. `item` spans all its chunks.
static void merge_item(const pareto_attention_args *a, const item_t *item, scratch_t *s, const float *partials) {
    prepare_units(a, item, s);
    for (int n = 0; n < item->units; n++) {
        for (int k = 0; k < item->chunks; k++) {
            const float *at = partials + (item->partial + (int64_t)k * item->units + n) * partial_floats(&a->cache);
            partial_t p = {.values = (float *)at + 32};
            memcpy(p.max, at, 64);
            memcpy(p.sum, at + 16, 64);
            unit_merge(s->units + n, &p, a->cache.head_dim);
        }
        unit_finish(s->units + n, a, item->request, item->kv_head);
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
    for (int request = 0; request < a->num_reqs; request++)
        if (a->seq_lens[request] > a->cache.num_anchors * TURN_SPAN) return -3;
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
        partials = malloc(sizeof(float) * partial_units * partial_floats(&a->cache));
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
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < num_parts; i++)
            if (s.memory) {
                const int64_t next = i + a->num_threads;
                run_item(a, parts + i, next < num_parts ? parts + next : NULL, &s, partials);
            }
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
