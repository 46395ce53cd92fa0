// 16-bit numbers of the type that a kernel is compiled for. Macro: IN_BFLOAT (1: bfloat16, 0: float16).
#pragma once
#include "ptx.cuh"

// Pairs of 128 in bfloat16 or 1,024 in float16, to which the low bits of a mantissa add what they are as an integer; and of 1.
constexpr u32 MAGIC = IN_BFLOAT ? 0x43004300u : 0x64006400u, ONES = IN_BFLOAT ? 0x3f803f80u : 0x3c003c00u;

DEVICE float to_float(u16 x) { return IN_BFLOAT ? from_bfloat(x) : from_half(x); }
DEVICE u32 multiply_add(u32 a, u32 b, u32 c) { return IN_BFLOAT ? fma_bfloat2(a, b, c) : fma_half2(a, b, c); }
DEVICE u16 from_float(float x) { return IN_BFLOAT ? to_bfloat(x) : to_half(x); }
