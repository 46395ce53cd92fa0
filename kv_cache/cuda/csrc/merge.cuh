// From the sums of warps to those of a piece, and from pieces to outputs.
#pragma once
#include "work.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int MERGE_WIDTH = HEAD_DIM + 4;  // Floats of a row of sums in shared memory, padded.

using Values = ValueShare<VALUE_BITS>;

// One warp's running sums for 8 query rows, transposed as the tensor cores leave them: lane (g, t), which is
// (lane / 4, lane % 4), has the rows 2t and 2t + 1. o[tile] are {lower channel of row 2t, lower channel of row 2t + 1,
// upper channel of row 2t, upper channel of row 2t + 1}.
struct RowSums {
    float o[Values::TILES][4];
    float l[4];    // Weights; l[0] and l[1] count.
    float top[2];  // What weights are relative to, base 2.
};

// An output's element from its sum of weighted codes and the weights' sum.
DEVICE float output(const Params& p, int head, int channel, float sum, float weight) {
    const float unit = VALUE_BITS != 8 && channel >= HEAD_DIM / 2 ? 0x1p20f : 0x1p24f;  // See codes.cuh.
    const int at = head * HEAD_DIM + channel;
    return p.value_scale[at] * (sum * unit / weight - p.value_zero[at]);
}

DEVICE u16 to_output(float x) { return OUT_BFLOAT ? to_bfloat(x) : to_half(x); }

// Where the output of a row of the piece's row block goes.
DEVICE u16* output_row(const Params& p, const Piece& piece, int row) {
    row += piece.row_block * ROWS;
    const i64 token = p.query_start[piece.request] + row / p.group;
    return p.out + token * p.out_token_stride + (piece.head * p.group + row % p.group) * p.out_head_stride;
}

constexpr int MERGE_ROWS = 4;  // Rows that are merged at once; 8 take more shared memory and no less time.

struct Merge {
    float* sums;    // Shared: [WARPS, MERGE_ROWS, MERGE_WIDTH].
    float2* stats;  // Shared: [WARPS, ROWS]: maximum (base 2) and weight.
    int* last;      // Shared: whether this thread block finished last.

    // Merge the warps of this thread block; `has` says whether this warp attended to any tile.
    DEVICE void warps(const Params& p, const Piece& piece, int rows, bool has, const RowSums (&own)[ROW_TILES]) const {
        const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        const bool whole = piece.pieces == 1;
#pragma unroll
        for (int n = 0; n < ROW_TILES; ++n) {
            const float top = g ? own[n].top[1] : own[n].top[0], weight = g ? own[n].l[1] : own[n].l[0];
            if (g < 2) stats[warp * ROWS + n * 8 + 2 * t + g] = {top, weight};
        }
#pragma unroll
        for (int part = 0; part < 2 * ROW_TILES; ++part) {
            const int n = part / 2, first_row = part * MERGE_ROWS;
            if (first_row >= rows) break;
            if (part) __syncthreads();  // The sums of the rows before are read.
            if (has && t / 2 == part % 2) {
                float* to = sums + (warp * MERGE_ROWS + t % 2 * 2) * MERGE_WIDTH;
#pragma unroll
                for (int tile = 0; tile < Values::TILES; ++tile) {
#pragma unroll
                    for (int upper = 0; upper < 2; ++upper) {
                        const int channel = Values::channel(tile, g, upper);
                        if (channel >= HEAD_DIM) continue;
                        to[channel] = own[n].o[tile][2 * upper];
                        to[channel + MERGE_WIDTH] = own[n].o[tile][2 * upper + 1];
                    }
                }
            }
            __syncthreads();
            const int count = min(MERGE_ROWS, rows - first_row) * HEAD_DIM;
            for (int i = threadIdx.x; i < count; i += THREADS) {
                const int channel = i % HEAD_DIM, row = first_row + i / HEAD_DIM;
                float best = NEG_INF, weight = 0, sum = 0;
#pragma unroll
                for (int w = 0; w < WARPS; ++w) best = fmaxf(best, stats[w * ROWS + row].x);
#pragma unroll
                for (int w = 0; w < WARPS; ++w) {
                    const float2 stat = stats[w * ROWS + row];
                    if (stat.x == NEG_INF) continue;
                    const float factor = exp2_fast(stat.x - best);
                    weight += factor * stat.y;
                    sum += factor * sums[(w * MERGE_ROWS + i / HEAD_DIM) * MERGE_WIDTH + channel];
                }
                if (whole) {
                    output_row(p, piece, row)[channel] = to_output(output(p, piece.head, channel, sum, weight));
                } else {
                    const int slot = piece.own_slot * ROWS + row;
                    p.partial[static_cast<i64>(slot) * HEAD_DIM + channel] = sum;
                    if (channel == 0) p.partial_stats[slot] = {best, weight};
                }
            }
        }
        if (!whole) pieces(p, piece, rows);
        __syncthreads();  // Shared memory may be written again.
    }

private:
    // Merge a sequence's pieces if this thread block is the last to have finished one.
    DEVICE void pieces(const Params& p, const Piece& piece, int rows) const {
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
        constexpr int QUADS = HEAD_DIM / 4, AHEAD = 4;
        for (int i = threadIdx.x; i < rows * QUADS; i += THREADS) {
            const int row = i / QUADS, quad = i % QUADS;
            float top = NEG_INF, weight = 0;
            float sum[4] = {0, 0, 0, 0};
            for (int first = 0; first < piece.pieces; first += AHEAD) {
                float2 stat[AHEAD];
                float4 part[AHEAD];
#pragma unroll
                for (int k = 0; k < AHEAD; ++k) {
                    const i64 slot = piece.slot_of(min(first + k, piece.pieces - 1)) * ROWS + row;
                    stat[k] = load_l2(p.partial_stats + slot);
                    part[k] = load_l2(reinterpret_cast<const float4*>(p.partial + slot * HEAD_DIM) + quad);
                }
                float best = top;
#pragma unroll
                for (int k = 0; k < AHEAD; ++k) best = fmaxf(best, stat[k].x);
                const float old = top == NEG_INF ? 0.0f : exp2_fast(top - best);
                weight *= old, top = best;
#pragma unroll
                for (int c = 0; c < 4; ++c) sum[c] *= old;
#pragma unroll
                for (int k = 0; k < AHEAD; ++k) {
                    const bool there = first + k < piece.pieces && stat[k].x != NEG_INF;
                    const float factor = there ? exp2_fast(stat[k].x - best) : 0.0f;
                    weight += factor * stat[k].y;
                    sum[0] += factor * part[k].x, sum[1] += factor * part[k].y;
                    sum[2] += factor * part[k].z, sum[3] += factor * part[k].w;
                }
            }
            u16 result[4];
#pragma unroll
            for (int c = 0; c < 4; ++c) result[c] = to_output(output(p, piece.head, quad * 4 + c, sum[c], weight));
            ushort4* out = reinterpret_cast<ushort4*>(output_row(p, piece, row)) + quad;
            *out = {result[0], result[1], result[2], result[3]};
        }
    }
};
