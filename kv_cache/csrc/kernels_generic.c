// Kernels for any processor.
#define PARETO_ENTRY pareto_attention_generic
#define PARETO_STORE pareto_store_generic
#include "attention_impl.h"
#include "store_impl.h"
