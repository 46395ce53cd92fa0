// The integer product under both halves of attention: activations [rows][64 k] times codes [64 k][16 lanes], exact.
//
// Activations are 16-bit fixed-point numbers of magnitude at most PARETO_ONE: query channels against keys, weights of
// tokens against values, and coefficients of pairs of channels against the table of turned centres. Codes come in tiles
// of 1 KB: int32 lane i of row j holds the four one-byte codes 4j .. 4j + 3 of column i (keys: four channels of token i;
// values: four tokens of channel i), which is what AMX multiplies.
//
// Two forms, chosen at compile time:
// - bytes (AMX, AVX-512): an activation is 256 * high + low with low in -128..127, unsigned codes times signed bytes.
//   A chunk of 64 k is [high bytes of each row, low bytes of each row][64].
// - words (AVX2, plain C): pairs of 16-bit numbers against the even and the odd bytes of a tile.
//   A chunk is [rows][16 pairs of even positions, 16 pairs of odd positions].
// Both give the same integers, which fit: 255 * PARETO_ONE * 256 < 2**31.
#ifndef PARETO_PRODUCT_H
#define PARETO_PRODUCT_H

#include "vector.h"

#define PARETO_ONE 32512  // 127 * 256: the largest whose high byte fits
#define UNIT_ROWS 8
#define TILE_BYTES 1024
#define CHUNK_BYTES 1024  // activations of 64 k and up to 8 rows, in either form

// Activations of 64 k to their place in a chunk, for lanes lane .. lane + PART - 1 of a row. Lane i of x[j] holds the
// activation (its low 16 bits) at 4i + j.
#if defined(__AVX512VNNI__)

INLINE void put_activations(uint8_t *chunk, int rows, int r, int lane, const vi x[4]) {
    const vi mask = part_splat_i(0x00ff00ff), word = part_splat_i(0xffff);
    const v32h half = (v32h)splati(0x00800080);
    const vi even = (x[0] & word) | (vi)((vu)x[2] << 16), odd = (x[1] & word) | (vi)((vu)x[3] << 16);
    const vi even_up = (vi)(((v32h)even + half) >> 8), odd_up = (vi)((v32h)odd + half);
    part_store_i(chunk + 64 * r + 4 * lane, (even_up & mask) | (odd_up & ~mask));
    part_store_i(chunk + 64 * (rows + r) + 4 * lane, (even & mask) | ((vi)((vu)odd << 8) & ~mask));
}

#else

INLINE void put_activations(uint8_t *chunk, int rows, int r, int lane, const vi x[4]) {
    const vi word = part_splat_i(0xffff);
    (void)rows;
    part_store_i(chunk + 128 * r + 4 * lane, (x[0] & word) | (vi)((vu)x[2] << 16));
    part_store_i(chunk + 128 * r + 64 + 4 * lane, (x[1] & word) | (vi)((vu)x[3] << 16));
}

#endif

// The same for the activations of 64 k in the order of k, of all lanes.
static void put_in_order(uint8_t *chunk, int rows, int r, const int32_t *x) {
#if defined(__AVX512VNNI__)
    for (int i = 0; i < 64; i += 16) {
        const v16i v = load16i(x + i);
        const __m128i high = _mm512_cvtepi32_epi8((__m512i)((v + 128) >> 8)), low = _mm512_cvtepi32_epi8((__m512i)v);
        memcpy(chunk + 64 * r + i, &high, 16);
        memcpy(chunk + 64 * (rows + r) + i, &low, 16);
    }
#else
    int16_t words[64];
    (void)rows;
    for (int i = 0; i < 16; i++) {
        words[2 * i] = (int16_t)x[4 * i], words[2 * i + 1] = (int16_t)x[4 * i + 2];
        words[32 + 2 * i] = (int16_t)x[4 * i + 1], words[32 + 2 * i + 1] = (int16_t)x[4 * i + 3];
    }
    memcpy(chunk + 128 * r, words, 128);
#endif
}

// product(a, b, b_stride, chunks, tiles, rows, out, stride): out[r][16 * tiles] = the sum over `chunks` of 64 k. Chunk k
// is a + k * CHUNK_BYTES; its tiles follow each other from b + k * b_stride. tiles_begin(rows) comes first on a thread.
// product_pair does the same for two units of UNIT_ROWS rows, where codes once loaded serve both.
#if defined(PARETO_USE_AMX)
#include "product_amx.h"
#elif defined(__AVX512VNNI__)
#include "product_avx512.h"
#else
#include "product_words.h"
#endif

#if !defined(PARETO_USE_AMX)
static void product_pair(const uint8_t *const a[2], const uint8_t *b, int64_t b_stride, int chunks, int tiles,
                         int32_t *const out[2], int64_t stride) {
    for (int i = 0; i < 2; i++) product(a[i], b, b_stride, chunks, tiles, UNIT_ROWS, out[i], stride);
}
#endif

#endif
