#define PARETO_GRID_SEARCH pareto_grid_search_generic
#include "grid_search_impl.h"
