// Attention for x86-64-v3 processors; compiled with -mavx2 -mfma -mf16c.
#define PARETO_ENTRY pareto_attention_avx2
#include "attention_impl.h"
