// Adds products with weights that are stored singly, in compressed rows, to a bulk's result, for up to 64 tokens:
// result[token, row] = y[token, row] + sum over n of values[n] * x[token, inputs[n]], of the row's n.
//
// The stored weights are few bytes: the time goes into waiting for one load after the other (starts, then inputs and
// values, then x), so as many as possible are under way at once. LANES neighbouring lanes have a row. They load its next
// weights, OWN each, and then go through them together: TOKEN_LANES of them gather a weight's inputs, WIDTH tokens each, and
// the others gather those of the next weights. For that x is turned around first (`turn`), so that a channel's tokens lie
// together; zeros after the last channel stand in where a row has no more weights. What a row has beyond its first p.own
// weights is dealt out in chunks to all warps of the block. Sums are float32, always in the same order, and rounded once.
//
// Macros: TOKENS (1, 2, 4, 8, 16, 32 or 64: at most so many), IN_BFLOAT, WARPS of a thread block (2, 4 or 8), OWN, GATHERS
// (of a lane that are under way at once), both powers of 2, RESIDENT (thread blocks of a multiprocessor that registers are to
// suffice for), TURN_WARPS of a thread block of `turn`, PARAMS_BYTES (what the host takes `Params` to be).
#include "numbers.cuh"

constexpr int LANES = 8, ROWS = WARPS * 32 / LANES, THREADS = 32 * WARPS;
constexpr int WIDTH = TOKENS < 8 ? TOKENS : 8, TOKEN_LANES = TOKENS / WIDTH;
constexpr int STEPS = OWN * TOKEN_LANES;                      // Of a lane in a round: gathers.
constexpr int AT_ONCE = GATHERS < STEPS ? GATHERS : STEPS;
static_assert(STEPS % AT_ONCE == 0 && ROWS <= 32 && THREADS >= TOKENS);

struct Params {
    const u16* y;         // [tokens, rows]
    u16* result;          // [tokens, rows]; may be y.
    const u16* x;         // [tokens, channels]
    u16* turned;          // [channels + 1, TOKENS], zeros last, 16 bytes' alignment; unused with TOKENS == 1.
    const int* starts;    // [rows + 1]
    const int* inputs;    // [starts[rows]] channels
    const u16* values;    // The same.
    i64 y_stride;         // Elements, as the next two.
    i64 result_stride;
    i64 x_stride;
    int tokens;
    int rows;
    int channels;
    int own;              // Weights of a row that its own lanes add.
    int early;            // Whether x and what is turned are complete before the kernel may start: see `sparse`.
};
static_assert(sizeof(Params) == PARAMS_BYTES, "the host passes other parameters");

// Weights of a row that a lane has loaded, of each LANE_COUNT in a row one. Past the end the channel is the one of zeros:
// were loads of inputs conditional, as with one token, eight at once would need more predicates than there are.
template <int LANE_COUNT>
struct Stored {
    int channel[OWN];
    float value[OWN];

    DEVICE void load(const Params& p, int begin, int end) {
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            const int at = begin + i * LANE_COUNT + threadIdx.x % LANE_COUNT;
            channel[i] = at < end ? p.inputs[at] : p.channels;
            value[i] = at < end ? to_float(p.values[at]) : 0.0f;
        }
    }
};

// A channel's inputs of a lane's tokens.
struct Inputs {
    u32 words[WIDTH < 2 ? 1 : WIDTH / 2];

    DEVICE void load(const Params& p, int channel) {
        if constexpr (WIDTH == 1) {
            words[0] = channel < p.channels ? p.x[channel] : 0u;
        } else {
            const u16* at = p.turned + static_cast<i64>(channel) * TOKENS + threadIdx.x % TOKEN_LANES * WIDTH;
            if constexpr (WIDTH == 2) {
                words[0] = *reinterpret_cast<const u32*>(at);
            } else if constexpr (WIDTH == 4) {
                const uint2 v = *reinterpret_cast<const uint2*>(at);
                words[0] = v.x, words[1] = v.y;
            } else {
                const uint4 v = *reinterpret_cast<const uint4*>(at);
                words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
            }
        }
    }

    DEVICE float of(int token) const { return to_float(static_cast<u16>(words[token / 2] >> 16 * (token % 2))); }
};

// A lane's sums: tokens from WIDTH * (lane % TOKEN_LANES).
struct Sums {
    float of[WIDTH];

    // Adds a row's weights from begin to before end, which LANE_COUNT lanes share; the first ones are loaded. `most` is how
    // many any of the warp's rows has: lanes of the others show them what they hold.
    template <int LANE_COUNT>
    DEVICE void add(const Params& p, Stored<LANE_COUNT> now, int begin, int end, int most) {
        constexpr int SOURCES = LANE_COUNT / TOKEN_LANES;  // Weights that are gone through in a step.
        const int lane = threadIdx.x % 32;
        const int first = lane / LANE_COUNT * LANE_COUNT + lane % LANE_COUNT / TOKEN_LANES;
        for (int done = 0; done < most; done += OWN * LANE_COUNT) {
            Stored<LANE_COUNT> next;
            next.load(p, begin + done + OWN * LANE_COUNT, end);
#pragma unroll
            for (int step = 0; step < STEPS; step += AT_ONCE) {
                if (done + step * SOURCES < most) {
                    Inputs x[AT_ONCE];
                    float value[AT_ONCE];
#pragma unroll
                    for (int i = 0; i < AT_ONCE; ++i) {
                        const int own = (step + i) / TOKEN_LANES, source = first + (step + i) % TOKEN_LANES * SOURCES;
                        int channel = now.channel[own];
                        value[i] = now.value[own];
                        if constexpr (TOKEN_LANES > 1) {
                            channel = __shfl_sync(ALL_LANES, channel, source);
                            value[i] = __shfl_sync(ALL_LANES, value[i], source);
                        }
                        x[i].load(p, channel);
                    }
#pragma unroll
                    for (int i = 0; i < AT_ONCE; ++i) {
#pragma unroll
                        for (int token = 0; token < WIDTH; ++token)
                            of[token] = fmaf(value[i], x[i].of(token), of[token]);
                    }
                }
            }
            now = next;
        }
        // Of the same tokens.
#pragma unroll
        for (int by = TOKEN_LANES; by < LANE_COUNT; by *= 2) {
#pragma unroll
            for (int token = 0; token < WIDTH; ++token) of[token] += __shfl_xor_sync(ALL_LANES, of[token], by);
        }
    }
};

// What the warps of a block show each other.
struct Shown {
    float sums[TOKENS][ROWS + 1];
    int begin[ROWS], end[ROWS];   // What a row's own lanes leave.
    float parts[WARPS][TOKENS];   // Sums of a chunk of a row.
    int part_rows[WARPS];
};

// Adds what the rows' own lanes left: rows of uneven lengths, in chunks as even as they can be, one for each warp at a time.
DEVICE void add_rest(const Params& p, Shown& shown) {
    constexpr int ROUND = 32 * OWN;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int begin = lane < ROWS ? shown.begin[lane] : 0, end = lane < ROWS ? shown.end[lane] : 0;
    int total = end - begin;
#pragma unroll
    for (int by = 1; by < 32; by *= 2) total += __shfl_xor_sync(ALL_LANES, total, by);
    if (total == 0) return;
    const int chunk = (total + WARPS * ROUND - 1) / (WARPS * ROUND) * ROUND;
    const int own = (end - begin + chunk - 1) / chunk;
    int last = own;  // The number of chunks up to the end of the lane's row.
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
        const int before = __shfl_up_sync(ALL_LANES, last, by);
        last += lane < by ? 0 : before;
    }
    const int chunks = __shfl_sync(ALL_LANES, last, 31);
    for (int first = 0; first < chunks; first += WARPS) {
        const int mine = first + warp;
        if (mine < chunks) {
            const int row = __ffs(__ballot_sync(ALL_LANES, last > mine)) - 1;
            const int nth = mine - __shfl_sync(ALL_LANES, last - own, row);
            const int from = __shfl_sync(ALL_LANES, begin, row) + nth * chunk;
            const int to = min(from + chunk, __shfl_sync(ALL_LANES, end, row));
            Stored<32> stored;
            stored.load(p, from, to);
            Sums sums = {};
            sums.add<32>(p, stored, from, to, to - from);
            if (lane < TOKEN_LANES) {
#pragma unroll
                for (int token = 0; token < WIDTH; ++token) shown.parts[warp][lane * WIDTH + token] = sums.of[token];
            }
            if (lane == 0) shown.part_rows[warp] = row;
        }
        __syncthreads();
        if (threadIdx.x < TOKENS) {
            for (int w = 0; w < min(WARPS, chunks - first); ++w)
                shown.sums[threadIdx.x][shown.part_rows[w]] += shown.parts[w][threadIdx.x];
        }
        __syncthreads();
    }
}

// Where launches overlap, a kernel's wait is only for the kernel right before it. The one before this kernel is such that
// it lets this one start after its own wait or at its end, and that it waits at all: so whatever came before that one is
// complete and to be seen from the start, x and what `turn` wrote too, and only y is not. That is p.early. Otherwise
// `turn`, or whatever wrote x, may be the kernel right before.
extern "C" __global__ __launch_bounds__(THREADS, RESIDENT) void sparse(const __grid_constant__ Params p) {
    SHARED Shown shown;
    const int lane = threadIdx.x % 32, own_row = threadIdx.x / LANES, row = blockIdx.x * ROWS + own_row;
    const int begin = row < p.rows ? p.starts[row] : 0, end = row < p.rows ? p.starts[row + 1] : 0;
    const int own_end = min(begin + p.own, end);
    Stored<LANES> stored;
    stored.load(p, begin, own_end);
    int most = own_end - begin;
#pragma unroll
    for (int by = LANES; by < 32; by *= 2) most = max(most, __shfl_xor_sync(ALL_LANES, most, by));
    if (!p.early) wait_for_previous_kernel();
    Sums sums = {};
    sums.add<LANES>(p, stored, begin, own_end, most);
    if (lane % LANES < TOKEN_LANES) {
#pragma unroll
        for (int token = 0; token < WIDTH; ++token) shown.sums[lane % LANES * WIDTH + token][own_row] = sums.of[token];
    }
    if (lane % LANES == 0) shown.begin[own_row] = own_end, shown.end[own_row] = end;
    __syncthreads();
    add_rest(p, shown);
    wait_for_previous_kernel();
    constexpr int RESULTS = (TOKENS * ROWS + THREADS - 1) / THREADS;  // Of a thread.
    u16 bulk[RESULTS];
#pragma unroll
    for (int i = 0; i < RESULTS; ++i) {
        const int at = i * THREADS + threadIdx.x, token = at / ROWS, of = blockIdx.x * ROWS + at % ROWS;
        if (token < p.tokens && of < p.rows) bulk[i] = load_l2(p.y + token * p.y_stride + of);
    }
#pragma unroll
    for (int i = 0; i < RESULTS; ++i) {
        const int at = i * THREADS + threadIdx.x, token = at / ROWS, of = blockIdx.x * ROWS + at % ROWS;
        if (token < p.tokens && of < p.rows)
            p.result[token * p.result_stride + of] = from_float(to_float(bulk[i]) + shown.sums[token][at % ROWS]);
    }
}

#if TOKENS > 1
// A thread turns WIDTH tokens of a channel around; zeros stand for tokens that are not there, and for the channel after the
// last. The next kernel may start at once: it waits for this one by itself. Until this one's own wait, what it will write
// may still be read by a kernel before it, in whose memory it is.
extern "C" __global__ __launch_bounds__(32 * TURN_WARPS) void turn(const __grid_constant__ Params p) {
    let_next_kernel_start();
    const int warp = blockIdx.x * TURN_WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    const int channel = warp / TOKEN_LANES * 32 + lane, first = warp % TOKEN_LANES * WIDTH;
    wait_for_previous_kernel();
    if (channel > p.channels) return;
    u32 halves[WIDTH];
#pragma unroll
    for (int i = 0; i < WIDTH; ++i)
        halves[i] = first + i < p.tokens && channel < p.channels ? load_l2(p.x + (first + i) * p.x_stride + channel) : 0u;
    u32 words[WIDTH / 2];
#pragma unroll
    for (int i = 0; i < WIDTH / 2; ++i) words[i] = halves[2 * i] | halves[2 * i + 1] << 16;
    u16* to = p.turned + static_cast<i64>(channel) * TOKENS + first;
    if constexpr (WIDTH == 2) *reinterpret_cast<u32*>(to) = words[0];
    else if constexpr (WIDTH == 4) *reinterpret_cast<uint2*>(to) = {words[0], words[1]};
    else *reinterpret_cast<uint4*>(to) = {words[0], words[1], words[2], words[3]};
}
#endif
