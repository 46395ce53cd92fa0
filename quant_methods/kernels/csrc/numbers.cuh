// 16-bit numbers of the type that a kernel is compiled for. Macro: IN_BFLOAT (1: bfloat16, 0: float16).
#pragma once
#include "ptx.cuh"

DEVICE float to_float(u16 x) { return IN_BFLOAT ? from_bfloat(x) : from_half(x); }
DEVICE u16 from_float(float x) { return IN_BFLOAT ? to_bfloat(x) : to_half(x); }
