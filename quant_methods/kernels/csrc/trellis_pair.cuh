// What a state of a trellis code means: quant_methods/formats/parts/trellis.py.
//
// Macros: MULTIPLIER_0, MULTIPLIER_1, INCREMENT_0, INCREMENT_1, KEEP and FLIP, of that file.
#pragma once
#include "ptx.cuh"

// A pair of bfloat16 numbers, the first one in the lower half, from a state of 16 bits.
DEVICE u32 trellis_pair(u32 state) {
    constexpr u32 KEPT = 0x10001u * KEEP, FLIPPED = 0x10001u * FLIP;
    const u32 first = state * static_cast<u32>(MULTIPLIER_0) + static_cast<u32>(INCREMENT_0);
    const u32 second = state * static_cast<u32>(MULTIPLIER_1) + static_cast<u32>(INCREMENT_1);
    return add_bfloats(and_xor(first, KEPT, FLIPPED)) | add_bfloats(and_xor(second, KEPT, FLIPPED)) << 16;
}
