// Attention for any processor.
#define PARETO_ENTRY pareto_attention_generic
#include "attention_impl.h"
