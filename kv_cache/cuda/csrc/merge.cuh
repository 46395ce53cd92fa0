// From the sums of warps to those of a piece, and from pieces to outputs.
#pragma once
#include "work.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int MERGE_WIDTH = HEAD_DIM + 4;    // Floats of a row of sums in shared memory, padded.
constexpr int COEFFICIENTS = HEAD_DIM + 16;  // Floats of a row's coefficients (bias.cuh), padded.

// Softmax weights are 2^(x - top + SHIFT), relative to a per-warp maximum `top` that only moves once a logit exceeds it
// by SLACK, so that sums are rarely rescaled. Times a value's scale, which lies between 2^-10 and 62, they become
// float16: a weight times a scale is at most 62 * 2^10, which float16 holds.
constexpr float SLACK = 7.0f, SHIFT = 3.0f;
constexpr float LOG2E = 1.4426950408889634f;

// c * tanh(y / c) = c * (1 - 2 / (1 + exp(2y / c))), times log2(e), of x = y * log2(e), y a logit.
[[maybe_unused]] DEVICE float capped(const Params& p, float x) {
    return p.soft_cap * LOG2E * (1 - 2 * reciprocal(1 + exp2_fast(x * (2 / p.soft_cap))));
}

using Values = ValueShare<VALUE_BITS>;

// One warp's running sums for 8 query rows, transposed as the tensor cores leave them: lane (g, t), which is (lane / 4,
// lane % 4), has the rows 2t and 2t + 1. o[tile] are the codes of the two in row g of the tile, then of the two in row
// g + 8 (ValueShare), times weights.
struct RowSums {
    float o[Values::TILES][4];
    float z[4];    // Zeros' bytes times weights; z[0] and z[1] count.
    float l[2];    // Softmax weights of the tokens that this lane has.
    float top[2];  // What weights are relative to, base 2.
};

DEVICE u16 to_output(float x) { return OUT_BFLOAT ? to_bfloat(x) : to_half(x); }

// Where the output of a row of the piece's row block goes.
DEVICE u16* output_row(const Params& p, const Piece& piece, int row) {
    const int2 at = piece.row(p, row);
    return p.out + (piece.first_query + at.x) * p.out_token_stride + (piece.head * p.group + at.y) * p.out_head_stride;
}

// How a row's channels are shared out to finish it: a lane has SHARE neighbours, and RUN_LANES lanes, neighbours of one
// warp, have a run of channels that are mixed with each other (kv_cache/transforms.py, hadamard_sums).
constexpr int RUN = HEAD_DIM & -HEAD_DIM;
constexpr int SHARE = RUN > 128 ? RUN / 32 : 4;
constexpr int RUN_LANES = RUN / SHARE, SHARES = HEAD_DIM / SHARE;
// Lanes of a warp that a row is given, whether it needs them all or not: then sums over a row stay within them.
constexpr int ROW_LANES = SHARES <= 16 ? 16 : 32;
static_assert(SHARES <= ROW_LANES);
static_assert(SHARE % 4 == 0 && RUN_LANES <= 32 && SHARES % RUN_LANES == 0, "a run is some lanes of one warp");

// hadamard_sums of what RUN_LANES lanes have.
DEVICE void mix(float (&x)[SHARE]) {
#pragma unroll
    for (int stride = 1; stride < SHARE; stride *= 2) {
#pragma unroll
        for (int i = 0; i < SHARE; ++i) {
            if (i & stride) continue;
            const float a = x[i], b = x[i + stride];
            x[i] = a + b, x[i + stride] = a - b;
        }
    }
#pragma unroll
    for (int stride = 1; stride < RUN_LANES; stride *= 2) {
        const float sign = threadIdx.x & stride ? -1.0f : 1.0f;
#pragma unroll
        for (int i = 0; i < SHARE; ++i) x[i] = sign * x[i] + __shfl_xor_sync(ALL_LANES, x[i], stride);
    }
}

// kv_cache/codec.py, reflect. A lane that has no share has zeros.
DEVICE void reflect(const float* mirror, float (&x)[SHARE]) {
    float normal[SHARE], along = 0;
#pragma unroll
    for (int i = 0; i < SHARE; i += 4) {
        const float4 n = *reinterpret_cast<const float4*>(mirror + i);
        normal[i] = n.x, normal[i + 1] = n.y, normal[i + 2] = n.z, normal[i + 3] = n.w;
    }
#pragma unroll
    for (int i = 0; i < SHARE; ++i) along += normal[i] * x[i];
#pragma unroll
    for (int apart = 1; apart < ROW_LANES; apart *= 2) along += __shfl_xor_sync(ALL_LANES, along, apart);
#pragma unroll
    for (int i = 0; i < SHARE; ++i) x[i] -= along * normal[i];
}

// What the ends of a piece's rows need, in shared memory: BiasRows has it.
struct Ends {
    const float4* numbers;
    const float* output;
    const u16* values;
    const float* sinks;  // COEFFICIENTS apart.
};

// Turn a row's sums of weighted codes into its output, and write them if `there`. Weights are relative to `top`, base 2.
// All lanes of a warp call this.
DEVICE void finish(const Params& p, const Piece& piece, const Ends& ends, int row, int share, float (&sum)[SHARE],
                   float top, float weight, bool there) {
    mix(sum);
    reflect(ends.output + min(share, SHARES - 1) * SHARE, sum);
    if (!there) return;
    // The row's own token, if it is not among the codes.
    float own = ends.numbers[row].w;
#if SOFT_CAP
    own = capped(p, own);
#endif
    const float sink = p.sinks ? ends.sinks[row * COEFFICIENTS] * LOG2E : NEG_INF;
    const float best = fmaxf(fmaxf(top, own), sink), keep = exp2_fast(top - best);
    const float own_weight = p.value ? exp2_fast(own - best + SHIFT) : 0.0f;
    const float sink_weight = p.sinks ? exp2_fast(sink - best + SHIFT) : 0.0f;
    const float whole = weight * keep + own_weight + sink_weight, own_share = own_weight / whole;
    // Of a code's 2^-24 and of its scale's unit, see codes.cuh.
    constexpr float UNIT_OF_SUMS = 0x1p24f * 4 / (1 << VALUE_BITS);
    const float factor = ends.output[HEAD_DIM] * UNIT_OF_SUMS * keep / whole;
    if (p.value) {
        const ushort4* values = reinterpret_cast<const ushort4*>(ends.values + row * HEAD_DIM + share * SHARE);
        const auto number = [](u16 bits) { return OUT_BFLOAT ? from_bfloat(bits) : from_half(bits); };
#pragma unroll
        for (int i = 0; i < SHARE; i += 4) {
            const ushort4 v = values[i / 4];
            sum[i] = factor * sum[i] + own_share * number(v.x), sum[i + 1] = factor * sum[i + 1] + own_share * number(v.y);
            sum[i + 2] = factor * sum[i + 2] + own_share * number(v.z);
            sum[i + 3] = factor * sum[i + 3] + own_share * number(v.w);
        }
    } else {
#pragma unroll
        for (int i = 0; i < SHARE; ++i) sum[i] *= factor;
    }
    ushort4* out = reinterpret_cast<ushort4*>(output_row(p, piece, row) + share * SHARE);
#pragma unroll
    for (int i = 0; i < SHARE; i += 4) {
        out[i / 4] = {to_output(sum[i]), to_output(sum[i + 1]), to_output(sum[i + 2]), to_output(sum[i + 3])};
    }
}

constexpr int MERGE_ROWS = 4;  // Rows that are merged at once; 8 take more shared memory and no less time.

struct Merge {
    float* sums;    // Shared: [WARPS, MERGE_ROWS, MERGE_WIDTH].
    float2* stats;  // Shared: [WARPS, ROWS]: maximum (base 2) and weight.
    int* last;      // Shared: whether this thread block finished last.

    // Merge the warps of this thread block; `has` says whether this warp attended to any tile. All warps must have done
    // so before one of them attends to the next piece or writes to `sums` and `stats` again.
    DEVICE void warps(const Params& p, const Piece& piece, const Ends& ends, int rows, bool has,
                      const RowSums (&own)[ROW_TILES]) const {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        const bool whole = piece.pieces == 1;
#pragma unroll
        for (int n = 0; n < ROW_TILES; ++n) {
            float weight[2] = {own[n].l[0], own[n].l[1]};
#pragma unroll
            for (int step = 4; step < 32; step <<= 1) {
#pragma unroll
                for (int j = 0; j < 2; ++j) weight[j] += __shfl_xor_sync(ALL_LANES, weight[j], step);
            }
            const float2 stat = {g ? own[n].top[1] : own[n].top[0], g ? weight[1] : weight[0]};
            if (g < 2) stats[warp * ROWS + n * 8 + 2 * t + g] = stat;
        }
#pragma unroll
        for (int part = 0; part < 2 * ROW_TILES; ++part) {
            const int n = part / 2, first_row = part * MERGE_ROWS;
            if (first_row >= rows) break;
            if (part) __syncthreads();  // The sums of the rows before are read.
            if (has && t / 2 == part % 2) put(own[n], sums + (warp * MERGE_ROWS + t % 2 * 2) * MERGE_WIDTH, g);
            __syncthreads();
            const int count = min(MERGE_ROWS, rows - first_row) * ROW_LANES;
            for (int first = 32 * warp; first < count; first += THREADS) {
                const int i = first + lane, share = i % ROW_LANES, row = first_row + i / ROW_LANES;
                const bool there = i < count && share < SHARES;
                float best = NEG_INF, weight = 0, sum[SHARE] = {};
                if (there) {
#pragma unroll
                    for (int w = 0; w < WARPS; ++w) best = fmaxf(best, stats[w * ROWS + row].x);
#pragma unroll
                    for (int w = 0; w < WARPS; ++w) {
                        const float2 stat = stats[w * ROWS + row];
                        if (stat.x == NEG_INF) continue;
                        const float factor = exp2_fast(stat.x - best);
                        weight += factor * stat.y;
                        const float* from = sums + (w * MERGE_ROWS + i / ROW_LANES) * MERGE_WIDTH + share * SHARE;
#pragma unroll
                        for (int c = 0; c < SHARE; c += 4) {
                            const float4 x = *reinterpret_cast<const float4*>(from + c);
                            sum[c] += factor * x.x, sum[c + 1] += factor * x.y;
                            sum[c + 2] += factor * x.z, sum[c + 3] += factor * x.w;
                        }
                    }
                }
                if (whole) {
                    finish(p, piece, ends, row, share, sum, best, weight, there);
                } else if (there) {
                    const i64 slot = piece.own_slot * ROWS + row;
                    float4* to = reinterpret_cast<float4*>(p.partial + slot * HEAD_DIM + share * SHARE);
#pragma unroll
                    for (int c = 0; c < SHARE; c += 4) to[c / 4] = {sum[c], sum[c + 1], sum[c + 2], sum[c + 3]};
                    if (share == 0) p.partial_stats[slot] = {best, weight};
                }
            }
        }
        if (!whole) pieces(p, piece, ends, rows);
    }

private:
    // Write the sums of two rows to shared memory, in the order of channels, with what the zeros take off.
    static DEVICE void put(const RowSums& own, float* to, int g) {
        constexpr float ZERO_UNIT = 1.0f / (1 << (8 - VALUE_BITS));  // Bytes of zeros count in it.
        const float zero[2] = {own.z[0] * ZERO_UNIT, own.z[1] * ZERO_UNIT};
#pragma unroll
        for (int slot = 0; slot < Values::SLOTS; ++slot) {
            const int word = Values::word(slot, g);
            if (word >= Values::WORDS) continue;
#pragma unroll
            for (int k = 0; k < Values::FIELDS; ++k) {
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const auto sum = [&](int byte) {
                        const float sum = own.o[Values::tile(slot, byte, k)][2 * Values::odd(byte, k) + j];
                        return sum * Values::unplace(k) - zero[j];
                    };
                    float4* quad = reinterpret_cast<float4*>(to + j * MERGE_WIDTH + 4 * word + k * Values::ROW);
                    *quad = {sum(0), sum(1), sum(2), sum(3)};
                }
            }
        }
    }

    // Merge a sequence's pieces if this thread block is the last to have finished one.
    DEVICE void pieces(const Params& p, const Piece& piece, const Ends& ends, int rows) const {
        int* counter = p.counters + (piece.request * p.row_blocks + piece.row_block) * p.kv_heads + piece.head;
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            *last = atomicAdd(counter, 1) == piece.pieces - 1;
            __threadfence();
            if (*last) *counter = 0;
        }
        __syncthreads();
        if (!*last) return;
        constexpr int QUADS = SHARE / 4, AHEAD = 4;
        for (int base = threadIdx.x / 32 * 32; base < rows * ROW_LANES; base += THREADS) {
            const int i = base + threadIdx.x % 32, row = i / ROW_LANES, share = i % ROW_LANES;
            const bool there = row < rows && share < SHARES;
            float top = NEG_INF, weight = 0, sum[SHARE] = {};
            for (int first = 0; there && first < piece.pieces; first += AHEAD) {
                float2 stat[AHEAD];
                float4 part[AHEAD][QUADS];
#pragma unroll
                for (int k = 0; k < AHEAD; ++k) {
                    const i64 slot = piece.slot_of(min(first + k, piece.pieces - 1)) * ROWS + row;
                    const float4* from = reinterpret_cast<const float4*>(p.partial + slot * HEAD_DIM) + share * QUADS;
                    stat[k] = load_l2(p.partial_stats + slot);
#pragma unroll
                    for (int q = 0; q < QUADS; ++q) part[k][q] = load_l2(from + q);
                }
                float best = top;
#pragma unroll
                for (int k = 0; k < AHEAD; ++k) best = fmaxf(best, stat[k].x);
                const float old = top == NEG_INF ? 0.0f : exp2_fast(top - best);
                weight *= old, top = best;
#pragma unroll
                for (int c = 0; c < SHARE; ++c) sum[c] *= old;
#pragma unroll
                for (int k = 0; k < AHEAD; ++k) {
                    const bool counts = first + k < piece.pieces && stat[k].x != NEG_INF;
                    const float factor = counts ? exp2_fast(stat[k].x - best) : 0.0f;
                    weight += factor * stat[k].y;
#pragma unroll
                    for (int q = 0; q < QUADS; ++q) {
                        sum[4 * q] += factor * part[k][q].x, sum[4 * q + 1] += factor * part[k][q].y;
                        sum[4 * q + 2] += factor * part[k][q].z, sum[4 * q + 3] += factor * part[k][q].w;
                    }
                }
            }
            finish(p, piece, ends, row, share, sum, top, weight, there);
        }
    }
};
