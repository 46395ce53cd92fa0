#define PARETO_GRID_SEARCH pareto_grid_search_avx512
#include "grid_search_impl.h"
