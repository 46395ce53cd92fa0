// Kernels for AVX-512 processors with VNNI; compiled with -mavx512{f,bw,vl,dq,vnni}.
#define PARETO_ENTRY pareto_attention_avx512
#define PARETO_STORE pareto_store_avx512
#define PARETO_USE_VNNI 1
#include "attention_impl.h"
#include "store_impl.h"
