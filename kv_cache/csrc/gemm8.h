// The integer product under both halves of attention: codes [m][64 k] times activations [64 k][8 rows], exact in int32.
//
// Activations are 16-bit fixed-point numbers of magnitude at most PARETO_ONE. The AMX form writes them as two signed
// bytes, 256 * high + low with low in -128..127, which makes 16 columns of a tile, and multiplies unsigned codes by
// signed bytes; the others multiply 16-bit pairs. All give the same integers: 255 * 32512 * 256 < 2**31.
#ifndef PARETO_GEMM8_H
#define PARETO_GEMM8_H

#include "pages.h"

#define PARETO_ONE 32512
#define CHUNK_BYTES 1024  // activations of 64 k and 8 rows, in either form

#if defined(PARETO_USE_AMX)

typedef uint8_t code_t;

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_per_row[16];
    uint8_t rows[16];
} tile_config;

static const tile_config TILES = {
    .palette = 1,
    .bytes_per_row = {64, 64, 64, 64, 64, 64, 64, 64},
    .rows = {16, 16, 16, 16, 16, 16, 16, 16},
};

static void tiles_begin(void) { _tile_loadconfig(&TILES); }

static void tiles_end(void) { _tile_release(); }

// Rows of a stored tile hold 8 products of high bytes, then 8 of low bytes.
INLINE void combine_tile(const int32_t *tile, int32_t *c) {
    for (int r = 0; r < 16; r += 2) {
        const __m512i a = _mm512_load_si512(tile + 16 * r), b = _mm512_load_si512(tile + 16 * r + 16);
        const __m512i high = _mm512_inserti64x4(a, _mm512_castsi512_si256(b), 1);
        const __m512i low = _mm512_shuffle_i64x2(a, b, 0xee);
        _mm512_storeu_si512(c + 8 * r, _mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
    }
}

// Up to four row tiles at a time: all products are issued, then all are stored, so that nothing waits on one of them.
#define GEMM_TILES(n)                                                                                                  \
    for (int k = 0; k < chunks; k++) {                                                                                 \
        _tile_loadd(4, b + k * CHUNK_BYTES, 64);                                                                       \
        _tile_loadd(5, a + 64 * k, stride);                                                                            \
        _tile_dpbusd(0, 5, 4);                                                                                         \
        if (n > 1) { _tile_loadd(6, a + 16L * stride + 64 * k, stride); _tile_dpbusd(1, 6, 4); }                       \
        if (n > 2) { _tile_loadd(7, a + 32L * stride + 64 * k, stride); _tile_dpbusd(2, 7, 4); }                       \
        if (n > 3) { _tile_loadd(5, a + 48L * stride + 64 * k, stride); _tile_dpbusd(3, 5, 4); }                       \
    }                                                                                                                  \
    _tile_stored(0, tiles[0], 64);                                                                                     \
    if (n > 1) _tile_stored(1, tiles[1], 64);                                                                          \
    if (n > 2) _tile_stored(2, tiles[2], 64);                                                                          \
    if (n > 3) _tile_stored(3, tiles[3], 64);                                                                          \
    for (int i = 0; i < n; i++) combine_tile(tiles[i], c + 128 * i);

// a: codes [m][stride], m a multiple of 16; b: `chunks` activation chunks; c: [m][8].
static void gemm8(const code_t *a, int64_t stride, int m, int chunks, const uint8_t *b, int32_t *c) {
    int32_t tiles[4][256] __attribute__((aligned(64)));
    // GCC's tile loads do not tell the compiler that they read memory: have every store done before them.
    __asm__ volatile("" ::: "memory");
    for (; m > 0; m -= 64, a += 64 * stride, c += 512) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        if (m >= 64) {
            GEMM_TILES(4)
        } else if (m >= 48) {
            GEMM_TILES(3)
        } else if (m >= 32) {
            GEMM_TILES(2)
        } else {
            GEMM_TILES(1)
        }
    }
}

// Place one activation into its chunks: row r of 8, position k.
INLINE void put_activation(uint8_t *b, int k, int r, int32_t x) {
    uint8_t *at = b + (k / 64) * CHUNK_BYTES + (k % 64) / 4 * 64 + r * 4 + k % 4;
    at[0] = (uint8_t)((x + 128) >> 8);
    at[32] = (uint8_t)x;
}

// Pack x [64 k][8 rows] (int32, magnitude at most PARETO_ONE) into one chunk.
INLINE void pack_activations(const int32_t *x, uint8_t *b) {
    const __m512i byte = _mm512_set1_epi32(255), half = _mm512_set1_epi32(128);
    for (int k = 0; k < 64; k += 4, b += 64) {
        const __m512i x01 = _mm512_loadu_si512(x + 8 * k), x23 = _mm512_loadu_si512(x + 8 * k + 16);
        const __m512i h01 = _mm512_and_si512(_mm512_srai_epi32(_mm512_add_epi32(x01, half), 8), byte);
        const __m512i h23 = _mm512_and_si512(_mm512_srai_epi32(_mm512_add_epi32(x23, half), 8), byte);
        // Lanes 0..7: bytes 0 and 2 of the result; lanes 8..15: bytes 1 and 3.
        const __m512i h = _mm512_or_si512(h01, _mm512_slli_epi32(h23, 16));
        const __m512i l = _mm512_or_si512(_mm512_and_si512(x01, byte), _mm512_slli_epi32(_mm512_and_si512(x23, byte), 16));
        const __m512i even = _mm512_inserti64x4(h, _mm512_castsi512_si256(l), 1);
        const __m512i odd = _mm512_shuffle_i64x2(h, l, 0xee);
        _mm512_storeu_si512(b, _mm512_or_si512(even, _mm512_slli_epi32(odd, 8)));
    }
}

#else

typedef uint16_t code_t;

static void tiles_begin(void) {}
static void tiles_end(void) {}

static void gemm8(const code_t *a, int64_t stride, int m, int chunks, const uint8_t *b, int32_t *c) {
#if defined(__AVX2__)
    for (int i = 0; i < m; i++) {
        // Four sums hide the latency of the multiply-adds.
        __m256i sum[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
        const code_t *row = a + (int64_t)i * stride;
        for (int k = 0; k < chunks * 32; k += 4)
            for (int s = 0; s < 4; s++) {
                int32_t pair;
                memcpy(&pair, row + 2 * (k + s), 4);
                const __m256i x = _mm256_loadu_si256((const __m256i *)(b + (k + s) * 32));
#if defined(PARETO_USE_VNNI)
                sum[s] = _mm256_dpwssd_epi32(sum[s], _mm256_set1_epi32(pair), x);
#else
                sum[s] = _mm256_add_epi32(sum[s], _mm256_madd_epi16(_mm256_set1_epi32(pair), x));
#endif
            }
        const __m256i total = _mm256_add_epi32(_mm256_add_epi32(sum[0], sum[1]), _mm256_add_epi32(sum[2], sum[3]));
        _mm256_storeu_si256((__m256i *)(c + 8 * i), total);
    }
#else
    for (int i = 0; i < m; i++) {
        const code_t *row = a + (int64_t)i * stride;
        int32_t sum[8] = {0};
        for (int k = 0; k < chunks * 32; k++) {
            int16_t x[16];
            memcpy(x, b + k * 32, 32);
            for (int r = 0; r < 8; r++) sum[r] += row[2 * k] * x[2 * r] + row[2 * k + 1] * x[2 * r + 1];
        }
        memcpy(c + 8 * i, sum, 32);
    }
#endif
}

INLINE void put_activation(uint8_t *b, int k, int r, int32_t x) {
    const int16_t value = (int16_t)x;
    memcpy(b + (k / 64) * CHUNK_BYTES + (k % 64) / 2 * 32 + r * 4 + k % 2 * 2, &value, 2);
}

INLINE void pack_activations(const int32_t *x, uint8_t *b) {
    for (int k = 0; k < 64; k += 2, b += 32) {
        int32_t out[8];
        for (int r = 0; r < 8; r++) out[r] = (x[8 * k + r] & 0xffff) | (int32_t)((uint32_t)x[8 * k + 8 + r] << 16);
        memcpy(b, out, 32);
    }
}

#endif
#endif
