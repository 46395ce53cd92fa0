// Reading a page: planes of packed codes to rows of one byte a code, and rows to columns.
#ifndef PARETO_PAGES_H
#define PARETO_PAGES_H

#include "pareto_cpu.h"
#include "vector.h"

#define INLINE static inline __attribute__((always_inline))

// Called with a constant head size, so that the compiler unrolls each row into a few vector instructions.
static inline __attribute__((always_inline)) void unpack_rows_of(const uint8_t *restrict plane, const uint8_t *restrict high, int bits, const int dim, int count,
                           uint8_t *restrict rows, int stride) {
    for (int t = 0; t < count; t++, rows += stride) {
        if (bits == 8) {
            memcpy(rows, plane + (int64_t)t * dim, dim);
            continue;
        }
        const uint8_t *restrict source = plane + (int64_t)t * (dim / 2);
#if defined(__AVX512BW__)
        if (bits == 4 && dim == 64) {  // the common case in one store, which tile and vector loads then forward from
            const __m256i packed = _mm256_loadu_si256((const __m256i *)source), mask = _mm256_set1_epi8(15);
            const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(packed, 4), mask);
            _mm512_storeu_si512(rows, _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_and_si256(packed, mask)), upper, 1));
            continue;
        }
#endif
        for (int j = 0; j < dim / 2; j++) {
            rows[j] = source[j] & 15;
            rows[j + dim / 2] = source[j] >> 4;
        }
        if (bits == 6) {
            const uint8_t *restrict pairs = high + (int64_t)t * (dim / 4);
            for (int j = 0; j < dim / 4; j++) {
                rows[j] |= (pairs[j] & 3) << 4;
                rows[j + dim / 4] |= ((pairs[j] >> 2) & 3) << 4;
                rows[j + dim / 2] |= ((pairs[j] >> 4) & 3) << 4;
                rows[j + dim / 4 * 3] |= (pairs[j] >> 6) << 4;
            }
        }
    }
}

// Unpack `count` consecutive tokens' codes of one plane pair into rows[count][stride], one byte a code.
static void unpack_rows(const uint8_t *plane, const uint8_t *high, int bits, int dim, int count, uint8_t *rows,
                        int stride) {
    switch (dim) {
        case 64: unpack_rows_of(plane, high, bits, 64, count, rows, stride); break;
        case 80: unpack_rows_of(plane, high, bits, 80, count, rows, stride); break;
        case 96: unpack_rows_of(plane, high, bits, 96, count, rows, stride); break;
        case 128: unpack_rows_of(plane, high, bits, 128, count, rows, stride); break;
        default: unpack_rows_of(plane, high, bits, 256, count, rows, stride); break;
    }
}

#if defined(__AVX512BW__)
// 16 rows of 64 bytes to 64 columns of 16 bytes: four interleaving steps, each within 128-bit lanes.
INLINE void transpose_16x64(const uint8_t *rows, int stride, uint8_t *columns, int column_stride) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(rows + (int64_t)i * stride);
    for (int i = 0; i < 8; i++) {
        b[2 * i] = _mm512_unpacklo_epi8(a[i], a[i + 8]);
        b[2 * i + 1] = _mm512_unpackhi_epi8(a[i], a[i + 8]);
    }
    for (int i = 0; i < 8; i++) {
        a[2 * i] = _mm512_unpacklo_epi8(b[i], b[i + 8]);
        a[2 * i + 1] = _mm512_unpackhi_epi8(b[i], b[i + 8]);
    }
    for (int i = 0; i < 8; i++) {
        b[2 * i] = _mm512_unpacklo_epi8(a[i], a[i + 8]);
        b[2 * i + 1] = _mm512_unpackhi_epi8(a[i], a[i + 8]);
    }
    for (int i = 0; i < 8; i++) {
        a[2 * i] = _mm512_unpacklo_epi8(b[i], b[i + 8]);
        a[2 * i + 1] = _mm512_unpackhi_epi8(b[i], b[i + 8]);
    }
    for (int i = 0; i < 16; i++) {
        uint8_t *out = columns + (int64_t)i * column_stride;
        _mm_storeu_si128((__m128i *)out, _mm512_castsi512_si128(a[i]));
        _mm_storeu_si128((__m128i *)(out + 16L * column_stride), _mm512_extracti32x4_epi32(a[i], 1));
        _mm_storeu_si128((__m128i *)(out + 32L * column_stride), _mm512_extracti32x4_epi32(a[i], 2));
        _mm_storeu_si128((__m128i *)(out + 48L * column_stride), _mm512_extracti32x4_epi32(a[i], 3));
    }
}
#endif

// rows[64][stride] to columns[dim][64]; stride is a multiple of 64 and at least dim.
static void transpose_rows(const uint8_t *rows, int stride, int dim, uint8_t *columns) {
#if defined(__AVX512BW__)
    for (int c = 0; c < dim; c += 64)
        for (int t = 0; t < 64; t += 16)
            transpose_16x64(rows + (int64_t)t * stride + c, stride, columns + (int64_t)c * 64 + t, 64);
#elif defined(__SSE2__)
    for (int c = 0; c < dim; c += 16)
        for (int t = 0; t < 64; t += 16) {
            __m128i a[16], b[16];
            for (int i = 0; i < 16; i++) a[i] = _mm_loadu_si128((const __m128i *)(rows + (int64_t)(t + i) * stride + c));
            for (int step = 0; step < 2; step++) {
                for (int i = 0; i < 8; i++) {
                    b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
                    b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
                }
                for (int i = 0; i < 8; i++) {
                    a[2 * i] = _mm_unpacklo_epi8(b[i], b[i + 8]);
                    a[2 * i + 1] = _mm_unpackhi_epi8(b[i], b[i + 8]);
                }
            }
            for (int i = 0; i < 16; i++) _mm_storeu_si128((__m128i *)(columns + (int64_t)(c + i) * 64 + t), a[i]);
        }
#else
    for (int c = 0; c < dim; c++)
        for (int t = 0; t < 64; t++) columns[c * 64 + t] = rows[(int64_t)t * stride + c];
#endif
}

#endif
