// Pairs of a trellis code (quant_methods/formats/parts/trellis.py) as the tensor cores' 16-row operand.
//
// A tile of 32 rows by 8 channels is what lanes t, 4 + t, ... 28 + t hold of a step of 32 channels. Its rows 4 g to 4 g + 3
// are lane 4 g + t's: the 16 pairs from 16 g, whose bits are BITS words of the tile's stream; the last states reach into the
// first word of the lane behind, of g + 1, cyclic. A lane's words i of the four steps are one vector.
//
// Macros: those of low_bit_unit.cuh, BITS being 2 to 4, and of trellis_pair.cuh.
#pragma once
#include "low_bit_unit.cuh"
#include "trellis_pair.cuh"

constexpr int SIDE_WORDS = 16 * GROUPS;  // Of a unit's scales: for each group [g][row r], in the type of x.

struct Unit {
    u32 words[4][BITS + 1];  // Of each step, and the one behind.

    static DEVICE int row(int g, int r) { return 4 * g + r; }

    DEVICE void load(const u32* from, const u32*) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i <= BITS; ++i) {
            const uint4 v = reinterpret_cast<const uint4*>(from)[i < BITS ? 32 * i + lane : (lane + 4) % 32];
            words[0][i] = v.x, words[1][i] = v.y, words[2][i] = v.z, words[3][i] = v.w;
        }
    }

    // The state of a lane's pair p of 16 of a step. A multiplication by a power of two and the permutation of bytes are the
    // work of different units, shifts and masks are of the same one.
    DEVICE u32 state(int j, int p) const {
        const int at = 2 * BITS * p / 32, shift = 2 * BITS * p % 32;
        const u32 low = words[j][at], high = words[j][at + 1];
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
