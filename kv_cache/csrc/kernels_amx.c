// Attention for processors with AMX int8 tiles; compiled with the AVX-512 flags and -mamx-tile -mamx-int8.
#define PARETO_ENTRY pareto_attention_amx
#define PARETO_USE_AMX 1
#include "attention_impl.h"
