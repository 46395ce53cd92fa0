// A bias of each logit that depends on its row and on the token's position p only:
//
//   bias(row, p) = sum over pairs i of A_i cos(p theta_i) + B_i sin(p theta_i)
//
// It is what centred keys add (kv_cache/rotary.py). With p = p0 + j, p0 a multiple of SPAN, it is a product of the
// tensor cores over coefficients turned by p0 theta_i and a table of SPAN positions, one for all requests, heads and
// layers. Its one-byte elements, (code - 128) / 127, are stored as the subnormal float16 numbers (code - 128) * 2^-24,
// in the order of the left operand, so that they need no instruction but their load. Tokens lie in the order of
// `token_of`.
//
// The coefficients come in the units of the product of queries and keys (prepare.cu), to which theirs adds.
//
// All of it lies in shared memory, fetched before it is needed: a load that has to wait while the memory is busy with
// pages takes as long as several tiles. Only a table that does not fit is read through the L1 cache, which codes go
// around.
#pragma once
#include "centre.cuh"
#include "merge.cuh"

constexpr int TABLE_QUADS = SPAN * HEAD_DIM / 8;  // Of 16 bytes.

// What the rows of a piece need, in shared memory.
struct BiasRows {
    static constexpr int BYTES = ROWS * (sizeof(float4) + COEFFICIENTS * sizeof(float) + HEAD_DIM * sizeof(u16))
        + OUTPUT_ROW * sizeof(float);
    float4* numbers;      // [ROWS]: of Params::rows.
    float* coefficients;  // [ROWS, COEFFICIENTS]: A, then B; in the padding's first place the sink of the row's head.
    float* output;        // [OUTPUT_ROW]: the head's of Params::value_output.
    u16* values;          // [ROWS, HEAD_DIM]: of the rows' own tokens.

    DEVICE explicit BiasRows(u8* room)
        : numbers(reinterpret_cast<float4*>(room)),
          coefficients(reinterpret_cast<float*>(room + ROWS * sizeof(float4))),
          output(coefficients + ROWS * COEFFICIENTS), values(reinterpret_cast<u16*>(output + OUTPUT_ROW)) {}

    DEVICE Ends ends() const { return {numbers, output, values, coefficients + HEAD_DIM}; }

    DEVICE void fetch(const Params& p, const Piece& piece, int rows) const {
        static_assert(ROWS <= THREADS, "a thread fetches a row's numbers");
        const int own = threadIdx.x;
        if (p.sinks && own < rows) {
            const float* sink = p.sinks + piece.head * p.group + piece.row(p, own).y;
            fetch_4(coefficients + own * COEFFICIENTS + HEAD_DIM, sink);
        }
        if (own < rows) fetch_16(numbers + own, p.rows + piece.query_of(p, own));
        else if (own < ROWS) numbers[own] = {1, 0, 0, 0};
        for (int i = threadIdx.x; i < rows * (HEAD_DIM / 4); i += THREADS) {
            const int row = i / (HEAD_DIM / 4), channel = i % (HEAD_DIM / 4) * 4;
            const i64 index = piece.query_of(p, row);
            fetch_16(coefficients + row * COEFFICIENTS + channel, p.bias_rows + index * HEAD_DIM + channel);
        }
        for (int i = threadIdx.x; p.value && i < rows * (HEAD_DIM / 8); i += THREADS) {
            const int row = i / (HEAD_DIM / 8), channel = i % (HEAD_DIM / 8) * 8;
            const i64 token = piece.first_query + piece.row(p, row).x;
            const u16* from = p.value + token * p.value_token_stride + piece.head * p.value_head_stride;
            fetch_16(values + row * HEAD_DIM + channel, from + channel);
        }
        for (int i = threadIdx.x * 4; i < OUTPUT_ROW; i += THREADS * 4)
            fetch_16(output + i, p.value_output + piece.head * OUTPUT_ROW + i);
    }
};

class Bias {
public:
    static constexpr int STEPS = HEAD_DIM / 16;
    static constexpr bool IN_REGISTERS = ROW_TILES * STEPS <= 16;
    static constexpr int ROOM = IN_REGISTERS ? 0 : ROW_TILES * STEPS * 32;  // Operands of a warp in shared memory.

    // `turns` [2, HEAD_DIM] and `room` are this warp's.
    DEVICE Bias(const Params& p, const uint4* table, float* turns, uint2* room)
        : p(p), table(table), turns(turns), room(room) {}

    // Turn to a piece, of which this warp has the tokens from `first` on, before `end`.
    DEVICE void prefetch(u32 first, u32 end) {
        span = ~0u, stop = end;
        if (first < end) fetch_turn(first / SPAN);
    }

    // Turn the coefficients of the piece's `count` rows to where a tile lies. The fetches of the piece's rows are done.
    DEVICE void turn(const BiasRows& rows, int count, u32 token) {
        if (token / SPAN == span) return;
        span = token / SPAN;
        if (BULK_COPY) fetches_done();
        __syncwarp();
        const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        const float* angles = turns + span % 2 * HEAD_DIM;
#pragma unroll
        for (int n = 0; n < ROW_TILES; ++n) {
            const bool there = n * 8 + g < count;
            const float* own = rows.coefficients + (n * 8 + g) * COEFFICIENTS;
#pragma unroll
            for (int s = 0; s < STEPS; ++s) {
                const int channel = 16 * s + 4 * t;  // And the next three; cosines come first, then sines.
                const bool sine = channel >= HEAD_DIM / 2;
                const int pair = sine ? channel - HEAD_DIM / 2 : channel;
                const float4 a = quad(own + pair), b = quad(own + HEAD_DIM / 2 + pair);
                const float4 c = quad(angles + pair), d = quad(angles + HEAD_DIM / 2 + pair);
                const auto turned = [&](float a, float b, float c, float d) {
                    return sine ? b * c - a * d : a * c + b * d;
                };
                const u32 low = pack_half2(turned(a.x, b.x, c.x, d.x), turned(a.y, b.y, c.y, d.y));
                const u32 high = pack_half2(turned(a.z, b.z, c.z, d.z), turned(a.w, b.w, c.w, d.w));
                place(n, s) = there ? uint2{low, high} : uint2{0, 0};
            }
        }
        if ((span + 1) * SPAN < stop) fetch_turn(span + 1);
    }

    // Set a unit's logits to their biases.
    DEVICE void set(u32 token, float (&s)[ROW_TILES][4]) {
        float sums[CHAINS][ROW_TILES][4] = {};
        const uint4* from = table + token % SPAN / UNIT * STEPS * 32 + threadIdx.x % 32;
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            const uint4 x = from[step * 32];
            const u32 a[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
            for (int n = 0; n < ROW_TILES; ++n) {
                const uint2 b = place(n, step);
                mma(sums[step % CHAINS][n], a, b.x, b.y);
            }
        }
        add_chains(sums, s);
    }

    // Position 0 has a centre of its own: its logits' biases, in the first unit of a sequence.
    static DEVICE void set_first(const BiasRows& rows, float (&s)[ROW_TILES][4]) {
        const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        if (g) return;
#pragma unroll
        for (int n = 0; n < ROW_TILES; ++n) {
#pragma unroll
            for (int j = 0; j < 2; ++j) s[n][j] = rows.numbers[n * 8 + 2 * t + j].z;
        }
    }

private:
    static DEVICE float4 quad(const float* p) { return *reinterpret_cast<const float4*>(p); }

    DEVICE uint2& place(int n, int step) {
        if constexpr (IN_REGISTERS) return operand[n][step];
        return room[(n * STEPS + step) * 32 + threadIdx.x % 32];
    }

    DEVICE void fetch_turn(u32 index) {
        const float* from = p.bias_turns + static_cast<i64>(index) * HEAD_DIM;
        float* to = turns + index % 2 * HEAD_DIM;
        for (int i = threadIdx.x % 32 * 4; i < HEAD_DIM; i += 128) {
            // To wait for a copy of the kind that pages come by would be to wait for pages.
            if (BULK_COPY) fetch_16(to + i, from + i);
            else *reinterpret_cast<float4*>(to + i) = quad(from + i);
        }
    }

    const Params& p;
    const uint4* table;
    float* turns;
    uint2* room;
    u32 span, stop;  // Which SPAN positions the operands are of, and the warp's last token of the piece.
    uint2 operand[IN_REGISTERS ? ROW_TILES : 1][IN_REGISTERS ? STEPS : 1];
};
