// From the scores of a chunk to the weights of its tokens, row by row: 16-bit fixed-point numbers relative to the row's
// maximum in the chunk, as activations for the product with the values.
#ifndef PARETO_SOFTMAX_H
#define PARETO_SOFTMAX_H

#include "unit.h"

// Scores are [16 vectors][16]: int32 or float. What a row does not see is INT32_MIN or -infinity.
INLINE v16i seen_tokens(const unit_t *u, int r, int token) {
    const v16i at = iota() + splati(token);
    return (at >= splati(u->first[r])) & (at <= splati(u->last[r]));
}

// Whether some row does not see all of the tokens from .. to - 1.
INLINE int is_masked(const unit_t *u, int from, int to) { return to - 1 > u->lowest_last || from < u->highest_first; }

// c * tanh(score / c) in base 2, by exp2: tanh |x| = (1 - t) / (1 + t) where t = exp(-2 |x|).
INLINE v16f soft_cap(v16f score, float cap) {
    const v16i sign = (v16i)score & splati(INT32_MIN);
    const v16f size = (v16f)((v16i)score ^ sign);
    const v16f t = exp2_16(size * splat(-2.0f * LOG2E / cap));
    const v16f capped = splat(cap * LOG2E) * ((splat(1) - t) / (splat(1) + t));
    return (v16f)((v16i)capped | sign);
}

// Weight bits of 16 tokens: ROUND_BITS + weight.
INLINE v16i weigh(v16f exponent) { return (v16i)fma16(exp2_16(exponent), splat(PARETO_ONE), splat(ROUND_MAGIC)); }

// One row's 64 int32 scores to an activation chunk; returns the sums of the weight bits.
#if defined(__AVX2__) && !defined(__AVX512F__)
// Sixteen lanes do not fit a register here, and would go through memory at each step: eight at a time, the same steps.
INLINE v16u weigh_block(const int32_t *scores, v16i base, v16f step, uint8_t *chunk, int rows, int r, const int masked) {
    const __m256i top = _mm256_set1_epi32(base[0]), word = _mm256_set1_epi32(0xffff);
    const __m256 unit = _mm256_set1_ps(step[0]), magic = _mm256_set1_ps(ROUND_MAGIC);
    __m256i sums[2];
    (void)rows;
    for (int half = 0; half < 2; half++) {
        __m256i bits[4];
        sums[half] = _mm256_setzero_si256();
        for (int j = 0; j < 4; j++) {
            const __m256i score = _mm256_loadu_si256((const __m256i *)(scores + 16 * j + 8 * half));
            const __m256 x = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(score, top)), unit);
            const __m256 clipped = _mm256_max_ps(x, _mm256_set1_ps(-100.0f)), shifted = _mm256_add_ps(clipped, magic);
            const __m256 f = _mm256_sub_ps(clipped, _mm256_sub_ps(shifted, magic));
            __m256 p = _mm256_fmadd_ps(_mm256_set1_ps(EXP2_5), f, _mm256_set1_ps(EXP2_4));
            p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(EXP2_3));
            p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(EXP2_2));
            p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(EXP2_1));
            p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.0f));
            const __m256i power = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
            p = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power));
            bits[j] = _mm256_castps_si256(_mm256_fmadd_ps(p, _mm256_set1_ps(PARETO_ONE), magic));
            if (masked)
                bits[j] = _mm256_blendv_epi8(bits[j], _mm256_set1_epi32(ROUND_BITS),
                                             _mm256_cmpeq_epi32(score, _mm256_set1_epi32(INT32_MIN)));
            sums[half] = _mm256_add_epi32(sums[half], bits[j]);
        }
        // As put_activations, in halves.
        __m256i *even = (__m256i *)(chunk + 128 * r + 32 * half), *odd = (__m256i *)(chunk + 128 * r + 64 + 32 * half);
        _mm256_store_si256(even, _mm256_or_si256(_mm256_and_si256(bits[0], word), _mm256_slli_epi32(bits[2], 16)));
        _mm256_store_si256(odd, _mm256_or_si256(_mm256_and_si256(bits[1], word), _mm256_slli_epi32(bits[3], 16)));
    }
    v16u sum;
    memcpy(&sum, sums, 64);
    return sum;
}
#else
INLINE v16u weigh_block(const int32_t *scores, v16i base, v16f step, uint8_t *chunk, int rows, int r, const int masked) {
    v16i bits[4];
    for (int j = 0; j < 4; j++) {
        const v16i score = load16i(scores + 16 * j);
        bits[j] = weigh(to_float((v16i)((v16u)score - (v16u)base)) * step);
        if (masked) bits[j] = select16i(score == splati(INT32_MIN), splati(ROUND_BITS), bits[j]);
    }
    put_activations(chunk, rows, r, bits[0], bits[1], bits[2], bits[3]);
    return (v16u)bits[0] + (v16u)bits[1] + (v16u)bits[2] + (v16u)bits[3];
}
#endif

// One row's int32 scores to activations of `blocks` blocks; returns the maximum and sets the weights' sum.
INLINE int32_t weigh_integers(const unit_t *u, int r, int32_t *scores, int from, int blocks, uint8_t *weights,
                              float *sum_out, const int masked) {
    const v16i none = splati(INT32_MIN);
    v16i top16 = none;
    for (int i = 0; i < 4 * blocks; i++) {
        v16i score = load16i(scores + 16 * i);
        if (masked) {
            score = select16i(seen_tokens(u, r, from + 16 * i), score, none);
            store16i(scores + 16 * i, score);
        }
        top16 = max16i(top16, score);
    }
    const int32_t top = lanes_max_i(top16);
    const v16i base = splati(top);
    const v16f step = splat(u->step[r]);
    v16u sum = (v16u)splati(0);
    for (int b = 0; b < blocks; b++)
        sum += weigh_block(scores + 64 * b, base, step, weights + b * CHUNK_BYTES, u->padded_rows, r, masked);
    // 64 bits of ROUND_BITS for each block were added, modulo 2**32.
    *sum_out = (float)(int32_t)(lanes_sum_u(sum) - (uint32_t)(64 * blocks) * ROUND_BITS);
    return top;
}

INLINE float row_max(const float *scores, int vectors) {
    v16f top = load16(scores);
    for (int i = 1; i < vectors; i++) top = max16(top, load16(scores + 16 * i));
    return lanes_max(top);
}

// The same for float scores (a soft cap).
static float weigh_floats(const unit_t *u, int r, const float *scores, int blocks, uint8_t *weights, float *sum_out) {
    const float top = row_max(scores, 4 * blocks);
    // A row that sees nothing: subtract 0, so that the exponents stay -infinity and the weights 0.
    const v16f base = splat(top == -INFINITY ? 0 : top);
    v16u sum = (v16u)splati(0);
    for (int b = 0; b < blocks; b++) {
        v16i bits[4];
        for (int j = 0; j < 4; j++) {
            bits[j] = weigh(load16(scores + 64 * b + 16 * j) - base);
            sum += (v16u)bits[j];
        }
        put_activations(weights + b * CHUNK_BYTES, u->padded_rows, r, bits[0], bits[1], bits[2], bits[3]);
    }
    *sum_out = (float)(int32_t)(lanes_sum_u(sum) - (uint32_t)(64 * blocks) * ROUND_BITS);
    return top;
}

// Float scores to exponentials in place.
static float exponentials(float *scores, int vectors, float *sum_out) {
    const float top = row_max(scores, vectors);
    const v16f base = splat(top == -INFINITY ? 0 : top);
    v16f sum = splat(0);
    for (int i = 0; i < vectors; i++) {
        const v16f p = exp2_or_0(load16(scores + 16 * i) - base);
        store16(scores + 16 * i, p);
        sum += p;
    }
    *sum_out = lanes_sum(sum);
    return top;
}

// One group of channels: exponentials times the tokens' value scales, as activations that are `unit` times as large,
// and `offset`, the sum of exponentials times minima.
static void weigh_group(const unit_t *u, int r, const float *p, const float *scales, const float *minima, int blocks,
                        uint8_t *weights, float *unit, float *offset) {
    v16f largest16 = splat(0), offset16 = splat(0);
    for (int i = 0; i < 64 * blocks; i += 16) {
        largest16 = max16(largest16, load16(p + i) * load16(scales + i));
        offset16 = fma16(load16(p + i), load16(minima + i), offset16);
    }
    const float largest = lanes_max(largest16);
    const v16f inverse = splat(largest > 1e-30f ? PARETO_ONE / largest : 0.0f);
    for (int b = 0; b < blocks; b++) {
        v16i bits[4];
        for (int j = 0; j < 4; j++) {
            const int i = 64 * b + 16 * j;
            bits[j] = (v16i)fma16(load16(p + i) * load16(scales + i), inverse, splat(ROUND_MAGIC));
        }
        put_activations(weights + b * CHUNK_BYTES, u->padded_rows, r, bits[0], bits[1], bits[2], bits[3]);
    }
    *unit = largest / PARETO_ONE;
    *offset = lanes_sum(offset16);
}

#endif
