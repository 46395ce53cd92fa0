// Prepares queries for decode.cu: y = M q (or key scale * q), then float16 in the order in which a page's keys yield
// their channels, each row scaled by a power of two to use float16's range. For centred keys (kv_cache/rotary.py) also
// the coefficients of query . centre(position), a bias of each logit.
//
// Macros: HEAD_DIM, KEY_BITS, VALUE_BITS, IN_BFLOAT, DENSE and BIAS (0 or 1). A block of PREPARE_THREADS threads
// prepares PREPARE_ROWS query rows of one KV head.
#include "codes.cuh"

constexpr int PREPARE_ROWS = 8;
constexpr int COLUMNS = (HEAD_DIM + 31) / 32 * 32;
constexpr int PARTS = DENSE ? 4 : 1;  // Of the sum over a row of the transform.
constexpr int PREPARE_THREADS = COLUMNS * PARTS;
constexpr float LOG2E = 1.4426950408889634f;

struct Params {
    const u16* query;       // [tokens, heads, HEAD_DIM] float16 or bfloat16.
    i64 query_token_stride; // Elements.
    i64 query_head_stride;  // Elements.
    const float* transform; // DENSE: [KV heads, HEAD_DIM of q, HEAD_DIM of y]; else key scales [KV heads, HEAD_DIM].
    const float* key_zero;  // [KV heads, HEAD_DIM].
    u16* prepared;          // [tokens, heads, 16 * STEPS] float16.
    float2* factors;        // [tokens, heads]: see decode.cu.
    const float* mean;      // BIAS: [KV heads, HEAD_DIM], mean key before rotary embedding.
    float* bias_rows;       // BIAS: [tokens, heads, HEAD_DIM], A then B of bias.cuh, in units of decode.cu's products.
    int pairs;              // BIAS: that rotary embedding turns: channels i and i + pairs,
    int interleaved;        // or, if not 0, 2i and 2i + 1.
    int rows;               // Query rows of a KV head: tokens * group.
    int kv_heads;
    int group;
    float scale;            // Of q.k.
    int beside_store;       // Whether the kernel before this one is the store, which this does not wait for.
};

using Keys = KeyShare<KEY_BITS>;

extern "C" __global__ __launch_bounds__(PREPARE_THREADS) void prepare(const __grid_constant__ Params p) {
    SHARED __align__(16) float q[HEAD_DIM][PREPARE_ROWS];
    SHARED __align__(16) float y[PARTS > 1 ? PARTS : 1 + BIAS][PREPARE_ROWS][HEAD_DIM];
    const int head = blockIdx.y, first = blockIdx.x * PREPARE_ROWS, heads = p.kv_heads * p.group;
    const int count = min(PREPARE_ROWS, p.rows - first);
    // Thread (part, channel) sums every PARTS-th element of a row of the transform.
    const int part = threadIdx.x / COLUMNS, channel = threadIdx.x % COLUMNS;
    const bool active = channel < HEAD_DIM;
    const float* column = p.transform + static_cast<i64>(head) * HEAD_DIM * (DENSE ? HEAD_DIM : 1) + channel;
    // The transform is a constant of the model: there is no need to wait for it.
    constexpr int SHARE = DENSE ? HEAD_DIM / PARTS : 1;
    float m[SHARE];
#pragma unroll
    for (int k = 0; k < SHARE; ++k) m[k] = active ? column[(k * PARTS + part) * HEAD_DIM * DENSE] : 0.0f;
    // The store waited for the queries before it let this kernel start, and reads nothing that this one writes.
    if (!p.beside_store) wait_for_previous_kernel();
    for (int i = threadIdx.x; i < PREPARE_ROWS * HEAD_DIM; i += PREPARE_THREADS) {
        const int r = i / HEAD_DIM, k = i % HEAD_DIM, row = first + r;
        float x = 0;
        if (r < count) {
            const u16 bits = p.query[static_cast<i64>(row / p.group) * p.query_token_stride +
                                     (head * p.group + row % p.group) * p.query_head_stride + k];
            x = IN_BFLOAT ? from_bfloat(bits) : from_half(bits);
        }
        q[k][r] = x;
    }
    __syncthreads();
    if (active) {
        float sum[PREPARE_ROWS] = {};
#pragma unroll
        for (int k = 0; k < SHARE; ++k) {
            const float4* from = reinterpret_cast<const float4*>(q[DENSE ? k * PARTS + part : channel]);
            const float4 a = from[0], b = from[1];
            sum[0] += m[k] * a.x, sum[1] += m[k] * a.y, sum[2] += m[k] * a.z, sum[3] += m[k] * a.w;
            sum[4] += m[k] * b.x, sum[5] += m[k] * b.y, sum[6] += m[k] * b.z, sum[7] += m[k] * b.w;
        }
#pragma unroll
        for (int r = 0; r < PREPARE_ROWS; ++r) y[part][r][channel] = sum[r];
    }
    __syncthreads();
    if constexpr (PARTS > 1) {
        for (int i = threadIdx.x; i < PREPARE_ROWS * HEAD_DIM; i += PREPARE_THREADS) {
            const int r = i / HEAD_DIM, c = i % HEAD_DIM;
            float sum = 0;
#pragma unroll
            for (int k = 0; k < PARTS; ++k) sum += y[k][r][c];
            y[0][r][c] = sum;
        }
        __syncthreads();
    }
    // The inputs are here: only now may the next kernel flood the memory with its reads of pages.
    let_next_kernel_start();
    for (int r = threadIdx.x / 32; r < count; r += PREPARE_THREADS / 32) {
        const int lane = threadIdx.x % 32, row = first + r;
        const i64 index = static_cast<i64>(row / p.group) * heads + head * p.group + row % p.group;
        float largest = 0;
        for (int i = lane; i < HEAD_DIM; i += 32) largest = fmaxf(largest, fabsf(y[0][r][i]));
        // query . centre(p) = sum of A cos(p theta) + B sin(p theta); the table that this meets means code / 127.
        [[maybe_unused]] float2* turning = reinterpret_cast<float2*>(y[BIAS][r]);  // The partial sums are summed.
        if constexpr (BIAS) {
            for (int i = lane; i < HEAD_DIM / 2; i += 32) {
                float2 x = {0, 0};
                if (i < p.pairs) {
                    const int c = p.interleaved ? 2 * i : i, d = p.interleaved ? 2 * i + 1 : i + p.pairs;
                    const float u = p.mean[head * HEAD_DIM + c] / 127, v = p.mean[head * HEAD_DIM + d] / 127;
                    x = {q[c][r] * u + q[d][r] * v, q[d][r] * u - q[c][r] * v};
                }
                turning[i] = x;
                largest = fmaxf(largest, sqrtf(x.x * x.x + x.y * x.y));
            }
        }
        for (int step = 16; step; step >>= 1) largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, step));
        // 2^raise brings the largest element into [2^13, 2^14).
        const int exponent = static_cast<int>(__float_as_uint(largest) >> 23) - 127;
        const int raise = largest > 0 ? min(max(13 - exponent, -100), 100) : 0;
        const float up = __uint_as_float(static_cast<u32>(127 + raise) << 23);
        const float down = __uint_as_float(static_cast<u32>(127 - raise) << 23);
        if constexpr (BIAS) {
            for (int i = lane; i < HEAD_DIM / 2; i += 32) {
                p.bias_rows[index * HEAD_DIM + i] = turning[i].x * up;
                p.bias_rows[index * HEAD_DIM + HEAD_DIM / 2 + i] = turning[i].y * up;
            }
        }
        float offset = 0;
        for (int i = lane; i < 16 * Keys::STEPS; i += 32) {
            const int channel = Keys::channel(i / (4 * Keys::STEPS), i / 4 % Keys::STEPS, i % 4);
            u16 x = 0;
            if (channel < HEAD_DIM) {
                const bool upper = KEY_BITS != 8 && channel >= HEAD_DIM / 2;  // Its codes read 16 times too large.
                x = to_half(y[0][r][channel] * up * (upper ? 0.0625f : 1.0f));
                offset += from_half(x) * (upper ? 16.0f : 1.0f) * p.key_zero[head * HEAD_DIM + channel];
            }
            p.prepared[index * 16 * Keys::STEPS + i] = x;
        }
        for (int step = 16; step; step >>= 1) offset += __shfl_xor_sync(ALL_LANES, offset, step);
        const float factor = p.scale * LOG2E * down;
        if (lane == 0) p.factors[index] = {factor * 0x1p24f, -factor * offset};
    }
    // Attention waits for this kernel, and by it for the store.
    if (p.beside_store) wait_for_previous_kernel();
}
