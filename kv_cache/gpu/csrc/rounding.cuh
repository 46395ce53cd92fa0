// Rounds the channels of 16 tokens from the last to the first, handing errors on (kv_cache/codec.py,
// quantize_with_feedback), on the tensor cores: a warp holds the tokens' scaled channels as accumulators of 16 x 8
// products. Bands of 16 channels are rounded one after the other, each channel by a thread for its token; then a product
// of the band's errors with the feedback adds them to all channels below. Errors are split into two bfloat16 numbers, 16
// bits in all, so that a code differs from the specification's only where a number lies within 1e-4 of a tie.
#pragma once

#include "ptx.cuh"

constexpr int BAND = 16;

// Number of 16 x 8 tiles of a strictly lower triangular matrix in bands below a band.
constexpr int feedback_tiles(int band) { return band * (band - 1); }

// The nearest code of x, in range; NaN is code 0. 1.5 * 2^23 added rounds to an integer, ties to even.
template <int CODE_BITS>
DEVICE float nearest(float x) {
    constexpr float TOP = (1 << CODE_BITS) - 1, MAGIC = 12582912.0f;
    x = x > 0 ? x : 0;
    x = x < TOP ? x : TOP;
    return __fsub_rn(__fadd_rn(x, MAGIC), MAGIC);
}

// A warp's scratch in shared memory while it rounds.
template <int DIM>
struct RoundingScratch {
    static constexpr int BAND_STRIDE = BAND + 4;     // Floats; rows of 16 bytes without bank conflicts.
    static constexpr int ERROR_STRIDE = BAND / 2 + 4;  // Pairs of errors, likewise.
    static constexpr int CODE_STRIDE = DIM + 16;     // Bytes.
    float band[16 * BAND_STRIDE];
    u32 errors[2][16 * ERROR_STRIDE];
    u8 codes[16 * CODE_STRIDE];
};

// feedback: [feedback_tiles(DIM / 16)][32 lanes] operands; own: [DIM / 16][16][16], the bands' own blocks. Both in
// shared memory. Leaves the codes in scratch.codes, token after token, for the whole warp to see.
template <int DIM, int CODE_BITS>
DEVICE void round_with_feedback(float (&sums)[DIM / 8][4], const uint2* feedback, const float* own,
                                RoundingScratch<DIM>& scratch) {
    using Scratch = RoundingScratch<DIM>;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, token = lane % 16;
    u32 errors[2][4];  // Of the band before, as operands.
#pragma unroll
    for (int band = DIM / BAND - 1; band >= 0; --band) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float* c = sums[2 * band + half];
            float* to = scratch.band + g * Scratch::BAND_STRIDE + 8 * half + 2 * t;
            *reinterpret_cast<float2*>(to) = {c[0], c[1]};
            *reinterpret_cast<float2*>(to + 8 * Scratch::BAND_STRIDE) = {c[2], c[3]};
        }
        __syncwarp();
        float u[BAND];
#pragma unroll
        for (int i = 0; i < BAND; i += 4) {
            const float4 v = *reinterpret_cast<const float4*>(scratch.band + token * Scratch::BAND_STRIDE + i);
            u[i] = v.x, u[i + 1] = v.y, u[i + 2] = v.z, u[i + 3] = v.w;
        }
        // The errors of the band before reach the channels below this band while its own are rounded.
        if (band < DIM / BAND - 1) {
#pragma unroll
            for (int n = 2 * band - 1; n >= 0; --n) {
                const uint2 b = feedback[(feedback_tiles(band + 1) + n) * 32 + lane];
                mma_bfloat(sums[n], errors[0], b.x, b.y);
                mma_bfloat(sums[n], errors[1], b.x, b.y);
            }
        }
        const float* block = own + band * BAND * BAND;
        u32 packed[4] = {};
#pragma unroll
        for (int i = BAND - 1; i >= 0; --i) {
            const float code = nearest<CODE_BITS>(u[i]), error = __fsub_rn(u[i], code);
            packed[i / 4] |= static_cast<u32>(code) << 8 * (i % 4);
            u[i] = error;
            float row[BAND];
#pragma unroll
            for (int j = 0; j < i; j += 4) {
                const float4 v = *reinterpret_cast<const float4*>(block + i * BAND + j);
                row[j] = v.x, row[j + 1] = v.y, row[j + 2] = v.z, row[j + 3] = v.w;
            }
#pragma unroll
            for (int j = i - 1; j >= 0; --j) u[j] = __fmaf_rn(row[j], error, u[j]);
        }
        u32 head[BAND / 2], tail[BAND / 2];
#pragma unroll
        for (int i = 0; i < BAND / 2; ++i) split_bfloat2(u[2 * i], u[2 * i + 1], head[i], tail[i]);
        if (lane < 16) {
            *reinterpret_cast<uint4*>(scratch.codes + token * Scratch::CODE_STRIDE + band * BAND) = {
                packed[0], packed[1], packed[2], packed[3]};
            uint4* to = reinterpret_cast<uint4*>(scratch.errors[0] + token * Scratch::ERROR_STRIDE);
            to[0] = {head[0], head[1], head[2], head[3]}, to[1] = {head[4], head[5], head[6], head[7]};
            to = reinterpret_cast<uint4*>(scratch.errors[1] + token * Scratch::ERROR_STRIDE);
            to[0] = {tail[0], tail[1], tail[2], tail[3]}, to[1] = {tail[4], tail[5], tail[6], tail[7]};
        }
        __syncwarp();
        if (band == 0) break;
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            const u32* from = scratch.errors[part] + g * Scratch::ERROR_STRIDE + t;
            errors[part][0] = from[0], errors[part][1] = from[8 * Scratch::ERROR_STRIDE];
            errors[part][2] = from[4], errors[part][3] = from[8 * Scratch::ERROR_STRIDE + 4];
        }
        // The next band first: it waits for them.
#pragma unroll
        for (int n = 2 * band - 1; n >= 2 * band - 2; --n) {
            const uint2 b = feedback[(feedback_tiles(band) + n) * 32 + lane];
            mma_bfloat(sums[n], errors[0], b.x, b.y);
            mma_bfloat(sums[n], errors[1], b.x, b.y);
        }
    }
}
