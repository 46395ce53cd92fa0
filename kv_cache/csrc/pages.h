// Reading pages: planes of packed codes to the tiles of product.h, and the scales that a page holds.
//
// Pages hold a multiple of 16 tokens, so 16 tokens at a multiple of 16 lie in one page, one plane row after the other.
// Packed bytes are brought into a tile's order first and split into codes after, which moves the fewest bytes. Nothing
// outside these rows is read: a page's end may be the end of the memory.
#ifndef PARETO_PAGES_H
#define PARETO_PAGES_H

#include "numeric.h"
#include "pareto_cpu.h"
#include "product.h"

// One side (keys or values) of 64 tokens: four times sixteen rows, which may lie in different pages.
typedef struct {
    const uint8_t *plane[4], *high[4], *meta[4];
    int stride, high_stride, meta_stride, bits, dim;
} rows_t;

// The rows of tokens from .. from + 63. Sixteens past the end are never seen, and repeat the first.
static void find_rows(rows_t *rows, const pareto_cache *c, const int32_t *table, int tokens, int kv_head, int side,
                      int from) {
    const int bits = side ? c->value_bits : c->key_bits, dim = c->head_dim;
    const int groups = c->group_size ? (dim + c->group_size - 1) / c->group_size : 0;
    // Divisions cost more than all the rest here.
    const int shift = __builtin_ctz(c->block_size), power = c->block_size == 1 << shift;
    rows->stride = bits == 8 ? dim : dim / 2;
    rows->high_stride = dim / 4;
    rows->meta_stride = groups * 4;
    rows->bits = bits;
    rows->dim = dim;
    for (int j = 0, token = from; j < 4; j++, token += 16) {
        if (token >= tokens) {
            rows->plane[j] = rows->plane[0], rows->high[j] = rows->high[0], rows->meta[j] = rows->meta[0];
            continue;
        }
        const int block = power ? token >> shift : token / c->block_size;
        const int64_t offset = token - block * c->block_size;
        const uint8_t *page = c->base + table[block] * c->block_stride + kv_head * c->head_stride;
        rows->plane[j] = page + (side ? c->value_offset : c->key_offset) + offset * rows->stride;
        rows->high[j] = page + (side ? c->value_high_offset : c->key_high_offset) + offset * rows->high_stride;
        rows->meta[j] = page + (side ? c->value_meta_offset : c->key_meta_offset) + offset * rows->meta_stride;
    }
}

// Ask for the i-th sixteenth of rows to come, into the second-level cache, which has more requests in flight than the
// first. Spread over the unpacking of rows that are there, requests do not wait for each other.
INLINE void prefetch_part(const rows_t *rows, int i) {
    if (!rows) return;
    const int j = i / 4, token = i % 4 * 4;
    for (int at = token * rows->stride; at < (token + 4) * rows->stride; at += 64)
        __builtin_prefetch(rows->plane[j] + at, 0, 2);
    if (rows->bits == 6)
        for (int at = token * rows->high_stride; at < (token + 4) * rows->high_stride; at += 64)
            __builtin_prefetch(rows->high[j] + at, 0, 2);
    for (int at = token * rows->meta_stride; at < (token + 4) * rows->meta_stride; at += 64)
        __builtin_prefetch(rows->meta[j] + at, 0, 2);
}

// Head sizes whose packed rows are no multiple of 16 bytes (80, and 96 at 6 bits) go through one byte a code.
static int needs_bytes(int bits, int dim) { return bits == 6 ? dim % 64 != 0 : bits == 4 && dim % 32 != 0; }

// codes: [4][16][256].
static void expand_rows(rows_t *rows, uint8_t *codes) {
    const int dim = rows->dim;
    for (int t = 0; t < 64; t++) {
        const uint8_t *source = rows->plane[t / 16] + (int64_t)(t % 16) * rows->stride;
        const uint8_t *pairs = rows->high[t / 16] + (int64_t)(t % 16) * rows->high_stride;
        uint8_t *out = codes + 256 * t;
        for (int j = 0; j < dim / 2; j++) {
            out[j] = source[j] & 15;
            out[j + dim / 2] = source[j] >> 4;
        }
        if (rows->bits == 6)
            for (int j = 0; j < dim; j++) out[j] |= (pairs[j % (dim / 4)] >> (2 * (j / (dim / 4))) & 3) << 4;
    }
    for (int j = 0; j < 4; j++) rows->plane[j] = codes + 4096 * j;
    rows->stride = 256;
    rows->bits = 8;
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

// Byte i of four rows of 16 bytes, as int32 lane i.
INLINE v16i interleave_4(const uint8_t *p0, const uint8_t *p1, const uint8_t *p2, const uint8_t *p3) {
    v16i out;
#if defined(__AVX512BW__)
    __m512i v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)p0));
    v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)p1), 1);
    v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)p2), 2);
    v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)p3), 3);
    v = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), v);
    const __m128i bytes = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    out = (v16i)_mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(bytes));
#elif defined(__SSE2__)
    const __m128i a = _mm_loadu_si128((const __m128i *)p0), b = _mm_loadu_si128((const __m128i *)p1);
    const __m128i c = _mm_loadu_si128((const __m128i *)p2), d = _mm_loadu_si128((const __m128i *)p3);
    const __m128i even_low = _mm_unpacklo_epi8(a, c), even_high = _mm_unpackhi_epi8(a, c);
    const __m128i odd_low = _mm_unpacklo_epi8(b, d), odd_high = _mm_unpackhi_epi8(b, d);
    const __m128i parts[4] = {_mm_unpacklo_epi8(even_low, odd_low), _mm_unpackhi_epi8(even_low, odd_low),
                              _mm_unpacklo_epi8(even_high, odd_high), _mm_unpackhi_epi8(even_high, odd_high)};
    memcpy(&out, parts, 64);
#else
    for (int i = 0; i < 16; i++) {
        const uint8_t four[4] = {p0[i], p1[i], p2[i], p3[i]};
        memcpy((uint8_t *)&out + 4 * i, four, 4);
    }
#endif
    return out;
}

INLINE v16i low_nibbles(v16i v) { return v & splati(0x0f0f0f0f); }
INLINE v16i high_nibbles(v16i v) { return (v16i)((v16u)v >> 4) & splati(0x0f0f0f0f); }
// Channels of quarter k in the 2-bit plane, at their place in the code.
INLINE v16i pair_bits(v16i v, int k) { return (v16i)(((v16u)v >> (2 * k) & (v16u)splati(0x03030303)) << 4); }

// The j-th sixteen's keys to tiles; int32 w of a row (4 channels) goes to row w % 16 of the tile of chunk w / 16.
INLINE void pack_keys_of(const rows_t *rows, int j, uint8_t *tile, int64_t chunk_stride, const int bits, const int dim) {
#define KEY_ROW(w) (tile + (w) / 16 * chunk_stride + (w) % 16 * 64)
    v16i code[4], pairs[4];
    if (bits == 8) {
        for (int w = 0; w < dim / 4; w += 4) {
            columns_of_16(rows->plane[j] + 4 * w, rows->stride, code);
            for (int i = 0; i < 4; i++) store16i(KEY_ROW(w + i), code[i]);
        }
        return;
    }
    const int quarters = bits == 6 ? dim / 4 : dim / 2;
    for (int from = 0; from < quarters; from += 16) {
        if (bits == 6) columns_of_16(rows->high[j] + from, rows->high_stride, pairs);
        for (int k = 0; k < dim / 2 / quarters; k++) {
            const int w = (k * quarters + from) / 4;
            columns_of_16(rows->plane[j] + 4 * w, rows->stride, code);
            for (int i = 0; i < 4; i++) {
                v16i low = low_nibbles(code[i]), high = high_nibbles(code[i]);
                if (bits == 6) low |= pair_bits(pairs[i], k), high |= pair_bits(pairs[i], k + 2);
                store16i(KEY_ROW(w + i), low);
                store16i(KEY_ROW(dim / 8 + w + i), high);
            }
        }
    }
#undef KEY_ROW
}

// 64 tokens' values to tiles of 16 channels each; row i holds tokens i, 16 + i, 32 + i and 48 + i.
INLINE void pack_values_of(const rows_t *rows, const rows_t *ahead, uint8_t *tiles, const int bits, const int dim) {
    const int64_t stride = rows->stride, high_stride = rows->high_stride;
    for (int i = 0; i < 16; i++, tiles += 64) {
        prefetch_part(ahead, i);
#define VALUE_BYTES(at)                                                                                                \
    interleave_4(rows->plane[0] + i * stride + (at), rows->plane[1] + i * stride + (at),                                 \
                 rows->plane[2] + i * stride + (at), rows->plane[3] + i * stride + (at))
        if (bits == 8) {
            for (int at = 0; at < dim; at += 16) store16i(tiles + at / 16 * TILE_BYTES, VALUE_BYTES(at));
            continue;
        }
        const int quarters = bits == 6 ? dim / 4 : dim / 2;
        for (int from = 0; from < quarters; from += 16) {
            v16i pairs = splati(0);
            if (bits == 6)
                pairs = interleave_4(rows->high[0] + i * high_stride + from, rows->high[1] + i * high_stride + from,
                                     rows->high[2] + i * high_stride + from, rows->high[3] + i * high_stride + from);
            for (int k = 0; k < dim / 2 / quarters; k++) {
                const int at = k * quarters + from;
                const v16i code = VALUE_BYTES(at);
                v16i low = low_nibbles(code), high = high_nibbles(code);
                if (bits == 6) low |= pair_bits(pairs, k), high |= pair_bits(pairs, k + 2);
                store16i(tiles + at / 16 * TILE_BYTES, low);
                store16i(tiles + (dim / 2 + at) / 16 * TILE_BYTES, high);
            }
        }
#undef VALUE_BYTES
    }
}

// Constant bits and head sizes for the common cases, so that the compiler unrolls them.
#define BY_SHAPE(bits, dim, call)                                                                                      \
    do {                                                                                                               \
        if (dim == 64 && bits == 4) { call(4, 64); }                                                                   \
        else if (dim == 64 && bits == 6) { call(6, 64); }                                                              \
        else if (dim == 64) { call(8, 64); }                                                                           \
        else if (dim == 128 && bits == 4) { call(4, 128); }                                                            \
        else if (dim == 128 && bits == 6) { call(6, 128); }                                                            \
        else if (dim == 128) { call(8, 128); }                                                                         \
        else { call(bits, dim); }                                                                                      \
    } while (0)

// Four tiles of sixteen tokens; `ahead`: rows to ask for meanwhile, or null. scratch: [4][16][256] bytes.
static void pack_keys(rows_t *rows, const rows_t *ahead, uint8_t *tiles, int64_t chunk_stride, uint8_t *scratch) {
    if (needs_bytes(rows->bits, rows->dim)) expand_rows(rows, scratch);
    for (int j = 0; j < 4; j++) {
        for (int i = 0; i < 4; i++) prefetch_part(ahead, 4 * j + i);
#define CALL(bits, dim) pack_keys_of(rows, j, tiles + j * TILE_BYTES, chunk_stride, bits, dim)
        BY_SHAPE(rows->bits, rows->dim, CALL);
#undef CALL
    }
}

static void pack_values(rows_t *rows, const rows_t *ahead, uint8_t *tiles, uint8_t *scratch) {
    if (needs_bytes(rows->bits, rows->dim)) expand_rows(rows, scratch);
#define CALL(bits, dim) pack_values_of(rows, ahead, tiles, bits, dim)
    BY_SHAPE(rows->bits, rows->dim, CALL);
#undef CALL
}

// The j-th sixteen's scales and minima: scales[group * group_stride + token], of which the first `count` are tokens. What
// stands beyond them in the page may be no number, and becomes 0.
static void read_meta(const rows_t *rows, int j, int count, float *scales, float *minima, int group_stride) {
    const int groups = rows->meta_stride / 4;
    const v16i valid = iota() < splati(count);
    for (int g = 0; g < groups; g++) {
        v16f scale, minimum;
#if defined(__AVX512F__)
        const __m512i at = _mm512_mullo_epi32((__m512i)iota(), _mm512_set1_epi32(groups));
        const __m512i both = _mm512_i32gather_epi32(at, rows->meta[j] + 4 * g, 4);
        scale = (v16f)_mm512_cvtph_ps(_mm512_cvtepi32_epi16(both));
        minimum = (v16f)_mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
#else
        uint16_t half[2][16];
        for (int t = 0; t < 16; t++) {
            memcpy(&half[0][t], rows->meta[j] + 4 * (t * groups + g), 2);
            memcpy(&half[1][t], rows->meta[j] + 4 * (t * groups + g) + 2, 2);
        }
        for (int t = 0; t < 16; t++) scale[t] = f16_to_float(half[0][t]), minimum[t] = f16_to_float(half[1][t]);
#endif
        store16(scales + g * group_stride, (v16f)((v16i)scale & valid));
        store16(minima + g * group_stride, (v16f)((v16i)minimum & valid));
    }
}

#endif
