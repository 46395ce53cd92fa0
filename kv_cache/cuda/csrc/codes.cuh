// Codes from a page to operands of the tensor cores.
//
// A code's bits, masked into the low bits of a float16, are the subnormal number code * 2^-24. The tensor cores take
// subnormals at full speed and multiply them exactly, so no code is ever converted, and no bias has to be subtracted:
// the factor 2^24 goes into the logits' scale and into the output's. The high nibbles stay where they are and read as
// 16 * code * 2^-24, which fits (1008 of 1023 for 6 bits); their channels, the upper half of a head, carry 1/16 in the
// query and in the output.
//
// Any bytes are finite numbers under this reading, so tokens beyond the end, padding and stale shared memory need only
// be masked, never cleared.
//
// Channels are summed in whatever order a page yields them; prepare.cu permutes the query to match, and merge.cuh puts
// the output's channels back.
#pragma once
#include "ptx.cuh"

constexpr int UNIT = 16;  // Tokens that one tensor-core operand holds.

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Planes of BITS-bit codes of one unit, as they lie in shared memory.
template <int BITS>
struct Plane {
    static constexpr int ROW = BITS == 8 ? HEAD_DIM : HEAD_DIM / 2;    // Bytes of a token's row.
    static constexpr int HIGH_ROW = BITS == 6 ? HEAD_DIM / 4 : 0;      // Bytes of its row in the 2-bit plane.
    static constexpr int WORDS = ROW / 4;
    static constexpr int HIGH_WORDS = HEAD_DIM / 16;
    static constexpr int CODES = BITS == 8 ? 4 : 8;                    // Codes of a word.
};

template <int WORDS>
struct Words {
    u32 word[WORDS];
};

// Read N neighbouring words (1, 2 or 4) from shared memory in one access.
template <int N>
DEVICE Words<N> load_words(const u8* p) {
    Words<N> r;
    if constexpr (N == 4) {
        const uint4 v = *reinterpret_cast<const uint4*>(p);
        r.word[0] = v.x, r.word[1] = v.y, r.word[2] = v.z, r.word[3] = v.w;
    } else if constexpr (N == 2) {
        const uint2 v = *reinterpret_cast<const uint2*>(p);
        r.word[0] = v.x, r.word[1] = v.y;
    } else {
        r.word[0] = *reinterpret_cast<const u32*>(p);
    }
    return r;
}

// How four lanes share a token's key. Lane t takes words (l * 4 + t) * VECTOR + e for l < LOADS, e < VECTOR. Word i
// yields the channels 4i, 4i + 2, 4i + 1, 4i + 3 and, of 4- and 6-bit codes, then the same plus HEAD_DIM / 2.
template <int BITS>
struct KeyShare : Plane<BITS> {
    using P = Plane<BITS>;
    static constexpr int VECTOR = P::ROW % 64 == 0 ? 4 : P::ROW % 32 == 0 ? 2 : 1;
    static constexpr int LOADS = ceil_div(P::WORDS, 4 * VECTOR);
    static constexpr int STEPS_PER_WORD = P::CODES / 4;
    static constexpr int STEPS = LOADS * VECTOR * STEPS_PER_WORD;  // Tensor-core products of 16 channels.

    // The i-th (of 4) channel that lane t's share of a step multiplies; HEAD_DIM or more if there is none.
    static DEVICE int channel(int t, int step, int i) {
        const int slot = step / STEPS_PER_WORD, word = (slot / VECTOR * 4 + t) * VECTOR + slot % VECTOR;
        if (word >= P::WORDS) return HEAD_DIM;
        return 4 * word + (i % 2 * 2 + i / 2) + step % STEPS_PER_WORD * (HEAD_DIM / 2);
    }

    // Operands of one word of tokens g and g + 8: `a[s]` is the 16 x 16 operand of the word's step s.
    static DEVICE void operands(u32 first, u32 second, u32 high_first, u32 high_second, u32 (&a)[STEPS_PER_WORD][4]) {
        const u32 w[2] = {first, second}, h[2] = {high_first, high_second};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if constexpr (BITS == 8) {
                a[0][i] = w[i] & 0x00ff00ffu;
                a[0][2 + i] = (w[i] >> 8) & 0x00ff00ffu;
            } else {
                a[0][i] = w[i] & 0x000f000fu;
                a[0][2 + i] = (w[i] >> 8) & 0x000f000fu;
                a[1][i] = w[i] & 0x00f000f0u;
                a[1][2 + i] = (w[i] >> 8) & 0x00f000f0u;
                if constexpr (BITS == 6) {
                    a[0][i] = and_or(h[i] << 4, 0x00300030u, a[0][i]);
                    a[0][2 + i] = and_or(h[i] >> 4, 0x00300030u, a[0][2 + i]);
                    a[1][i] = and_or(h[i] << 4, 0x03000300u, a[1][i]);
                    a[1][2 + i] = and_or(h[i] >> 4, 0x03000300u, a[1][2 + i]);
                }
            }
        }
    }

    // For each word e of load l of tokens g and g + 8: call(step, operand).
    template <typename Call>
    static DEVICE void for_each(const u8* plane, const u8* high_plane, int g, int t, Call call) {
#pragma unroll
        for (int l = 0; l < LOADS; ++l) {
            const int word = (l * 4 + t) * VECTOR;
            const auto first = load_words<VECTOR>(plane + g * P::ROW + word * 4);
            const auto second = load_words<VECTOR>(plane + (g + 8) * P::ROW + word * 4);
            Words<VECTOR> high_first, high_second;
            if constexpr (BITS == 6) {
                const int high = word % P::HIGH_WORDS, shift = word / P::HIGH_WORDS * 2;
                high_first = load_words<VECTOR>(high_plane + g * P::HIGH_ROW + high * 4);
                high_second = load_words<VECTOR>(high_plane + (g + 8) * P::HIGH_ROW + high * 4);
#pragma unroll
                for (int e = 0; e < VECTOR; ++e) high_first.word[e] >>= shift, high_second.word[e] >>= shift;
            }
#pragma unroll
            for (int e = 0; e < VECTOR; ++e) {
                u32 a[STEPS_PER_WORD][4];
                operands(first.word[e], second.word[e], high_first.word[e], high_second.word[e], a);
#pragma unroll
                for (int s = 0; s < STEPS_PER_WORD; ++s) call((l * VECTOR + e) * STEPS_PER_WORD + s, a[s]);
            }
        }
    }
};

// How eight groups of lanes share a token's value. Group g takes words (l * 8 + g) * VECTOR + e. A word yields TILES
// operands of 16 channels by 16 tokens; row g of tile b is channel 4 * word + b of 4- and 6-bit codes and row g + 8 the
// same plus HEAD_DIM / 2; of 8-bit codes, they are channels 4 * word + 2b and 4 * word + 2b + 1.
template <int BITS>
struct ValueShare : Plane<BITS> {
    using P = Plane<BITS>;
    static constexpr int VECTOR = P::ROW % 128 == 0 ? 4 : P::ROW % 64 == 0 ? 2 : 1;
    static constexpr int LOADS = ceil_div(P::WORDS, 8 * VECTOR);
    static constexpr int TILES_PER_WORD = P::CODES / 2;
    static constexpr int TILES = LOADS * VECTOR * TILES_PER_WORD;

    // Channel of row g (or g + 8) of a tile; HEAD_DIM or more if there is none.
    static DEVICE int channel(int tile, int g, bool upper) {
        const int slot = tile / TILES_PER_WORD, part = tile % TILES_PER_WORD;
        const int word = (slot / VECTOR * 8 + g) * VECTOR + slot % VECTOR;
        if (word >= P::WORDS) return HEAD_DIM;
        return BITS == 8 ? 4 * word + 2 * part + upper : 4 * word + part + upper * (HEAD_DIM / 2);
    }

    // Operands of one word of tokens 2t, 2t + 1, 2t + 8, 2t + 9.
    static DEVICE void operands(const u32 (&w)[4], const u32 (&h)[4], u32 (&a)[TILES_PER_WORD][4]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {  // The first and the second pair of tokens.
            if constexpr (BITS == 8) {
                const u32 x = __byte_perm(w[2 * i], w[2 * i + 1], 0x5140);
                const u32 y = __byte_perm(w[2 * i], w[2 * i + 1], 0x7362);
                a[0][2 * i] = __byte_perm(x, 0, 0x4140);
                a[0][2 * i + 1] = __byte_perm(x, 0, 0x4342);
                a[1][2 * i] = __byte_perm(y, 0, 0x4140);
                a[1][2 * i + 1] = __byte_perm(y, 0, 0x4342);
            } else {
#pragma unroll
                for (int b = 0; b < 4; ++b) {
                    const u32 pair = __byte_perm(w[2 * i], w[2 * i + 1], b < 2 ? 0x5410 : 0x7632) >> (b % 2 * 8);
                    a[b][2 * i] = pair & 0x000f000fu;
                    a[b][2 * i + 1] = pair & 0x00f000f0u;
                    if constexpr (BITS == 6) {
                        const u32 high = __byte_perm(h[2 * i], h[2 * i + 1], b < 2 ? 0x5410 : 0x7632);
                        const u32 moved = b % 2 ? high >> 4 : high << 4;
                        a[b][2 * i] = and_or(moved, 0x00300030u, a[b][2 * i]);
                        a[b][2 * i + 1] = and_or(moved, 0x03000300u, a[b][2 * i + 1]);
                    }
                }
            }
        }
    }

    // For each tile of the unit's values: call(tile, operand).
    template <typename Call>
    static DEVICE void for_each(const u8* plane, const u8* high_plane, int g, int t, Call call) {
#pragma unroll
        for (int l = 0; l < LOADS; ++l) {
            const int word = (l * 8 + g) * VECTOR;
            Words<VECTOR> words[4], highs[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int token = 2 * t + i % 2 + i / 2 * 8;
                words[i] = load_words<VECTOR>(plane + token * P::ROW + word * 4);
                if constexpr (BITS == 6) {
                    const int high = word % P::HIGH_WORDS, shift = word / P::HIGH_WORDS * 2;
                    highs[i] = load_words<VECTOR>(high_plane + token * P::HIGH_ROW + high * 4);
#pragma unroll
                    for (int e = 0; e < VECTOR; ++e) highs[i].word[e] >>= shift;
                }
            }
#pragma unroll
            for (int e = 0; e < VECTOR; ++e) {
                const u32 w[4] = {words[0].word[e], words[1].word[e], words[2].word[e], words[3].word[e]};
                const u32 h[4] = {highs[0].word[e], highs[1].word[e], highs[2].word[e], highs[3].word[e]};
                u32 a[TILES_PER_WORD][4];
                operands(w, h, a);
#pragma unroll
                for (int b = 0; b < TILES_PER_WORD; ++b) call((l * VECTOR + e) * TILES_PER_WORD + b, a[b]);
            }
        }
    }
};

// The planes of one unit in shared memory: those of a page of 16 tokens, one after the other.
constexpr int KEY_BYTES = UNIT * Plane<KEY_BITS>::ROW;
constexpr int KEY_HIGH_BYTES = UNIT * Plane<KEY_BITS>::HIGH_ROW;
constexpr int VALUE_BYTES = UNIT * Plane<VALUE_BITS>::ROW;
constexpr int VALUE_HIGH_BYTES = UNIT * Plane<VALUE_BITS>::HIGH_ROW;
constexpr int UNIT_BYTES = KEY_BYTES + KEY_HIGH_BYTES + VALUE_BYTES + VALUE_HIGH_BYTES;
