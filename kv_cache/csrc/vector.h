// Vectors in GCC's portable form: one source, lowered to AVX-512, AVX2, NEON or plain code.
//
// Data go in rows of sixteen lanes (v16f, v16i), whatever the instruction set. Long loops take a row in parts of the
// size of a register (vf, vi), because GCC takes vectors wider than that through memory at each step. A lane's numbers
// are the same either way, and multiply-adds are fused everywhere, explicitly (the compiler itself may not contract), so
// every instruction set rounds alike.
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

#if defined(__AVX512F__)
#define PART 16
#elif defined(__AVX2__)
#define PART 8
#else
#define PART 4
#endif
#define PARTS (16 / PART)
typedef float vf __attribute__((vector_size(4 * PART)));
typedef int32_t vi __attribute__((vector_size(4 * PART)));
typedef uint32_t vu __attribute__((vector_size(4 * PART)));

INLINE vf part_load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE vi part_load_i(const void *p) {
    vi v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void part_store(float *p, vf v) { memcpy(p, &v, sizeof v); }
INLINE void part_store_i(void *p, vi v) { memcpy(p, &v, sizeof v); }
INLINE vf part_splat(float x) { return x - (vf){0}; }
INLINE vi part_splat_i(int32_t x) { return x - (vi){0}; }
INLINE vf part_float(vi v) { return __builtin_convertvector(v, vf); }
INLINE vf part_select(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

// The lanes' numbers from `first` on.
INLINE vi part_iota(int first) {
    static const int32_t lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return part_load_i(lanes) + first;
}

INLINE vf part_fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    for (int i = 0; i < PART; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#endif
}

INLINE vf part_max(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return part_select(a > b, a, b);
#endif
}

INLINE vf part_min(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return part_select(a < b, a, b);
#endif
}

// sum + the products of the low 16 bits, signed; the high ones of b are 0.
INLINE vi part_add_words(vi sum, vi a, vi b) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return sum + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    return sum + (a << 16 >> 16) * b;
#endif
}

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
INLINE v16f splat(float x) { return x - (v16f){0}; }
INLINE v16i splati(int32_t x) { return x - (v16i){0}; }
INLINE v16f select16(v16i mask, v16f yes, v16f no) { return (v16f)((mask & (v16i)yes) | (~mask & (v16i)no)); }

INLINE v16f fma16(v16f a, v16f b, v16f c) {
    vf x[PARTS], y[PARTS], z[PARTS];
    memcpy(x, &a, 64), memcpy(y, &b, 64), memcpy(z, &c, 64);
    for (int i = 0; i < PARTS; i++) z[i] = part_fma(x[i], y[i], z[i]);
    memcpy(&c, z, 64);
    return c;
}

INLINE v16f max16(v16f a, v16f b) {
    vf x[PARTS], y[PARTS];
    memcpy(x, &a, 64), memcpy(y, &b, 64);
    for (int i = 0; i < PARTS; i++) x[i] = part_max(x[i], y[i]);
    memcpy(&a, x, 64);
    return a;
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

#define EXP2_1 6.931241934e-01f
#define EXP2_2 2.402409861e-01f
#define EXP2_3 5.590642504e-02f
#define EXP2_4 9.582853169e-03f

// 2**x for x <= 0, relative error below 3e-6, a fifth of what rounding to 16 bits takes off the largest weight; exactly
// 1 at 0. Below -100, minus infinity included, about 2**-100. Polynomial: least relative error, degree 4, on
// [-1/2, 1/2], with the constant term held at 1.
INLINE vf part_exp2(vf x) {
    const vf magic = part_splat(ROUND_MAGIC), clipped = part_max(x, part_splat(-100.0f));
    const vf shifted = clipped + magic, f = clipped - (shifted - magic);
    vf p = part_fma(part_splat(EXP2_4), f, part_splat(EXP2_3));
    p = part_fma(p, f, part_splat(EXP2_2));
    p = part_fma(p, f, part_splat(EXP2_1));
    p = part_fma(p, f, part_splat(1.0f));
    // The magic number's bits vanish in the shift.
    return (vf)((vu)p + ((vu)shifted << 23));
}

// As part_exp2, but exactly 0 below -100.
INLINE v16f exp2_or_0(v16f x) {
    vf parts[PARTS];
    memcpy(parts, &x, 64);
    for (int i = 0; i < PARTS; i++)
        parts[i] = (vf)((vi)part_exp2(parts[i]) & (parts[i] >= part_splat(-100.0f)));
    memcpy(&x, parts, 64);
    return x;
}

#endif
