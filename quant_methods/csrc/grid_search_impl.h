// One instruction set's search; PARETO_GRID_SEARCH is its name.
#include "grid_search.h"

#include <math.h>

// Added and taken off again, it rounds to an integer, ties to even.
#define ROUND_MAGIC 12582912.0f
#define BLOCK 1024

// Sum of importance * (what is read back - weight)^2. rounded: weight / scale as integers, not yet clamped.
static float group_error(const float *weight, const float *rounded, const float *importance, int64_t width, float scale,
                         float low, float high) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; i++) {
        float x = rounded[i] < low ? low : rounded[i];
        x = x > high ? high : x;
        const float error = x * scale - weight[i];
        sum += error * error * importance[i];
    }
    return sum;
}

// Candidates side by side, and rows of the matrix whose products are in registers together.
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
#define ROWS 8
typedef float lanes __attribute__((vector_size(4 * LANES)));

// Errors e^T M e of LANES candidates, e being what is read back less the weight, and M symmetric: off its diagonal
// blocks one half is enough.
static void pair_errors(const float *weight, const float *matrix, int64_t width, const float *scale, const float *zero,
                        float low, float high, float *errors) {
    float e[PARETO_MAX_PAIRS][LANES] __attribute__((aligned(64)));
    for (int64_t i = 0; i < width; i++) {
#pragma omp simd
        for (int k = 0; k < LANES; k++) {
            float x = weight[i] / scale[k];
            x = x < -65536.0f ? -65536.0f : x;
            x = x > 65536.0f ? 65536.0f : x;
            x = x + ROUND_MAGIC - ROUND_MAGIC;
            const float least = low - zero[k], most = high - zero[k];
            x = x < least ? least : x;
            x = x > most ? most : x;
            e[i][k] = x * scale[k] - weight[i];
        }
    }
    lanes sum = {0};
    for (int64_t i = 0; i < width; i += ROWS) {
        const float *rows = matrix + i * width;
        lanes product[ROWS] = {0};
        for (int64_t j = 0; j < i; j++) {
            const lanes other = *(const lanes *)e[j];
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) product[r] += rows[r * width + j] * other;
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) product[r] += product[r];
        for (int64_t j = i; j < i + ROWS; j++) {
            const lanes other = *(const lanes *)e[j];
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) product[r] += rows[r * width + j] * other;
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) sum += product[r] * *(const lanes *)e[i + r];
    }
    *(lanes *)errors = sum;
}

// The errors of all candidates of one group.
static void all_pair_errors(const pareto_grid_search *a, int64_t at, float *errors) {
    const int64_t count = a->rows * a->groups;
    for (int64_t k = 0; k < a->candidates; k += LANES) {
        float scale[LANES], zero[LANES];
        for (int64_t l = 0; l < LANES; l++) {
            // The last ones are tried again in place of none.
            const int64_t from = (k + l < a->candidates ? k + l : a->candidates - 1) * count + at;
            scale[l] = a->scale[from];
            zero[l] = a->zero[from];
        }
        pair_errors(a->weight + at * a->width, a->importance + at % a->groups * a->width * a->width, a->width, scale, zero,
                    a->low, a->high, errors + k);
    }
}

// The same where errors count one by one.
static void all_single_errors(const pareto_grid_search *a, int64_t at, float *errors) {
    const int64_t count = a->rows * a->groups;
    float rounded[BLOCK];
    // A wide group goes through a block at a time.
    for (int64_t first = 0; first < a->width; first += BLOCK) {
        const int64_t width = a->width - first < BLOCK ? a->width - first : BLOCK;
        const float *weight = a->weight + at * a->width + first;
        const float *importance = a->importance + at % a->groups * a->width + first;
        float last = NAN;
        for (int64_t k = 0; k < a->candidates; k++) {
            const float scale = a->scale[k * count + at], zero = a->zero[k * count + at];
            // Neighbours may differ in the zero-point alone.
            if (scale != last) {
#pragma omp simd
                for (int64_t i = 0; i < width; i++) {
                    float x = weight[i] / scale;
                    // Far beyond every code, where the sum below would no longer round.
                    x = x < -65536.0f ? -65536.0f : x;
                    x = x > 65536.0f ? 65536.0f : x;
                    rounded[i] = x + ROUND_MAGIC - ROUND_MAGIC;
                }
                last = scale;
            }
            errors[k] += group_error(weight, rounded, importance, width, scale, a->low - zero, a->high - zero);
        }
    }
}

int PARETO_GRID_SEARCH(const pareto_grid_search *a) {
    if (a->candidates > PARETO_MAX_CANDIDATES) return -1;
    if (a->pairs && (a->width > PARETO_MAX_PAIRS || a->width % ROWS)) return -1;
    const int64_t count = a->rows * a->groups;
#pragma omp parallel for num_threads(a->num_threads) if (a->num_threads > 1) schedule(static)
    for (int64_t at = 0; at < count; at++) {
        float errors[PARETO_MAX_CANDIDATES] __attribute__((aligned(64))) = {0};
        if (a->pairs)
            all_pair_errors(a, at, errors);
        else
            all_single_errors(a, at, errors);
        int32_t best = 0;
        for (int32_t k = 1; k < a->candidates; k++)
            if (errors[k] < errors[best]) best = k;
        a->best[at] = best;
    }
    return 0;
}
