#define PARETO_TRELLIS_SEARCH pareto_trellis_search_generic
#include "trellis_search_impl.h"
