// Codes of 4 bits of which two in four channels are kept (quant_methods/formats/parts/semi_sparse.py) as the sparse tensor
// cores' 16-row operand.
//
// Of 32 channels from 32 j, lane 4 g + t holds fours t and 4 + t, of rows g + 8 r. A word is one operand's: rows from 16 i,
// pair h + 2 s being row g + 8 h of four t + 4 s, the first code of pair p from bit 4 p and the second from bit 16 + 4 p.
// The eight words [j][i] of a unit are two vectors of a lane. Its third one are the places of 16 channels from
// 32 j + 16 * (t % 2), of rows from 16 * (t / 2): a word for each j, with nibbles of row g in the lower half and of row
// g + 8 in the upper. So of each four lanes two have the places of rows 0 to 15 and two those of rows 16 to 31: the
// instruction's selector says which. pack_semi_sparse() in low_bit_layout.py writes this layout.
//
// Macros: those of low_bit_unit.cuh, BITS being 3, those that two codes and their places are of four weights.
#pragma once
#include "low_bit_unit.cuh"

constexpr int SIDE_WORDS = 32 * GROUPS;  // As of codes on a grid: see low_bit_codes.cuh.

struct Unit {
    u32 codes[8], places[4], offsets[4];

    static DEVICE int row(int g, int r) { return g + 8 * r; }

    DEVICE void load(const u32* words, const u32*) {
        const uint4* from = reinterpret_cast<const uint4*>(words) + threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint4 v = from[32 * i];
            codes[4 * i] = v.x, codes[4 * i + 1] = v.y, codes[4 * i + 2] = v.z, codes[4 * i + 3] = v.w;
        }
        const uint4 v = from[64];
        places[0] = v.x, places[1] = v.y, places[2] = v.z, places[3] = v.w;
    }

    // Scales of the rows; their zero-points stay here.
    DEVICE void set_group(const u32* side, int group, float (&scales)[4]) {
        const uint4 v = reinterpret_cast<const uint4*>(side)[8 * group + threadIdx.x % 32 / 4];
        const u32 both[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int r = 0; r < 4; ++r) scales[r] = to_float(both[r] & 0xffff), offsets[r] = __byte_perm(both[r], 0, 0x3232);
    }

    // The kept weights of rows from 16 i and channels from 32 j, as the tensor cores want them.
    DEVICE void operand(int i, int j, u32 (&out)[4]) const {
        const u32 word = codes[2 * j + i];
#pragma unroll
        for (int p = 0; p < 4; ++p)
            out[p] = multiply_add(and_or(word >> 4 * p, 0x000f000fu, MAGIC), ONES, offsets[2 * i + p % 2]);
    }

    // All weights of row r in fours t and 4 + t from 32 j, zeros in their places; the lanes of the warp go along.
    DEVICE void pairs(int r, int j, u32 (&out)[4]) const {
        const int lane = threadIdx.x % 32, t = lane % 4;
        u32 kept[4];
        operand(r / 2, j, kept);
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            const u32 nibble = __shfl_sync(ALL_LANES, places[j], lane - t + 2 * (r / 2) + s) >> 16 * (r % 2) + 4 * t;
            const u64 low = kept[r % 2 + 2 * s] & 0xffff, high = kept[r % 2 + 2 * s] >> 16;
            const u64 four = low << 16 * (nibble & 3) | high << 16 * (nibble >> 2 & 3);
            out[2 * s] = static_cast<u32>(four), out[2 * s + 1] = static_cast<u32>(four >> 32);
        }
    }
};
