// Sixteen-lane vectors in GCC's portable form: one source, lowered to AVX-512, AVX2, NEON or plain code.
#ifndef PARETO_VECTOR_H
#define PARETO_VECTOR_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

typedef float v16f __attribute__((vector_size(64)));
typedef int32_t v16i __attribute__((vector_size(64)));

static inline v16f load16(const float *p) {
    v16f v;
    memcpy(&v, p, 64);
    return v;
}

static inline v16i load16i(const int32_t *p) {
    v16i v;
    memcpy(&v, p, 64);
    return v;
}

static inline void store16(float *p, v16f v) { memcpy(p, &v, 64); }
static inline void store16i(int32_t *p, v16i v) { memcpy(p, &v, 64); }
static inline v16f splat(float x) { return (v16f){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
static inline v16i splati(int32_t x) { return (v16i){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

// Lanes 0..7 hold a, lanes 8..15 hold b.
static inline v16f halves(float a, float b) { return (v16f){a, a, a, a, a, a, a, a, b, b, b, b, b, b, b, b}; }

static inline v16f select16(v16i mask, v16f yes, v16f no) {
    return (v16f)((mask & (v16i)yes) | (~mask & (v16i)no));
}

static inline v16f max16(v16f a, v16f b) {
#if defined(__AVX512F__)
    return (v16f)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return select16(a > b, a, b);
#endif
}

// Maximum (or sum) of lanes r and r + 8, in both of them.
static inline v16f swap_halves(v16f v) {
    return __builtin_shuffle(v, (v16i){8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
}

static inline v16i swap_halves_i(v16i v) {
    return __builtin_shuffle(v, (v16i){8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
}

// 2**x for x <= 0, relative error below 2e-7; exactly 1 at 0 and exactly 0 below -125, -infinity included.
// Polynomial: Cephes' exp2f (S. Moshier).
static inline v16f exp2_16(v16f x) {
    const v16f magic = splat(12582912.0f);  // 1.5 * 2**23: adding it rounds to an integer
    const v16i tiny = x < splat(-125.0f);
    const v16f clipped = max16(x, splat(-125.0f));
    const v16f shifted = clipped + magic;
    const v16f f = clipped - (shifted - magic);
    v16f p = splat(1.535336188319500e-4f);
    p = p * f + splat(1.339887440266574e-3f);
    p = p * f + splat(9.618437357674640e-3f);
    p = p * f + splat(5.550332471162809e-2f);
    p = p * f + splat(2.402264791363012e-1f);
    p = p * f + splat(6.931472028550421e-1f);
    p = p * f + splat(1.0f);
    const v16i exponent = (v16i)shifted - (v16i)magic;
    const v16f result = (v16f)((v16i)p + (exponent << 23));
    return (v16f)((v16i)result & ~tiny);
}

#endif
