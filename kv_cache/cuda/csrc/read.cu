// Gathers 16-bit keys or values for FlashAttention, request after request: earlier tokens read back from pages
// (kv_cache/codec.py, read_page), fresh ones copied. It serves what read_tiles.cu does not: scales inside the page, and
// transforms of heads that are too large or of an odd size.
//
// A block reads one side of one KV head for TOKENS tokens of one request. Transformed keys are multiplied by the inverse
// transform, and centred keys get their centre back.
//
// Macros: HEAD_DIM, BLOCK_SIZE, BITS, GROUP_SIZE (0: scales are the layer's), TRANSFORM, PAIRS (0: keys are not centred),
// INTERLEAVED, OUT_BFLOAT.
#include "centre.cuh"

constexpr int TOKENS = 16, THREADS = 128;
constexpr int STRIDE = TOKENS + 4;
constexpr int GROUPS = GROUP_SIZE ? (HEAD_DIM + GROUP_SIZE - 1) / (GROUP_SIZE ? GROUP_SIZE : 1) : 1;

struct Params {
    const u8* cache;
    i64 block_stride;
    i64 head_stride;
    u16* out;                 // [tokens, KV heads, HEAD_DIM]
    i64 token_stride;         // Elements.
    i64 out_head_stride;      // Elements.
    const u16* fresh;         // [fresh tokens, KV heads, HEAD_DIM]
    i64 fresh_token_stride;
    i64 fresh_head_stride;
    const int* block_table;   // [requests, blocks]
    i64 table_stride;
    const int* tiles;         // [tiles, 4], as read_tiles.cu has them.
    const float* scale;       // [KV heads, HEAD_DIM]; TRANSFORM: [KV heads, HEAD_DIM (of codes), HEAD_DIM (of keys)].
    const float* zero;        // [KV heads, HEAD_DIM]
    Centres centres;          // PAIRS
    int plane;
    int high_plane;
    int meta_plane;
};

DEVICE int code_of(const u8* page, const Params& p, int offset, int c) {
    if (BITS == 8) return page[p.plane + offset * HEAD_DIM + c];
    constexpr int HALF = HEAD_DIM / 2, QUARTER = HEAD_DIM / 4;
    const int nibble = page[p.plane + offset * HALF + c % HALF] >> (c < HALF ? 0 : 4) & 15;
    if (BITS == 4) return nibble;
    return nibble | (page[p.high_plane + offset * QUARTER + c % QUARTER] >> 2 * (c / QUARTER) & 3) << 4;
}

DEVICE void add_centre(const Params& p, int head, int position, float* x) {
    for (int i = threadIdx.x; i < PAIRS; i += THREADS) {
        const float2 centre = centre_of<PAIRS>(p.centres, head, position, i);
        x[(INTERLEAVED ? 2 * i : i) * STRIDE] += centre.x;
        x[(INTERLEAVED ? 2 * i + 1 : i + PAIRS) * STRIDE] += centre.y;
    }
}

extern "C" __global__ __launch_bounds__(THREADS) void read(const __grid_constant__ Params p) {
    SHARED __align__(16) float x[HEAD_DIM * STRIDE], y[TRANSFORM ? HEAD_DIM * STRIDE : 4];
    const int head = blockIdx.y;
    const int* tile = p.tiles + 4 * blockIdx.x;
    const int request = tile[0], first = tile[1], count = tile[2], row = tile[3];
    if (request < 0) {
        for (int i = threadIdx.x; i < count * HEAD_DIM; i += THREADS) {
            const int t = i / HEAD_DIM, c = i % HEAD_DIM;
            p.out[(row + t) * p.token_stride + head * p.out_head_stride + c] =
                p.fresh[(first + t) * p.fresh_token_stride + head * p.fresh_head_stride + c];
        }
        return;
    }
    const int* table = p.block_table + request * p.table_stride;
    for (int i = threadIdx.x; i < TOKENS * HEAD_DIM; i += THREADS) {
        const int t = i / HEAD_DIM, c = i % HEAD_DIM, token = first + t;
        float v = 0;
        if (t < count) {
            const u8* page = p.cache + table[token / BLOCK_SIZE] * p.block_stride + head * p.head_stride;
            const int offset = token % BLOCK_SIZE;
            v = static_cast<float>(code_of(page, p, offset, c));
            if (GROUP_SIZE) {
                const u16* meta = reinterpret_cast<const u16*>(page + p.meta_plane) +
                                  2 * (offset * GROUPS + c / (GROUP_SIZE ? GROUP_SIZE : 1));
                v = v * from_half(meta[0]) + from_half(meta[1]);
            } else {
                v -= p.zero[head * HEAD_DIM + c];
                if (!TRANSFORM) v *= p.scale[head * HEAD_DIM + c];
            }
        }
        x[c * STRIDE + t] = v;
    }
    __syncthreads();
    float* result = x;
    if (TRANSFORM) {
        result = y;
        const float* matrix = p.scale + static_cast<i64>(head) * HEAD_DIM * HEAD_DIM;
        for (int c = threadIdx.x; c < HEAD_DIM; c += THREADS) {
            float sum[TOKENS] = {};
#pragma unroll 4
            for (int j = 0; j < HEAD_DIM; ++j) {
                const float m = matrix[j * HEAD_DIM + c];
                const float4* codes = reinterpret_cast<const float4*>(x + j * STRIDE);
#pragma unroll
                for (int t = 0; t < TOKENS; t += 4) {
                    const float4 v = codes[t / 4];
                    sum[t] += m * v.x, sum[t + 1] += m * v.y, sum[t + 2] += m * v.z, sum[t + 3] += m * v.w;
                }
            }
#pragma unroll
            for (int t = 0; t < TOKENS; ++t) y[c * STRIDE + t] = sum[t];
        }
        __syncthreads();
        if (PAIRS) {
            for (int t = 0; t < count; ++t) add_centre(p, head, first + t, y + t);
            __syncthreads();
        }
    }
    for (int i = threadIdx.x; i < TOKENS * HEAD_DIM; i += THREADS) {
        const int t = i / HEAD_DIM, c = i % HEAD_DIM;
        if (t >= count) break;
        const float v = result[c * STRIDE + t];
        p.out[(row + t) * p.token_stride + head * p.out_head_stride + c] = OUT_BFLOAT ? to_bfloat(v) : to_half(v);
    }
}
