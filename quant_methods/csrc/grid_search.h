// The search for the range of a group of weights, one candidate after the other while the group is in the first cache:
// quant_methods/formats/grid.py, fit. Compiled once for each instruction set.
#ifndef PARETO_GRID_SEARCH_H
#define PARETO_GRID_SEARCH_H

#include <stdint.h>

// quant_methods/formats/grid_search.py mirrors it.
typedef struct {
    const float *weight;      // [rows][groups][width]
    const float *importance;  // [groups][width]; with pairs [groups][width][width], symmetric
    const float *scale;       // [candidates][rows][groups]
    const float *zero;        // [candidates][rows][groups], integral
    int32_t *best;            // [rows][groups]: the candidate of the least error, the first of equal ones
    int64_t rows, groups, width, candidates;
    float low, high;          // codes
    int32_t num_threads;
    int32_t pairs;            // errors within a group count together: width is then a multiple of 8 up to 128
} pareto_grid_search;

#define PARETO_MAX_CANDIDATES 128
#define PARETO_MAX_PAIRS 128

int pareto_grid_search_generic(const pareto_grid_search *);
int pareto_grid_search_avx2(const pareto_grid_search *);
int pareto_grid_search_avx512(const pareto_grid_search *);

#endif
