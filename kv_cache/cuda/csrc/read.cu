// Gathers the keys and values that FlashAttention attends to, request after request, in 16 bits: earlier tokens read
// back from pages (kv_cache/codec.py, read_page), fresh ones copied. A warp reads 16 tokens of one KV head at a time.
// Codes are bfloat16 numbers as they are, which the tensor cores multiply with the inverse transform, the sum of two
// bfloat16 numbers. Scale and zero follow: step * (inverse codes - zero * sums of the inverse's rows).
//
// Macros: HEAD_DIM, BLOCK_SIZE, KEY_BITS, VALUE_BITS, PAIRS_APART (pairs of channels i and i + PAIRS_APART; the others
// are neighbours), OUT_BFLOAT, WARPS of a block, SHARED_BYTES, PARAMS_BYTES (what the host takes a block's memory and
// `Params` to be).
#include "centre.cuh"
#include "rows.cuh"

constexpr int TOKENS = 16, STEPS = HEAD_DIM / 16, TILES = HEAD_DIM / 8, THREADS = 32 * WARPS;
constexpr int PASS_TILES = TILES < 16 ? TILES : 16, PASSES = TILES / PASS_TILES;  // Sums of a pass stay in registers.
static_assert(TILES % PASS_TILES == 0);
// A matrix too large for shared memory is read from the L2 cache each time.
constexpr int OPERANDS = STEPS * TILES * 32;
constexpr bool MATRIX_IS_SHARED = HEAD_DIM <= 128;

// Strides without bank conflicts, in words: pairs of codes, and results. Results take the codes' place after one pass.
constexpr int CODE_STRIDE = HEAD_DIM / 2 + 4, ROW_STRIDE = HEAD_DIM + 8;
constexpr int RESULTS_AT = PASSES > 1 ? TOKENS * CODE_STRIDE : 0, SCRATCH_WORDS = RESULTS_AT + TOKENS * ROW_STRIDE;
static_assert((MATRIX_IS_SHARED ? OPERANDS * 16 : 0) + WARPS * SCRATCH_WORDS * 4 == SHARED_BYTES,
              "the host asks for other shared memory");

struct Side {
    u16* out;              // [tokens, KV heads, HEAD_DIM]
    i64 token_stride;      // Elements.
    i64 head_stride;       // Elements.
    const u16* fresh;      // [fresh tokens, KV heads, HEAD_DIM]
    i64 fresh_token_stride;
    i64 fresh_head_stride;
    int planes[2];         // Offsets in bytes in the page of one head.
};

struct Params {
    const u8* cache;
    i64 block_stride;
    i64 head_stride;
    const int* block_table;     // [requests, blocks]
    i64 table_stride;
    const int4* tiles;          // Request (-1: fresh tokens), first token in it (or of those), tokens, row of out.
    const uint4* inverse;       // [KV heads, STEPS, TILES, 32] operands, heads and tails.
    const float* row_sums;      // [KV heads, HEAD_DIM]
    Centres centres;
    const float* value_decode;  // [KV heads]
    const float* value_mirror;  // [KV heads, HEAD_DIM]
    Side sides[2];
    int count;                  // Tiles.
    int meta;                   // Offset in bytes in the page of one head.
};
static_assert(sizeof(Params) == PARAMS_BYTES, "the host passes other parameters");

DYNAMIC_SHARED __align__(16) u8 shared[];

DEVICE u32 pair_of(float low, float high) { return OUT_BFLOAT ? pack_bfloat2(low, high) : pack_half2(low, high); }

// Up to 16 tokens that lie in one page.
struct Tile {
    int first, count, row;
    const u8* page;

    DEVICE u16* out(const Side& side, int head, int token) const {
        return side.out + (row + token) * side.token_stride + head * side.head_stride;
    }
    DEVICE int offset(int token) const { return first % BLOCK_SIZE + token; }

    // For each of the lane's tokens, there or not: call(token, codes of the lane's quads, 0 where there are none).
    template <int BITS, class Call>
    DEVICE void for_each_token(const Side& side, const Call& call) const {
        constexpr int AT_ONCE = 2;  // Tokens whose codes are on the way.
        static_assert(TOKENS % (AT_ONCE * WARP_TOKENS) == 0);
#pragma unroll 1
        for (int base = 0; base < TOKENS; base += AT_ONCE * WARP_TOKENS) {
            u32 codes[AT_ONCE][OWN] = {};
#pragma unroll
            for (int k = 0; k < AT_ONCE; ++k) {
                const int token = base + k * WARP_TOKENS + threadIdx.x % 32 / LANES;
                if (token >= count) continue;
#pragma unroll
                for (int i = 0; i < OWN; ++i) {
                    if (has_quad(i)) codes[k][i] = Planes<BITS>::load(page, side.planes, offset(token), quad(i));
                }
            }
#pragma unroll
            for (int k = 0; k < AT_ONCE; ++k) call(base + k * WARP_TOKENS + threadIdx.x % 32 / LANES, codes[k]);
        }
    }

    // A token's bytes of scale and zero, of its key or its value; of tokens that are not there, another's.
    DEVICE u32 meta(const Params& p, int kind, int token) const {
        return reinterpret_cast<const u16*>(page + p.meta)[2 * offset(min(token, count - 1)) + kind];
    }
};

DEVICE void read_values(const Params& p, int head, const Tile& tile) {
    const Side& side = p.sides[1];
    const float decode = load_constant(p.value_decode + head);
    Mirror mirror;
    mirror.load(p.value_mirror, head);
    tile.for_each_token<VALUE_BITS>(side, [&](int token, const u32 (&codes)[OWN]) {
        const u32 meta = tile.meta(p, 1, token);
        const float step = step_of<VALUE_BITS>(meta & 255), shift = shift_of<VALUE_BITS>(meta >> 8);
        float y[OWN][4];
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
#pragma unroll
            for (int k = 0; k < 4; ++k)
                y[i][k] = has_quad(i) ? __fmul_rn(__fsub_rn(code_of(codes[i], k), shift), step) : 0.0f;
        }
        hadamard_sums(y);
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
#pragma unroll
            for (int k = 0; k < 4; ++k) y[i][k] *= decode;
        }
        mirror.reflect(y);
        if (token >= tile.count) return;
        u16* out = tile.out(side, head, token);
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            if (has_quad(i))
                *reinterpret_cast<uint2*>(out + 4 * quad(i)) = {pair_of(y[i][0], y[i][1]), pair_of(y[i][2], y[i][3])};
        }
    });
}

DEVICE void read_keys(const Params& p, int head, const Tile& tile, const uint4* inverse, u32* scratch) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    tile.for_each_token<KEY_BITS>(p.sides[0], [&](int token, const u32 (&codes)[OWN]) {
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            const auto pair = [&](int k) { return pack_bfloat2(code_of(codes[i], k), code_of(codes[i], k + 1)); };
            u32* to = scratch + token * CODE_STRIDE + 2 * quad(i);
            if (has_quad(i)) *reinterpret_cast<uint2*>(to) = {pair(0), pair(2)};
        }
    });
    float steps[2], shifts[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const u32 meta = tile.meta(p, 0, g + 8 * half);
        steps[half] = step_of<KEY_BITS>(meta & 255), shifts[half] = shift_of<KEY_BITS>(meta >> 8);
    }
    __syncwarp();

    float* results = reinterpret_cast<float*>(scratch + RESULTS_AT);
#pragma unroll 1
    for (int pass = 0; pass < PASSES; ++pass) {
        float sums[PASS_TILES][4] = {};
#pragma unroll 1
        for (int step = 0; step < STEPS; ++step) {
            const u32* at = scratch + g * CODE_STRIDE + 8 * step + t;
            const u32 a[4] = {at[0], at[8 * CODE_STRIDE], at[4], at[8 * CODE_STRIDE + 4]};
            const uint4* operands = inverse + (step * TILES + pass * PASS_TILES) * 32 + lane;
#pragma unroll
            for (int n = 0; n < PASS_TILES; ++n) {
                const uint4 b = MATRIX_IS_SHARED ? operands[n * 32] : load_constant(operands + n * 32);
                mma_bfloat(sums[n], a, b.x, b.y);
                mma_bfloat(sums[n], a, b.z, b.w);
            }
        }
        __syncwarp();
#pragma unroll
        for (int n = 0; n < PASS_TILES; ++n) {
            const int channel = 8 * (pass * PASS_TILES + n) + 2 * t;
            const float2 whole = load_constant(reinterpret_cast<const float2*>(p.row_sums + head * HEAD_DIM + channel));
            float* to = results + g * ROW_STRIDE + channel;
#pragma unroll
            for (int half = 0; half < 2; ++half)
                *reinterpret_cast<float2*>(to + 8 * half * ROW_STRIDE) = {
                    (sums[n][2 * half] - shifts[half] * whole.x) * steps[half],
                    (sums[n][2 * half + 1] - shifts[half] * whole.y) * steps[half]};
        }
    }
    __syncwarp();

    using Pairs = PairRuns<PAIRS_APART>;
    constexpr int WIDTH = Pairs::WIDTH;
#pragma unroll 2
    for (int i = lane; i < TOKENS * Pairs::COUNT; i += 32) {
        const int token = i / Pairs::COUNT, position = tile.first + token;
        if (token >= tile.count) break;
        const Pairs pairs(i % Pairs::COUNT);
        Pairs::Runs mean;
        pairs.load(position ? p.centres.mean : p.centres.first, head, mean);
        const Pairs::Runs centre = pairs.centre(p.centres, mean, position);
        u16* out = tile.out(p.sides[0], head, token);
#pragma unroll
        for (int run = 0; run < 2; ++run) {
            const float* from = results + token * ROW_STRIDE + pairs.channel(run);
            u16* to = out + pairs.channel(run);
            if constexpr (WIDTH == 4) {
                const float4 y = *reinterpret_cast<const float4*>(from);
                const float(&c)[WIDTH] = centre.x[run];
                *reinterpret_cast<uint2*>(to) = {pair_of(y.x + c[0], y.y + c[1]), pair_of(y.z + c[2], y.w + c[3])};
            } else {
#pragma unroll
                for (int k = 0; k < WIDTH; ++k) {
                    const float x = from[k] + centre.x[run][k];
                    to[k] = OUT_BFLOAT ? to_bfloat(x) : to_half(x);
                }
            }
        }
    }
    __syncwarp();
}

DEVICE void copy(const Side& side, int head, const Tile& tile) {
    for (int i = threadIdx.x % 32; i < tile.count * QUADS; i += 32) {
        const int token = i / QUADS, channel = i % QUADS * 4;
        const u16* from = side.fresh + (tile.first + token) * side.fresh_token_stride + head * side.fresh_head_stride;
        u16* to = tile.out(side, head, token);
        *reinterpret_cast<uint2*>(to + channel) = *reinterpret_cast<const uint2*>(from + channel);
    }
}

extern "C" __global__ __launch_bounds__(THREADS, 1) void read(const __grid_constant__ Params p) {
    // Broadcast, so that the compiler knows that a warp does not part over it.
    const int head = blockIdx.y, warp = __shfl_sync(ALL_LANES, threadIdx.x / 32, 0);
    const uint4* inverse = p.inverse + static_cast<i64>(head) * OPERANDS;
    u32* scratch = reinterpret_cast<u32*>(shared) + warp * SCRATCH_WORDS;
    if constexpr (MATRIX_IS_SHARED) {
        uint4* mine = reinterpret_cast<uint4*>(shared + WARPS * SCRATCH_WORDS * 4);
        for (int i = threadIdx.x; i < OPERANDS; i += THREADS) fetch_16(mine + i, inverse + i);
        fetches_done();
        __syncthreads();
        inverse = mine;
    }
    for (int index = blockIdx.x * WARPS + warp; index < p.count; index += gridDim.x * WARPS) {
        const int4 entry = p.tiles[index];
        Tile tile = {entry.y, entry.z, entry.w, nullptr};
        if (entry.x < 0) {
            copy(p.sides[0], head, tile), copy(p.sides[1], head, tile);
            continue;
        }
        const int block = p.block_table[entry.x * p.table_stride + tile.first / BLOCK_SIZE];
        tile.page = p.cache + block * p.block_stride + head * p.head_stride;
        read_keys(p, head, tile, inverse, scratch);
        read_values(p, head, tile);
    }
}
