// Kernels for x86-64-v3 processors; compiled with -mavx2 -mfma -mf16c.
#define PARETO_ENTRY pareto_attention_avx2
#define PARETO_STORE pareto_store_avx2
#include "attention_impl.h"
#include "store_impl.h"
