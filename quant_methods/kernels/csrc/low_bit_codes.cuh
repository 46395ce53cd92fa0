// Codes of 2 to 7 bits as the tensor cores' 16-row operand.
//
// A code's bits become the low bits of a 16-bit float's mantissa (128 + code in bfloat16, 1,024 + code in float16), or
// higher ones of it, and one instruction takes the zero-point and undoes the place. With TABLE, bytes of each row's
// look-up table are permuted into place instead.
//
// Of a unit's channels (low_bit_unit.cuh), lane 4 g + t holds rows g + 8 r (r = 0 to 3). A row's are 16 pairs, pair 4 j to
// 4 j + 3 from each j, in BITS words: a word's two halves hold the pairs' first and second codes, 16 / BITS of them, and the bits left over above these
// hold the last pairs, a bit at a time. A lane's words i of its four rows are one vector. runs() in low_bit_cuda.py writes
// this layout.
//
// Macros: BITS (2 to 7), IN_BFLOAT, TABLE (0 or 1; BITS 3 or 4), GROUP_STEPS (2, 4 or 8: groups of 32, 64 or 128 channels).
#pragma once
#include "low_bit_unit.cuh"

constexpr int ROW_TABLE = 2 << (BITS - 2);  // Words of a row's table: low bytes, then high bytes, of 2^BITS entries.
// Words of what goes with a unit's codes: for each group [g][row r] (a scale and, above it, -(128 or 1,024) - zero-point, in
// the type of x), or the rows' tables, [g][row r][ROW_TABLE].
constexpr int SIDE_WORDS = TABLE ? 32 * ROW_TABLE : 32 * GROUPS;

// A lane's codes of a row of a unit.
struct Row {
    u32 words[BITS];

#if TABLE
    u32 table[ROW_TABLE];

    // Words of the eight codes from 32 j, a nibble each.
    DEVICE u32 nibbles(int j) const {
        if (BITS == 4) return words[j];
        if (j < 3) return words[j];
        // Of three bits, the fourth bits of 24 nibbles are the last eight codes.
        return (words[0] >> 3 & 0x11111111) | (words[1] >> 2 & 0x22222222) | (words[2] >> 1 & 0x44444444);
    }

    // The four pairs of weights from 32 j.
    DEVICE void pairs(int j, u32 (&out)[4]) const {
        const u32 all = nibbles(j), codes = all & 0x77777777, half = (all & 0x88888888) >> 1 | 0x32103210;
        constexpr int BYTES = ROW_TABLE / 2;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            u32 found[2];
#pragma unroll
            for (int b = 0; b < 2; ++b) {
                const u32* t = table + BYTES * b;
                found[b] = __byte_perm(t[0], t[1], codes >> 16 * i);
                if constexpr (BITS == 4) found[b] = __byte_perm(found[b], __byte_perm(t[2], t[3], codes >> 16 * i), half >> 16 * i);
            }
            out[2 * i] = __byte_perm(found[0], found[1], 0x5140);
            out[2 * i + 1] = __byte_perm(found[0], found[1], 0x7362);
        }
    }
#else
    static constexpr int FIELDS = 16 / BITS;                         // Codes of half a word.
    static constexpr int WHOLE = FIELDS * BITS, LEFT = 16 - WHOLE;   // Pairs in whole fields; bits that are left over.
    static constexpr int IN_PLACE = (IN_BFLOAT ? 7 : 10) / BITS;     // Fields that a mantissa has room for.
    static constexpr u32 MAGIC = IN_BFLOAT ? 0x43004300u : 0x64006400u;

    u32 offsets[IN_PLACE];  // -(128 or 1,024) / 2^place - zero-point for the places 0, BITS, ...

    // A pair of 2^-place, and of 1 - 2^-place.
    static constexpr u32 power(int place) { return 0x10001u * (IN_BFLOAT ? (127 - place) << 7 : (15 - place) << 10); }
    static constexpr u32 rest(int place) {
        return 0x10001u * (IN_BFLOAT ? 0x3f80 - (0x100 >> place) : 0x3c00 - (0x800 >> place));
    }

    DEVICE void set_offset(u32 offset) {
#pragma unroll
        for (int i = 0; i < IN_PLACE; ++i) offsets[i] = i ? multiply_add(MAGIC, rest(BITS * i), offset) : offset;
    }

    // Pair q less the zero-point.
    DEVICE u32 pair(int q) const {
        const int field = q % FIELDS, place = q < WHOLE ? field % IN_PLACE : 0;
        u32 code = MAGIC;
        if (q < WHOLE) {
            code = and_or(words[q / FIELDS] >> BITS * (field - place), ((1u << BITS) - 1) * 0x10001u << BITS * place, code);
        } else {
            // Bits of several words; those that are neighbours come together.
#pragma unroll
            for (int b = 0; b < BITS; ++b) {
                const int n = (q - WHOLE) * BITS + b, at = n % max(LEFT, 1), run = min(max(LEFT, 1) - at, BITS - b);
                if (b && at) continue;
                code = and_or(words[n / max(LEFT, 1)] >> WHOLE + at - b, ((1u << run) - 1) * 0x10001u << b, code);
            }
        }
        return multiply_add(code, power(BITS * place), offsets[place]);
    }

    DEVICE void pairs(int j, u32 (&out)[4]) const {
#pragma unroll
        for (int h = 0; h < 4; ++h) out[h] = pair(4 * j + h);
    }
#endif
};

// A lane's codes of a unit: rows g + 8 r.
struct Unit {
    Row rows[4];

    static DEVICE int row(int g, int r) { return g + 8 * r; }
    DEVICE void pairs(int r, int j, u32 (&out)[4]) const { rows[r].pairs(j, out); }

    // From a unit's words and, with TABLE, the rows' tables.
    DEVICE void load(const u32* words, const u32* side) {
        const int lane = threadIdx.x % 32;
        const uint4* from = reinterpret_cast<const uint4*>(words) + lane;
#pragma unroll
        for (int i = 0; i < BITS; ++i) {
            const uint4 v = from[32 * i];
            rows[0].words[i] = v.x, rows[1].words[i] = v.y, rows[2].words[i] = v.z, rows[3].words[i] = v.w;
        }
#if TABLE
        const uint4* tables = reinterpret_cast<const uint4*>(side) + lane / 4 * ROW_TABLE;
#pragma unroll
        for (int i = 0; i < ROW_TABLE; ++i) {
            const uint4 v = tables[i];
            u32* to = rows[i / (ROW_TABLE / 4)].table + 4 * (i % (ROW_TABLE / 4));
            to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
        }
#endif
    }

#if !TABLE
    // Scales of the rows; their zero-points go into `rows`.
    DEVICE void set_group(const u32* side, int group, float (&scales)[4]) {
        const uint4 v = reinterpret_cast<const uint4*>(side)[8 * group + threadIdx.x % 32 / 4];
        const u32 both[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            scales[r] = to_float(both[r] & 0xffff);
            rows[r].set_offset(__byte_perm(both[r], 0, 0x3232));
        }
    }
#endif
};
