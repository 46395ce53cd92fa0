// A bias of each logit that depends on its row and on the token's position p only:
//
//   bias(row, p) = sum over pairs i of A_i cos(p theta_i) + B_i sin(p theta_i)
//
// It is what centred keys add (kv_cache/rotary.py). With p = p0 + j, p0 a multiple of 256, it is a product of the
// tensor cores over coefficients rotated by p0 theta_i and a table of 256 positions, one for all requests, heads and
// layers. Its one-byte elements, (code - 128) / 127, are stored as the subnormal float16 numbers (code - 128) * 2^-24,
// in the order of the left operand, so that they need no instruction but their load; the table stays in the L1 cache,
// which nothing else uses: codes go around it.
//
// The coefficients come in the units of the product of queries and keys (prepare.cu), to which theirs adds. The table's
// tokens lie in the order of `token_of`.
#pragma once
#include "centre.cuh"
#include "merge.cuh"

struct Bias {
    static constexpr int STEPS = HEAD_DIM / 16;
    uint2 operand[ROW_TILES][STEPS];
    int first = -1;  // Position of the table's first row.

    // Turn to the tile's part of the sequence.
    DEVICE void move(const Params& p, const Piece& piece, int rows, int token) {
        if (token / SPAN * SPAN == first) return;
        first = token / SPAN * SPAN;
        const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        const float* turn = p.bias_turns + static_cast<i64>(first / SPAN) * HEAD_DIM;
#pragma unroll
        for (int n = 0; n < ROW_TILES; ++n) {
            const bool there = n * 8 + g < rows;
            const float* own = p.bias_rows + piece.row(p, n * 8 + g) * HEAD_DIM;
#pragma unroll
            for (int s = 0; s < STEPS; ++s) {
                const int channel = 16 * s + 4 * t;  // And the next three; cosines come first, then sines.
                const bool sine = channel >= HEAD_DIM / 2;
                const int pair = sine ? channel - HEAD_DIM / 2 : channel;
                operand[n][s] = {0, 0};
                if (!there) continue;
                const float4 a = quad(own + pair), b = quad(own + HEAD_DIM / 2 + pair);
                const float4 c = quad(turn + pair), d = quad(turn + HEAD_DIM / 2 + pair);
                const auto rotate = [&](float a, float b, float c, float d) {
                    return sine ? b * c - a * d : a * c + b * d;
                };
                operand[n][s].x = pack_half2(rotate(a.x, b.x, c.x, d.x), rotate(a.y, b.y, c.y, d.y));
                operand[n][s].y = pack_half2(rotate(a.z, b.z, c.z, d.z), rotate(a.w, b.w, c.w, d.w));
            }
        }
    }

    // Add the bias of a unit's tokens to their logits.
    DEVICE void add(const Params& p, int token, float (&s)[ROW_TILES][4]) const {
        const uint4* table = p.bias_table + (token - first) / UNIT * STEPS * 32 + threadIdx.x % 32;
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            const uint4 x = table[step * 32];
            const u32 a[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
            for (int n = 0; n < ROW_TILES; ++n) mma(s[n], a, operand[n][step].x, operand[n][step].y);
        }
    }

    // Position 0 has a centre of its own: set its logits' bias in those of a sequence's first unit.
    static DEVICE void set_first(const Params& p, const Piece& piece, int rows, float (&s)[ROW_TILES][4]) {
        const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        if (g) return;
#pragma unroll
        for (int n = 0; n < ROW_TILES; ++n) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int row = n * 8 + 2 * t + j;
                if (row < rows) s[n][j] = p.rows[piece.row(p, row)].z;
            }
        }
    }

private:
    static DEVICE float4 quad(const float* p) { return *reinterpret_cast<const float4*>(p); }
};
