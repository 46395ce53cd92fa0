// Codes from a page to operands of the tensor cores.
//
// A code's bits, masked into the low 11 bits of a float16, are the number code * 2^s * 2^-24, s the place of its lowest
// bit: float16's subnormal numbers and those of its first exponent are multiples of 2^-24. The tensor cores take them
// at full speed and multiply them exactly, so no code is ever converted. The factor 2^-24 goes into the logits' scale
// and into the output's; 2^s is undone in the query's channels and in the output's.
//
// A plane's word holds several codes in each byte (kv_cache/layout.py): those at the same place of all bytes are
// channels next to each other. Masks take the codes out of the word's lower and upper half at once, first those of the
// halves' lower bytes, and, with the word turned by a byte, those of their upper bytes. Codes of 3 and 6 bits are first
// put together from two planes: turned by a few bits, the upper plane's word has each code's high bits just above the
// low ones, where the next code of the lower plane lies. So two words come of it, one with every even code whole and
// one with every odd one.
//
// Any bytes are finite numbers under this reading, so tokens beyond the end, padding and stale shared memory need only
// be masked, never cleared.
//
// Channels are summed in whatever order a page yields them; prepare.cu permutes the query to match, and merge.cuh puts
// the output's channels back. So are tokens: `token_of` says which token a row of a key operand is.
#pragma once
#include "ptx.cuh"

constexpr int UNIT = 16;  // Tokens that one tensor-core operand holds.

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// The token of a unit that row g of a key operand is (row g + 8 is 8 tokens on). Transposed weights have rows 2t and 2t
// + 1 in lane t, which are then tokens t and t + 4: four lanes read the values of neighbours, without bank conflicts.
DEVICE int token_of(int g) { return g / 2 + g % 2 * 4; }

// The planes of BITS-bit codes.
template <int BITS>
struct Planes {
    static constexpr int HIGH = BITS == 3 ? 1 : BITS == 6 ? 2 : 0;  // Bits in the upper plane, if there is one,
    static constexpr int LOW = BITS - HIGH;                        // and in the lower one.
    static constexpr int FIELDS = 8 / LOW;                         // Codes of a byte of the lower plane.
    static constexpr int ROW = HEAD_DIM * LOW / 8;                 // Bytes of a token's row.
    static constexpr int HIGH_ROW = HEAD_DIM * HIGH / 8;
    static constexpr int WORDS = ROW / 4;
    static constexpr int HIGH_WORDS = HIGH ? HIGH_ROW / 4 : WORDS;
    static constexpr int BYTES = UNIT * (ROW + HIGH_ROW);          // Of a unit: the lower plane, then the upper one.

    // What undoes the place of a byte's k-th code.
    static constexpr float unplace(int k) { return 1.0f / (1 << k * LOW); }

    // By how many bits the upper plane's word is turned for a word of the lower plane: each serves two of those.
    static DEVICE int turn(int word) { return HIGH * (word / HIGH_WORDS ? 1 : 2); }
};

// The codes of a word of the lower plane, with its word of the upper plane.
template <int BITS>
class Codes {
    using P = Planes<BITS>;
    u32 part[2][2];  // By the byte of a half, and by whether the code is an even or an odd one of its byte.

public:
    DEVICE Codes(u32 word, u32 high, int turn) {
        if constexpr (P::HIGH) {
            constexpr u32 EVEN = P::LOW == 2 ? 0x33333333u : 0x0f0f0f0fu;
            const u32 turned = high << turn | high >> (32 - turn);
            part[0][0] = select_bits(EVEN, word, turned), part[0][1] = select_bits(~EVEN, word, turned);
        } else {
            part[0][0] = part[0][1] = word;
        }
        // A turn by a byte takes the bits of a code that lie beyond its half along.
        for (int odd = 0; odd < 2; ++odd) part[1][odd] = __byte_perm(part[0][odd], 0, P::HIGH ? 0x0321 : 0x4341);
    }

    // The k-th codes of byte `byte` of either half.
    DEVICE u32 at(int byte, int k) const {
        constexpr u32 MASK = 0x00010001u * ((1 << BITS) - 1);
        if (BITS == 8 && byte) return part[1][0];
        return part[byte][k % 2] & MASK << k * P::LOW;
    }
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

// Read N neighbouring words of a token's lower plane in a unit, and those of the upper plane that go with them.
template <int BITS, int N>
DEVICE void load_codes(const u8* planes, int token, int word, Words<N>& low, Words<N>& high) {
    using P = Planes<BITS>;
    low = load_words<N>(planes + token * P::ROW + word * 4);
    if constexpr (P::HIGH) {
        high = load_words<N>(planes + UNIT * P::ROW + token * P::HIGH_ROW + word % P::HIGH_WORDS * 4);
    } else {
        high = {};
    }
}

// How four lanes share a token's key. Lane t takes words (l * 4 + t) * VECTOR + e for l < LOADS, e < VECTOR. The k-th
// codes of word i are the channels 4i, 4i + 2, 4i + 1, 4i + 3 plus k * ROW.
template <int BITS>
struct KeyShare : Planes<BITS> {
    using P = Planes<BITS>;
    static constexpr int VECTOR = P::ROW % 64 == 0 ? 4 : P::ROW % 32 == 0 ? 2 : 1;
    static constexpr int LOADS = ceil_div(P::WORDS, 4 * VECTOR);
    static constexpr int STEPS = LOADS * VECTOR * P::FIELDS;  // Tensor-core products of 16 channels.

    // The i-th (of 4) channel that lane t's share of a step multiplies; HEAD_DIM or more if there is none.
    static DEVICE int channel(int t, int step, int i) {
        const int slot = step / P::FIELDS, word = (slot / VECTOR * 4 + t) * VECTOR + slot % VECTOR;
        if (word >= P::WORDS) return HEAD_DIM;
        return 4 * word + (i % 2 * 2 + i / 2) + step % P::FIELDS * P::ROW;
    }

    // For each 16 x 16 operand of a unit's keys: call(step, operand).
    template <typename Call>
    static DEVICE void for_each(const u8* planes, int g, int t, Call call) {
#pragma unroll
        for (int l = 0; l < LOADS; ++l) {
            const int word = (l * 4 + t) * VECTOR, turn = P::turn(word);
            Words<VECTOR> low[2], high[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) load_codes<BITS>(planes, token_of(g) + 8 * i, word, low[i], high[i]);
#pragma unroll
            for (int e = 0; e < VECTOR; ++e) {
                const Codes<BITS> first(low[0].word[e], high[0].word[e], turn);
                const Codes<BITS> second(low[1].word[e], high[1].word[e], turn);
#pragma unroll
                for (int k = 0; k < P::FIELDS; ++k) {
                    const u32 a[4] = {first.at(0, k), second.at(0, k), first.at(1, k), second.at(1, k)};
                    call((l * VECTOR + e) * P::FIELDS + k, a);
                }
            }
        }
    }
};

// How eight groups of lanes share a token's value. Group g takes words (l * 8 + g) * VECTOR + e; slot l * VECTOR + e is
// this lane's word. A word yields TILES_PER_WORD operands of 16 channels by 16 tokens; row g of one is an even code of
// a byte and row g + 8 the odd one after it, or, of 8-bit codes, the next byte's.
template <int BITS>
struct ValueShare : Planes<BITS> {
    using P = Planes<BITS>;
    static constexpr int VECTOR = P::ROW % 128 == 0 ? 4 : P::ROW % 64 == 0 ? 2 : 1;
    static constexpr int LOADS = ceil_div(P::WORDS, 8 * VECTOR);
    static constexpr int SLOTS = LOADS * VECTOR;
    static constexpr int TILES_PER_WORD = 2 * P::FIELDS;
    static constexpr int TILES = SLOTS * TILES_PER_WORD;
    static constexpr int PAIRS = P::FIELDS / 2;  // Of codes of a byte; 0 if it is one code.

    // The word of a slot; WORDS or more if there is none. Its k-th codes are the channels 4 * word + k * ROW and after.
    static DEVICE int word(int slot, int g) { return (slot / VECTOR * 8 + g) * VECTOR + slot % VECTOR; }

    // The tile that has the k-th code of a byte of a slot's word, and whether in row g + 8.
    static constexpr int tile(int slot, int byte, int k) {
        return slot * TILES_PER_WORD + (PAIRS ? byte * PAIRS + k / 2 : byte / 2);
    }
    static constexpr bool odd(int byte, int k) { return (PAIRS ? k : byte) % 2; }

    // For each operand of a unit's values: call(tile, operand). Its columns are the tokens in the order of `token_of`.
    template <typename Call>
    static DEVICE void for_each(const u8* planes, int g, int t, Call call) {
#pragma unroll
        for (int l = 0; l < LOADS; ++l) {
            const int word = (l * 8 + g) * VECTOR, turn = P::turn(word);
            Words<VECTOR> low[4], high[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) load_codes<BITS>(planes, t + 4 * i, word, low[i], high[i]);
#pragma unroll
            for (int e = 0; e < VECTOR; ++e) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    // Of two tokens, the same two bytes.
                    const auto pair = [&](const Words<VECTOR>(&w)[4], int i) {
                        return __byte_perm(w[i].word[e], w[i + 1].word[e], half ? 0x7632 : 0x5410);
                    };
                    const Codes<BITS> first(pair(low, 0), pair(high, 0), turn);
                    const Codes<BITS> second(pair(low, 2), pair(high, 2), turn);
                    const int slot = l * VECTOR + e;
                    if constexpr (PAIRS == 0) {
                        const u32 a[4] = {first.at(0, 0), first.at(1, 0), second.at(0, 0), second.at(1, 0)};
                        call(tile(slot, 2 * half, 0), a);
                    } else {
#pragma unroll
                        for (int i = 0; i < 2 * PAIRS; ++i) {
                            const int byte = i / PAIRS, k = i % PAIRS * 2;
                            const u32 a[4] = {first.at(byte, k), first.at(byte, k + 1), second.at(byte, k),
                                              second.at(byte, k + 1)};
                            call(tile(slot, 2 * half + byte, k), a);
                        }
                    }
                }
            }
        }
    }
};

// What lies beside the codes: four bytes of each token, the scale and the zero of its key and of its value. A scale is
// a number of 4 exponent and 4 mantissa bits (kv_cache/codec.py): as float32's top bits it lacks 117 of the exponent.
enum Side { KEY, VALUE };

// A token's scale, times 2^exponent.
template <Side SIDE>
DEVICE float scale_of(u32 meta, int exponent) {
    const u32 bits = SIDE == KEY ? (meta & 0x000000ffu) << 19 : (meta & 0x00ff0000u) << 3;
    return __uint_as_float(bits + (static_cast<u32>(117 + exponent) << 23));
}

// The byte of a key's zero, which is 2^(8 - KEY_BITS) times the code that it means.
DEVICE float key_zero(u32 meta) { return static_cast<float>(meta >> 8 & 0xff); }

// The bytes of two values' zeros, as halves that are so many times 2^-24.
DEVICE u32 value_zeros(u32 meta, u32 other) { return __byte_perm(meta >> 24, other, 0x2710); }

// A unit in shared memory: the planes of a page of 16 tokens, one after the other.
constexpr int PLANE_ROWS[] = {Planes<KEY_BITS>::ROW, Planes<KEY_BITS>::HIGH_ROW, Planes<VALUE_BITS>::ROW,
                              Planes<VALUE_BITS>::HIGH_ROW, 4};
constexpr int VALUES_AT = Planes<KEY_BITS>::BYTES, META_AT = VALUES_AT + Planes<VALUE_BITS>::BYTES;
constexpr int UNIT_BYTES = META_AT + UNIT * 4;

// A token's scales and zeros.
DEVICE u32 meta_of(const u8* unit, int token) { return *reinterpret_cast<const u32*>(unit + META_AT + token * 4); }
