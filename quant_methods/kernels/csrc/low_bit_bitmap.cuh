// Codes of the weights that are not zero, and a bitmap (quant_methods/formats/parts/bitmap_codes.py), as the tensor cores'
// 16-row operand.
//
// Of a unit's channels (low_bit_unit.cuh), lane 4 g + t holds rows g + 8 r (r = 0 to 3). Word j of the bitmap is that of the
// channels from 32 j, bit 8 r + i is the weight of row g + 8 r and channel 32 j + 8 t + i; a lane's four words are one
// vector. The codes that are left follow each other in the order of j, lanes and bits.
//
// Where a lane's codes begin is what all lanes before it have: one sum over the warp for a unit. Eight weights of a row are
// decoded at a time: the next eight codes are shifted into one word, and their byte of the bitmap looks up, in a table in
// shared memory, by which permutation of bytes they get to their places. A place without a code gets zeros; exclusive or
// the zero-point that is the zero-point, and what was stored exclusive or it is the code again.
//
// Macros: those of low_bit_unit.cuh, BITS being 1, and CODE_WORDS, the words that a unit's codes have at most.
#pragma once
#include "low_bit_unit.cuh"

constexpr int SIDE_WORDS = 32 * GROUPS;  // For each group [g][row r]: a scale, and above it -(128 or 1,024) - zero-point.
// Lanes look up different bytes at once. With as many copies, only two of them share memory banks.
constexpr int COPIES = 16, SELECTOR_WORDS = 256 * COPIES;

// Where each of eight weights finds its code, by which of them have one. A nibble for each weight picks a byte of a pair of
// words, as `permute_bytes` wants it: codes 0, 2, 4, 6 are the lower halves of the first word's bytes, codes 1, 3, 5, 7 those
// of the second's, whose last byte has no sign to copy (15). Weights 0 2 1 3 are one permutation, 4 6 5 7 the next.
DEVICE u32 selector(u32 present) {
    u32 all = 0, before = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const u32 bit = present >> i & 1, pick = bit ? before / 2 + before % 2 * 4 : 15;
        all |= pick << 4 * (i / 4 * 4 + i % 2 * 2 + i % 4 / 2);
        before += bit;
    }
    return all;
}

// Fills the table, [byte of the bitmap][copy]; neighbouring threads write to different banks.
DEVICE void fill_selectors(u32* to, int threads) {
    for (u32 present = threadIdx.x; present < 256; present += threads) {
        const u32 found = selector(present);
#pragma unroll
        for (u32 i = 0; i < COPIES; ++i) to[present * COPIES + (i + present / 2) % COPIES] = found;
    }
}

struct Unit {
    u32 bitmap[4];
    u32 begin[4];                // The bit of the unit's codes where the lane's of each step begin.
    u32 offsets[4];              // Of the rows: -(128 or 1,024) - zero-point, twice.
    const u32* codes;
    u32 selectors;               // The address in shared memory of the lane's copy.
    mutable u32 next[2];         // The codes of two rows of a step, from the first one's on.

    static DEVICE int row(int g, int r) { return g + 8 * r; }

    // From a unit's bitmap, its codes, of which two words more than there are may be read, and the table.
    DEVICE void load(const u32* words, const u32* its_codes, const u32* table) {
        const int lane = threadIdx.x % 32;
        codes = its_codes, selectors = shared_address(table + lane % COPIES);
        const uint4 v = reinterpret_cast<const uint4*>(words)[lane];
        bitmap[0] = v.x, bitmap[1] = v.y, bitmap[2] = v.z, bitmap[3] = v.w;
        // Two steps to a word: all lanes together have at most 4,096 bits of codes in a step.
        u32 ends[2], own[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            own[i] = ends[i] = 4u * __popc(bitmap[2 * i]) + (4u << 16) * __popc(bitmap[2 * i + 1]);
#pragma unroll
            for (int by = 1; by < 32; by *= 2) {
                const u32 before = __shfl_up_sync(ALL_LANES, ends[i], by);
                if (lane >= by) ends[i] += before;
            }
        }
        u32 total = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const u32 all = __shfl_sync(ALL_LANES, ends[j / 2], 31);
            begin[j] = total + ((ends[j / 2] - own[j / 2]) >> 16 * (j % 2) & 0xffff);
            total += all >> 16 * (j % 2) & 0xffff;
        }
    }

    // The bits of row r's eight weights from 32 j.
    DEVICE u32 present(int r, int j) const { return __byte_perm(bitmap[j], 0, 0x4440 + r); }

    // Two weights less the zero-point, from two codes in the lowest bits of either half.
    DEVICE u32 weights(int r, u32 pair) const {
        constexpr u32 ONE = IN_BFLOAT ? 0x3f803f80u : 0x3c003c00u;
        // 128 or 1,024 plus the zero-point has the zero-point in its lowest bits.
        return multiply_add(and_xor(pair, 0x000f000fu, offsets[r] ^ 0x80008000u), ONE, offsets[r]);
    }

    // The four pairs of row r from 32 j; an even row is asked for before the next one.
    DEVICE void pairs(int r, int j, u32 (&out)[4]) const {
        u32 eight;
        if (r % 2 == 0) {
            const u32 at = begin[j] + (r ? 4 * __popc(bitmap[j] & 0xffff) : 0);
            const u32* from = codes + (at >> 5);
            const u32 a = from[0], b = from[1], c = from[2];
            next[0] = eight = __funnelshift_r(a, b, at), next[1] = __funnelshift_r(b, c, at);
        } else {
            eight = __funnelshift_rc(next[0], next[1], 4 * __popc(present(r - 1, j)));
        }
        const u32 found = load_shared(selectors + present(r, j) * (4 * COPIES)), odd = eight >> 4;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const u32 four = permute_bytes(eight, odd, found >> 16 * i);
            out[2 * i] = weights(r, four), out[2 * i + 1] = weights(r, four >> 8);
        }
    }

    DEVICE void set_group(const u32* side, int group, float (&scales)[4]) {
        const uint4 v = reinterpret_cast<const uint4*>(side)[8 * group + threadIdx.x % 32 / 4];
        const u32 both[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            scales[r] = to_float(both[r] & 0xffff);
            offsets[r] = __byte_perm(both[r], 0, 0x3232);
        }
    }
};
