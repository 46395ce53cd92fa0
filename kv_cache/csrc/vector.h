// Sixteen-lane vectors in GCC's portable form: one source, lowered to AVX-512, AVX2, NEON or plain code.
//
// Multiply-adds are fused everywhere, explicitly (the compiler itself may not contract), so every instruction set
// rounds alike.
#ifndef PARETO_VECTOR_H
#define PARETO_VECTOR_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float v16f __attribute__((vector_size(64)));
typedef int32_t v16i __attribute__((vector_size(64)));
typedef uint32_t v16u __attribute__((vector_size(64)));
typedef uint16_t v32h __attribute__((vector_size(64)));

INLINE v16f load16(const float *p) {
    v16f v;
    memcpy(&v, p, 64);
    return v;
}

INLINE v16i load16i(const void *p) {
    v16i v;
    memcpy(&v, p, 64);
    return v;
}

INLINE void store16(float *p, v16f v) { memcpy(p, &v, 64); }
INLINE void store16i(void *p, v16i v) { memcpy(p, &v, 64); }
INLINE v16f splat(float x) { return (v16f){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE v16i splati(int32_t x) { return (v16i){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE v16i iota(void) { return (v16i){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }
INLINE v16f to_float(v16i v) { return __builtin_convertvector(v, v16f); }
INLINE v16f select16(v16i mask, v16f yes, v16f no) { return (v16f)((mask & (v16i)yes) | (~mask & (v16i)no)); }
INLINE v16i select16i(v16i mask, v16i yes, v16i no) { return (mask & yes) | (~mask & no); }

INLINE v16f fma16(v16f a, v16f b, v16f c) {
#if defined(__AVX512F__)
    return (v16f)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    __m256 x[2], y[2], z[2];
    memcpy(x, &a, 64), memcpy(y, &b, 64), memcpy(z, &c, 64);
    for (int i = 0; i < 2; i++) z[i] = _mm256_fmadd_ps(x[i], y[i], z[i]);
    memcpy(&c, z, 64);
    return c;
#else
    for (int i = 0; i < 16; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#endif
}

INLINE v16f max16(v16f a, v16f b) {
#if defined(__AVX512F__)
    return (v16f)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return select16(a > b, a, b);
#endif
}

INLINE v16i max16i(v16i a, v16i b) {
#if defined(__AVX512F__)
    return (v16i)_mm512_max_epi32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    __m256i x[2], y[2];
    memcpy(x, &a, 64), memcpy(y, &b, 64);
    for (int i = 0; i < 2; i++) x[i] = _mm256_max_epi32(x[i], y[i]);
    memcpy(&a, x, 64);
    return a;
#else
    return select16i(a > b, a, b);
#endif
}

// Reductions over the lanes, always in this order.
#define REDUCE16(v, type, join)                                                                                        \
    do {                                                                                                               \
        v = join(v, __builtin_shuffle(v, (v16i){8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7}));               \
        v = join(v, __builtin_shuffle(v, (v16i){4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11}));               \
        v = join(v, __builtin_shuffle(v, (v16i){2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13}));               \
        v = join(v, __builtin_shuffle(v, (v16i){1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14}));               \
    } while (0)

INLINE v16f add16(v16f a, v16f b) { return a + b; }
INLINE v16u add16u(v16u a, v16u b) { return a + b; }

INLINE float lanes_max(v16f v) {
    REDUCE16(v, v16f, max16);
    return v[0];
}

INLINE int32_t lanes_max_i(v16i v) {
    REDUCE16(v, v16i, max16i);
    return v[0];
}

INLINE float lanes_sum(v16f v) {
    REDUCE16(v, v16f, add16);
    return v[0];
}

INLINE uint32_t lanes_sum_u(v16u v) {
    REDUCE16(v, v16u, add16u);
    return v[0];
}

#define ROUND_MAGIC 12582912.0f  // 1.5 * 2**23: adding it rounds to an integer, which the low bits then hold
#define ROUND_BITS 0x4b400000

#define EXP2_1 6.931470037e-01f
#define EXP2_2 2.402224243e-01f
#define EXP2_3 5.550733581e-02f
#define EXP2_4 9.671512991e-03f
#define EXP2_5 1.326472731e-03f

// 2**x for x <= 0, relative error below 2.5e-7; exactly 1 at 0. Below -100, minus infinity included, about 2**-100.
// Polynomial: least relative error, degree 5, on [-1/2, 1/2] with the constant term held at 1.
INLINE v16f exp2_16(v16f x) {
    const v16f magic = splat(ROUND_MAGIC), clipped = max16(x, splat(-100.0f));
    const v16f shifted = clipped + magic, f = clipped - (shifted - magic);
    v16f p = fma16(splat(EXP2_5), f, splat(EXP2_4));
    p = fma16(p, f, splat(EXP2_3));
    p = fma16(p, f, splat(EXP2_2));
    p = fma16(p, f, splat(EXP2_1));
    p = fma16(p, f, splat(1.0f));
    // The magic number's bits vanish in the shift.
    return (v16f)((v16u)p + ((v16u)shifted << 23));
}

// As exp2_16, but exactly 0 below -100.
INLINE v16f exp2_or_0(v16f x) { return (v16f)((v16i)exp2_16(x) & (x >= splat(-100.0f))); }

#endif
