// Quantizes new keys and values and scatters them into pages: kv_cache/codec.py, write_pages, bit for bit. It serves
// scales inside the page, and heads that are too large for store_tiles.cu.
//
// A block codes one side (keys or values) of one KV head for up to TOKENS tokens. Without feedback a thread codes channels
// by themselves. With it the block first brings all channels into code units (a matrix product, for transformed keys),
// then rounds BAND channels at a time, from the last to the first: a thread for each token goes through the band, and all
// threads add the band's errors to the channels below it.
//
// Macros: HEAD_DIM, BLOCK_SIZE, BITS, GROUP_SIZE (0: scales are the layer's), FEEDBACK, TRANSFORM, PAIRS (0: keys are not
// centred), INTERLEAVED, INPUT (0 float32, 1 bfloat16, 2 float16).
#include "centre.cuh"
#include "rounding.cuh"

constexpr int TOKENS = 16, THREADS = 128;
constexpr int STRIDE = TOKENS + 4;  // Of a channel's tokens; 16-byte rows, fewer bank conflicts.
constexpr float TOP = (1 << BITS) - 1;
constexpr int GROUPS = GROUP_SIZE ? (HEAD_DIM + GROUP_SIZE - 1) / (GROUP_SIZE ? GROUP_SIZE : 1) : 1;

struct Params {
    u8* cache;
    i64 block_stride;
    i64 head_stride;
    const void* x;            // [tokens, KV heads, HEAD_DIM]
    i64 token_stride;         // Elements.
    i64 x_head_stride;        // Elements.
    const i64* slots;         // [tokens] block * BLOCK_SIZE + offset; negative: not stored.
    const i64* positions;     // [tokens], for centred keys.
    const float* inverse;     // [KV heads, HEAD_DIM] 1 / scale.
    const float* zero;        // [KV heads, HEAD_DIM]
    const float* encode;      // TRANSFORM: [KV heads, HEAD_DIM (of x), HEAD_DIM (of the codes)].
    const float* feedback;    // FEEDBACK: [KV heads, HEAD_DIM, HEAD_DIM].
    Centres centres;
    int tokens;
    int plane;                // Offsets in bytes in the page of one head.
    int high_plane;
    int meta_plane;
};

DEVICE float load(const void* data, i64 at) {
    if (INPUT == 0) return static_cast<const float*>(data)[at];
    const u16 bits = static_cast<const u16*>(data)[at];
    return INPUT == 1 ? from_bfloat(bits) : from_half(bits);
}

// The matrix product and the rounding of errors fuse multiply-adds, all else must not.
DEVICE void subtract_centre(const Params& p, int head, i64 position, float* x) {
    for (int i = threadIdx.x; i < PAIRS; i += THREADS) {
        const float2 centre = centre_of<PAIRS>(p.centres, head, position, i);
        float& first = x[(INTERLEAVED ? 2 * i : i) * STRIDE];
        float& second = x[(INTERLEAVED ? 2 * i + 1 : i + PAIRS) * STRIDE];
        first = __fsub_rn(first, centre.x), second = __fsub_rn(second, centre.y);
    }
}

SHARED __align__(16) float scaled[HEAD_DIM * STRIDE];
SHARED u8 codes[TOKENS][HEAD_DIM];

// scaled = zero + encode^T x, sums from the first channel on.
DEVICE void transform(const Params& p, int head, const float* x) {
    const float* matrix = p.encode + static_cast<i64>(head) * HEAD_DIM * HEAD_DIM;
    for (int c = threadIdx.x; c < HEAD_DIM; c += THREADS) {
        const float zero = p.zero[head * HEAD_DIM + c];
        float sum[TOKENS];
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) sum[t] = zero;
#pragma unroll 4
        for (int j = 0; j < HEAD_DIM; ++j) {
            const float m = matrix[j * HEAD_DIM + c];
            const float4* row = reinterpret_cast<const float4*>(x + j * STRIDE);
#pragma unroll
            for (int t = 0; t < TOKENS; t += 4) {
                const float4 v = row[t / 4];
                sum[t] = __fmaf_rn(m, v.x, sum[t]);
                sum[t + 1] = __fmaf_rn(m, v.y, sum[t + 1]);
                sum[t + 2] = __fmaf_rn(m, v.z, sum[t + 2]);
                sum[t + 3] = __fmaf_rn(m, v.w, sum[t + 3]);
            }
        }
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) scaled[c * STRIDE + t] = sum[t];
    }
}

DEVICE void round_with_feedback(const Params& p, int head) {
    SHARED __align__(16) float errors[BAND * STRIDE];
    SHARED float own[BAND * BAND];
    const float* matrix = p.feedback + static_cast<i64>(head) * HEAD_DIM * HEAD_DIM;
    for (int band = HEAD_DIM - BAND; band >= 0; band -= BAND) {
        for (int i = threadIdx.x; i < BAND * BAND; i += THREADS)
            own[i] = matrix[(band + i / BAND) * HEAD_DIM + band + i % BAND];
        __syncthreads();
        if (threadIdx.x < TOKENS) {
            float u[BAND];
#pragma unroll
            for (int i = 0; i < BAND; ++i) u[i] = scaled[(band + i) * STRIDE + threadIdx.x];
#pragma unroll
            for (int i = BAND - 1; i >= 0; --i) {
                const float code = nearest<BITS>(u[i]), error = __fsub_rn(u[i], code);
                codes[threadIdx.x][band + i] = static_cast<u8>(code);
                errors[i * STRIDE + threadIdx.x] = error;
#pragma unroll
                for (int j = 0; j < i; ++j) u[j] = __fmaf_rn(own[i * BAND + j], error, u[j]);
            }
        }
        __syncthreads();
        for (int c = threadIdx.x; c < band; c += THREADS) {
            float4* mine = reinterpret_cast<float4*>(scaled + c * STRIDE);
            float4 sum[TOKENS / 4];
#pragma unroll
            for (int t = 0; t < TOKENS / 4; ++t) sum[t] = mine[t];
#pragma unroll
            for (int i = BAND - 1; i >= 0; --i) {
                const float m = matrix[(band + i) * HEAD_DIM + c];
                const float4* row = reinterpret_cast<const float4*>(errors + i * STRIDE);
#pragma unroll
                for (int t = 0; t < TOKENS / 4; ++t) {
                    const float4 e = row[t];
                    sum[t].x = __fmaf_rn(m, e.x, sum[t].x);
                    sum[t].y = __fmaf_rn(m, e.y, sum[t].y);
                    sum[t].z = __fmaf_rn(m, e.z, sum[t].z);
                    sum[t].w = __fmaf_rn(m, e.w, sum[t].w);
                }
            }
#pragma unroll
            for (int t = 0; t < TOKENS / 4; ++t) mine[t] = sum[t];
        }
        // The next band reads what these threads wrote, after its own barrier.
    }
}

// One token's group of channels, by one thread: a scale and a minimum of its own.
DEVICE void code_group(const Params& p, const float* x, int token, int group, u8* meta) {
    const int from = group * GROUP_SIZE, to = min(from + GROUP_SIZE, HEAD_DIM);
    float low = __int_as_float(0x7f800000), high = NEG_INF;
    auto clean = [&](int i) {
        const float v = x[i * STRIDE + token];
        return v != v ? 0.0f : fminf(fmaxf(v, -65504.0f), 65504.0f);
    };
    for (int i = from; i < to; ++i) low = fminf(low, clean(i)), high = fmaxf(high, clean(i));
    const u16 minimum = to_half(low);
    const float base = from_half(minimum);
    float spread = __fmul_rn(__fsub_rn(high, base), 1.0f / TOP);
    spread = fminf(fmaxf(spread, 0.0f), 65504.0f);
    const u16 scale = to_half(spread);
    const float step = from_half(scale), inverse = step > 0 ? __frcp_rn(step) : 0.0f;
    for (int i = from; i < to; ++i)
        codes[token][i] = static_cast<u8>(nearest<BITS>(__fmul_rn(__fsub_rn(clean(i), base), inverse)));
    reinterpret_cast<u16*>(meta)[2 * group] = scale;
    reinterpret_cast<u16*>(meta)[2 * group + 1] = minimum;
}

extern "C" __global__ __launch_bounds__(THREADS) void store(const __grid_constant__ Params p) {
    SHARED __align__(16) float x[TRANSFORM || GROUP_SIZE ? HEAD_DIM * STRIDE : 4];
    SHARED u8* pages[TOKENS];
    SHARED int offsets[TOKENS];
    const int head = blockIdx.y, first = blockIdx.x * TOKENS, count = min(TOKENS, p.tokens - first);
    wait_for_previous_kernel();
    if (threadIdx.x < TOKENS) {
        const i64 slot = threadIdx.x < count ? p.slots[first + threadIdx.x] : -1;
        pages[threadIdx.x] = slot < 0 ? nullptr : p.cache + slot / BLOCK_SIZE * p.block_stride + head * p.head_stride;
        offsets[threadIdx.x] = static_cast<int>(slot % BLOCK_SIZE);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < TOKENS * HEAD_DIM; i += THREADS) {
        const int t = i / HEAD_DIM, c = i % HEAD_DIM;
        float v = 0;
        if (pages[t]) v = load(p.x, (first + t) * p.token_stride + head * p.x_head_stride + c);
        if (TRANSFORM || GROUP_SIZE) {
            x[c * STRIDE + t] = v;
            continue;
        }
        v = __fadd_rn(__fmul_rn(v, p.inverse[head * HEAD_DIM + c]), p.zero[head * HEAD_DIM + c]);
        if (FEEDBACK) scaled[c * STRIDE + t] = v;
        else codes[t][c] = static_cast<u8>(nearest<BITS>(v));
    }
    __syncthreads();
    if (GROUP_SIZE) {
        for (int i = threadIdx.x; i < TOKENS * GROUPS; i += THREADS)
            if (const int t = i / GROUPS; pages[t])
                code_group(p, x, t, i % GROUPS, pages[t] + p.meta_plane + offsets[t] * GROUPS * 4);
    }
    if (PAIRS) {
        for (int t = 0; t < count; ++t)
            if (pages[t]) subtract_centre(p, head, p.positions[first + t], x + t);
        __syncthreads();
    }
    if (TRANSFORM) {
        transform(p, head, x);
        __syncthreads();
    }
    if (FEEDBACK) round_with_feedback(p, head);
    __syncthreads();

    // Four bytes of a row at a time.
    constexpr int ROW = BITS == 8 ? HEAD_DIM : HEAD_DIM / 2, WORDS = ROW / 4;
    for (int i = threadIdx.x; i < TOKENS * WORDS; i += THREADS) {
        const int t = i / WORDS, at = i % WORDS * 4;
        if (!pages[t]) continue;
        u32 word = 0;
        for (int k = 0; k < 4; ++k) {
            const u32 low = codes[t][at + k];
            word |= (BITS == 8 ? low : (low & 15) | (codes[t][(at + k + HEAD_DIM / 2) % HEAD_DIM] & 15) << 4) << 8 * k;
        }
        *reinterpret_cast<u32*>(pages[t] + p.plane + offsets[t] * ROW + at) = word;
    }
    if (BITS != 6) return;
    constexpr int QUARTER = HEAD_DIM / 4, HIGH_WORDS = QUARTER / 4;
    for (int i = threadIdx.x; i < TOKENS * HIGH_WORDS; i += THREADS) {
        const int t = i / HIGH_WORDS, at = i % HIGH_WORDS * 4;
        if (!pages[t]) continue;
        u32 word = 0;
        for (int k = 0; k < 4; ++k)
            for (int quarter = 0; quarter < 4; ++quarter)
                word |= static_cast<u32>(codes[t][at + k + quarter * QUARTER] >> 4) << (8 * k + 2 * quarter);
        *reinterpret_cast<u32*>(pages[t] + p.high_plane + offsets[t] * QUARTER + at) = word;
    }
}
