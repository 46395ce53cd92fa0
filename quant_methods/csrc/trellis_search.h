// The streams of a trellis code that read back closest to given weights: quant_methods/kernels/trellis_search.py. Compiled
// once for each instruction set.
#ifndef PARETO_TRELLIS_SEARCH_H
#define PARETO_TRELLIS_SEARCH_H

#include <stdint.h>

// quant_methods/kernels/trellis_search.py mirrors it.
typedef struct {
    const float *targets;  // [tiles][128][2]
    const float *weights;  // [tiles][128][2], of squared errors; NULL: 1
    const int32_t *values; // [65536]: what states mean, a pair of bfloat16 numbers, the first one in the lower half
    const int32_t *turned; // the same as [overlaps][branches], 2^(16 - 2 bits) by 2^(2 bits): states by their lower bits
    int32_t *states;       // [tiles][128]
    int64_t tiles;
    int32_t bits;          // of a weight, 2 to 4
    int32_t num_threads;
} pareto_trellis_search;

int pareto_trellis_search_generic(const pareto_trellis_search *);
int pareto_trellis_search_avx2(const pareto_trellis_search *);
int pareto_trellis_search_avx512(const pareto_trellis_search *);

#endif
