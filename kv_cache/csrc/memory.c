// Advice to the operating system about a cache's memory.
#include <stdint.h>

#include "pareto_cpu.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

// Ask for large pages under [base, base + bytes): attention reads pages in random order, and with 4 KiB of memory a page
// table entry each access would miss the TLB. Only advice: where it is refused nothing changes. Returns 0 when taken.
int pareto_prefer_huge_pages(void *base, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t huge = 2u << 20, from = ((uintptr_t)base + huge - 1) & ~(huge - 1);
    const uintptr_t to = ((uintptr_t)base + (uintptr_t)bytes) & ~(huge - 1);
    return to > from ? madvise((void *)from, to - from, MADV_HUGEPAGE) : -1;
#else
    (void)base, (void)bytes;
    return -1;
#endif
}
