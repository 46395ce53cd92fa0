// Pairs of a trellis code (quant_methods/formats/parts/trellis.py) as the tensor cores' 16-row operand.
//
// A tile of 32 rows by 8 channels is what lanes t, 4 + t, ... 28 + t hold of a step of 32 channels. Its rows 4 g to 4 g + 3
// are lane 4 g + t's: the 16 pairs from 16 g, whose bits are BITS words of the tile's stream. The lane's 4 * BITS words of
// the four steps follow each other in its vectors. What the last pairs reach into is the first word of lane g + 1, cyclic.
//
// Macros: those of low_bit_unit.cuh, BITS being 2 to 4, and of trellis_pair.cuh.
#pragma once
#include "low_bit_unit.cuh"
#include "trellis_pair.cuh"

constexpr int SIDE_WORDS = 16 * GROUPS;  // Of a unit's scales: for each group [g][row r], in the type of x.

struct Unit {
    u32 words[4 * BITS];
    u32 behind[4];  // For each j, what follows the lane's words.

    static DEVICE int row(int g, int r) { return 4 * g + r; }

    DEVICE void load(const u32* from, const u32*) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < BITS; ++i) {
            const uint4 v = reinterpret_cast<const uint4*>(from)[32 * i + lane];
            words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) behind[j] = __shfl_sync(ALL_LANES, words[j * BITS], (lane + 4) % 32);
    }

    // The state of a lane's pair p of 16 of a step.
    DEVICE u32 state(int j, int p) const {
        const int at = 2 * BITS * p / 32, shift = 2 * BITS * p % 32;
        const u32 low = words[j * BITS + at], high = at + 1 < BITS ? words[j * BITS + min(at + 1, BITS - 1)] : behind[j];
        if (shift % 8 == 0 && shift <= 16) return __byte_perm(low, 0, 0x4410 + 0x11 * (shift / 8));
        if (shift < 16) return __byte_perm(low << 16 - shift, 0, 0x4432);
        return __funnelshift_r(low, high, shift) & 0xffff;
    }

    // The four pairs of row r from 32 j.
    DEVICE void pairs(int r, int j, u32 (&out)[4]) const {
#pragma unroll
        for (int h = 0; h < 4; ++h) {
            out[h] = trellis_pair(state(j, 4 * r + h));
            // Numbers of 8 bits from 2^-10 to 4, or zero: float16 has them all.
            if (!IN_BFLOAT) out[h] = pack_half2(from_bfloat(out[h] & 0xffff), from_bfloat(out[h] >> 16));
        }
    }

    DEVICE void set_group(const u32* side, int group, float (&scales)[4]) const {
        const uint2 v = reinterpret_cast<const uint2*>(side)[8 * group + threadIdx.x % 32 / 4];
        scales[0] = to_float(v.x & 0xffff), scales[1] = to_float(v.x >> 16);
        scales[2] = to_float(v.y & 0xffff), scales[3] = to_float(v.y >> 16);
    }
};
