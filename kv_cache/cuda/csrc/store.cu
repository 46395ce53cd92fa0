// Quantizes new keys and values and scatters them into pages, both in one launch: kv_cache/codec.py, write_pages.
// Values are the specification's bit for bit. Keys are transformed on the tensor cores, split into two bfloat16 numbers
// each, so that a byte may differ where a number lies next to a tie.
//
// A thread block takes the tokens of one KV head 16 at a time. Each warp keeps its columns of the transform in
// registers, asked for before the kernels ahead have ended; all share the tokens' operands. Few tokens, which are waited
// for, have blocks of their own for keys and for values. Code is small: fetched once a layer, instructions cost more
// than their execution.
//
// Macros: HEAD_DIM, BLOCK_SIZE, KEY_BITS, VALUE_BITS, PAIRS_APART (pairs of channels i and i + PAIRS_APART; the others
// are neighbours), INPUT (0 float32, 1 bfloat16, 2 float16), WARPS of a block, RESIDENT (blocks of a multiprocessor that
// registers are to suffice for), SHARED_BYTES, PARAMS_BYTES (what the host takes `Scratch` and `Params` to be).
#include "centre.cuh"
#include "rows.cuh"

constexpr int TOKENS = 16, THREADS = 32 * WARPS;
constexpr int STEPS = HEAD_DIM / 16, TILES = HEAD_DIM / 8, WARP_TILES = TILES / WARPS;
static_assert(TILES % WARPS == 0 && WARPS * WARP_TOKENS >= TOKENS);

struct Side {
    const void* x;      // [tokens, KV heads, HEAD_DIM]
    i64 token_stride;   // Elements.
    i64 head_stride;    // Elements.
    int planes[2];      // Offsets in bytes in the page of one head.
    float range_scale;  // From a token's range to its scale, and from the range below 0 in steps to its zero:
    float range_zero;   // kv_cache/codec.py, fit.
    float gain;         // What is multiplied by it before it is rounded to codes.
};

struct Params {
    u8* cache;
    i64 block_stride;
    i64 head_stride;
    const i64* slots;           // [tokens] block * BLOCK_SIZE + offset; negative: not stored.
    const i64* positions;       // [tokens]
    Centres centres;
    const uint2* transform;     // [KV heads, STEPS, TILES, 32] operands.
    const float* value_encode;  // [KV heads]
    const float* value_mirror;  // [KV heads, HEAD_DIM]
    Side sides[2];
    int tokens;
    int meta;                   // Offset in bytes in the page of one head.
};
static_assert(sizeof(Params) == PARAMS_BYTES, "the host passes other parameters");

// Strides without bank conflicts, in words.
constexpr int OPERAND_STRIDE = HEAD_DIM / 2 + 4, ROW_STRIDE = HEAD_DIM + 8, CODE_STRIDE = 5 * LANES;

struct Scratch {
    u32 operands[2][TOKENS * OPERAND_STRIDE];  // Keys less their centres: heads, then tails, in pairs of bfloat16.
    float y[TOKENS * ROW_STRIDE];              // Transformed keys.
    u32 codes[TOKENS * CODE_STRIDE];           // Quads, a byte each.
};
static_assert(sizeof(Scratch) == SHARED_BYTES, "the host asks for other shared memory");

DYNAMIC_SHARED __align__(16) u8 shared[];

// COUNT neighbouring elements as they come, and as numbers.
template <int COUNT>
struct Elements {
    static constexpr int BYTES = COUNT * (INPUT == 0 ? 4 : 2);
    u32 words[(BYTES + 3) / 4];

    DEVICE void load(const Side& side, i64 token, int head, int channel) {
        const i64 at = token * side.token_stride + head * side.head_stride + channel;
        const u8* from = static_cast<const u8*>(side.x) + at * (INPUT == 0 ? 4 : 2);
        if constexpr (BYTES == 16) {
            const uint4 v = *reinterpret_cast<const uint4*>(from);
            words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
        } else if constexpr (BYTES == 8) {
            const uint2 v = *reinterpret_cast<const uint2*>(from);
            words[0] = v.x, words[1] = v.y;
        } else if constexpr (BYTES == 4) {
            words[0] = *reinterpret_cast<const u32*>(from);
        } else {
            words[0] = *reinterpret_cast<const u16*>(from);
        }
    }

    DEVICE float operator[](int i) const {
        if (INPUT == 0) return __uint_as_float(words[i]);
        const u16 bits = static_cast<u16>(words[i / 2] >> 16 * (i % 2));
        return INPUT == 1 ? from_bfloat(bits) : from_half(bits);
    }
};

// A token of the lane, where there is one.
struct Place {
    int token;
    bool there;
    i64 slot = -1;

    DEVICE Place(const Params& p, int first)
        : token(first + threadIdx.x / LANES), there(threadIdx.x / LANES < TOKENS && token < p.tokens) {
        if (there) slot = p.slots[token];
    }

    // Codes what the lane has of its token, which is even, and writes it. All lanes of a warp come here.
    template <int BITS>
    DEVICE void code(const Params& p, int kind, int head, float (&y)[OWN][4]) const {
        // 1.5 * 2^23: added, it rounds to an integer, ties to even, in the lowest bits.
        constexpr float MAGIC = 12582912.0f;
        const Side& side = p.sides[kind];
        float low = 0, high = 0;
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                if (y[i][k] != y[i][k]) y[i][k] = 0;
                low = fminf(low, y[i][k]), high = fmaxf(high, y[i][k]);
            }
        }
#pragma unroll
        for (int apart = LANES / 2; apart; apart /= 2) {
            low = fminf(low, __shfl_xor_sync(ALL_LANES, low, apart));
            high = fmaxf(high, __shfl_xor_sync(ALL_LANES, high, apart));
        }
        const u32 bits = __float_as_uint(__fmul_rn(__fsub_rn(high, low), side.range_scale));
        const u32 rounded = (bits + (1 << (MANTISSA_SHIFT - 1))) >> MANTISSA_SHIFT;
        const int scale = min(max(static_cast<int>(rounded) - UNIT_BYTE, 0), 255);
        const float inverse = __frcp_rn(step_of<BITS>(scale));
        const float below = __fmul_rn(__fmul_rn(-low, inverse), side.range_zero);
        const float zero = __fadd_rn(fminf(fmaxf(below, 0.0f), 255.0f), MAGIC);
        const float shift = shift_of<BITS>(__fsub_rn(zero, MAGIC)), factor = __fmul_rn(inverse, side.gain);

        u32* codes = reinterpret_cast<Scratch*>(shared)->codes + threadIdx.x / LANES % TOKENS * CODE_STRIDE;
        const bool stored = slot >= 0;
        if (stored) {
#pragma unroll
            for (int i = 0; i < OWN; ++i) {
                u32 sums[4];
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const float scaled = __fmaf_rn(y[i][k], factor, shift);
                    sums[k] = __float_as_uint(__fadd_rn(fminf(fmaxf(scaled, 0.0f), (1 << BITS) - 1), MAGIC));
                }
                const u32 pairs[2] = {__byte_perm(sums[0], sums[1], 0x0040), __byte_perm(sums[2], sums[3], 0x0040)};
                if (has_quad(i)) codes[quad(i)] = __byte_perm(pairs[0], pairs[1], 0x5410);
            }
        }
        __syncwarp();
        if (stored) {
            u8* page = p.cache + slot / BLOCK_SIZE * p.block_stride + head * p.head_stride;
            const int offset = static_cast<int>(slot % BLOCK_SIZE);
            write_planes<BITS>(page, side.planes, offset, codes);
            if (threadIdx.x % LANES == 0) {
                u16* meta = reinterpret_cast<u16*>(page + p.meta) + 2 * offset + kind;
                *meta = static_cast<u16>(scale | (__float_as_uint(zero) & 255) << 8);
            }
        }
        __syncwarp();
    }
};

// What a block keeps to transform one head's keys.
struct Keys {
    using Pairs = PairRuns<PAIRS_APART>;
    static constexpr int WIDTH = Pairs::WIDTH, SHARE = TOKENS * Pairs::COUNT / THREADS;  // Of a thread: runs of pairs.
    static_assert(THREADS % Pairs::COUNT == 0 && TOKENS * Pairs::COUNT % THREADS == 0);
    // A thread has the same channels of several tokens.
    const Pairs pairs{static_cast<int>(threadIdx.x % Pairs::COUNT)};
    Pairs::Runs mean;
    uint2 transform[STEPS][WARP_TILES];

    // Constants of the model: there is no need to wait for them.
    DEVICE void load(const Params& p, int head) {
        const int first = head * STEPS * TILES + threadIdx.x / 32 * WARP_TILES;
        const uint2* from = p.transform + first * 32 + threadIdx.x % 32;
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
#pragma unroll
            for (int n = 0; n < WARP_TILES; ++n) transform[step][n] = load_constant(from + (step * TILES + n) * 32);
        }
        pairs.load(p.centres.mean, head, mean);
    }

    // Brings the tokens less their centres into shared memory, each number as the sum of two of bfloat16.
    DEVICE void stage(const Params& p, int head, int first) const {
        Scratch& scratch = *reinterpret_cast<Scratch*>(shared);
        const Side& side = p.sides[0];
        const int start = threadIdx.x / Pairs::COUNT;
        constexpr int TOKEN_STEP = THREADS / Pairs::COUNT;  // Tokens of a thread.
        Elements<WIDTH> raw[SHARE][2];
        i64 slots[SHARE];
        int positions[SHARE];
#pragma unroll
        for (int i = 0; i < SHARE; ++i) {
            const int token = first + start + i * TOKEN_STEP;
            slots[i] = -1;
            if (token >= p.tokens) continue;
            slots[i] = p.slots[token], positions[i] = static_cast<int>(p.positions[token]);
#pragma unroll
            for (int run = 0; run < 2; ++run) raw[i][run].load(side, token, head, pairs.channel(run));
        }
#pragma unroll
        for (int i = 0; i < SHARE; ++i) {
            if (slots[i] < 0) continue;  // Nobody reads what its row leaves then, and its position may be any.
            Pairs::Runs own = mean;
            if (!positions[i]) pairs.load(p.centres.first, head, own);
            const Pairs::Runs centre = pairs.centre(p.centres, own, positions[i]);
            const int row = (start + i * TOKEN_STEP) * OPERAND_STRIDE;
#pragma unroll
            for (int run = 0; run < 2; ++run) {
                u32 parts[2][(WIDTH + 1) / 2];
#pragma unroll
                for (int k = 0; k < WIDTH; k += 2) {
                    const float x = __fsub_rn(raw[i][run][k], centre.x[run][k]);
                    const float next = WIDTH > 1 ? __fsub_rn(raw[i][run][k + 1], centre.x[run][k + 1]) : 0.0f;
                    split_bfloat2(x, next, parts[0][k / 2], parts[1][k / 2]);
                }
#pragma unroll
                for (int part = 0; part < 2; ++part) {
                    u16* to = reinterpret_cast<u16*>(scratch.operands[part] + row) + pairs.channel(run);
                    if constexpr (WIDTH == 4) *reinterpret_cast<uint2*>(to) = {parts[part][0], parts[part][1]};
                    else if constexpr (WIDTH == 2) *reinterpret_cast<u32*>(to) = parts[part][0];
                    else *to = static_cast<u16>(parts[part][0]);
                }
            }
        }
    }

    DEVICE void multiply() const {
        Scratch& scratch = *reinterpret_cast<Scratch*>(shared);
        const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        // Of few columns, heads and tails have sums of their own, so that fewer products wait for each other.
        constexpr int SUMS = WARP_TILES <= 2 ? 2 : 1;
        float sums[SUMS][WARP_TILES][4] = {};
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                const u32* at = scratch.operands[part] + g * OPERAND_STRIDE + 8 * step + t;
                const u32 a[4] = {at[0], at[8 * OPERAND_STRIDE], at[4], at[8 * OPERAND_STRIDE + 4]};
#pragma unroll
                for (int n = 0; n < WARP_TILES; ++n)
                    mma_bfloat(sums[part % SUMS][n], a, transform[step][n].x, transform[step][n].y);
            }
        }
#pragma unroll
        for (int n = 0; n < WARP_TILES; ++n) {
            float(&sum)[4] = sums[0][n];
            if constexpr (SUMS > 1) {
#pragma unroll
                for (int i = 0; i < 4; ++i) sum[i] += sums[1][n][i];
            }
            float* to = scratch.y + g * ROW_STRIDE + 8 * (threadIdx.x / 32 * WARP_TILES + n) + 2 * t;
            *reinterpret_cast<float2*>(to) = {sum[0], sum[1]};
            *reinterpret_cast<float2*>(to + 8 * ROW_STRIDE) = {sum[2], sum[3]};
        }
    }

    DEVICE static void transformed(float (&y)[OWN][4]) {
        const float* row = reinterpret_cast<Scratch*>(shared)->y + threadIdx.x / LANES * ROW_STRIDE;
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            float4 v = {};
            if (has_quad(i)) v = *reinterpret_cast<const float4*>(row + 4 * quad(i));
            y[i][0] = v.x, y[i][1] = v.y, y[i][2] = v.z, y[i][3] = v.w;
        }
    }
};

extern "C" __global__ __launch_bounds__(THREADS, RESIDENT) void store(const __grid_constant__ Params p) {
    const int head = blockIdx.y;
    const bool codes_keys = gridDim.z == 1 || blockIdx.z == 0, codes_values = gridDim.z == 1 || blockIdx.z == 1;
    // So told, the compiler knows that a warp does not part over it.
    const bool warp_codes = __shfl_sync(ALL_LANES, threadIdx.x / 32, 0) * WARP_TOKENS < TOKENS;
    Keys keys;
    if (codes_keys) keys.load(p, head);
    const float encode = load_constant(p.value_encode + head);
    // Few tokens have registers for it, and are waited for; many find it in the cache.
    constexpr bool MIRROR_AHEAD = RESIDENT == 1;
    Mirror mirror;
    if (MIRROR_AHEAD && codes_values) mirror.load(p.value_mirror, head);
    wait_for_previous_kernel();
    let_next_kernel_start();
    for (int first = blockIdx.x * TOKENS; first < p.tokens; first += gridDim.x * TOKENS) {
        const Place place(p, first);
        Elements<4> values[OWN] = {};
        if (codes_values && warp_codes) {
#pragma unroll
            for (int i = 0; i < OWN; ++i)
                if (place.there && has_quad(i)) values[i].load(p.sides[1], place.token, head, 4 * quad(i));
        }
        float y[OWN][4];
        if (codes_keys) {
            keys.stage(p, head, first);
            __syncthreads();
            keys.multiply();
            __syncthreads();
            if (warp_codes) {
                Keys::transformed(y);
                place.code<KEY_BITS>(p, 0, head, y);
            }
        }
        if (codes_values && warp_codes) {
#pragma unroll
            for (int i = 0; i < OWN; ++i) {
#pragma unroll
                for (int k = 0; k < 4; ++k) y[i][k] = values[i][k];
            }
            if (!MIRROR_AHEAD) mirror.load(p.value_mirror, head);
            mirror.reflect(y);
            hadamard_sums(y);
#pragma unroll
            for (int i = 0; i < OWN; ++i) {
#pragma unroll
                for (int k = 0; k < 4; ++k) y[i][k] = __fmul_rn(y[i][k], encode);
            }
            place.code<VALUE_BITS>(p, 1, head, y);
        }
    }
}
