#define PARETO_TRELLIS_SEARCH pareto_trellis_search_avx2
#include "trellis_search_impl.h"
