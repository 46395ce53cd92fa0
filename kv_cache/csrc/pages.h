// Reading pages: planes of packed codes to the tiles of product.h, and the scales and zeros of tokens.
//
// Pages hold a multiple of 16 tokens, so 16 tokens at a multiple of 16 lie in one page, one plane row after the other.
// Packed bytes are brought into a tile's order first and split into codes after, which moves the fewest bytes. Nothing
// outside these rows is read: a page's end may be the end of the memory.
#ifndef PARETO_PAGES_H
#define PARETO_PAGES_H

#include "numeric.h"
#include "pareto_cpu.h"
#include "product.h"

#define BLOCK 64
#define CHUNK 256  // tokens; sums of weights times codes over a chunk fit in int32
#define CHUNK_BLOCKS (CHUNK / BLOCK)

static int side_bits(const pareto_cache *c, int side) { return c->planes[side][0].width + c->planes[side][1].width; }

// Where the sixteens of a chunk lie: the page of the head, or null past the end, and the first token in it.
typedef struct {
    const uint8_t *page[CHUNK / 16];
    int token[CHUNK / 16];
} places_t;

static void find_places(places_t *p, const pareto_cache *c, const int32_t *table, int kv_head, int chunk, int end) {
    // Divisions cost more than all the rest here.
    const int shift = __builtin_ctz(c->block_size), power = c->block_size == 1 << shift;
    for (int j = 0, token = chunk; j < CHUNK / 16; j++, token += 16) {
        p->page[j] = NULL;
        if (token >= end) continue;
        const int block = power ? token >> shift : token / c->block_size;
        p->page[j] = c->base + table[block] * c->block_stride + kv_head * c->head_stride;
        p->token[j] = token - block * c->block_size;
    }
}

// One side (keys or values) of 64 tokens: four times sixteen rows, which may lie in different pages.
typedef struct {
    const uint8_t *plane[2][4];  // null where nobody sees the sixteen
    int row[2], width[2], dim;   // bytes of a token's row in a plane, and bits of a channel there
} rows_t;

// The rows of the block's tokens. Sixteens that nobody sees repeat the first if they `repeat`.
static void find_rows(rows_t *rows, const pareto_cache *c, const places_t *places, int side, int block, int repeat) {
    rows->dim = c->head_dim;
    for (int p = 0; p < 2; p++) {
        const pareto_plane *plane = c->planes[side] + p;
        rows->width[p] = plane->width;
        rows->row[p] = c->head_dim * plane->width / 8;
        for (int j = 0; j < 4; j++) {
            const int at = 4 * block + j, from = repeat && !places->page[at] ? 4 * block : at;
            const uint8_t *page = places->page[from];
            rows->plane[p][j] = page ? page + plane->offset + (int64_t)places->token[from] * rows->row[p] : NULL;
        }
    }
}

// Ask for the i-th sixteenth of rows to come, into the second-level cache, which has more requests in flight than the
// first. Spread over the unpacking of rows that are there, requests do not wait for each other.
INLINE void prefetch_part(const rows_t *rows, int i) {
    if (!rows->plane[0][i / 4]) return;
    for (int p = 0; p < 2; p++) {
        const uint8_t *from = rows->plane[p][i / 4] + i % 4 * 4 * rows->row[p];
        for (int at = 0; at < 4 * rows->row[p]; at += 64) __builtin_prefetch(from + at, 0, 2);
    }
}

// The packing below takes rows by 16 bytes, and rows of 8 bytes (3-bit codes of heads of 64) as if they were 16: byte
// 8 + j is then byte j moved by one bit, so that channel j + 16 * k is bit 2 * k of byte j. Other rows (of head size 80,
// and of 96 where a plane's bits are below 4) go through one byte a code.
#define SHORT_ROW 8
static int fits_packing(int row) { return row % 16 == 0 || row == SHORT_ROW; }

// Rows to one byte a code, if they need it; codes: [4][16][256].
static void expand_rows(rows_t *rows, uint8_t *codes) {
    if (fits_packing(rows->row[0]) && fits_packing(rows->row[1])) return;
    for (int t = 0; t < BLOCK; t++) {
        uint8_t *out = codes + 256 * t;
        for (int p = 0, low = 0; p < 2 && rows->width[p]; low += rows->width[p++]) {
            const int row = rows->row[p], width = rows->width[p], mask = (1 << width) - 1;
            const uint8_t *source = rows->plane[p][t / 16] + (int64_t)(t % 16) * row;
            for (int k = 0; k < 8 / width; k++)
                for (int j = 0; j < row; j++) {
                    const uint8_t bits = (uint8_t)((source[j] >> (k * width) & mask) << low);
                    out[k * row + j] = p ? out[k * row + j] | bits : bits;
                }
        }
    }
    for (int j = 0; j < 4; j++) rows->plane[0][j] = codes + 4096 * j;
    rows->row[0] = 256, rows->row[1] = 0;
    rows->width[0] = 8, rows->width[1] = 0;
}

// Four int32 columns of 16 rows: out[w][t] = the w-th int32 of row t.
INLINE void columns_of_16(const uint8_t *rows, int64_t stride, v16i out[4]) {
#if defined(__AVX512F__)
    __m512i v[4];
    for (int i = 0; i < 4; i++) {  // 128-bit lane l: row 4l + i
        v[i] = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(rows + i * stride)));
        v[i] = _mm512_inserti32x4(v[i], _mm_loadu_si128((const __m128i *)(rows + (4 + i) * stride)), 1);
        v[i] = _mm512_inserti32x4(v[i], _mm_loadu_si128((const __m128i *)(rows + (8 + i) * stride)), 2);
        v[i] = _mm512_inserti32x4(v[i], _mm_loadu_si128((const __m128i *)(rows + (12 + i) * stride)), 3);
    }
    const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
    const __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
    out[0] = (v16i)_mm512_unpacklo_epi64(a, c), out[1] = (v16i)_mm512_unpackhi_epi64(a, c);
    out[2] = (v16i)_mm512_unpacklo_epi64(b, d), out[3] = (v16i)_mm512_unpackhi_epi64(b, d);
#elif defined(__SSE2__)
    __m128i columns[4][4];
    for (int l = 0; l < 4; l++) {
        __m128i v[4];
        for (int i = 0; i < 4; i++) v[i] = _mm_loadu_si128((const __m128i *)(rows + (4 * l + i) * stride));
        const __m128i a = _mm_unpacklo_epi32(v[0], v[1]), b = _mm_unpackhi_epi32(v[0], v[1]);
        const __m128i c = _mm_unpacklo_epi32(v[2], v[3]), d = _mm_unpackhi_epi32(v[2], v[3]);
        columns[0][l] = _mm_unpacklo_epi64(a, c), columns[1][l] = _mm_unpackhi_epi64(a, c);
        columns[2][l] = _mm_unpacklo_epi64(b, d), columns[3][l] = _mm_unpackhi_epi64(b, d);
    }
    memcpy(out, columns, 256);
#else
    for (int w = 0; w < 4; w++)
        for (int t = 0; t < 16; t++) memcpy((int32_t *)(out + w) + t, rows + t * stride + 4 * w, 4);
#endif
}

// The same for 16 rows of 8 bytes, one after the other, taken as 16.
INLINE void columns_of_8(const uint8_t *rows, v16i out[4]) {
    const v16i a = load16i(rows), b = load16i(rows + 64);
    out[0] = __builtin_shuffle(a, b, (v16i){0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30});
    out[1] = __builtin_shuffle(a, b, (v16i){1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31});
    out[2] = (v16i)((v16u)out[0] >> 1);
    out[3] = (v16i)((v16u)out[1] >> 1);
}

typedef uint8_t v16b __attribute__((vector_size(16)));

INLINE v16b load_bytes(const uint8_t *row, const int is_short) {
    typedef uint64_t v2q __attribute__((vector_size(16)));
    v16b v;
    if (is_short) {
        uint64_t bytes;
        memcpy(&bytes, row, 8);
        v = (v16b)(bytes - (v2q){0});
    } else {
        memcpy(&v, row, 16);
    }
    return v;
}

// Byte i of four rows, as int32 lane i.
INLINE v16i interleave_4(v16b a, v16b b, v16b c, v16b d) {
    v16i out;
#if defined(__AVX512BW__)
    __m512i v = _mm512_castsi128_si512((__m128i)a);
    v = _mm512_inserti32x4(v, (__m128i)b, 1);
    v = _mm512_inserti32x4(v, (__m128i)c, 2);
    v = _mm512_inserti32x4(v, (__m128i)d, 3);
    v = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), v);
    const __m128i bytes = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    out = (v16i)_mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(bytes));
#elif defined(__SSE2__)
    const __m128i even[2] = {_mm_unpacklo_epi8((__m128i)a, (__m128i)c), _mm_unpackhi_epi8((__m128i)a, (__m128i)c)};
    const __m128i odd[2] = {_mm_unpacklo_epi8((__m128i)b, (__m128i)d), _mm_unpackhi_epi8((__m128i)b, (__m128i)d)};
    const __m128i parts[4] = {_mm_unpacklo_epi8(even[0], odd[0]), _mm_unpackhi_epi8(even[0], odd[0]),
                              _mm_unpacklo_epi8(even[1], odd[1]), _mm_unpackhi_epi8(even[1], odd[1])};
    memcpy(&out, parts, 64);
#else
    for (int i = 0; i < 16; i++) {
        const uint8_t four[4] = {a[i], b[i], c[i], d[i]};
        memcpy((uint8_t *)&out + 4 * i, four, 4);
    }
#endif
    return out;
}

// `width` bits from bit `from` of every byte on, moved to bit `to`.
INLINE v16i take_bits(v16i v, int from, int width, int to) {
    const v16i mask = splati((((1 << width) - 1) << to) * 0x01010101);
    return (from >= to ? (v16i)((v16u)v >> (from - to)) : (v16i)((v16u)v << (to - from))) & mask;
}

// Walks over the planes of a row of codes by 16 channels: LOAD(p, from, is_short, v) brings 16 bytes of plane p, COUNT
// vectors of them, and STORE(channel, i, code) takes the codes. Widths and `dim` are constants where it matters.
#define UNPACK_ROW(low, high, dim, COUNT, LOAD, STORE)                                                                 \
    do {                                                                                                               \
        const int row = (dim) * (low) / 8, short_row = (high) && (dim) * (high) / 8 == SHORT_ROW;                      \
        const int above = !(high) ? row : short_row ? 16 : (dim) * (high) / 8, step = short_row ? 2 : (high);          \
        for (int from = 0; from < above; from += 16) {                                                                 \
            v16i low_bytes[COUNT], high_bytes[COUNT] = {{0}};                                                          \
            if (high) LOAD(1, from, short_row, high_bytes);                                                            \
            for (int run = 0; run < row / above; run++) {                                                              \
                LOAD(0, run * above + from, 0, low_bytes);                                                             \
                for (int k = 0; k < 8 / (low); k++)                                                                    \
                    for (int i = 0; i < COUNT; i++) {                                                                  \
                        v16i code = (low) == 8 ? low_bytes[i] : take_bits(low_bytes[i], k * (low), low, 0);            \
                        if (high) code |= take_bits(high_bytes[i], (k * (row / above) + run) * step, high, low);       \
                        STORE(k * row + run * above + from, i, code);                                                  \
                    }                                                                                                  \
            }                                                                                                          \
        }                                                                                                              \
    } while (0)

// The j-th sixteen's keys to tiles; int32 w of a row (4 channels) goes to row w % 16 of the tile of chunk w / 16.
INLINE void pack_keys_of(const rows_t *rows, int j, uint8_t *tile, int64_t chunk_stride, const int low, const int high,
                         const int dim) {
#define LOAD(p, from, is_short, v)                                                                                     \
    do {                                                                                                               \
        if (is_short) columns_of_8(rows->plane[p][j], v);                                                              \
        else columns_of_16(rows->plane[p][j] + (from), rows->row[p], v);                                               \
    } while (0)
#define STORE(channel, i, code)                                                                                        \
    store16i(tile + ((channel) / 4 + i) / 16 * chunk_stride + ((channel) / 4 + i) % 16 * 64, code)
    UNPACK_ROW(low, high, dim, 4, LOAD, STORE);
#undef LOAD
#undef STORE
}

// 64 tokens' values to tiles of 16 channels each; row i holds tokens i, 16 + i, 32 + i and 48 + i.
INLINE void pack_values_of(const rows_t *rows, const rows_t *ahead, uint8_t *tiles, const int low, const int high,
                           const int dim) {
#define LOAD(p, from, is_short, v)                                                                                     \
    do {                                                                                                               \
        const int64_t at = (int64_t)token * rows->row[p] + (from);                                                     \
        v16b four[4];                                                                                                  \
        for (int j = 0; j < 4; j++) four[j] = load_bytes(rows->plane[p][j] + at, is_short);                            \
        (v)[0] = interleave_4(four[0], four[1], four[2], four[3]);                                                     \
        if (is_short) (v)[0] = (v16i)((v16u)(v)[0] >> (v16u){0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1});         \
    } while (0)
#define STORE(channel, i, code) store16i(tiles + (channel) / 16 * TILE_BYTES + 64 * token, code)
    for (int token = 0; token < 16; token++) {
        prefetch_part(ahead, token);
        UNPACK_ROW(low, high, dim, 1, LOAD, STORE);
    }
#undef LOAD
#undef STORE
}

// Constant widths and head sizes for the common cases, so that the compiler unrolls them.
#define BY_WIDTHS(dim, call)                                                                                           \
    do {                                                                                                               \
        const int low = rows->width[0], high = rows->width[1];                                                         \
        if (low == 8 && !high) { call(8, 0, dim); }                                                                    \
        else if (low == 4 && !high) { call(4, 0, dim); }                                                               \
        else if (low == 4 && high == 2) { call(4, 2, dim); }                                                           \
        else if (low == 2 && !high) { call(2, 0, dim); }                                                               \
        else if (low == 2 && high == 1) { call(2, 1, dim); }                                                           \
        else { call(low, high, dim); }                                                                                 \
    } while (0)
#define BY_SHAPE(call)                                                                                                 \
    do {                                                                                                               \
        if (rows->dim == 64) BY_WIDTHS(64, call);                                                                      \
        else if (rows->dim == 128) BY_WIDTHS(128, call);                                                               \
        else call(rows->width[0], rows->width[1], rows->dim);                                                          \
    } while (0)

// Four tiles of sixteen tokens; `ahead`: rows to ask for meanwhile. scratch: [4][16][256] bytes.
static void pack_keys(rows_t *rows, const rows_t *ahead, uint8_t *tiles, int64_t chunk_stride, uint8_t *scratch) {
    expand_rows(rows, scratch);
    for (int j = 0; j < 4; j++) {
        for (int i = 0; i < 4; i++) prefetch_part(ahead, 4 * j + i);
#define CALL(low, high, dim) pack_keys_of(rows, j, tiles + j * TILE_BYTES, chunk_stride, low, high, dim)
        BY_SHAPE(CALL);
#undef CALL
    }
}

static void pack_values(rows_t *rows, const rows_t *ahead, uint8_t *tiles, uint8_t *scratch) {
    expand_rows(rows, scratch);
#define CALL(low, high, dim) pack_values_of(rows, ahead, tiles, low, high, dim)
    BY_SHAPE(CALL);
#undef CALL
}

#define WEIGHT_ONE 30600.0f  // see softmax.h

// What sixteen tokens are read with: steps of codes, and bytes of zeros.
typedef struct {
    float key_step[16], key_zero[16];
    float value_unit[16];  // WEIGHT_ONE steps, but for what all tokens share
    float value_size[16];  // see softmax.h
    int32_t value_zero[16];
} meta_t;

// A sixteen's scales and zeros, whatever stands there.
static void read_meta(const pareto_cache *c, const uint8_t *page, int token, meta_t *m) {
    const uint8_t *from = page + c->meta_offset + 4 * (int64_t)token;
    const int bits = side_bits(c, 0);
    for (int l = 0; l < 16; l += PART) {
        const vu four = (vu)part_load_i(from + 4 * l), scale = four >> 16 & 255;
        part_store(m->key_step + l, (vf)SCALE_FLOAT(four & 255, STEP_EXPONENT(bits)));
        part_store(m->key_zero + l, part_float((vi)(four >> 8 & 255)));
        part_store(m->value_unit + l, (vf)SCALE_FLOAT(scale, 0) * WEIGHT_ONE);
        part_store(m->value_size + l, part_float((vi)scale) * 0.0625f);
        part_store_i(m->value_zero + l, (vi)(four >> 24));
    }
}

#endif
