// The streams of a trellis code that read back closest to given weights; quant_methods/kernels/trellis_search.py.
//
// A thread block searches a tile. Of a state's 16 bits the lower ones are its overlap with the pair before, the upper ones
// that with the next. So a step needs, of what came before, the least cost of each overlap alone, in shared memory, and the
// costs of 65,536 states are never stored: a thread has 64 neighbouring states. The number of the state that has the least
// cost takes the place of a cost's last bits, so that one minimum of integers finds both: costs are not negative, and then
// their bits order as they do.
//
// Macros: BITS (2 to 4) of a weight, PARAMS_BYTES (what the host takes `Params` to be), and those of trellis_pair.cuh.
#include "trellis_pair.cuh"

constexpr int PAIRS = 128, STATES = 65536, THREADS = 1024, OWN = STATES / THREADS;
constexpr int BRANCHES = 1 << 2 * BITS, OVERLAPS = STATES / BRANCHES;
constexpr int SHARING = BRANCHES > OWN ? BRANCHES / OWN : 1;  // Threads that have an overlap's states together.
constexpr int RUN = BRANCHES < OWN ? BRANCHES : OWN;          // Of an overlap's states, those of a thread.
constexpr bool CHOSEN_SHARED = BITS > 2;                      // Whether what was chosen fits into shared memory.

struct Params {
    const float* targets;  // [tiles][PAIRS][2]
    const float* weights;  // The same of squared errors, or null.
    int* states;           // [tiles][PAIRS]
    u8* chosen;            // [blocks][PAIRS][OVERLAPS], unless CHOSEN_SHARED.
    int tiles;
};
static_assert(sizeof(Params) == PARAMS_BYTES, "the host passes other parameters");

DYNAMIC_SHARED __align__(128) u8 shared[];

DEVICE float* least(int turn) { return reinterpret_cast<float*>(shared) + turn * OVERLAPS; }
DEVICE u8* chosen_of(const Params& p, int step) {
    u8* all = CHOSEN_SHARED ? shared + 8 * OVERLAPS : p.chosen + static_cast<i64>(blockIdx.x) * PAIRS * OVERLAPS;
    return all + step * OVERLAPS;
}

// Costs after a pair, from those before it.
DEVICE void advance(const Params& p, i64 pair, int step) {
    const float x0 = p.targets[2 * pair], x1 = p.targets[2 * pair + 1];
    const float w0 = p.weights ? p.weights[2 * pair] : 1, w1 = p.weights ? p.weights[2 * pair + 1] : 1;
    const float* before = least(step % 2);
    float* after = least((step + 1) % 2);
    u8* chosen = chosen_of(p, step);
    const int first = threadIdx.x * OWN;
#pragma unroll
    for (int begin = 0; begin < OWN; begin += RUN) {
        u32 best = 0x7fffffff;
#pragma unroll 16
        for (int i = 0; i < RUN; ++i) {
            const u32 state = first + begin + i, pair_of = trellis_pair(state);
            const float e0 = __uint_as_float(pair_of << 16) - x0, e1 = __uint_as_float(pair_of & 0xffff0000) - x1;
            const float cost = fmaf(w1 * e1, e1, fmaf(w0 * e0, e0, before[state % OVERLAPS]));
            best = min(best, __float_as_uint(cost) & ~0xffu | state % BRANCHES);
        }
#pragma unroll
        for (int mask = 1; mask < SHARING; mask *= 2) best = min(best, __shfl_xor_sync(ALL_LANES, best, mask));
        const int overlap = (first + begin) / BRANCHES;
        if (SHARING == 1 || threadIdx.x % SHARING == 0) {
            after[overlap] = __uint_as_float(best & ~0xffu);
            chosen[overlap] = best & 0xff;
        }
    }
    __syncthreads();
}

// The overlap of the least cost, to all of the first warp.
DEVICE int best_overlap() {
    float cost = least(0)[threadIdx.x];
    int best = threadIdx.x;
    for (int q = threadIdx.x + 32; q < OVERLAPS; q += 32) {
        if (least(0)[q] < cost) cost = least(0)[q], best = q;
    }
#pragma unroll
    for (int mask = 16; mask; mask /= 2) {
        const float other = __shfl_xor_sync(ALL_LANES, cost, mask);
        const int its = __shfl_xor_sync(ALL_LANES, best, mask);
        if (other < cost || (other == cost && its < best)) cost = other, best = its;
    }
    return best;
}

extern "C" __global__ __launch_bounds__(THREADS, 1) void search(const __grid_constant__ Params p) {
    SHARED int seam;
    for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
        const i64 first = static_cast<i64>(tile) * PAIRS;
        // Once around from the middle: what the best path has at the seam.
        for (int q = threadIdx.x; q < OVERLAPS; q += THREADS) least(0)[q] = 0;
        __syncthreads();
        for (int step = 0; step < PAIRS; ++step) advance(p, first + (step + PAIRS / 2) % PAIRS, step);
        if (threadIdx.x < 32) {
            int at = best_overlap();
            if (threadIdx.x == 0) {
                for (int step = PAIRS - 1; step >= PAIRS / 2; --step) at = (at * BRANCHES + chosen_of(p, step)[at]) % OVERLAPS;
                seam = at;
            }
        }
        __syncthreads();
        // The best path that begins and ends with it.
        for (int q = threadIdx.x; q < OVERLAPS; q += THREADS) least(0)[q] = q == seam ? 0 : 1e30f;
        __syncthreads();
        for (int step = 0; step < PAIRS; ++step) advance(p, first + step, step);
        if (threadIdx.x == 0) {
            int at = seam;
            for (int step = PAIRS - 1; step >= 0; --step) {
                const int state = at * BRANCHES + chosen_of(p, step)[at];
                p.states[first + step] = state;
                at = state % OVERLAPS;
            }
        }
        __syncthreads();
    }
}
