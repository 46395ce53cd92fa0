// Centres of keys (kv_cache/rotary.py, CentreTable.centre), as the kernels that write and read pages need them.
#pragma once

#include "ptx.cuh"

constexpr int SPAN = 256;  // kv_cache/rotary.py

struct Centres {
    const float* mean;     // [KV heads, 2, pairs]: first, then second channels of the pairs; as are the next two:
    const float* fine;     // [SPAN, 2, pairs], cosine, then sine
    const float* anchors;  // [positions / SPAN, 2, pairs]
};

// The centre's two channels of one of TURNED pairs, without fused operations.
template <int TURNED>
DEVICE float2 centre_of(const Centres& p, int head, i64 position, int pair) {
    const float* mean = p.mean + static_cast<i64>(head) * 2 * TURNED + pair;
    const float* anchor = p.anchors + position / SPAN * 2 * TURNED + pair;
    const float* fine = p.fine + position % SPAN * 2 * TURNED + pair;
    const float x = load_constant(mean), y = load_constant(mean + TURNED);
    const float cos = load_constant(anchor), sin = load_constant(anchor + TURNED);
    const float c = load_constant(fine), s = load_constant(fine + TURNED);
    const float ax = __fsub_rn(__fmul_rn(x, cos), __fmul_rn(y, sin));
    const float ay = __fadd_rn(__fmul_rn(y, cos), __fmul_rn(x, sin));
    return {__fsub_rn(__fmul_rn(c, ax), __fmul_rn(s, ay)), __fadd_rn(__fmul_rn(c, ay), __fmul_rn(s, ax))};
}
