// From the integer scores of a chunk to the weights of its tokens, row by row.
//
// Scores are floats in base 2. What weighs codes of values is p * step, p = exp2(score), as 16-bit fixed-point numbers:
//
//   weight[t] = p[t] * step[t] * WEIGHT_ONE / 2**top,   top = max over t of score[t] + size[t]
//
// A value's step is (1 + m / 16) * 2**e times what all tokens share, its size e + m / 16. No logarithm is needed: size
// is at most 0.0861 below that of the step, so that weights are below 2**0.0861 * WEIGHT_ONE, which PARETO_ONE holds.
// The sum of p is taken before anything is rounded: a token of tiny values may have all of it.
#ifndef PARETO_SOFTMAX_H
#define PARETO_SOFTMAX_H

#include "unit.h"

// Whether some row does not see all of the tokens from .. to - 1, or one is the first, whose key has another centre.
INLINE int is_special(const unit_t *u, int from, int to) {
    return to - 1 > u->lowest_last || from < u->highest_first || from == 0;
}

// `count` sixteens of a row's products with codes, `dots`, and with the turn table, `turns`, to scores, which take the
// place of `dots`; -infinity where the row does not see. `token`: the first one's position. Returns `top`.
INLINE float score_row(const unit_t *u, int r, int32_t *dots, const int32_t *turns, const meta_t *m, int token,
                       int count, float cap, const int special) {
    const vf step = part_splat(u->step[r]), zero = part_splat(u->zero[r]);
    const vf turn_step = part_splat(u->turn_step[r]), turn_offset = part_splat(u->turn_offset[r]);
    const vi first = part_splat_i(u->first[r]), last = part_splat_i(u->last[r]);
    const vf first_bias = part_splat(u->first_bias[r]), nothing = part_splat(-INFINITY);
    vf tops[PARTS];
    for (int h = 0; h < PARTS; h++) {
        vf top = nothing;
        vi position = part_iota(PART * h) + token;
        for (int i = 0; i < count; i++, position += 16) {
            const int at = 16 * i + PART * h;
            const vf dot = part_fma(part_load(m[i].key_zero + PART * h), zero, part_float(part_load_i(dots + at)));
            vf bias = part_fma(part_float(part_load_i(turns + at)), turn_step, turn_offset);
            if (special) bias = part_select(position == 0, first_bias, bias);
            vf score = part_fma(dot * step, part_load(m[i].key_step + PART * h), bias);
            if (cap > 0) score = soft_cap(score, cap);
            if (special) score = part_select((position >= first) & (position <= last), score, nothing);
            part_store_i(dots + at, (vi)score);
            top = part_max(top, score + part_load(m[i].value_size + PART * h));
        }
        tops[h] = top;
    }
    v16f all;
    memcpy(&all, tops, 64);
    return lanes_max(all);
}

// One row's scores to the weights of `blocks` blocks, as activations. `sum`: of p / 2**top; `shift`: of the rounded
// weights times the bytes of the values' zeros.
INLINE void weigh_row(const unit_t *u, int r, const int32_t *scores, const meta_t *m, int blocks, float top,
                      uint8_t *weights, float *sum_out, float *shift_out) {
    // A row that sees nothing: subtract 0, so that the exponents stay -infinity and the weights 0.
    const vf base = part_splat(top == -INFINITY ? 0 : top), magic = part_splat(ROUND_MAGIC);
    vf sums[PARTS];
    vi shifts[PARTS];
    for (int h = 0; h < PARTS; h++) {
        vf sum = part_splat(0);
        vi shift = part_splat_i(0);
        const meta_t *meta = m;
        for (int b = 0; b < blocks; b++) {
            vi bits[4];
            for (int j = 0; j < 4; j++, meta++) {
                const vf p = part_exp2((vf)part_load_i(scores + 64 * b + 16 * j + PART * h) - base);
                sum += p;
                bits[j] = (vi)part_fma(p, part_load(meta->value_unit + PART * h), magic);
                shift = part_add_words(shift, bits[j], part_load_i(meta->value_zero + PART * h));
            }
            put_activations(weights + b * CHUNK_BYTES, u->padded_rows, r, PART * h, bits);
        }
        sums[h] = sum;
        shifts[h] = shift;
    }
    v16f all_sums;
    v16u all_shifts;
    memcpy(&all_sums, sums, 64);
    memcpy(&all_shifts, shifts, 64);
    *sum_out = lanes_sum(all_sums);
    *shift_out = (float)(int32_t)lanes_sum_u(all_shifts);
}

#endif
