// Prepares queries for decode.cu: y = (inverse of the keys' transform) q, then float16 in the order in which a page's
// keys yield their channels, each row scaled by a power of two to use float16's range; and the coefficients of the
// query's product with a position's centre, a bias of each logit (kv_cache/rotary.py).
//
// Macros: HEAD_DIM, KEY_BITS, VALUE_BITS, IN_BFLOAT (0 or 1), PARAMS_BYTES (what the host takes `Params` to be). A
// block of PREPARE_THREADS threads prepares PREPARE_ROWS query rows of one KV head.
#include "codes.cuh"

constexpr int PREPARE_ROWS = 8;
constexpr int COLUMNS = (HEAD_DIM + 31) / 32 * 32;
constexpr int PARTS = 4;                   // Of the sum over a row of the transform,
constexpr int SHARE = HEAD_DIM / PARTS;    // each of so many products.
constexpr int PREPARE_THREADS = COLUMNS * PARTS;
constexpr float LOG2E = 1.4426950408889634f;

struct Params {
    const u16* query;       // [tokens, heads, HEAD_DIM] float16 or bfloat16.
    i64 query_token_stride; // Elements.
    i64 query_head_stride;  // Elements.
    const u16* key;         // [tokens, KV heads, HEAD_DIM] like queries: their tokens' own, read as they are; or null.
    i64 key_token_stride;   // Elements.
    i64 key_head_stride;    // Elements.
    const float* inverse;   // [KV heads, HEAD_DIM of q, HEAD_DIM of y].
    const float* mean;      // [KV heads, HEAD_DIM], mean key before rotary embedding.
    const float* first;     // [KV heads, HEAD_DIM], centre of keys at position 0.
    u16* prepared;          // [tokens, heads, 16 * STEPS] float16.
    float4* rows;           // [tokens, heads]: of a row, in the units of decode.cu's products: their factor to a logit,
                            // times log2(e); the sum of channels, for a zero's byte; the bias at position 0; and
                            // the logit of its own token, times log2(e), -infinity without keys.
    float* bias_rows;       // [tokens, heads, HEAD_DIM], A then B of bias.cuh, in units of decode.cu's products.
    int rotated;            // Pairs that rotary embedding turns: channels i and i + rotated,
    int interleaved;        // or, if not 0, 2i and 2i + 1, as are all other pairs.
    int query_rows;         // Of a KV head: tokens * group.
    int kv_heads;
    int group;
    float scale;            // Of q.k.
    int beside_store;       // Whether the kernel before this one is the store, which this does not wait for.
};
static_assert(sizeof(Params) == PARAMS_BYTES, "the host passes other parameters");

using Keys = KeyShare<KEY_BITS>;

// The pairs of channels that a lane has of a row, and what the keys' centres are in them.
struct Pairs {
    static constexpr int COUNT = (HEAD_DIM / 2 + 31) / 32;
    int channel[COUNT][2];
    float2 mean[COUNT], first[COUNT];

    static DEVICE bool there(int k) { return k * 32 + threadIdx.x % 32 < HEAD_DIM / 2; }

    DEVICE Pairs(const Params& p, int head) {
#pragma unroll
        for (int k = 0; k < COUNT; ++k) {
            const int i = there(k) ? k * 32 + threadIdx.x % 32 : 0;
            const bool apart = i < p.rotated && !p.interleaved;
            channel[k][0] = apart ? i : 2 * i, channel[k][1] = apart ? i + p.rotated : 2 * i + 1;
            const int a = head * HEAD_DIM + channel[k][0], b = head * HEAD_DIM + channel[k][1];
            mean[k] = {p.mean[a], p.mean[b]}, first[k] = {p.first[a], p.first[b]};
        }
    }
};

extern "C" __global__ __launch_bounds__(PREPARE_THREADS) void prepare(const __grid_constant__ Params p) {
    SHARED __align__(16) float q[PREPARE_ROWS][HEAD_DIM];
    SHARED float y[PARTS][PREPARE_ROWS][HEAD_DIM];
    const int head = blockIdx.y, first = blockIdx.x * PREPARE_ROWS, heads = p.kv_heads * p.group;
    const int count = min(PREPARE_ROWS, p.query_rows - first), lane = threadIdx.x % 32, own = threadIdx.x / 32;
    static_assert(PREPARE_THREADS / 32 >= PREPARE_ROWS, "a warp finishes a row");
    // Thread (part, channel) sums the part's share of the products of a row of the transform.
    const int part = threadIdx.x / COLUMNS, channel = threadIdx.x % COLUMNS;
    const bool active = channel < HEAD_DIM;
    const float* column = p.inverse + (static_cast<i64>(head) * HEAD_DIM + part * SHARE) * HEAD_DIM + channel;
    // What is a constant of the model is there already: there is no need to wait for it, if registers suffice.
    constexpr bool AHEAD = SHARE <= 32;
    float m[AHEAD ? SHARE : 1];
#pragma unroll
    for (int k = 0; AHEAD && k < SHARE; ++k) m[k] = active ? column[k * HEAD_DIM] : 0.0f;
    const Pairs pairs(p, head);
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
        q[r][k] = x;
    }
    // The own key of the row that the warp finishes.
    float own_key[COLUMNS / 32] = {};
    if (p.key && own < count) {
        const u16* from = p.key + static_cast<i64>((first + own) / p.group) * p.key_token_stride
            + head * p.key_head_stride;
#pragma unroll
        for (int k = 0; k < COLUMNS / 32; ++k) {
            const int i = k * 32 + lane;
            if (i < HEAD_DIM) own_key[k] = IN_BFLOAT ? from_bfloat(from[i]) : from_half(from[i]);
        }
    }
    __syncthreads();
    if (active) {
        float sum[PREPARE_ROWS] = {};
#pragma unroll(AHEAD ? SHARE / 4 : 2)
        for (int k = 0; k < SHARE; k += 4) {
            float own[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) own[i] = AHEAD ? m[AHEAD ? k + i : 0] : column[(k + i) * HEAD_DIM];
#pragma unroll
            for (int r = 0; r < PREPARE_ROWS; ++r) {
                const float4 x = *reinterpret_cast<const float4*>(q[r] + part * SHARE + k);
                sum[r] += own[0] * x.x + own[1] * x.y + own[2] * x.z + own[3] * x.w;
            }
        }
#pragma unroll
        for (int r = 0; r < PREPARE_ROWS; ++r) y[part][r][channel] = sum[r];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < PREPARE_ROWS * HEAD_DIM; i += PREPARE_THREADS) {
        const int r = i / HEAD_DIM, c = i % HEAD_DIM;
        float sum = 0;
#pragma unroll
        for (int k = 0; k < PARTS; ++k) sum += y[k][r][c];
        y[0][r][c] = sum;
    }
    __syncthreads();
    // The inputs are here: only now may the next kernel flood the memory with its reads of pages.
    let_next_kernel_start();
    if (own < count) {
        const int row = first + own;
        const i64 index = static_cast<i64>(row / p.group) * heads + head * p.group + row % p.group;
        float largest = 0;
        for (int i = lane; i < HEAD_DIM; i += 32) largest = fmaxf(largest, fabsf(y[0][own][i]));
        // query . centre(p) = sum of A cos(p theta) + B sin(p theta); the table that this meets means code / 127.
        float2 turning[Pairs::COUNT];
        float bias = 0;  // query . centre(0)
#pragma unroll
        for (int k = 0; k < Pairs::COUNT; ++k) {
            const float a = q[own][pairs.channel[k][0]], b = q[own][pairs.channel[k][1]];
            const float u = pairs.mean[k].x / 127, v = pairs.mean[k].y / 127;
            turning[k] = {a * u + b * v, b * u - a * v};
            if (!pairs.there(k)) continue;
            bias += a * pairs.first[k].x + b * pairs.first[k].y;
            largest = fmaxf(largest, sqrtf(turning[k].x * turning[k].x + turning[k].y * turning[k].y));
        }
        for (int step = 16; step; step >>= 1) largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, step));
        // 2^raise brings the largest element into [2^13, 2^14).
        const int exponent = static_cast<int>(__float_as_uint(largest) >> 23) - 127;
        const int raise = largest > 0 ? min(max(13 - exponent, -100), 100) : 0;
        const float up = __uint_as_float(static_cast<u32>(127 + raise) << 23);
        const float down = __uint_as_float(static_cast<u32>(127 - raise) << 23);
#pragma unroll
        for (int k = 0; k < Pairs::COUNT; ++k) {
            if (!pairs.there(k)) continue;
            float* to = p.bias_rows + index * HEAD_DIM + k * 32 + lane;
            to[0] = turning[k].x * up, to[HEAD_DIM / 2] = turning[k].y * up;
        }
        float sum = 0;
        for (int i = lane; i < 16 * Keys::STEPS; i += 32) {
            const int channel = Keys::channel(i / (4 * Keys::STEPS), i / 4 % Keys::STEPS, i % 4);
            u16 x = 0;
            if (channel < HEAD_DIM) {
                const int place = channel / Keys::ROW * Keys::LOW;  // The code's lowest bit in its operand.
                x = to_half(y[0][own][channel] * up * __uint_as_float(static_cast<u32>(127 - place) << 23));
                sum += from_half(x) * (1 << place);
            }
            p.prepared[index * 16 * Keys::STEPS + i] = x;
        }
        float logit = 0;
#pragma unroll
        for (int k = 0; k < COLUMNS / 32; ++k) {
            const int i = k * 32 + lane;
            if (i < HEAD_DIM) logit += q[own][i] * own_key[k];
        }
        for (int step = 16; step; step >>= 1) {
            sum += __shfl_xor_sync(ALL_LANES, sum, step), bias += __shfl_xor_sync(ALL_LANES, bias, step);
            logit += __shfl_xor_sync(ALL_LANES, logit, step);
        }
        logit = p.key ? logit * p.scale * LOG2E : NEG_INF;
        constexpr float UNIT_OF_PRODUCTS = 0x1p-24f, UNIT_OF_ZEROS = 1.0f / (1 << (8 - KEY_BITS));
        const float factor = p.scale * LOG2E * down / UNIT_OF_PRODUCTS;
        const float4 numbers = {factor, sum * UNIT_OF_PRODUCTS * UNIT_OF_ZEROS, bias * up * UNIT_OF_PRODUCTS, logit};
        if (lane == 0) p.rows[index] = numbers;
    }
    // Attention waits for this kernel, and by it for the store.
    if (p.beside_store) wait_for_previous_kernel();
}
