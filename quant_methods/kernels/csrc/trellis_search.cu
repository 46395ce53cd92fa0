// The streams of a trellis code that read back closest to given weights; quant_methods/kernels/trellis_search.py.
//
// A thread block searches SIDE tiles together, which share the work of saying what states mean. A state is
// branch * OVERLAPS + the overlap with the pair before it, and an overlap with the next pair is state / BRANCHES. So a step
// needs, of what came before, the least cost of each overlap alone, and the costs of 65,536 states are never stored: a
// thread goes through the states of an overlap, or through a part of them. Lanes have neighbouring branches, for which what
// came before is one number. Which state had an overlap's least cost is not kept either: the way back, which asks for one
// overlap a step, computes these costs again, from all steps' least costs in global memory.
//
// Macros: BITS (2 to 4) of a weight, SIDE (1, 2 or 4), WEIGHTED (0 or 1), PARAMS_BYTES and SHARED_BYTES (what the host takes
// `Params` and `Shared` to be), and those of trellis_pair.cuh.
#include "trellis_pair.cuh"

constexpr int PAIRS = 128, STATES = 65536, THREADS = 1024;
constexpr int BRANCHES = 1 << 2 * BITS, OVERLAPS = STATES / BRANCHES, RESTS = OVERLAPS / BRANCHES;
constexpr int PARTS = OVERLAPS < THREADS ? THREADS / OVERLAPS : 1;  // Threads that share an overlap's states.
constexpr int OWN = OVERLAPS > THREADS ? OVERLAPS / THREADS : 1;    // Overlaps of a thread.
constexpr int LOWS = BRANCHES / PARTS;                              // States of an overlap that a thread has.
constexpr float FAR = 1e30f;

struct Params {
    const float* targets;  // [tiles][PAIRS][2]
    const float* weights;  // The same of squared errors, if WEIGHTED.
    int* states;           // [tiles][PAIRS]
    float* history;        // [blocks][PAIRS][OVERLAPS][SIDE]: the least costs before each step.
    float largest;         // Of what states mean.
    int tiles;
};
static_assert(sizeof(Params) == PARAMS_BYTES, "the host passes other parameters");

// Of each tile: w (b - x)^2 is w b^2 + n b and a constant.
struct alignas(16) Factors {
    float n0, n1, w0, w1;
};
struct alignas(4 * SIDE) Costs {
    float of[SIDE];
};
struct Shared {
    Factors factors[PAIRS][SIDE];
    Costs constants[PAIRS];
    Costs least[2][OVERLAPS];  // Before a step and after it, where place_of says.
    Costs parts[PARTS > 1 ? THREADS : 1];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "the host sets aside other memory");

DYNAMIC_SHARED __align__(128) u8 shared[];

// An overlap is branch * RESTS + rest. Neighbouring threads end with neighbouring branches, and so these lie together.
DEVICE int place_of(int overlap) { return overlap % RESTS * BRANCHES + overlap / RESTS; }

// w x^2, or if no state means as much, what the nearest one leaves of it: then the least possible cost is 0, and costs stay
// small numbers, which have their differences exactly.
DEVICE float constant_of(float x, float w, float largest) {
    x = fabsf(x);
    return x < largest ? w * x * x : w * largest * (2 * x - largest);
}

// What the tiles' costs are made of, for all their pairs.
DEVICE void prepare(const Params& p, Shared& s, int tile) {
    for (int i = threadIdx.x; i < PAIRS * SIDE; i += THREADS) {
        const int pair = i / SIDE, t = i % SIDE;
        // Past the last tile that one once more.
        const i64 at = 2 * (static_cast<i64>(min(tile + t, p.tiles - 1)) * PAIRS + pair);
        const float x0 = p.targets[at], x1 = p.targets[at + 1];
        const float w0 = WEIGHTED ? p.weights[at] : 1, w1 = WEIGHTED ? p.weights[at + 1] : 1;
        s.factors[pair][t] = {-2 * w0 * x0, -2 * w1 * x1, w0, w1};
        s.constants[pair].of[t] = constant_of(x0, w0, p.largest) + constant_of(x1, w1, p.largest);
    }
}

// Keeps an overlap's least costs after a step.
DEVICE void keep(Shared& s, Costs* history, int pair, int step, int place, Costs best) {
    const Costs constants = s.constants[pair];
#pragma unroll
    for (int t = 0; t < SIDE; ++t) best.of[t] += constants.of[t];
    s.least[(step + 1) % 2][place] = best;
    if (step + 1 < PAIRS) history[(step + 1) * OVERLAPS + place] = best;
}

// Costs after a pair, from those before it.
DEVICE void advance(Shared& s, Costs* history, int pair, int step) {
    Factors f[SIDE];
#pragma unroll
    for (int t = 0; t < SIDE; ++t) f[t] = s.factors[pair][t];
    const Costs* before = s.least[step % 2];
#pragma unroll 1
    for (int k = 0; k < OWN; ++k) {
        const int place = threadIdx.x % OVERLAPS + k * THREADS, rest = place / BRANCHES, branch = place % BRANCHES;
        const int from = rest * BRANCHES + threadIdx.x / OVERLAPS * LOWS;
        Costs best;
#pragma unroll
        for (int t = 0; t < SIDE; ++t) best.of[t] = 4 * FAR;
#pragma unroll 8
        for (int i = 0; i < LOWS; ++i) {
            const u32 both = trellis_pair(branch * OVERLAPS + from + i);
            const float b0 = __uint_as_float(both << 16), b1 = __uint_as_float(both & 0xffff0000), square = b0 * b0;
            const float squares = WEIGHTED ? b1 * b1 : fmaf(b1, b1, square);
            const Costs costs = before[place_of(from + i)];
#pragma unroll
            for (int t = 0; t < SIDE; ++t) {
                float cost = costs.of[t];
                cost = WEIGHTED ? fmaf(square, f[t].w0, fmaf(squares, f[t].w1, cost)) : cost + squares;
                best.of[t] = fminf(best.of[t], fmaf(b0, f[t].n0, fmaf(b1, f[t].n1, cost)));
            }
        }
        if (PARTS > 1) {
            s.parts[threadIdx.x] = best;
        } else {
            keep(s, history, pair, step, place, best);
        }
    }
    if (PARTS > 1) {
        __syncthreads();
        if (threadIdx.x < OVERLAPS) {
            Costs best = s.parts[threadIdx.x];
#pragma unroll
            for (int part = 1; part < PARTS; ++part) {
                const Costs other = s.parts[part * OVERLAPS + threadIdx.x];
#pragma unroll
                for (int t = 0; t < SIDE; ++t) best.of[t] = fminf(best.of[t], other.of[t]);
            }
            keep(s, history, pair, step, threadIdx.x, best);
        }
    }
    __syncthreads();
}

// The number of the least cost, to all lanes; the first of equal ones.
DEVICE int least_of_warp(float cost, int number) {
#pragma unroll
    for (int mask = 16; mask; mask /= 2) {
        const float other = __shfl_xor_sync(ALL_LANES, cost, mask);
        const int its = __shfl_xor_sync(ALL_LANES, number, mask);
        if (other < cost || (other == cost && its < number)) cost = other, number = its;
    }
    return number;
}

// The overlap of a tile's least cost after all steps, to all lanes.
DEVICE int best_overlap(const Shared& s, int tile) {
    float least = 4 * FAR;
    int best = 0;
    for (int q = threadIdx.x % 32; q < OVERLAPS; q += 32) {
        const float cost = s.least[PAIRS % 2][place_of(q)].of[tile];
        if (cost < least) least = cost, best = q;
    }
    return least_of_warp(least, best);
}

// The state of the least cost of those that leave an overlap after a step, to all lanes.
DEVICE int back(const Shared& s, const Costs* history, int pair, int step, int overlap, int tile) {
    const Factors f = s.factors[pair][tile];
    float least = 4 * FAR;
    int best = 0;
    for (int low = threadIdx.x % 32; low < BRANCHES; low += 32) {
        const int state = overlap * BRANCHES + low;
        const u32 both = trellis_pair(state);
        const float b0 = __uint_as_float(both << 16), b1 = __uint_as_float(both & 0xffff0000);
        const float before = history[step * OVERLAPS + place_of(state % OVERLAPS)].of[tile];
        const float cost = fmaf(b0, fmaf(f.w0, b0, f.n0), fmaf(b1, fmaf(f.w1, b1, f.n1), before));
        if (cost < least) least = cost, best = low;
    }
    return overlap * BRANCHES + least_of_warp(least, best);
}

extern "C" __global__ __launch_bounds__(THREADS, 1) void search(const __grid_constant__ Params p) {
    SHARED int seam[SIDE];
    Shared& s = *reinterpret_cast<Shared*>(shared);
    Costs* history = reinterpret_cast<Costs*>(p.history) + static_cast<i64>(blockIdx.x) * PAIRS * OVERLAPS;
    const int own = threadIdx.x / 32;  // The tile whose way back is this warp's.
    for (int tile = blockIdx.x * SIDE; tile < p.tiles; tile += gridDim.x * SIDE) {
        prepare(p, s, tile);
        // Once around from the middle: what the best path has at the seam.
        for (int q = threadIdx.x; q < OVERLAPS; q += THREADS) s.least[0][q] = {};
        __syncthreads();
        for (int step = 0; step < PAIRS; ++step) advance(s, history, (step + PAIRS / 2) % PAIRS, step);
        if (own < SIDE) {
            int at = best_overlap(s, own);
            for (int step = PAIRS - 1; step >= PAIRS / 2; --step) {
                at = back(s, history, step - PAIRS / 2, step, at, own) % OVERLAPS;
            }
            if (threadIdx.x % 32 == 0) seam[own] = at;
        }
        __syncthreads();
        // The best path that begins and ends with it.
        for (int q = threadIdx.x; q < OVERLAPS; q += THREADS) {
            Costs costs;
#pragma unroll
            for (int t = 0; t < SIDE; ++t) costs.of[t] = q == place_of(seam[t]) ? 0 : FAR;
            s.least[0][q] = history[q] = costs;
        }
        __syncthreads();
        for (int step = 0; step < PAIRS; ++step) advance(s, history, step, step);
        if (own < SIDE && tile + own < p.tiles) {
            int at = seam[own];
            for (int step = PAIRS - 1; step >= 0; --step) {
                const int state = back(s, history, step, step, at, own);
                if (threadIdx.x % 32 == 0) p.states[static_cast<i64>(tile + own) * PAIRS + step] = state;
                at = state % OVERLAPS;
            }
        }
        __syncthreads();
    }
}
