// One instruction set's search; PARETO_TRELLIS_SEARCH is its name.
//
// Of a state's bits the lower OVERLAP ones are also the pair's before it, the upper ones the next pair's. So a step needs,
// of what came before, the least cost of each overlap alone, and the costs of 65,536 states are never stored: an overlap's
// 2^(2 bits) states are neighbours, and the least of their costs goes to the next step, together with which of them it was.
// That one's number takes the place of a cost's last bits, so that one minimum of integers finds both: costs are not
// negative, and then their bits order as they do.
#include "trellis_search.h"

#include <stdlib.h>
#include <string.h>

#define PAIRS 128
#define STATES 65536
#define MOST_OVERLAPS 4096  // Of 2 bits.
#define FAR 1e30f

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef floats floats_anywhere __attribute__((aligned(4)));
typedef ints ints_anywhere __attribute__((aligned(4)));

#if defined(__AVX512F__)
#include <immintrin.h>
static inline floats multiply_add(floats a, floats b, floats c) { return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
static inline ints smaller(ints a, ints b) { return (ints)_mm512_min_epi32((__m512i)a, (__m512i)b); }
static inline int32_t least_of(ints a) { return _mm512_reduce_min_epi32((__m512i)a); }
#elif defined(__AVX2__)
#include <immintrin.h>
static inline floats multiply_add(floats a, floats b, floats c) { return (floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
static inline ints smaller(ints a, ints b) { return (ints)_mm256_min_epi32((__m256i)a, (__m256i)b); }
static inline int32_t least_of(ints a) {
    __m128i m = _mm_min_epi32(_mm256_castsi256_si128((__m256i)a), _mm256_extracti128_si256((__m256i)a, 1));
    m = _mm_min_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    return _mm_cvtsi128_si32(_mm_min_epi32(m, _mm_shuffle_epi32(m, 0xb1)));
}
#else
static inline floats multiply_add(floats a, floats b, floats c) { return a * b + c; }
static inline ints smaller(ints a, ints b) { return (a & (a < b)) | (b & (a >= b)); }
static inline int32_t least_of(ints a) {
    int32_t least = a[0];
    for (int l = 1; l < LANES; l++) least = a[l] < least ? a[l] : least;
    return least;
}
#endif

// Tiles that are searched side by side, so that what states mean is read from the second cache once for all of them.
#define SIDE 4

typedef struct {
    float least[2][MOST_OVERLAPS];        // Of an overlap's states, before a step and after it.
    uint8_t chosen[PAIRS][MOST_OVERLAPS]; // Which state of an overlap that was, by step.
} tile_scratch;

typedef struct {
    tile_scratch of[SIDE];
} scratch;

// The costs after one more pair of each tile, step i of the search, from those before it.
static void step(const pareto_trellis_search *a, const int64_t *pairs, int i, scratch *s) {
    const int branches = 1 << 2 * a->bits, overlaps = STATES >> 2 * a->bits;
    const floats zero = {0};
    floats w0[SIDE], w1[SIDE], n0[SIDE], n1[SIDE], constant[SIDE];
    for (int t = 0; t < SIDE; t++) {
        const float x0 = a->targets[2 * pairs[t]], x1 = a->targets[2 * pairs[t] + 1];
        const float v0 = a->weights ? a->weights[2 * pairs[t]] : 1, v1 = a->weights ? a->weights[2 * pairs[t] + 1] : 1;
        // Costs w (b - x)^2 as b (w b - 2 w x) + w x^2.
        w0[t] = zero + v0, w1[t] = zero + v1, n0[t] = zero - 2 * v0 * x0, n1[t] = zero - 2 * v1 * x1;
        constant[t] = zero + (v0 * x0 * x0 + v1 * x1 * x1);
    }
    ints numbers;
    for (int l = 0; l < LANES; l++) numbers[l] = l;
    float smallest[SIDE];
    for (int t = 0; t < SIDE; t++) smallest[t] = 2 * FAR;
    for (int p = 0; p < overlaps; p++) {
        const int base = p * branches;
        ints best[SIDE], number = numbers;
        for (int t = 0; t < SIDE; t++) best[t] = numbers | 0x7fffff00;
        for (int low = 0; low < branches; low += LANES) {
            // Two bfloat16 numbers, each the upper half of a float32.
            const ints both = *(const ints_anywhere *)(a->values + base + low);
            const floats b0 = (floats)(both << 16), b1 = (floats)(both & (int32_t)0xffff0000);
            const int before = (base + low) & (overlaps - 1);
#pragma GCC unroll 4
            for (int t = 0; t < SIDE; t++) {
                floats cost = *(const floats_anywhere *)(s->of[t].least[i % 2] + before) + constant[t];
                cost = multiply_add(b1, multiply_add(w1[t], b1, n1[t]), cost);
                cost = multiply_add(b0, multiply_add(w0[t], b0, n0[t]), cost);
                best[t] = smaller(best[t], ((ints)cost & ~0xff) | number);
            }
            number += LANES;
        }
        for (int t = 0; t < SIDE; t++) {
            int32_t least = least_of(best[t]);
            s->of[t].chosen[i][p] = (uint8_t)(least & 0xff);
            least &= ~0xff;
            float *after = s->of[t].least[(i + 1) % 2] + p;
            memcpy(after, &least, 4);
            smallest[t] = *after < smallest[t] ? *after : smallest[t];
        }
    }
    // Differences count alone, and small numbers have them exactly.
    for (int t = 0; t < SIDE; t++)
        for (int p = 0; p < overlaps; p++) s->of[t].least[(i + 1) % 2][p] -= smallest[t];
}

// All pairs, the first one being pair `begin`. Leaves what was chosen by step, and the costs in least[0].
static void forward(const pareto_trellis_search *a, int64_t tile, int begin, scratch *s) {
    for (int i = 0; i < PAIRS; i++) {
        int64_t pairs[SIDE];
        for (int t = 0; t < SIDE; t++) {
            // Past the last tile that one once more.
            const int64_t of = tile + t < a->tiles ? tile + t : a->tiles - 1;
            pairs[t] = of * PAIRS + (begin + i) % PAIRS;
        }
        step(a, pairs, i, s);
    }
}

int PARETO_TRELLIS_SEARCH(const pareto_trellis_search *a) {
    if (a->bits < 2 || a->bits > 4) return -1;
    const int overlaps = STATES >> 2 * a->bits;
    int failed = 0;
#pragma omp parallel num_threads(a->num_threads) if (a->num_threads > 1)
    {
        scratch *s = aligned_alloc(64, (sizeof(scratch) + 63) / 64 * 64);
        if (!s) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic)
        for (int64_t tile = 0; tile < a->tiles; tile += SIDE) {
            if (!s) continue;
            // Once around from the middle: what the best path has at the seam.
            for (int t = 0; t < SIDE; t++) memset(s->of[t].least[0], 0, sizeof(s->of[t].least[0]));
            forward(a, tile, PAIRS / 2, s);
            int seam[SIDE];
            for (int t = 0; t < SIDE; t++) {
                const tile_scratch *own = s->of + t;
                int p = 0;
                for (int q = 1; q < overlaps; q++)
                    if (own->least[0][q] < own->least[0][p]) p = q;
                for (int i = PAIRS - 1; i >= PAIRS / 2; i--) p = (p << 2 * a->bits | own->chosen[i][p]) & (overlaps - 1);
                seam[t] = p;
            }
            // The best path that begins and ends with it.
            for (int t = 0; t < SIDE; t++)
                for (int q = 0; q < overlaps; q++) s->of[t].least[0][q] = q == seam[t] ? 0 : FAR;
            forward(a, tile, 0, s);
            for (int t = 0; t < SIDE && tile + t < a->tiles; t++) {
                int p = seam[t];
                for (int i = PAIRS - 1; i >= 0; i--) {
                    const int state = p << 2 * a->bits | s->of[t].chosen[i][p];
                    a->states[(tile + t) * PAIRS + i] = state;
                    p = state & (overlaps - 1);
                }
            }
        }
        free(s);
    }
    return failed ? -2 : 0;
}
