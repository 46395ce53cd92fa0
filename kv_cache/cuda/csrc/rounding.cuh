// Rounds the channels of 32 tokens from the last to the first, handing errors on (kv_cache/codec.py,
// quantize_with_feedback). Bands of 16 channels are rounded one after the other, each token's by a thread; then a
// product of the tensor cores adds the band's errors times the feedback to all channels below. Errors are split into
// two bfloat16 numbers, 16 bits in all, so that a code differs from the specification's only where a number lies next to
// a tie.
//
// The tokens' channels stay in shared memory and loops stay loops: while decoding, a multiprocessor runs this once for
// each layer, and fetching instructions would take longer than carrying them out.
#pragma once

#include "ptx.cuh"

constexpr int BAND = 16;

// Number of 16 x 8 tiles of a strictly lower triangular matrix in bands below a band.
constexpr int feedback_tiles(int band) { return band * (band - 1); }

constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: added, it rounds to an integer, ties to even, in the lowest bits.
constexpr u32 MAGIC_BITS = 0x4b400000u;

// MAGIC + the nearest code of x, in range; NaN is code 0.
template <int CODE_BITS>
DEVICE float nearest_and_magic(float x) {
    constexpr float TOP = (1 << CODE_BITS) - 1;
    return __fadd_rn(fminf(fmaxf(x, 0.0f), TOP), MAGIC);
}

// The nearest code of x, in range; NaN is code 0.
template <int CODE_BITS>
DEVICE float nearest(float x) {
    return __fsub_rn(nearest_and_magic<CODE_BITS>(x), MAGIC);
}

// A team of warps works on the same tokens; a warp alone need not wait for others.
template <int WARPS_OF_TEAM>
DEVICE void team_sync() {
    if constexpr (WARPS_OF_TEAM == 1) __syncwarp();
    else __syncthreads();
}

// What a team of warps keeps in shared memory.
template <int DIM, int WARPS_OF_TEAM>
struct Scratch {
    static constexpr int TOKENS = 32, HALVES = TOKENS / 16;
    static constexpr int TURNS = WARPS_OF_TEAM > 1 ? 2 : 1;    // Bands whose errors are kept.
    static constexpr int STRIDE = DIM + 8;               // Floats of a token: no bank conflicts of 8-byte accesses.
    static constexpr int ERROR_STRIDE = BAND / 2 + 4;    // Pairs of errors; rows of 16 bytes without bank conflicts.
    float x[TOKENS * STRIDE];  // Channels; scaled ones; at last a band's 16 codes, one byte each, where its numbers were.
    u32 errors[TURNS][2][TOKENS * ERROR_STRIDE];  // Heads, then tails.
    u64 pages[TOKENS];         // Of each token; 0: it is not stored.
    i64 positions[TOKENS];
    int offsets[TOKENS];       // In the page.

    DEVICE u32 codes(int token, int channel) const {
        const u8* row = reinterpret_cast<const u8*>(x + token * STRIDE + channel / BAND * BAND);
        return *reinterpret_cast<const u32*>(row + channel % BAND);
    }
};

// A warp's 16 x 8 tile of shared numbers as an accumulator, and back.
template <int STRIDE>
DEVICE void load_tile(const float* x, float (&c)[4]) {
    const int lane = threadIdx.x % 32;
    const float* from = x + lane / 4 * STRIDE + 2 * (lane % 4);
    const float2 a = *reinterpret_cast<const float2*>(from), b = *reinterpret_cast<const float2*>(from + 8 * STRIDE);
    c[0] = a.x, c[1] = a.y, c[2] = b.x, c[3] = b.y;
}

template <int STRIDE>
DEVICE void store_tile(float* x, const float (&c)[4]) {
    const int lane = threadIdx.x % 32;
    float* to = x + lane / 4 * STRIDE + 2 * (lane % 4);
    *reinterpret_cast<float2*>(to) = {c[0], c[1]};
    *reinterpret_cast<float2*>(to + 8 * STRIDE) = {c[2], c[3]};
}

// The strictly lower part of a band's own block, row after row, in groups of four.
constexpr int own_group(int row) {  // Of a row's first element: rows 1 to 4 have one group, 5 to 8 two, ...
    const int full = (row - 1) / 4, rest = (row - 1) % 4;
    return 2 * full * (full + 1) + rest * (full + 1);
}

struct OwnBlock {
    float4 groups[own_group(BAND)];

    DEVICE void load(const float* own) {
#pragma unroll
        for (int i = 1; i < BAND; ++i) {
#pragma unroll
            for (int j = 0; j < i; j += 4) groups[own_group(i) + j / 4] = *reinterpret_cast<const float4*>(own + i * BAND + j);
        }
    }
};

// Round one token's channels of a band; leaves codes and errors in the scratch.
template <int CODE_BITS, class S>
DEVICE void round_band(S& scratch, const OwnBlock& own, int band) {
    const int token = threadIdx.x % 32;
    float* row = scratch.x + token * S::STRIDE + band * BAND;
    float u[BAND];
#pragma unroll
    for (int i = 0; i < BAND; i += 4) {
        const float4 v = *reinterpret_cast<const float4*>(row + i);
        u[i] = v.x, u[i + 1] = v.y, u[i + 2] = v.z, u[i + 3] = v.w;
    }
    u32 packed[BAND / 4];
#pragma unroll
    for (int i = BAND - 1; i >= 0; --i) {
        const float shifted = nearest_and_magic<CODE_BITS>(u[i]), code = __fsub_rn(shifted, MAGIC);
        const float error = __fsub_rn(u[i], code);
        // A code is the lowest byte of its sum with MAGIC; what the four sums' other bytes add up to is known.
        if (i % 4 == 3) packed[i / 4] = 0u - MAGIC_BITS - (MAGIC_BITS << 8) - (MAGIC_BITS << 16) - (MAGIC_BITS << 24);
        packed[i / 4] += __float_as_uint(shifted) << 8 * (i % 4);
#pragma unroll
        for (int j = 0; j < i; ++j) {
            const float4 v = own.groups[own_group(i) + j / 4];
            const float by = j % 4 == 0 ? v.x : j % 4 == 1 ? v.y : j % 4 == 2 ? v.z : v.w;
            // The next channel waits for this one: its sum is by * u - by * code, so that only the code is waited for.
            u[j] = j == i - 1 ? fmaf(-by, code, fmaf(by, u[i], u[j])) : fmaf(by, error, u[j]);
        }
        u[i] = error;
    }
    *reinterpret_cast<uint4*>(row) = {packed[0], packed[1], packed[2], packed[3]};
    u32 head[BAND / 2], tail[BAND / 2];
#pragma unroll
    for (int i = 0; i < BAND / 2; ++i) split_bfloat2(u[2 * i], u[2 * i + 1], head[i], tail[i]);
    uint4* to = reinterpret_cast<uint4*>(scratch.errors[band % S::TURNS][0] + token * S::ERROR_STRIDE);
    to[0] = {head[0], head[1], head[2], head[3]}, to[1] = {head[4], head[5], head[6], head[7]};
    to = reinterpret_cast<uint4*>(scratch.errors[band % S::TURNS][1] + token * S::ERROR_STRIDE);
    to[0] = {tail[0], tail[1], tail[2], tail[3]}, to[1] = {tail[4], tail[5], tail[6], tail[7]};
}

// Add a band's errors times the feedback to the tiles first, first + stride, ... of those before `end`.
template <class S>
DEVICE void hand_on(S& scratch, const uint2* feedback, int band, int first, int stride, int end, int tokens) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    u32 errors[S::HALVES][2][4];
#pragma unroll
    for (int half = 0; half < S::HALVES; ++half) {
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            const u32* from = scratch.errors[band % S::TURNS][part] + (16 * half + g) * S::ERROR_STRIDE + t;
            u32(&a)[4] = errors[half][part];
            a[0] = from[0], a[1] = from[8 * S::ERROR_STRIDE], a[2] = from[4], a[3] = from[8 * S::ERROR_STRIDE + 4];
        }
    }
    const uint2* tiles = feedback + feedback_tiles(band) * 32 + lane;
#pragma unroll 1
    for (int n = first; n < end; n += 2 * stride) {
        const int both[2] = {n, n + stride < end ? n + stride : n};  // An odd one out is done twice.
        const uint2 b[2] = {tiles[both[0] * 32], tiles[both[1] * 32]};
#pragma unroll
        for (int half = 0; half < S::HALVES; ++half) {
            if (half && tokens <= 16) break;
            float* at = scratch.x + 16 * half * S::STRIDE;
            float c[2][4];
#pragma unroll
            for (int i = 0; i < 2; ++i) load_tile<S::STRIDE>(at + 8 * both[i], c[i]);
#pragma unroll
            for (int part = 0; part < 2; ++part) {
#pragma unroll
                for (int i = 0; i < 2; ++i) mma_bfloat(c[i], errors[half][part], b[i].x, b[i].y);
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) store_tile<S::STRIDE>(at + 8 * both[i], c[i]);
        }
    }
}

// Round the scratch's scaled channels to codes. feedback: [feedback_tiles(DIM / 16)][32 lanes] operands; own:
// [DIM / 16][16][16], the bands' own blocks; both in shared memory. The caller synchronizes the team before and after.
template <int CODE_BITS, int DIM, int WARPS_OF_TEAM>
DEVICE void round_with_feedback(Scratch<DIM, WARPS_OF_TEAM>& scratch, const uint2* feedback, const float* own, int tokens) {
    constexpr int TOP = DIM / BAND - 1, OWN = BAND * BAND;
    OwnBlock block;
    if constexpr (WARPS_OF_TEAM == 1) {
#pragma unroll 1
        for (int band = TOP; band >= 0; --band) {
            block.load(own + band * OWN);
            round_band<CODE_BITS>(scratch, block, band);
            __syncwarp();
            if (!band) break;  // Nothing below waits for its errors.
            hand_on(scratch, feedback, band, 0, 1, 2 * band, tokens);
            __syncwarp();
        }
    } else {
        // Two warps take turns: one rounds a band, which has first to know the errors of the band above, while the other
        // fetches its next band's own block and the rest hand on the errors of the band above to all bands below.
        const int member = threadIdx.x / 32;
        if (member == TOP % 2) block.load(own + TOP * OWN);
#pragma unroll 1
        for (int band = TOP; band >= 0; --band) {
            if (member == band % 2) {
                if (band < TOP) hand_on(scratch, feedback, band + 1, 2 * band, 1, 2 * band + 2, tokens);
                __syncwarp();
                round_band<CODE_BITS>(scratch, block, band);
            } else if (member < 2) {
                if (band) block.load(own + (band - 1) * OWN);
            } else if (band < TOP) {
                hand_on(scratch, feedback, band + 1, member - 2, WARPS_OF_TEAM - 2, 2 * band, tokens);
            }
            __syncthreads();
        }
    }
}
