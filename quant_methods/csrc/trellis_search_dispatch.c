// Takes the widest instruction set that this processor has.
#include "trellis_search.h"

#include <stddef.h>

// What kv_cache/compiled.py compares with its own structure when it loads the library.
const size_t pareto_bytes_of_trellis = sizeof(pareto_trellis_search);

int pareto_trellis_search_best(const pareto_trellis_search *a) {
#ifdef PARETO_X86
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) return pareto_trellis_search_avx512(a);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return pareto_trellis_search_avx2(a);
#endif
    return pareto_trellis_search_generic(a);
}
