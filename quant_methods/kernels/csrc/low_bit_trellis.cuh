// Streams of a trellis code (quant_methods/formats/parts/trellis.py) as the tensor cores' 16-row operand.
//
// A unit is 32 rows by 128 channels, a warp's work at a time: 16 tiles of the code. Of 32 channels from 32 j, lane 4 g + t
// holds the eight from 32 j + 8 t, of the rows 4 g + r (r = 0 to 3): pairs 16 g to 16 g + 15 of a tile's stream, BITS words
// of it, and the last states reach into the next lane's first word. A lane's words i of the four j are one vector.
//
// Macros: BITS (2 to 4), IN_BFLOAT, GROUP_STEPS (2, 4 or 8: groups of 32, 64 or 128 channels), those of trellis_pair.cuh.
#pragma once
#include "numbers.cuh"
#include "trellis_pair.cuh"

constexpr int ROWS = 32, CHANNELS = 128, GROUPS = 8 / GROUP_STEPS;
// Words of a unit's streams, [word][lane][j], and of what goes with them: scales, for each group [g][row r], in the lower
// halves.
constexpr int UNIT_WORDS = 128 * BITS, SIDE_WORDS = 32 * GROUPS;

// The row of a tile that is a lane's r-th.
DEVICE int row_in_tile(int g, int r) { return 4 * g + r; }

// A lane's streams of a unit.
struct Unit {
    u32 words[4][BITS + 1];

    DEVICE void load(const u32* from, const u32*) {
        const int lane = threadIdx.x % 32;
        const uint4* vectors = reinterpret_cast<const uint4*>(from);
#pragma unroll
        for (int i = 0; i <= BITS; ++i) {
            const uint4 v = i < BITS ? vectors[32 * i + lane] : vectors[(lane + 4) % 32];
            words[0][i] = v.x, words[1][i] = v.y, words[2][i] = v.z, words[3][i] = v.w;
        }
    }

    // Scales of the rows.
    DEVICE void set_group(const u32* side, int group, float (&scales)[4]) {
        const uint4 v = reinterpret_cast<const uint4*>(side)[8 * group + threadIdx.x % 32 / 4];
        scales[0] = to_float(v.x & 0xffff), scales[1] = to_float(v.y & 0xffff);
        scales[2] = to_float(v.z & 0xffff), scales[3] = to_float(v.w & 0xffff);
    }

    // The state of the lane's pair q from 32 j.
    DEVICE u32 state(int j, int q) const {
        const int bit = 2 * BITS * q, word = bit / 32, at = bit % 32;
        if (at == 16) return words[j][word] >> 16;
        const u32 low = at < 16 ? words[j][word] >> at : __funnelshift_r(words[j][word], words[j][word + 1], at);
        return low & 0xffff;
    }

    // The four pairs of row r from 32 j, without scale.
    DEVICE void pairs(int r, int j, u32 (&out)[4]) const {
#pragma unroll
        for (int h = 0; h < 4; ++h) {
            const u32 pair = trellis_pair(state(j, 4 * r + h));
            // All these sums are numbers of float16 too.
            out[h] = IN_BFLOAT ? pair : pack_half2(from_bfloat(pair & 0xffff), from_bfloat(pair >> 16));
        }
    }
};
