#define PARETO_TRELLIS_SEARCH pareto_trellis_search_avx512
#include "trellis_search_impl.h"
