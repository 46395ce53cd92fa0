// Paged decode attention over codes.
//
// Compiled at run time for one combination of these macros (kv_cache/cuda/decode.py sets them):
//   HEAD_DIM, KEY_BITS, VALUE_BITS, BLOCK_SIZE   the format and the page
//   ROW_TILES      query rows of a pass, in eights
//   SOFT_CAP, OUT_BFLOAT   0 or 1
//   PARAMS_BYTES   what the host takes `Params` to be
//   WARPS, UNITS, STAGES, BLOCKS_PER_SM, BULK_COPY, SHARED_TABLE   tuning: warps of a block, tokens of a step in
//                  sixteens, steps that are read ahead, resident blocks, Hopper's bulk copies instead of cp.async, and
//                  whether the table of positions lies in shared memory
//
// Products are transposed, so that the codes are the tensor cores' 16-row operand and up to 8 query rows the other: a
// group of 4 to 8 query heads leaves little of it idle, and codes go from shared memory to operands by masks alone
// (codes.cuh). Logits of a step leave the first product in the layout that the second one wants, up to an 8 x 8
// transposition, for which there is an instruction.
//
// A token's key is (codes - zero) * step + centre. So a row's logit is step * (codes . query - zero * sum of query)
// plus a bias that depends on the row and the position (bias.cuh), and that of position 0, whose centre is another,
// comes from prepare.cu. A value is (codes - zero) * scale: the scale goes into the weight, and the zeros, weighed, are
// summed by one more product of the tensor cores. What is left to do once a row is complete is in merge.cuh.
//
// A row's own token can be left out of the codes: its logit comes from prepare.cu, its value from the step's own.
#include "bias.cuh"
#include "pipe.cuh"

using Keys = KeyShare<KEY_BITS>;
constexpr bool QUERY_IN_REGISTERS = ROW_TILES * Keys::STEPS <= 16;
constexpr int QUERY_WIDTH = 16 * Keys::STEPS;  // float16 of a prepared row: lane t's share is the t-th quarter.

// The query rows of a row block, as the tensor cores' right operands and as what their logits need.
struct Query {
    uint2 operand[QUERY_IN_REGISTERS ? ROW_TILES : 1][QUERY_IN_REGISTERS ? Keys::STEPS : 1];
    const uint2* shared;          // [ROW_TILES, STEPS, 32], where registers do not suffice.
    const float4* numbers;        // [ROWS]: see BiasRows.
    float2 own_numbers[QUERY_IN_REGISTERS ? ROW_TILES : 1][2];

    DEVICE uint2 at(int n, int step) const {
        if constexpr (QUERY_IN_REGISTERS) return operand[n][step];
        return shared[(n * Keys::STEPS + step) * 32 + threadIdx.x % 32];
    }

    // Of row 2t + j of an eight: the logits' factor, times log2(e), and what a zero of 1 takes off the product.
    DEVICE float2 number(int n, int j) const {
        if constexpr (QUERY_IN_REGISTERS) return own_numbers[n][j];
        const float4 x = numbers[n * 8 + threadIdx.x % 4 * 2 + j];
        return {x.x, x.y};
    }

    // Read a piece's rows; where they go through `room`, all warps must have done so before one attends.
    DEVICE void load(const Params& p, const Piece& piece, int rows, uint2* room, const BiasRows& bias_rows) {
        const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        shared = room, numbers = bias_rows.numbers;
#pragma unroll
        for (int n = 0; n < ROW_TILES; ++n) {
            const bool there = n * 8 + g < rows;
            if (QUERY_IN_REGISTERS || n % WARPS == threadIdx.x / 32) {
                const u16* row = p.query + static_cast<i64>(piece.query_of(p, n * 8 + g)) * QUERY_WIDTH;
                const uint2* from = reinterpret_cast<const uint2*>(row) + t * Keys::STEPS;
#pragma unroll
                for (int s = 0; s < Keys::STEPS; ++s) {
                    const uint2 x = there ? from[s] : uint2{0, 0};
                    if constexpr (QUERY_IN_REGISTERS) operand[n][s] = x;
                    else room[(n * Keys::STEPS + s) * 32 + lane] = x;
                }
            }
        }
    }

    // The piece's numbers have come.
    DEVICE void keep_numbers() {
        if constexpr (!QUERY_IN_REGISTERS) return;
#pragma unroll
        for (int n = 0; n < ROW_TILES; ++n) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float4 x = numbers[n * 8 + threadIdx.x % 4 * 2 + j];
                own_numbers[n][j] = {x.x, x.y};
            }
        }
    }
};

// The logits of a tile: lane (g, t) has tokens `token_of(g)` and 8 after it of each unit for query rows 2t and 2t + 1
// of each eight.
using Logits = float[UNITS][ROW_TILES][4];

// The biases of a tile's logits, which do not need the tile.
DEVICE void start(Bias& bias, const BiasRows& rows, int first_token, Logits& s) {
#pragma unroll
    for (int u = 0; u < UNITS; ++u) bias.set(first_token + u * UNIT, s[u]);
    if (first_token == 0) bias.set_first(rows, s[0]);
}

// Attend to one tile in shared memory. `masked` says whether some row does not see all of its tokens.
DEVICE void attend(const Params& p, const Piece& piece, const Query& query, const u8* tile, int first_token,
                   bool masked, Logits& s, RowSums (&sums)[ROW_TILES], float (&base)[ROW_TILES][2]) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float value_scale[UNITS][2];
#pragma unroll
    for (int u = 0; u < UNITS; ++u) {
        const u8* unit = tile + u * UNIT_BYTES;
        float sums_of_chains[CHAINS][ROW_TILES][4] = {}, products[ROW_TILES][4];
        Keys::for_each(unit, g, t, [&](int step, const u32(&a)[4]) {
#pragma unroll
            for (int n = 0; n < ROW_TILES; ++n) {
                const uint2 b = query.at(n, step);
                mma(sums_of_chains[step % CHAINS][n], a, b.x, b.y);
            }
        });
        add_chains(sums_of_chains, products);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const u32 meta = meta_of(unit, token_of(g) + 8 * i);
            const float step = scale_of<KEY>(meta, 2 - KEY_BITS), zero = step * key_zero(meta);
            value_scale[u][i] = scale_of<VALUE>(meta, 0);
#pragma unroll
            for (int n = 0; n < ROW_TILES; ++n) {
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    float& x = s[u][n][2 * i + j];
                    x = step * products[n][2 * i + j] + (x - zero * query.number(n, j).y);
                }
            }
        }
    }

#if SOFT_CAP
#pragma unroll
    for (int u = 0; u < UNITS; ++u) {
#pragma unroll
        for (int n = 0; n < ROW_TILES; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) s[u][n][i] = capped(p, s[u][n][i] * query.number(n, i % 2).x);
        }
    }
#endif
    if (masked) {
#pragma unroll
        for (int n = 0; n < ROW_TILES; ++n) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int position = piece.length - piece.query + piece.row(p, n * 8 + 2 * t + j).x;
                const int last = position - (p.value != nullptr);
#pragma unroll
                for (int i = 0; i < 2 * UNITS; ++i) {
                    const int token = first_token + i * 8 + token_of(g);
                    const bool hidden = token > last || (p.window && token <= position - p.window);
                    if (hidden) s[i / 2][n][i % 2 * 2 + j] = NEG_INF;
                }
            }
        }
    }

    bool grows = false;
    float top[ROW_TILES][2];
#pragma unroll
    for (int n = 0; n < ROW_TILES; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            top[n][j] = fmaxf(s[0][n][j], s[0][n][j + 2]);
#pragma unroll
            for (int u = 1; u < UNITS; ++u) top[n][j] = fmaxf(top[n][j], fmaxf(s[u][n][j], s[u][n][j + 2]));
            if (!SOFT_CAP) top[n][j] *= query.number(n, j).x;
            grows |= top[n][j] > sums[n].top[j] + SLACK;
        }
    }
    if (__any_sync(ALL_LANES, grows)) {
#pragma unroll
        for (int n = 0; n < ROW_TILES; ++n) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                float best = top[n][j];
#pragma unroll
                for (int step = 4; step < 32; step <<= 1) best = fmaxf(best, __shfl_xor_sync(ALL_LANES, best, step));
                best = fmaxf(best, sums[n].top[j]);
                if (best == NEG_INF) continue;
                const float shrink = exp2_fast(sums[n].top[j] - best);
                sums[n].top[j] = best, base[n][j] = SHIFT - best;
                sums[n].l[j] *= shrink, sums[n].z[j] *= shrink;
#pragma unroll
                for (int i = 0; i < Values::TILES; ++i) sums[n].o[i][j] *= shrink, sums[n].o[i][j + 2] *= shrink;
            }
        }
    }

    u32 weights[UNITS][ROW_TILES][2];
#pragma unroll
    for (int u = 0; u < UNITS; ++u) {
#pragma unroll
        for (int n = 0; n < ROW_TILES; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float x = SOFT_CAP ? s[u][n][i] : s[u][n][i] * query.number(n, i % 2).x;
                const float weight = exp2_fast(x + base[n][i % 2]);
                sums[n].l[i % 2] += weight;
                s[u][n][i] = weight * value_scale[u][i / 2];
            }
            weights[u][n][0] = transpose(pack_half2(s[u][n][0], s[u][n][1]));
            weights[u][n][1] = transpose(pack_half2(s[u][n][2], s[u][n][3]));
        }
    }

#pragma unroll
    for (int u = 0; u < UNITS; ++u) {
        const u8* unit = tile + u * UNIT_BYTES;
        u32 zeros[4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int token = t + 8 * i;
            zeros[2 * i] = zeros[2 * i + 1] = value_zeros(meta_of(unit, token), meta_of(unit, token + 4));
        }
#pragma unroll
        for (int n = 0; n < ROW_TILES; ++n) mma(sums[n].z, zeros, weights[u][n][0], weights[u][n][1]);
        Values::for_each(unit + VALUES_AT, g, t, [&](int i, const u32(&a)[4]) {
#pragma unroll
            for (int n = 0; n < ROW_TILES; ++n) mma(sums[n].o[i], a, weights[u][n][0], weights[u][n][1]);
        });
    }
}

extern "C" __global__ __launch_bounds__(THREADS, BLOCKS_PER_SM) void decode(const __grid_constant__ Params p) {
    DYNAMIC_SHARED __align__(128) u8 shared[];
    const int warp = threadIdx.x / 32;
    // Shared memory; its size is shared_bytes in tuning.py.
    u8* room = shared + WARPS * RING_BYTES;
    const auto take = [&](int bytes) { return (room += bytes) - bytes; };
    uint4* table = reinterpret_cast<uint4*>(take(SHARED_TABLE * TABLE_QUADS * sizeof(uint4)));
    float* turns = reinterpret_cast<float*>(take(WARPS * 2 * HEAD_DIM * sizeof(float))) + warp * 2 * HEAD_DIM;
    uint2* bias_room = reinterpret_cast<uint2*>(take(WARPS * Bias::ROOM * sizeof(uint2))) + warp * Bias::ROOM;
    // What rows need of two pieces: of the one that is attended to, and of the next.
    constexpr int QUERY_BYTES = QUERY_IN_REGISTERS ? 0 : ROW_TILES * Keys::STEPS * 32 * sizeof(uint2);
    u8* query_rooms = take(2 * QUERY_BYTES);
    u8* bias_rooms = take(2 * BiasRows::BYTES);
    const Merge merge{reinterpret_cast<float*>(take(WARPS * MERGE_ROWS * MERGE_WIDTH * sizeof(float))),
                      reinterpret_cast<float2*>(take(WARPS * ROWS * sizeof(float2))), reinterpret_cast<int*>(take(16))};
    Walk* ahead = reinterpret_cast<Walk*>(take(WARPS * sizeof(Walk))) + warp;
    u64* barriers = reinterpret_cast<u64*>(take(WARPS * STAGES * sizeof(u64)));

    const bool awaits_store = p.awaits_store && *p.awaits_store;  // On its way while the work is cut.
    const Cut cut(p);
    Walk walk(p, cut);
    if (walk.place >= walk.end) return;
    if (threadIdx.x % 32 == 0) *ahead = walk;
    __syncwarp();
    if (awaits_store) wait_for_previous_kernel();
    // What comes before the pages is not kept waiting by them.
    if constexpr (SHARED_TABLE) {
        for (int i = threadIdx.x; i < TABLE_QUADS; i += THREADS) fetch_16(table + i, p.bias_table + i);
    }
    Pipe pipe(p, cut, ahead, shared + warp * RING_BYTES, barriers + warp * STAGES);
    wait_for_previous_kernel();  // Codes were there before, unless they are said to await the store.

    Bias bias(p, SHARED_TABLE ? table : p.bias_table, turns, bias_room);
    Query query;
    RowSums sums[ROW_TILES];
    Piece piece, next;
    int rows = 0, parity = 0, first = 0, last = 0;
    for (bool any = false;; any = true) {
        // A piece's rows are fetched before the piece before it is merged: while the memory is busy with pages, that
        // takes long.
        const bool more = walk.next(p, cut, next);
        const int next_rows = min(ROWS, next.query * p.group - next.row_block * ROWS);
        const int next_first = warp_begin(next, warp), next_last = warp_begin(next, warp + 1);
        const BiasRows bias_rows(bias_rooms + parity * BiasRows::BYTES);
        if (more) {
            bias_rows.fetch(p, next, next_rows);
            bias.prefetch(next_first * TILE, next_last * TILE);
            query.load(p, next, next_rows, reinterpret_cast<uint2*>(query_rooms + parity * QUERY_BYTES), bias_rows);
        }
        if (any) {
            const BiasRows own(bias_rooms + (parity ^ 1) * BiasRows::BYTES);
            merge.warps(p, piece, own.ends(), rows, first < last, sums);
        }
        fetches_done();
        if (!more) break;
        __syncthreads();  // Rows are there, and the merge is over.
        query.keep_numbers();
        piece = next, rows = next_rows, first = next_first, last = next_last, parity ^= 1;

        float base[ROW_TILES][2];
#pragma unroll
        for (int n = 0; n < ROW_TILES; ++n) {
            sums[n] = {};
            base[n][0] = base[n][1] = SHIFT;
            sums[n].top[0] = sums[n].top[1] = NEG_INF;
        }
        // Tokens before it, unless out of the window.
        const int seen_by_all = piece.length - piece.query + 1 - (p.value != nullptr);
        for (int tile = first; tile < last; ++tile) {
            const int token = tile * TILE;
            Logits logits;
            bias.turn(bias_rows, rows, token);
            start(bias, bias_rows, token, logits);
            const u8* codes = pipe.wait();
            const bool masked = token + TILE > seen_by_all || (p.window && token <= piece.length - 1 - p.window);
            attend(p, piece, query, codes, token, masked, logits, sums, base);
            pipe.release();
        }
    }
}
