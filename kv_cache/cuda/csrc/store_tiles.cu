// Quantizes new keys and values and scatters them into pages, both in one launch: kv_cache/codec.py, write_pages, for
// scales kept outside the page. A team of warps codes one side (keys or values) of one KV head for 32 tokens at a time:
// one warp where many tokens keep all busy, the whole block where few are waited for. Without feedback the codes are the
// specification's bit for bit. With it, products run on the tensor cores, operands split into two bfloat16 numbers, and
// a code may differ where a number lies next to a tie (rounding.cuh).
//
// Macros: HEAD_DIM, BLOCK_SIZE, INPUT (0 float32, 1 bfloat16, 2 float16), WARPS (of a block), TEAM (1 or WARPS); of keys
// and of values: KEY_BITS, KEY_FEEDBACK, VALUE_BITS, VALUE_FEEDBACK; TRANSFORM (of keys), PAIRS (0: keys are not
// centred), INTERLEAVED.
#include "centre.cuh"
#include "rounding.cuh"

using Team = Scratch<HEAD_DIM, TEAM>;
constexpr int TOKENS = Team::TOKENS, STRIDE = Team::STRIDE, TEAM_THREADS = 32 * TEAM;
constexpr int STEPS = HEAD_DIM / 16, TILES = HEAD_DIM / 8, QUARTER = HEAD_DIM / 4;

struct Side {
    const void* x;           // [tokens, KV heads, HEAD_DIM]
    i64 token_stride;        // Elements.
    i64 head_stride;         // Elements.
    const float* inverse;    // [KV heads, HEAD_DIM] 1 / scale.
    const float* zero;       // [KV heads, HEAD_DIM]
    const uint2* transform;  // TRANSFORM: [KV heads, STEPS, TILES, 32] operands.
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
    Side sides[2];
};

// Four channels as they come, and as numbers.
template <int KIND> struct RawOf { using Type = uint2; };
template <> struct RawOf<0> { using Type = uint4; };
using Raw = RawOf<INPUT>::Type;

DEVICE Raw load_4(const void* data, i64 at) {
    constexpr int BYTES = INPUT == 0 ? 4 : 2;
    return *reinterpret_cast<const Raw*>(static_cast<const u8*>(data) + at * BYTES);
}

DEVICE void numbers(const Raw& raw, float (&x)[4]) {
    const u32* words = reinterpret_cast<const u32*>(&raw);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (INPUT == 0) x[i] = __uint_as_float(words[i]);
        else {
            const u16 bits = static_cast<u16>(words[i / 2] >> 16 * (i % 2));
            x[i] = INPUT == 1 ? from_bfloat(bits) : from_half(bits);
        }
    }
}

DYNAMIC_SHARED __align__(16) u8 shared[];

// Writes the codes of four columns in each quarter of a token's channels.
template <int BITS>
DEVICE void write(const Side& side, u8* page, int offset, int column, const u32 (&codes)[4]) {
    constexpr int ROW = BITS == 8 ? HEAD_DIM : HEAD_DIM / 2;
    u8* row = page + side.plane + offset * ROW + column;
#pragma unroll
    for (int q = 0; q < (BITS == 8 ? 4 : 2); ++q) {
        const u32 word = BITS == 8 ? codes[q] : (codes[q] & 0x0f0f0f0f) | (codes[q + 2] & 0x0f0f0f0f) << 4;
        *reinterpret_cast<u32*>(row + q * QUARTER) = word;
    }
    if (BITS != 6) return;
    u32 high = 0;
#pragma unroll
    for (int q = 0; q < 4; ++q) high |= (codes[q] >> 4 & 0x03030303) << 2 * q;
    *reinterpret_cast<u32*>(page + side.high_plane + offset * QUARTER + column) = high;
}

// Four channels in codes, not yet rounded.
DEVICE void scale_4(const Side& side, int channel, const Raw& raw, float (&x)[4]) {
    numbers(raw, x);
    const float4 by = load_constant(reinterpret_cast<const float4*>(side.inverse + channel));
    const float4 zero = load_constant(reinterpret_cast<const float4*>(side.zero + channel));
    x[0] = __fadd_rn(__fmul_rn(x[0], by.x), zero.x), x[1] = __fadd_rn(__fmul_rn(x[1], by.y), zero.y);
    x[2] = __fadd_rn(__fmul_rn(x[2], by.z), zero.z), x[3] = __fadd_rn(__fmul_rn(x[3], by.w), zero.w);
}

// Where a thread's token goes, as it is asked for.
struct Place {
    i64 slot, position;

    DEVICE Place(const Params& p, int token, bool positions) {
        const bool there = threadIdx.x % TEAM_THREADS < TOKENS && token < p.tokens;
        slot = there ? p.slots[token] : -1;
        position = there && positions ? p.positions[token] : 0;
    }

    DEVICE void keep(const Params& p, int head, Team& team) const {
        const int token = threadIdx.x % TEAM_THREADS;
        if (token >= TOKENS) return;
        team.positions[token] = position;
        const i64 block = slot / BLOCK_SIZE;
        team.pages[token] = slot < 0 ? 0 : reinterpret_cast<u64>(p.cache + block * p.block_stride + head * p.head_stride);
        team.offsets[token] = slot < 0 ? 0 : static_cast<int>(slot % BLOCK_SIZE);
    }
};

template <int BITS>
DEVICE void code_plainly(const Params& p, const Side& side, int head, int first, const Team& team) {
    constexpr int COLUMNS = QUARTER / 4;
#pragma unroll 2
    for (int i = threadIdx.x % TEAM_THREADS; i < TOKENS * COLUMNS; i += TEAM_THREADS) {
        const int token = i / COLUMNS, column = i % COLUMNS * 4;
        if (first + token >= p.tokens) break;
        Raw raw[4];
#pragma unroll
        for (int q = 0; q < 4; ++q)
            raw[q] = load_4(side.x, (first + token) * side.token_stride + head * side.head_stride + column + q * QUARTER);
        u32 codes[4] = {};
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            float x[4];
            scale_4(side, head * HEAD_DIM + column + q * QUARTER, raw[q], x);
#pragma unroll
            for (int k = 0; k < 4; ++k) codes[q] |= static_cast<u32>(nearest<BITS>(x[k])) << 8 * k;
        }
        u8* page = reinterpret_cast<u8*>(team.pages[token]);
        if (page) write<BITS>(side, page, team.offsets[token], column, codes);
    }
}

// A warp's part of the centres: it takes whole tokens, and a lane the same pairs of each. Few tokens are waited for:
// their centres are asked for beside the tokens themselves, not once these are there.
struct CentreShare {
    static constexpr int LANE_PAIRS = (PAIRS + 31) / 32, WARP_TOKENS = TOKENS / TEAM;
    static constexpr bool EARLY = PAIRS > 0 && TEAM > 1;
    u32 positions[EARLY ? WARP_TOKENS : 1];
    float2 centres[EARLY ? WARP_TOKENS : 1][EARLY ? LANE_PAIRS : 1];

    template <class Do>
    DEVICE static void for_each_token(int tokens, const Do& handle) {
#pragma unroll(EARLY ? WARP_TOKENS : 4)
        for (int k = 0; k < WARP_TOKENS; ++k) {
            const int token = threadIdx.x % TEAM_THREADS / 32 + k * TEAM;
            if (!EARLY || token < tokens) handle(k, token);
        }
    }

    DEVICE void ask_positions(const Params& p, int first) {
        if constexpr (EARLY)
            for_each_token(p.tokens - first, [&](int k, int token) { positions[k] = static_cast<u32>(p.positions[first + token]); });
    }

    DEVICE void ask(const Params& p, int head, int first) {
        if constexpr (EARLY) {
            for_each_token(p.tokens - first, [&](int k, int) {
#pragma unroll
                for (int i = 0; i < LANE_PAIRS; ++i) {
                    const int pair = threadIdx.x % 32 + 32 * i;
                    if (pair < PAIRS) centres[k][i] = centre_of<PAIRS>(p.centres, head, positions[k], pair);
                }
            });
        }
    }

    DEVICE void subtract(const Params& p, int head, int first, Team& team) const {
        if constexpr (PAIRS > 0) {
#pragma unroll
            for (int i = 0; i < LANE_PAIRS; ++i) {
                const int pair = threadIdx.x % 32 + 32 * i;
                if (pair >= PAIRS) break;
                for_each_token(p.tokens - first, [&](int k, int token) {
                    float2 centre;
                    if constexpr (EARLY) centre = centres[k][i];
                    else centre = centre_of<PAIRS>(p.centres, head, team.positions[token], pair);
                    float& a = team.x[token * STRIDE + (INTERLEAVED ? 2 * pair : pair)];
                    float& b = team.x[token * STRIDE + (INTERLEAVED ? 2 * pair + 1 : pair + PAIRS)];
                    a = __fsub_rn(a, centre.x), b = __fsub_rn(b, centre.y);
                });
            }
        }
    }
};

// Brings the team's tokens into shared memory: scaled, or less their centres if a transform comes next.
template <bool TRANSFORMED>
DEVICE void stage(const Params& p, const Side& side, int head, int first, Team& team) {
    constexpr int QUADS = HEAD_DIM / 4, AT_ONCE = TEAM == 1 ? 16 : 4;  // Loads on the way.
    constexpr bool CENTRED = TRANSFORMED && PAIRS > 0;
    const int tid = threadIdx.x % TEAM_THREADS;
    const Place place(p, first + tid, CENTRED);
    [[maybe_unused]] CentreShare share;
    if constexpr (CENTRED) share.ask_positions(p, first);
#pragma unroll 1
    for (int base = tid; base < TOKENS * QUADS; base += AT_ONCE * TEAM_THREADS) {
        Raw raw[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
            const int i = base + k * TEAM_THREADS, token = i / QUADS;
            raw[k] = {};
            if (i < TOKENS * QUADS && first + token < p.tokens)
                raw[k] = load_4(side.x, (first + token) * side.token_stride + head * side.head_stride + i % QUADS * 4);
        }
        if constexpr (CENTRED)
            if (base == tid) share.ask(p, head, first);
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
            const int i = base + k * TEAM_THREADS, c = i % QUADS * 4;
            if (i >= TOKENS * QUADS) break;
            float x[4];
            if (TRANSFORMED) numbers(raw[k], x);
            else scale_4(side, head * HEAD_DIM + c, raw[k], x);
            *reinterpret_cast<float4*>(team.x + i / QUADS * STRIDE + c) = {x[0], x[1], x[2], x[3]};
        }
    }
    place.keep(p, head, team);
    team_sync<TEAM>();
    if constexpr (CENTRED) {
        share.subtract(p, head, first, team);
        team_sync<TEAM>();
    }
}

// x = (transform x) / scale + zero.
DEVICE void transform(const uint2* matrix, const float* inverse, const float* zero, int tokens, Team& team) {
    // Few tokens are transformed all at once; for many there are not enough registers.
    constexpr int SHARE = (TILES + TEAM - 1) / TEAM, AT_ONCE = TEAM > 1 ? Team::HALVES : 1;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, member = threadIdx.x / 32 % TEAM;
#pragma unroll 1
    for (int first = 0; 16 * first < min(tokens, TOKENS); first += AT_ONCE) {
        float* x = team.x + 16 * first * STRIDE;
        float sums[AT_ONCE][SHARE][4] = {};
#pragma unroll(TEAM > 1 ? 4 : 1)
        for (int step = 0; step < STEPS; ++step) {
#pragma unroll
            for (int half = 0; half < AT_ONCE; ++half) {
                if (half && tokens <= 16) break;
                u32 heads[4], tails[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float* at = x + (16 * half + g + i % 2 * 8) * STRIDE + 16 * step + 2 * t + i / 2 * 8;
                    const float2 v = *reinterpret_cast<const float2*>(at);
                    split_bfloat2(v.x, v.y, heads[i], tails[i]);
                }
#pragma unroll
                for (int i = 0; i < SHARE; ++i) {
                    const uint2 m = matrix[(step * TILES + min(member + i * TEAM, TILES - 1)) * 32 + lane];
                    mma_bfloat(sums[half][i], heads, m.x, m.y);
                    mma_bfloat(sums[half][i], tails, m.x, m.y);
                }
            }
        }
        team_sync<TEAM>();  // All have read these tokens.
#pragma unroll
        for (int i = 0; i < SHARE; ++i) {
            const int n = member + i * TEAM;
            if (n >= TILES) break;
            const int channel = 8 * n + 2 * t;
            const float2 by = *reinterpret_cast<const float2*>(inverse + channel);
            const float2 to = *reinterpret_cast<const float2*>(zero + channel);
#pragma unroll
            for (int half = 0; half < AT_ONCE; ++half) {
                const float(&sum)[4] = sums[half][i];
                const float scaled[4] = {sum[0] * by.x + to.x, sum[1] * by.y + to.y,
                                         sum[2] * by.x + to.x, sum[3] * by.y + to.y};
                store_tile<STRIDE>(x + 16 * half * STRIDE + channel - 2 * t, scaled);
            }
        }
    }
    team_sync<TEAM>();
}

template <int BITS>
DEVICE void write_codes(const Side& side, const Team& team) {
    constexpr int COLUMNS = QUARTER / 4;
#pragma unroll 1
    for (int i = threadIdx.x % TEAM_THREADS; i < TOKENS * COLUMNS; i += TEAM_THREADS) {
        const int token = i / COLUMNS, column = i % COLUMNS * 4;
        u8* page = reinterpret_cast<u8*>(team.pages[token]);
        if (!page) continue;
        u32 codes[4];
#pragma unroll
        for (int q = 0; q < 4; ++q) codes[q] = team.codes(token, column + q * QUARTER);
        write<BITS>(side, page, team.offsets[token], column, codes);
    }
}

// Copies bytes, a multiple of 16, into shared memory by all threads of the block; they are there after copies_done.
DEVICE u8* fetch(u8* to, const void* from, int bytes) {
    for (int i = threadIdx.x * 16; i < bytes; i += WARPS * 32 * 16) fetch_16(to + i, static_cast<const u8*>(from) + i);
    return to + bytes;
}

DEVICE void copies_done() {
    fetches_done();
    __syncthreads();
}

template <int BITS, bool FEEDBACK, bool TRANSFORMED>
DEVICE void code(const Params& p, const Side& side, int block, int blocks) {
    constexpr int MATRIX = STEPS * TILES * 32, FED = feedback_tiles(STEPS) * 32, OWN = STEPS * BAND * BAND;
    constexpr int TEAMS = WARPS / TEAM;
    const int head = blockIdx.y, team_index = threadIdx.x / TEAM_THREADS;
    Team& team = reinterpret_cast<Team*>(shared)[team_index];
    u8* end = shared + TEAMS * sizeof(Team);
    const uint2* matrix = nullptr;
    const uint2* feedback = nullptr;
    const float *own = nullptr, *inverse = nullptr, *zero = nullptr;
    if constexpr (FEEDBACK) {
        // Constants of the model: there is no need to wait for them.
        const auto take = [&](auto*& to, const auto* from, int elements) {
            to = reinterpret_cast<decltype(from)>(end);
            end = fetch(end, from + static_cast<i64>(head) * elements, elements * sizeof(*from));
        };
        if constexpr (TRANSFORMED) {
            take(matrix, side.transform, MATRIX);
            take(inverse, side.inverse, HEAD_DIM), take(zero, side.zero, HEAD_DIM);
        }
        take(feedback, side.feedback, FED);
        take(own, side.own, OWN);
    }
    wait_for_previous_kernel();
    let_next_kernel_start();
    int first = (block * TEAMS + team_index) * TOKENS;
    const int step = blocks * TEAMS * TOKENS;
    if constexpr (FEEDBACK) {
        if (first < p.tokens) stage<TRANSFORMED>(p, side, head, first, team);
        copies_done();
        while (first < p.tokens) {
            if constexpr (TRANSFORMED) transform(matrix, inverse, zero, p.tokens - first, team);
            round_with_feedback<BITS>(team, feedback, own, p.tokens - first);
            write_codes<BITS>(side, team);
            first += step;
            team_sync<TEAM>();
            if (first < p.tokens) stage<TRANSFORMED>(p, side, head, first, team);
        }
    } else {
        for (; first < p.tokens; first += step) {
            Place(p, first + threadIdx.x % TEAM_THREADS, false).keep(p, head, team);
            team_sync<TEAM>();
            code_plainly<BITS>(p, side, head, first, team);
            team_sync<TEAM>();
        }
    }
}

extern "C" __global__ __launch_bounds__(32 * WARPS, 1) void store_tiles(const __grid_constant__ Params p) {
    const int block = blockIdx.x;
    if (block < p.key_blocks)
        code<KEY_BITS, KEY_FEEDBACK, TRANSFORM>(p, p.sides[0], block, p.key_blocks);
    else
        code<VALUE_BITS, VALUE_FEEDBACK, false>(p, p.sides[1], block - p.key_blocks, gridDim.x - p.key_blocks);
}
