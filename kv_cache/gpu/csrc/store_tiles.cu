// Quantizes new keys and values and scatters them into pages, both in one launch: kv_cache/codec.py, write_pages, for
// scales kept outside the page. A warp codes one side (keys or values) of one KV head for 16 tokens at a time; a block's
// warps share the side's matrices in shared memory. Without feedback the codes are the specification's bit for bit. With
// it, products run on the tensor cores, operands split into two bfloat16 numbers, and a code may differ where a number
// lies next to a tie (rounding.cuh).
//
// Macros: HEAD_DIM, BLOCK_SIZE, INPUT (0 float32, 1 bfloat16, 2 float16), WARPS; of keys and of values: KEY_BITS,
// KEY_FEEDBACK, VALUE_BITS, VALUE_FEEDBACK; TRANSFORM (of keys), PAIRS (0: keys are not centred), INTERLEAVED.
#include "centre.cuh"
#include "rounding.cuh"

constexpr int TOKENS = 16, STRIDE = HEAD_DIM + 8;  // Floats of a token's row: no bank conflicts of 8-byte reads.
constexpr int STEPS = HEAD_DIM / 16, TILES = HEAD_DIM / 8;

struct Side {
    const void* x;           // [tokens, KV heads, HEAD_DIM]
    i64 token_stride;        // Elements.
    i64 head_stride;         // Elements.
    const float* inverse;    // [KV heads, HEAD_DIM] 1 / scale.
    const float* zero;       // [KV heads, HEAD_DIM]
    const uint4* encode;     // TRANSFORM: [KV heads, STEPS, TILES, 32] operands, heads and tails.
    const uint2* feedback;   // FEEDBACK: [KV heads, feedback_tiles(STEPS), 32] operands.
    const float* own;        // FEEDBACK: [KV heads, STEPS, 16, 16]
    int plane;               // Offsets in bytes in the page of one head.
    int high_plane;
};

struct Params {
    u8* cache;
    i64 block_stride;
    i64 head_stride;
    const i64* slots;        // [tokens] block * BLOCK_SIZE + offset; negative: not stored.
    const i64* positions;    // [tokens], for centred keys.
    Centres centres;
    int tokens;
    int key_blocks;          // The first blocks of a head code keys, the others values.
    int reads_nothing_before;  // Whether the kernel before this one, which may still run, writes nothing that this reads.
    Side sides[2];
};

union Scratch {
    float x[TOKENS * STRIDE];
    RoundingScratch<HEAD_DIM> rounding;
};

// Four channels from an index that is a multiple of four.
DEVICE float4 load_4(const void* data, i64 at) {
    if (INPUT == 0) return *reinterpret_cast<const float4*>(static_cast<const float*>(data) + at);
    const uint2 bits = *reinterpret_cast<const uint2*>(static_cast<const u16*>(data) + at);
    const u16 part[4] = {static_cast<u16>(bits.x), static_cast<u16>(bits.x >> 16), static_cast<u16>(bits.y),
                         static_cast<u16>(bits.y >> 16)};
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = INPUT == 1 ? from_bfloat(part[i]) : from_half(part[i]);
    return {x[0], x[1], x[2], x[3]};
}


extern __shared__ __align__(16) u8 shared[];

// Where this lane's token goes: lanes 0 to 15 know one token each, all others the same through shuffles.
struct Place {
    u8* page;
    int offset;
};

DEVICE Place place_of(u64 page, int offset, int token) {
    return {reinterpret_cast<u8*>(__shfl_sync(ALL_LANES, page, token)), __shfl_sync(ALL_LANES, offset, token)};
}

// Writes the codes of four columns in each quarter of a token's channels.
template <int BITS>
DEVICE void write(const Side& side, Place place, int column, const u32 (&codes)[4]) {
    constexpr int QUARTER = HEAD_DIM / 4, ROW = BITS == 8 ? HEAD_DIM : HEAD_DIM / 2;
    u8* row = place.page + side.plane + place.offset * ROW + column;
#pragma unroll
    for (int q = 0; q < (BITS == 8 ? 4 : 2); ++q) {
        const u32 word = BITS == 8 ? codes[q] : (codes[q] & 0x0f0f0f0f) | (codes[q + 2] & 0x0f0f0f0f) << 4;
        *reinterpret_cast<u32*>(row + q * QUARTER) = word;
    }
    if (BITS != 6) return;
    u32 high = 0;
#pragma unroll
    for (int q = 0; q < 4; ++q) high |= (codes[q] >> 4 & 0x03030303) << 2 * q;
    *reinterpret_cast<u32*>(place.page + side.high_plane + place.offset * QUARTER + column) = high;
}

template <int BITS>
DEVICE void code_plainly(const Side& side, int head, int first, u64 page, int offset) {
    constexpr int QUARTER = HEAD_DIM / 4, COLUMNS = QUARTER / 4;
#pragma unroll
    for (int from = 0; from < TOKENS * COLUMNS; from += 32) {
        const int i = from + threadIdx.x % 32, token = i / COLUMNS, column = i % COLUMNS * 4;
        const Place place = place_of(page, offset, token);
        if (token >= TOKENS || !place.page) continue;
        u32 codes[4];
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            const int c = column + q * QUARTER;
            const float4 x = load_4(side.x, (first + token) * side.token_stride + head * side.head_stride + c);
            const float* inverse = side.inverse + head * HEAD_DIM + c;
            const float* zero = side.zero + head * HEAD_DIM + c;
            codes[q] = 0;
            const float v[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
            for (int k = 0; k < 4; ++k)
                codes[q] |= static_cast<u32>(nearest<BITS>(__fadd_rn(__fmul_rn(v[k], inverse[k]), zero[k]))) << 8 * k;
        }
        write<BITS>(side, place, column, codes);
    }
}

template <bool TRANSFORMED>
DEVICE void scale_channels(const Side& side, int head, const uint4* encode, const float* x, float (&sums)[TILES][4]) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const float* zero = side.zero + head * HEAD_DIM;
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
        const int c = 8 * n + 2 * t;
        const float2 z = *reinterpret_cast<const float2*>(zero + c);
        sums[n][0] = sums[n][2] = z.x, sums[n][1] = sums[n][3] = z.y;
        if (TRANSFORMED) continue;
        const float2 by = *reinterpret_cast<const float2*>(side.inverse + head * HEAD_DIM + c);
        const float2 a = *reinterpret_cast<const float2*>(x + g * STRIDE + c);
        const float2 b = *reinterpret_cast<const float2*>(x + (g + 8) * STRIDE + c);
        sums[n][0] = __fadd_rn(__fmul_rn(a.x, by.x), z.x), sums[n][1] = __fadd_rn(__fmul_rn(a.y, by.y), z.y);
        sums[n][2] = __fadd_rn(__fmul_rn(b.x, by.x), z.x), sums[n][3] = __fadd_rn(__fmul_rn(b.y, by.y), z.y);
    }
    if constexpr (TRANSFORMED) {
#pragma unroll 1
        for (int step = 0; step < STEPS; ++step) {
            u32 head_of[4], tail[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 v = *reinterpret_cast<const float2*>(x + (g + i % 2 * 8) * STRIDE + 16 * step + 2 * t + i / 2 * 8);
                split_bfloat2(v.x, v.y, head_of[i], tail[i]);
            }
#pragma unroll
            for (int n = 0; n < TILES; ++n) {
                const uint4 m = encode[(step * TILES + n) * 32 + lane];
                mma_bfloat(sums[n], head_of, m.x, m.y);
                mma_bfloat(sums[n], head_of, m.z, m.w);
                mma_bfloat(sums[n], tail, m.x, m.y);
            }
        }
    }
}

template <int BITS, bool TRANSFORMED>
DEVICE void code_with_feedback(const Params& p, const Side& side, int head, int first, u64 page, int offset,
                               const uint4* encode, const uint2* feedback, const float* own, Scratch& scratch) {
    const int lane = threadIdx.x % 32;
    constexpr int QUADS = HEAD_DIM / 4;
    __syncwarp();
#pragma unroll 4
    for (int i = lane; i < TOKENS * QUADS; i += 32) {
        const int token = i / QUADS, c = i % QUADS * 4;
        float4 x = {0, 0, 0, 0};
        if (__shfl_sync(ALL_LANES, page, token))
            x = load_4(side.x, (first + token) * side.token_stride + head * side.head_stride + c);
        *reinterpret_cast<float4*>(scratch.x + token * STRIDE + c) = x;
    }
    __syncwarp();
    if constexpr (TRANSFORMED && PAIRS > 0) {
        const int count = min(TOKENS, p.tokens - first);
        const i64 position = lane < count && page ? p.positions[first + lane] : 0;
#pragma unroll 4
        for (int from = 0; from < TOKENS * PAIRS; from += 32) {
            const int i = from + lane, token = i / PAIRS, pair = i % PAIRS;
            const i64 at = __shfl_sync(ALL_LANES, position, token);
            if (token >= TOKENS) continue;
            const float2 centre = centre_of<PAIRS>(p.centres, head, at, pair);
            float& a = scratch.x[token * STRIDE + (INTERLEAVED ? 2 * pair : pair)];
            float& b = scratch.x[token * STRIDE + (INTERLEAVED ? 2 * pair + 1 : pair + PAIRS)];
            a = __fsub_rn(a, centre.x), b = __fsub_rn(b, centre.y);
        }
        __syncwarp();
    }
    float sums[TILES][4];
    scale_channels<TRANSFORMED>(side, head, encode, scratch.x, sums);
    __syncwarp();  // The rounding uses the same scratch.
    round_with_feedback<HEAD_DIM, BITS>(sums, feedback, own, scratch.rounding);
    constexpr int QUARTER = HEAD_DIM / 4, COLUMNS = QUARTER / 4;
#pragma unroll
    for (int from = 0; from < TOKENS * COLUMNS; from += 32) {
        const int i = from + lane, token = i / COLUMNS, column = i % COLUMNS * 4;
        const Place place = place_of(page, offset, token);
        if (token >= TOKENS || !place.page) continue;
        u32 codes[4];
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            const u8* row = scratch.rounding.codes + token * RoundingScratch<HEAD_DIM>::CODE_STRIDE;
            codes[q] = *reinterpret_cast<const u32*>(row + column + q * QUARTER);
        }
        write<BITS>(side, place, column, codes);
    }
}

// Copies bytes, a multiple of 16, into shared memory by all threads of the block; they are there after copies_done.
DEVICE u8* fetch(u8* to, const void* from, int bytes) {
    for (int i = threadIdx.x * 16; i < bytes; i += WARPS * 32 * 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to + i)),
                     "l"(__cvta_generic_to_global(static_cast<const u8*>(from) + i)) : "memory");
    return to + bytes;
}

DEVICE void copies_done() {
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
}

template <int BITS, bool FEEDBACK, bool TRANSFORMED>
DEVICE void code(const Params& p, const Side& side, int block, int blocks) {
    constexpr int ENCODE = STEPS * TILES * 32, FED = feedback_tiles(STEPS) * 32, OWN = STEPS * BAND * BAND;
    const int head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    u8* end = shared + WARPS * sizeof(Scratch);
    const uint4* encode = reinterpret_cast<const uint4*>(end);
    const uint2* feedback = nullptr;
    const float* own = nullptr;
    if constexpr (FEEDBACK) {
        // Constants of the model: there is no need to wait for them.
        if constexpr (TRANSFORMED) end = fetch(end, side.encode + static_cast<i64>(head) * ENCODE, ENCODE * sizeof(uint4));
        feedback = reinterpret_cast<const uint2*>(end);
        end = fetch(end, side.feedback + static_cast<i64>(head) * FED, FED * sizeof(uint2));
        own = reinterpret_cast<const float*>(end);
        fetch(end, side.own + head * OWN, OWN * sizeof(float));
    }
    if (!p.reads_nothing_before) wait_for_previous_kernel();
    let_next_kernel_start();
    if constexpr (FEEDBACK) copies_done();
    for (int first = (block * WARPS + warp) * TOKENS; first < p.tokens; first += blocks * WARPS * TOKENS) {
        const i64 slot = lane < TOKENS && first + lane < p.tokens ? p.slots[first + lane] : -1;
        const u64 page = slot < 0 ? 0
                                  : reinterpret_cast<u64>(p.cache + slot / BLOCK_SIZE * p.block_stride +
                                                          head * p.head_stride);
        const int offset = slot < 0 ? 0 : static_cast<int>(slot % BLOCK_SIZE);
        if constexpr (FEEDBACK) {
            Scratch& scratch = reinterpret_cast<Scratch*>(shared)[warp];
            code_with_feedback<BITS, TRANSFORMED>(p, side, head, first, page, offset, encode, feedback, own, scratch);
        } else {
            code_plainly<BITS>(side, head, first, page, offset);
        }
    }
    // The next kernel waits for this one, and by it for the one before.
    if (p.reads_nothing_before) wait_for_previous_kernel();
}

extern "C" __global__ __launch_bounds__(32 * WARPS) void store_tiles(const __grid_constant__ Params p) {
    const int block = blockIdx.x;
    if (block < p.key_blocks)
        code<KEY_BITS, KEY_FEEDBACK, TRANSFORM>(p, p.sides[0], block, p.key_blocks);
    else
        code<VALUE_BITS, VALUE_FEEDBACK, false>(p, p.sides[1], block - p.key_blocks, gridDim.x - p.key_blocks);
}
