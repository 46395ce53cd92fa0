// Gathers the keys and values that FlashAttention attends to, request after request, in 16 bits: earlier tokens read
// back from pages (kv_cache/codec.py, read_page), fresh ones copied. Keys and values in one launch, for scales kept
// outside the page. A warp reads one side of one KV head, 16 tokens at a time. Transformed keys are multiplied by the
// inverse transform on the tensor cores, as the sum of two bfloat16 numbers, and get their centre back.
//
// Macros: HEAD_DIM, BLOCK_SIZE, KEY_BITS, VALUE_BITS, TRANSFORM (of keys; a multiple of 32 channels), PAIRS (0: keys are
// not centred), INTERLEAVED, OUT_BFLOAT, WARPS.
#include "centre.cuh"

constexpr int TOKENS = 16, STEPS = HEAD_DIM / 16, TILES = HEAD_DIM / 8, QUARTER = HEAD_DIM / 4;
constexpr int OUT_STRIDE = HEAD_DIM / 2 + 4;  // Pairs of a token's row of results; rows of 16 bytes, few bank conflicts.

struct Side {
    u16* out;              // [tokens, KV heads, HEAD_DIM]
    i64 token_stride;      // Elements.
    i64 head_stride;       // Elements.
    const u16* fresh;      // [fresh tokens, KV heads, HEAD_DIM]
    i64 fresh_token_stride;
    i64 fresh_head_stride;
    const float* scale;    // [KV heads, HEAD_DIM]
    const float* zero;     // [KV heads, HEAD_DIM]
    int plane;
    int high_plane;
};

struct Params {
    const u8* cache;
    i64 block_stride;
    i64 head_stride;
    const int* block_table;  // [requests, blocks]
    i64 table_stride;
    const int4* tiles;       // Request (-1: fresh tokens), first token in it (or of the fresh ones), tokens, row of out.
    int count;               // Tiles.
    const uint4* decode;     // TRANSFORM: [KV heads, STEPS, TILES, 32] operands, heads and tails.
    const float* bias;       // TRANSFORM: [KV heads, HEAD_DIM], what codes of 0 read as.
    Centres centres;
    Side sides[2];
};

DYNAMIC_SHARED __align__(16) u8 shared[];

DEVICE u32 pair_of(float low, float high) { return OUT_BFLOAT ? pack_bfloat2(low, high) : pack_half2(low, high); }

// The codes of four columns in each quarter of a token's channels.
template <int BITS>
DEVICE void load_codes(const u8* page, const Side& side, int offset, int column, u32 (&codes)[4]) {
    constexpr int ROW = BITS == 8 ? HEAD_DIM : HEAD_DIM / 2;
    const u8* row = page + side.plane + offset * ROW + column;
#pragma unroll
    for (int q = 0; q < (BITS == 8 ? 4 : 2); ++q) {
        const u32 word = *reinterpret_cast<const u32*>(row + q * QUARTER);
        codes[q] = BITS == 8 ? word : word & 0x0f0f0f0f;
        if (BITS != 8) codes[q + 2] = word >> 4 & 0x0f0f0f0f;
    }
    if (BITS != 6) return;
    const u32 high = *reinterpret_cast<const u32*>(page + side.high_plane + offset * QUARTER + column);
#pragma unroll
    for (int q = 0; q < 4; ++q) codes[q] |= (high >> 2 * q & 0x03030303) << 4;
}

// A tile, and where lanes 0 to 15 find one token each.
struct Tile {
    int first, count, row;
    u64 page;
};

template <int BITS>
DEVICE void read_plainly(const Side& side, int head, const Tile& tile) {
    constexpr int COLUMNS = QUARTER / 4;
#pragma unroll
    for (int from = 0; from < TOKENS * COLUMNS; from += 32) {
        const int i = from + threadIdx.x % 32, token = i / COLUMNS, column = i % COLUMNS * 4;
        const u8* page = reinterpret_cast<const u8*>(__shfl_sync(ALL_LANES, tile.page, token));
        if (token >= tile.count) continue;
        u32 codes[4];
        load_codes<BITS>(page, side, (tile.first + token) % BLOCK_SIZE, column, codes);
        u16* out = side.out + (tile.row + token) * side.token_stride + head * side.head_stride + column;
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            const float4 zero = *reinterpret_cast<const float4*>(side.zero + head * HEAD_DIM + column + q * QUARTER);
            const float4 scale = *reinterpret_cast<const float4*>(side.scale + head * HEAD_DIM + column + q * QUARTER);
            const float a = (static_cast<float>(codes[q] & 255) - zero.x) * scale.x;
            const float b = (static_cast<float>(codes[q] >> 8 & 255) - zero.y) * scale.y;
            const float c = (static_cast<float>(codes[q] >> 16 & 255) - zero.z) * scale.z;
            const float d = (static_cast<float>(codes[q] >> 24) - zero.w) * scale.w;
            *reinterpret_cast<uint2*>(out + q * QUARTER) = {pair_of(a, b), pair_of(c, d)};
        }
    }
}

DEVICE void copy(const Side& side, int head, const Tile& tile) {
    constexpr int PIECES = HEAD_DIM / 4;
    for (int i = threadIdx.x % 32; i < tile.count * PIECES; i += 32) {
        const int token = i / PIECES, c = i % PIECES * 4;
        const u16* from = side.fresh + (tile.first + token) * side.fresh_token_stride + head * side.fresh_head_stride + c;
        *reinterpret_cast<uint2*>(side.out + (tile.row + token) * side.token_stride + head * side.head_stride + c) =
            *reinterpret_cast<const uint2*>(from);
    }
}

// Two nibbles, in the low bits of a 32-bit word's halves, as bfloat16 numbers: 128 + code is exact, and so is the rest.
DEVICE u32 bfloat_codes(u32 nibbles) { return fma_bfloat2(nibbles | 0x43004300, 0x3f803f80, 0xc300c300); }

DEVICE void read_transformed(const Params& p, const Side& side, int head, const Tile& tile, const uint4* decode,
                             u32* results) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const u8* rows[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int token = g + 8 * half;
        const u64 page = __shfl_sync(ALL_LANES, tile.page, token);
        rows[half] = page ? reinterpret_cast<const u8*>(page) + side.plane +
                                (tile.first + token) % BLOCK_SIZE * (HEAD_DIM / 2) + 2 * t
                          : nullptr;
    }
    float sums[TILES][4];
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
        const float2 bias = *reinterpret_cast<const float2*>(p.bias + head * HEAD_DIM + 8 * n + 2 * t);
        sums[n][0] = sums[n][2] = bias.x, sums[n][1] = sums[n][3] = bias.y;
    }
    // A byte's low nibble is a channel of the first half, its high one of the second.
#pragma unroll 1
    for (int step = 0; step < STEPS / 2; ++step) {
        u32 low[4], high[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const u8* row = rows[i % 2];
            const u32 bytes = row ? *reinterpret_cast<const u16*>(row + 16 * step + i / 2 * 8) : 0;
            const u32 spread = (bytes & 255) | (bytes & 0xff00) << 8;
            low[i] = bfloat_codes(spread & 0x000f000f), high[i] = bfloat_codes(spread >> 4 & 0x000f000f);
        }
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
            const uint4 a = decode[(step * TILES + n) * 32 + lane];
            mma_bfloat(sums[n], low, a.x, a.y);
            mma_bfloat(sums[n], low, a.z, a.w);
            const uint4 b = decode[((step + STEPS / 2) * TILES + n) * 32 + lane];
            mma_bfloat(sums[n], high, b.x, b.y);
            mma_bfloat(sums[n], high, b.z, b.w);
        }
    }
    __syncwarp();
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
        u32* to = results + g * OUT_STRIDE + 4 * n + t;
        if constexpr (PAIRS > 0) {
            // A thread holds channels 8n + 2t and the one after: of one pair, or the first or second ones of two.
            const int c = 8 * n + 2 * t;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const i64 position = tile.first + min(g + 8 * half, tile.count - 1);
                float& a = sums[n][2 * half];
                float& b = sums[n][2 * half + 1];
                if (INTERLEAVED) {
                    if (c < 2 * PAIRS) {
                        const float2 centre = centre_of<PAIRS>(p.centres, head, position, c / 2);
                        a += centre.x, b += centre.y;
                    }
                } else if (c < 2 * PAIRS) {
                    const bool second = c >= PAIRS;
                    const float2 one = centre_of<PAIRS>(p.centres, head, position, second ? c - PAIRS : c);
                    const float2 other = centre_of<PAIRS>(p.centres, head, position, second ? c + 1 - PAIRS : c + 1);
                    a += second ? one.y : one.x, b += second ? other.y : other.x;
                }
            }
        }
        to[0] = pair_of(sums[n][0], sums[n][1]);
        to[8 * OUT_STRIDE] = pair_of(sums[n][2], sums[n][3]);
    }
    __syncwarp();
    constexpr int PIECES = HEAD_DIM / 8;
#pragma unroll
    for (int i = lane; i < TOKENS * PIECES; i += 32) {
        const int token = i / PIECES, piece = i % PIECES;
        if (token >= tile.count) break;
        u16* out = side.out + (tile.row + token) * side.token_stride + head * side.head_stride + 8 * piece;
        *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(results + token * OUT_STRIDE + 4 * piece);
    }
}

template <int BITS, bool TRANSFORMED>
DEVICE void gather(const Params& p, const Side& side) {
    const int head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    constexpr int OPERANDS = STEPS * TILES * 32;
    uint4* decode = reinterpret_cast<uint4*>(shared);
    u32* results = reinterpret_cast<u32*>(shared + OPERANDS * sizeof(uint4)) + warp * TOKENS * OUT_STRIDE;
    if constexpr (TRANSFORMED) {
        const uint4* from = p.decode + static_cast<i64>(head) * OPERANDS;
        for (int i = threadIdx.x; i < OPERANDS; i += WARPS * 32) decode[i] = from[i];
        __syncthreads();
    }
    for (int index = blockIdx.x * WARPS + warp; index < p.count; index += gridDim.x * WARPS) {
        const int4 entry = p.tiles[index];
        Tile tile = {entry.y, entry.z, entry.w, 0};
        if (entry.x < 0) {
            copy(side, head, tile);
            continue;
        }
        if (lane < tile.count) {
            const int block = p.block_table[entry.x * p.table_stride + (tile.first + lane) / BLOCK_SIZE];
            tile.page = reinterpret_cast<u64>(p.cache + block * p.block_stride + head * p.head_stride);
        }
        if constexpr (TRANSFORMED)
            read_transformed(p, side, head, tile, decode, results);
        else
            read_plainly<BITS>(side, head, tile);
    }
}

extern "C" __global__ __launch_bounds__(32 * WARPS, 2) void read_tiles(const __grid_constant__ Params p) {
    if (blockIdx.z == 0)
        gather<KEY_BITS, TRANSFORM>(p, p.sides[0]);
    else
        gather<VALUE_BITS, false>(p, p.sides[1]);
}
