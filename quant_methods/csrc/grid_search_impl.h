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

int PARETO_GRID_SEARCH(const pareto_grid_search *a) {
    if (a->candidates > PARETO_MAX_CANDIDATES) return -1;
    const int64_t count = a->rows * a->groups;
#pragma omp parallel for num_threads(a->num_threads) if (a->num_threads > 1) schedule(static)
    for (int64_t at = 0; at < count; at++) {
        float errors[PARETO_MAX_CANDIDATES] = {0}, rounded[BLOCK];
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
        int32_t best = 0;
        for (int32_t k = 1; k < a->candidates; k++)
            if (errors[k] < errors[best]) best = k;
        a->best[at] = best;
    }
    return 0;
}
