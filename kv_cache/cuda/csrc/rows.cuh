// A token's channels of one head among a few lanes, and its codes in the planes of a page (kv_cache/layout.py).
#pragma once

#include "ptx.cuh"

constexpr int QUADS = HEAD_DIM / 4;                                      // Fours of neighbouring channels.
constexpr int LANES = HEAD_DIM <= 64 ? 4 : HEAD_DIM <= 128 ? 8 : 16;     // That share a token.
constexpr int WARP_TOKENS = 32 / LANES;
constexpr int OWN = (QUADS + LANES - 1) / LANES;                         // Quads of a lane: the i-th is quad(i).

// Where there is no such quad, what a lane has of it is zeros.
DEVICE int quad(int i) { return threadIdx.x % LANES + LANES * i; }
DEVICE bool has_quad(int i) { return QUADS % LANES == 0 || quad(i) < QUADS; }

DEVICE void add_and_subtract(float& a, float& b) {
    const float sum = __fadd_rn(a, b);
    b = __fsub_rn(a, b), a = sum;
}

// kv_cache/transforms.py, hadamard_sums, in the same order.
DEVICE void hadamard_sums(float (&x)[OWN][4]) {
    constexpr int RUN = HEAD_DIM & -HEAD_DIM;
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
        add_and_subtract(x[i][0], x[i][1]), add_and_subtract(x[i][2], x[i][3]);
        add_and_subtract(x[i][0], x[i][2]), add_and_subtract(x[i][1], x[i][3]);
    }
#pragma unroll
    for (int apart = 1; apart < LANES && 4 * apart < RUN; apart *= 2) {
        const float sign = threadIdx.x & apart ? -1.0f : 1.0f;
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const float other = __shfl_xor_sync(ALL_LANES, x[i][k], apart);
                x[i][k] = __fmaf_rn(sign, x[i][k], other);  // Rounds as a sum or a difference does.
            }
        }
    }
#pragma unroll
    for (int apart = 1; 4 * LANES * apart < RUN; apart *= 2) {
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            if (i & apart) continue;
#pragma unroll
            for (int k = 0; k < 4; ++k) add_and_subtract(x[i][k], x[i + apart][k]);
        }
    }
}

// The normal times sqrt(2) of the reflection of a head's values, in the lanes that share a token.
struct Mirror {
    float4 normal[OWN];

    DEVICE void load(const float* mirrors, int head) {
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            normal[i] = {};
            if (has_quad(i))
                normal[i] = load_constant(reinterpret_cast<const float4*>(mirrors + head * HEAD_DIM) + quad(i));
        }
    }

    // kv_cache/codec.py, reflect.
    DEVICE void reflect(float (&x)[OWN][4]) const {
        float sums[4] = {};
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            sums[0] = __fmaf_rn(normal[i].x, x[i][0], sums[0]), sums[1] = __fmaf_rn(normal[i].y, x[i][1], sums[1]);
            sums[2] = __fmaf_rn(normal[i].z, x[i][2], sums[2]), sums[3] = __fmaf_rn(normal[i].w, x[i][3], sums[3]);
        }
        float along = __fadd_rn(__fadd_rn(sums[0], sums[1]), __fadd_rn(sums[2], sums[3]));
#pragma unroll
        for (int apart = 1; apart < LANES; apart *= 2)
            along = __fadd_rn(along, __shfl_xor_sync(ALL_LANES, along, apart));
        const float back = -along;
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            x[i][0] = __fmaf_rn(back, normal[i].x, x[i][0]), x[i][1] = __fmaf_rn(back, normal[i].y, x[i][1]);
            x[i][2] = __fmaf_rn(back, normal[i].z, x[i][2]), x[i][3] = __fmaf_rn(back, normal[i].w, x[i][3]);
        }
    }
};

// The planes of codes of BITS bits (kv_cache/formats.py, PLANES): the low one has as many bits as the largest power of
// two in BITS, the high one the rest.
template <int BITS>
struct Planes {
    static constexpr int LOW = BITS == 8 ? 8 : BITS >= 4 ? 4 : 2, HIGH = BITS - LOW;

    // Words of a token's row in a plane.
    static constexpr int words(int width) { return HEAD_DIM * width / 32; }
    static constexpr u32 mask(int width) { return ((1u << width) - 1) * 0x01010101u; }

    // Of a plane of WIDTH bits that begin at bit AT of a code, the word at an index, from quads of codes, a byte each.
    template <int WIDTH, int AT>
    DEVICE static u32 pack(const u32* codes, int word) {
        u32 packed = 0;
#pragma unroll
        for (int k = 0; k < 8 / WIDTH; ++k) packed |= (codes[word + k * words(WIDTH)] >> AT & mask(WIDTH)) << k * WIDTH;
        return packed;
    }

    template <int WIDTH>
    DEVICE static u32 unpack(const u8* plane, int offset, int quad) {
        constexpr int WORDS = words(WIDTH);
        const u32* row = reinterpret_cast<const u32*>(plane) + offset * WORDS;
        return row[quad % WORDS] >> quad / WORDS * WIDTH & mask(WIDTH);
    }

    // A quad of codes of the token at an offset in a page.
    DEVICE static u32 load(const u8* page, const int (&planes)[2], int offset, int quad) {
        u32 codes = unpack<LOW>(page + planes[0], offset, quad);
        if constexpr (HIGH > 0) codes |= unpack<HIGH>(page + planes[1], offset, quad) << LOW;
        return codes;
    }
};

// The lane's part of a token's rows in all planes; codes are those of the token's quads, in shared memory.
template <int BITS>
DEVICE void write_planes(u8* page, const int (&planes)[2], int offset, const u32* codes) {
    using P = Planes<BITS>;
    u32* low = reinterpret_cast<u32*>(page + planes[0]) + offset * P::words(P::LOW);
#pragma unroll
    for (int word = threadIdx.x % LANES; word < P::words(P::LOW); word += LANES)
        low[word] = P::template pack<P::LOW, 0>(codes, word);
    if constexpr (P::HIGH > 0) {
        u32* high = reinterpret_cast<u32*>(page + planes[1]) + offset * P::words(P::HIGH);
#pragma unroll
        for (int word = threadIdx.x % LANES; word < P::words(P::HIGH); word += LANES)
            high[word] = P::template pack<P::HIGH, P::LOW>(codes, word);
    }
}

// The i-th of a quad of codes as a number.
DEVICE float code_of(u32 codes, int i) {
    return __fsub_rn(__uint_as_float(__byte_perm(codes, 0x4b000000, 0x7650 + i)), 8388608.0f);  // 2^23
}

// A token's scale and zero as kv_cache/codec.py reads their bytes.
constexpr int UNIT_BYTE = (127 - 10) << 4;
constexpr int MANTISSA_SHIFT = 23 - 4;

template <int BITS>
DEVICE float step_of(u32 scale) {
    return __uint_as_float((scale + UNIT_BYTE) << MANTISSA_SHIFT) * (4.0f / (1 << BITS));
}

// What codes of a zero's byte are less.
template <int BITS>
DEVICE float shift_of(float zero) {
    return zero * ((1 << BITS) / 256.0f);
}
