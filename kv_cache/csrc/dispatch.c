// Which instruction set this processor has, and the call of its kernel.
#include "pareto_cpu.h"

#include <stddef.h>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

// Tiles are usable once the kernel has been asked for their state (arch_prctl ARCH_REQ_XCOMP_PERM of XTILEDATA).
static int has_amx(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    if (!(d >> 24 & 1) || !(d >> 25 & 1)) return 0;
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}
#endif

int pareto_best_isa(void) {
    static int best = -1;
    if (best >= 0) return best;
    int isa = PARETO_GENERIC;
#if defined(PARETO_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        isa = PARETO_AVX2;
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")
            && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni")) {
            isa = PARETO_AVX512;
#if defined(__linux__)
            if (has_amx()) isa = PARETO_AMX;
#endif
        }
    }
#endif
    return best = isa;
}

// What kv_cache/compiled.py compares with its own structures when it loads the library.
const size_t pareto_bytes_of_attention = sizeof(pareto_attention_args), pareto_bytes_of_store = sizeof(pareto_store_args);

// Attend over codes with the given instruction set, which must not exceed the best one. 0: done; -1: out of memory;
// -2: no such instruction set here; -3: a position beyond the table of centres.
int pareto_attention(const pareto_attention_args *args, int isa) {
    if (isa < 0 || isa > pareto_best_isa()) return -2;
#if defined(PARETO_X86)
    if (isa == PARETO_AMX) return pareto_attention_amx(args);
    if (isa == PARETO_AVX512) return pareto_attention_avx512(args);
    if (isa == PARETO_AVX2) return pareto_attention_avx2(args);
#endif
    return pareto_attention_generic(args);
}

// Store tokens; as above.
int pareto_store(const pareto_store_args *args, int isa) {
    if (isa < 0 || isa > pareto_best_isa()) return -2;
#if defined(PARETO_X86)
    if (isa >= PARETO_AVX512) return pareto_store_avx512(args);
    if (isa == PARETO_AVX2) return pareto_store_avx2(args);
#endif
    return pareto_store_generic(args);
}
