// Centres of keys (kv_cache/rotary.py, CentreTable.centre), as the kernels that write and read pages need them.
#pragma once

#include "ptx.cuh"

constexpr int SPAN = 256;  // kv_cache/rotary.py
constexpr int PAIRS = HEAD_DIM / 2;

struct Centres {
    const float* mean;     // [KV heads, 2, PAIRS]: first, then second channels of the pairs.
    const float* first;    // The same at position 0, where a turn by nothing leaves it as it is.
    const float* fine;     // [SPAN, 2, PAIRS]: cosines, then sines.
    const float* anchors;  // [positions / SPAN, 2, PAIRS]
};

template <int COUNT>
DEVICE void load_constants(const float* from, float (&x)[COUNT]) {
    if constexpr (COUNT == 4) {
        const float4 v = load_constant(reinterpret_cast<const float4*>(from));
        x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
    } else if constexpr (COUNT == 2) {
        const float2 v = load_constant(reinterpret_cast<const float2*>(from));
        x[0] = v.x, x[1] = v.y;
    } else {
        x[0] = load_constant(from);
    }
}

// WIDTH neighbouring pairs, which lie in two runs of WIDTH channels. Pairs below APART are channels i and i + APART;
// from there on, neighbours.
template <int APART>
struct PairRuns {
    static constexpr int WIDTH = APART % 4 == 0 ? 4 : APART % 2 == 0 ? 2 : 1;
    static constexpr int COUNT = PAIRS / WIDTH;  // That a head has.
    struct Runs { float x[2][WIDTH]; };
    int pair;

    DEVICE explicit PairRuns(int index) : pair(index * WIDTH) {}

    DEVICE bool are_apart() const { return APART == PAIRS || (APART > 0 && pair < APART); }

    // Of a run, the first channel.
    DEVICE int channel(int run) const { return are_apart() ? pair + run * APART : 2 * pair + run * WIDTH; }

    // The pairs' first and second channels of a mean.
    DEVICE void load(const float* mean, int head, Runs& runs) const {
#pragma unroll
        for (int i = 0; i < 2; ++i) load_constants<WIDTH>(mean + (2 * head + i) * PAIRS + pair, runs.x[i]);
    }

    // Channels of the centre at a position, as they lie in the runs, without fused operations.
    DEVICE Runs centre(const Centres& p, const Runs& mean, int position) const {
        Runs result;
        const float* anchor = p.anchors + static_cast<i64>(position / SPAN) * 2 * PAIRS + pair;
        const float* fine = p.fine + position % SPAN * 2 * PAIRS + pair;
        float cos[WIDTH], sin[WIDTH], c[WIDTH], s[WIDTH];
        load_constants<WIDTH>(anchor, cos), load_constants<WIDTH>(anchor + PAIRS, sin);
        load_constants<WIDTH>(fine, c), load_constants<WIDTH>(fine + PAIRS, s);
#pragma unroll
        for (int k = 0; k < WIDTH; ++k) {
            const float x = mean.x[0][k], y = mean.x[1][k];
            const float ax = __fsub_rn(__fmul_rn(x, cos[k]), __fmul_rn(y, sin[k]));
            const float ay = __fadd_rn(__fmul_rn(y, cos[k]), __fmul_rn(x, sin[k]));
            const float one = __fsub_rn(__fmul_rn(c[k], ax), __fmul_rn(s[k], ay));
            const float other = __fadd_rn(__fmul_rn(c[k], ay), __fmul_rn(s[k], ax));
            if (are_apart()) {
                result.x[0][k] = one, result.x[1][k] = other;
            } else {
                result.x[2 * k / WIDTH][2 * k % WIDTH] = one;
                result.x[(2 * k + 1) / WIDTH][(2 * k + 1) % WIDTH] = other;
            }
        }
        return result;
    }
};
