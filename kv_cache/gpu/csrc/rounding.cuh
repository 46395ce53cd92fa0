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

// The nearest code of x, in range; NaN is code 0. 1.5 * 2^23 added rounds to an integer, ties to even.
template <int CODE_BITS>
DEVICE float nearest(float x) {
    constexpr float TOP = (1 << CODE_BITS) - 1, MAGIC = 12582912.0f;
    return __fsub_rn(__fadd_rn(fminf(fmaxf(x, 0.0f), TOP), MAGIC), MAGIC);
}

// A team of warps works on the same tokens; a warp alone need not wait for others.
template <int WARPS_OF_TEAM>
DEVICE void team_sync() {
    if constexpr (WARPS_OF_TEAM == 1) __syncwarp();
    else __syncthreads();
}

// What a team keeps in shared memory.
template <int DIM>
struct Scratch {
    static constexpr int TOKENS = 32, HALVES = TOKENS / 16;
    static constexpr int STRIDE = DIM + 8;               // Floats of a token: no bank conflicts of 8-byte accesses.
    static constexpr int ERROR_STRIDE = BAND / 2 + 4;    // Pairs of errors; rows of 16 bytes without bank conflicts.
    float x[TOKENS * STRIDE];  // Channels; scaled ones; at last a band's 16 codes, one byte each, where its numbers were.
    u32 errors[2][TOKENS * ERROR_STRIDE];
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

// Round one token's channels of a band; leaves codes and errors in the scratch.
template <int DIM, int CODE_BITS>
DEVICE void round_band(Scratch<DIM>& scratch, const float* own, int band) {
    using S = Scratch<DIM>;
    const int token = threadIdx.x % 32;
    float* row = scratch.x + token * S::STRIDE + band * BAND;
    float u[BAND];
#pragma unroll
    for (int i = 0; i < BAND; i += 4) {
        const float4 v = *reinterpret_cast<const float4*>(row + i);
        u[i] = v.x, u[i + 1] = v.y, u[i + 2] = v.z, u[i + 3] = v.w;
    }
    u32 packed[BAND / 4] = {};
#pragma unroll
    for (int i = BAND - 1; i >= 0; --i) {
        const float code = nearest<CODE_BITS>(u[i]), error = __fsub_rn(u[i], code);
        packed[i / 4] |= static_cast<u32>(code) << 8 * (i % 4);
        u[i] = error;
#pragma unroll
        for (int j = 0; j < i; j += 4) {
            const float4 v = *reinterpret_cast<const float4*>(own + i * BAND + j);
            const float by[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int k = 0; k < 4; ++k)
                if (j + k < i) u[j + k] = __fmaf_rn(by[k], error, u[j + k]);
        }
    }
    *reinterpret_cast<uint4*>(row) = {packed[0], packed[1], packed[2], packed[3]};
    u32 head[BAND / 2], tail[BAND / 2];
#pragma unroll
    for (int i = 0; i < BAND / 2; ++i) split_bfloat2(u[2 * i], u[2 * i + 1], head[i], tail[i]);
    uint4* to = reinterpret_cast<uint4*>(scratch.errors[0] + token * S::ERROR_STRIDE);
    to[0] = {head[0], head[1], head[2], head[3]}, to[1] = {head[4], head[5], head[6], head[7]};
    to = reinterpret_cast<uint4*>(scratch.errors[1] + token * S::ERROR_STRIDE);
    to[0] = {tail[0], tail[1], tail[2], tail[3]}, to[1] = {tail[4], tail[5], tail[6], tail[7]};
}

// Round the scratch's scaled channels to codes. feedback: [feedback_tiles(DIM / 16)][32 lanes] operands; own:
// [DIM / 16][16][16], the bands' own blocks; both in shared memory. The caller synchronizes the team before and after.
template <int DIM, int CODE_BITS, int WARPS_OF_TEAM>
DEVICE void round_with_feedback(Scratch<DIM>& scratch, const uint2* feedback, const float* own) {
    using S = Scratch<DIM>;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, member = threadIdx.x / 32 % WARPS_OF_TEAM;
#pragma unroll 1
    for (int band = DIM / BAND - 1; band >= 0; --band) {
        if (member == 0) round_band<DIM, CODE_BITS>(scratch, own + band * BAND * BAND, band);
        team_sync<WARPS_OF_TEAM>();
        if (band == 0) break;
        u32 errors[S::HALVES][2][4];
#pragma unroll
        for (int half = 0; half < S::HALVES; ++half) {
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                const u32* from = scratch.errors[part] + (16 * half + g) * S::ERROR_STRIDE + t;
                u32(&a)[4] = errors[half][part];
                a[0] = from[0], a[1] = from[8 * S::ERROR_STRIDE], a[2] = from[4], a[3] = from[8 * S::ERROR_STRIDE + 4];
            }
        }
        const uint2* tiles = feedback + feedback_tiles(band) * 32 + lane;
#pragma unroll 2
        for (int n = member; n < 2 * band; n += WARPS_OF_TEAM) {
            const uint2 b = tiles[n * 32];
#pragma unroll
            for (int half = 0; half < S::HALVES; ++half) {
                float* at = scratch.x + 16 * half * S::STRIDE + 8 * n;
                float c[4];
                load_tile<S::STRIDE>(at, c);
                mma_bfloat(c, errors[half][0], b.x, b.y);
                mma_bfloat(c, errors[half][1], b.x, b.y);
                store_tile<S::STRIDE>(at, c);
            }
        }
        team_sync<WARPS_OF_TEAM>();
    }
}
