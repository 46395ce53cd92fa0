// Who reads what. A sequence is the tiles of one request, as one KV head and one block of query rows see them. It is
// cut into pieces, one thread block attends to a piece at a time, and the one that finishes a sequence's last piece
// merges them. The grid does not depend on the batch. There are two cuts:
//
// - aligned: one piece to a thread block. Taken where some piece length fills the grid well, as with equal lengths.
// - otherwise the sequences of all requests, KV heads and row blocks form one line, cut into equal ranges, one for each
//   thread block; a range may end inside a sequence and go on into the next. So any mixture of lengths keeps every
//   multiprocessor busy until the end. A sequence takes up its tiles and, before them, SWITCH places for the time lost.
//
// Every warp works the cut out for itself from the sequence lengths: no plan is passed between kernels.
#pragma once
#include "codes.cuh"

constexpr int TILE = UNIT * UNITS;   // Tokens that a warp attends to in one step.
constexpr int ROWS = 8 * ROW_TILES;  // Query rows (token and head of a group) of a row block.
constexpr int MIN_SHARE = WARPS;     // Tiles of a piece: below that, merging costs more than parallelism gains.
// Products that add up wait for each other. With few other products at hand, they add up in two sums instead of one.
constexpr int CHAINS = UNITS * ROW_TILES <= 2 ? 2 : 1;
constexpr int SWITCH = 32;           // Tiles that a thread block could read in the time that a change of pieces takes.

constexpr int OUTPUT_ROW = HEAD_DIM + 4;  // Floats that a head's outputs need: the mirror, the factor, padding.

struct Params {
    const u8* cache;             // Pages; see kv_cache/layout.py.
    i64 block_stride;            // Bytes.
    i64 head_stride;             // Bytes.
    const u16* query;            // Prepared: [tokens, heads, QUERY_WIDTH] float16.
    const float4* rows;          // [tokens, heads]: numbers of a row; see prepare.cu.
    u16* out;                    // [tokens, heads, HEAD_DIM] float16 or bfloat16.
    i64 out_token_stride;        // Elements.
    i64 out_head_stride;         // Elements.
    const int* block_table;      // [requests, blocks]: pages of a request.
    i64 table_stride;            // Elements.
    const int* seq_lens;         // [requests]: tokens, the query's included; 0 for padding.
    const int* query_start;      // [requests + 1]: first query token.
    const u16* value;            // [tokens, KV heads, HEAD_DIM] in the outputs' dtype: the query tokens' own, read as
                                 // they are; or null, then their codes are.
    i64 value_token_stride;      // Elements.
    i64 value_head_stride;       // Elements.
    const float* sinks;          // [heads]: a logit more in each head's softmax, without a value; or null.
    const float* value_output;   // [KV heads, OUTPUT_ROW]: kv_cache/cuda/folding.py.
    float* partial;              // [2 * thread blocks, ROWS, HEAD_DIM]: sums of pieces.
    float2* partial_stats;       // [2 * thread blocks, ROWS]: maximum (base 2) and weight of pieces.
    int* counters;               // [requests, row blocks, KV heads]: pieces done; 0 between launches.
    const float* bias_rows;      // [tokens, heads, HEAD_DIM], A then B, in the prepared query's units.
    const float* bias_turns;     // [positions / 256, HEAD_DIM], cos then sin of p0 theta.
    const uint4* bias_table;     // [16, HEAD_DIM / 16, 32], cos then sin of j theta; see bias.cuh.
    const int* awaits_store;     // [1], or null for 0: not 0 if the kernel that stores the step's tokens runs beside
                                 // this one and may be writing pages of tokens that are no query's here.
    int requests;
    int kv_heads;
    int group;                   // Query heads of a KV head.
    int row_blocks;              // Most that a request can have.
    int window;                  // Tokens that a token sees, itself included; 0 means all.
    float soft_cap;              // c in c * tanh(logit / c); used if SOFT_CAP.
};
static_assert(sizeof(Params) == PARAMS_BYTES, "the host passes other parameters");

DEVICE void add_chains(const float (&chains)[CHAINS][ROW_TILES][4], float (&sum)[ROW_TILES][4]) {
#pragma unroll
    for (int n = 0; n < ROW_TILES; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            sum[n][i] = CHAINS == 1 ? chains[0][n][i] : chains[0][n][i] + chains[CHAINS - 1][n][i];
        }
    }
}

DEVICE int div_up(int a, int b) { return (a + b - 1) / b; }

DEVICE int warp_sum(int x) {
#pragma unroll
    for (int step = 16; step; step >>= 1) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

DEVICE int warp_max(int x) {
#pragma unroll
    for (int step = 16; step; step >>= 1) x = max(x, __shfl_xor_sync(ALL_LANES, x, step));
    return x;
}

struct Request {
    int length;      // Tokens.
    int query;       // Query tokens,
    int first_query; // the first of all queries' tokens.
    int first;       // First tile that any row sees.
    int tiles;       // Tiles of one row block and head.
    int row_blocks;

    DEVICE Request(const Params& p, int index) {
        length = index < p.requests ? p.seq_lens[index] : 0;
        first_query = index < p.requests ? p.query_start[index] : 0;
        query = index < p.requests ? p.query_start[index + 1] - first_query : 0;
        first = p.window ? max(length - query + 1 - p.window, 0) / TILE : 0;
        tiles = length > 0 && query > 0 ? div_up(length, TILE) - first : 0;
        row_blocks = div_up(query * p.group, ROWS);
    }

    // Heads times row blocks: sequences of `tiles` that this request is attended with.
    DEVICE int sequences(const Params& p) const { return tiles ? row_blocks * p.kv_heads : 0; }
};

// How the work is cut. Its line consists of pieces if aligned, else of tiles.
struct Cut {
    int total;  // Of the line.
    int share;  // Tiles of a thread block, at most.
    bool aligned;

    DEVICE explicit Cut(const Params& p) {
        const int lane = threadIdx.x % 32, blocks = gridDim.x;
        int longest = 0, shortest = 1 << 30, sequences = 0;
        total = 0;
        for (int base = 0; base < p.requests; base += 32) {
            const Request r(p, base + lane);
            total += (r.tiles + SWITCH) * r.sequences(p), sequences += r.sequences(p);
            longest = max(longest, r.tiles);
            if (r.tiles) shortest = min(shortest, r.tiles);
        }
        total = warp_sum(total), longest = max(warp_max(longest), 1);
        share = max(div_up(total, blocks), MIN_SHARE);
        aligned = false;
        const int most = warp_sum(sequences) <= blocks ? div_up(longest, share) : 0;
        for (int parts = most; parts > 0 && parts > most - 3; --parts) {
            const int length = div_up(longest, parts);
            if (length > share + share / 8) break;
            int pieces = 0;
            for (int base = 0; base < p.requests; base += 32) {
                const Request r(p, base + lane);
                pieces += div_up(r.tiles, length) * r.sequences(p);
            }
            pieces = warp_sum(pieces);
            if (pieces <= blocks) {
                aligned = true, share = length, total = pieces;
                return;
            }
        }
        // Ranges of whole sequences need no merging; with equal lengths that is worth a few idle thread blocks.
        const int whole = div_up(share, longest + SWITCH) * (longest + SWITCH);
        if (longest == -warp_max(-shortest) && whole <= share + share / 16) share = whole;
    }

    // The line's length of a request's sequence.
    DEVICE int length(const Request& r) const { return aligned ? div_up(r.tiles, share) : r.tiles + SWITCH; }
};

// One thread block's part of one sequence.
struct Piece {
    int request, head, row_block;
    int first, last;      // Tiles, of the request.
    int length, query;    // Tokens of the request, and how many of them are the query's.
    int first_query;      // Of all query tokens, the request's first.
    int pieces;           // Of the sequence.
    int block, slot;      // Thread block of its first piece, and that piece's slot for sums.
    int own_slot;

    // A thread block leaves at most two pieces to merge: the one that its range starts with, and the one it ends with.
    DEVICE int slot_of(int piece) const { return piece ? 2 * (block + piece) : slot; }

    // A row of the row block: its token, from 0, and which query head of the KV head's it is.
    DEVICE int2 row(const Params& p, int own) const {
        own += row_block * ROWS;
        // A quotient of numbers so small is exact: it is never nearer to an integer than 0.5 / group.
        const int token = static_cast<int>((own + 0.5f) * reciprocal(static_cast<float>(p.group)));
        return {token, own - token * p.group};
    }

    // Which of all queries (token and head) it is.
    DEVICE int query_of(const Params& p, int own) const {
        const int2 at = row(p, own);
        return (first_query + at.x) * p.kv_heads * p.group + head * p.group + at.y;
    }
};

// A thread block's pieces, one after the other.
struct Walk {
    int place, end;      // On the line.
    int index, start;    // A request at or before `place`, and where it starts.

    DEVICE Walk(const Params& p, const Cut& cut) {
        place = cut.aligned ? blockIdx.x : blockIdx.x * cut.share;
        end = min(place + (cut.aligned ? 1 : cut.share), cut.total);
        index = start = 0;
        if (place >= end) return;
        const int lane = threadIdx.x % 32;
        for (int base = 0; base < p.requests; base += 32) {
            const Request r(p, base + lane);
            const int size = cut.length(r) * r.sequences(p);
            int sum = size;
#pragma unroll
            for (int step = 1; step < 32; step <<= 1) {
                const int before = __shfl_up_sync(ALL_LANES, sum, step);
                if (lane >= step) sum += before;
            }
            const u32 beyond = __ballot_sync(ALL_LANES, start + sum > place);
            if (beyond) {
                const int found = __ffs(beyond) - 1;
                index = base + found, start += __shfl_sync(ALL_LANES, sum - size, found);
                return;
            }
            start += __shfl_sync(ALL_LANES, sum, 31);
        }
    }

    // Step to the next piece; false if there is none.
    DEVICE bool next(const Params& p, const Cut& cut, Piece& piece) {
        while (place < end) {
            Request r(p, index);
            while (place >= start + cut.length(r) * r.sequences(p)) {
                start += cut.length(r) * r.sequences(p);
                r = Request(p, ++index);
            }
            const int length = cut.length(r), sequence = (place - start) / length, begin = start + sequence * length;
            piece.request = index, piece.head = sequence / r.row_blocks, piece.row_block = sequence % r.row_blocks;
            piece.length = r.length, piece.query = r.query, piece.first_query = r.first_query;
            if (cut.aligned) {
                const int part = place - begin;
                piece.first = r.first + r.tiles * part / length, piece.last = r.first + r.tiles * (part + 1) / length;
                piece.pieces = length, piece.block = begin, piece.slot = 2 * begin, piece.own_slot = 2 * place;
                ++place;
                return true;
            }
            const int tiles_begin = begin + SWITCH, stop = min(begin + length, end), from = max(place, tiles_begin);
            place = stop;
            if (from >= stop) continue;  // The range ends before the sequence's first tile.
            piece.first = r.first + from - tiles_begin, piece.last = r.first + stop - tiles_begin;
            piece.block = tiles_begin / cut.share, piece.pieces = (begin + length - 1) / cut.share - piece.block + 1;
            piece.slot = 2 * piece.block + (piece.block * cut.share < begin);
            piece.own_slot = piece.slot_of(blockIdx.x - piece.block);
            return true;
        }
        return false;
    }
};

// The warp's tiles of a piece: the piece is split evenly, so that a warp's tokens are contiguous.
DEVICE int warp_begin(const Piece& piece, int warp) {
    return piece.first + (piece.last - piece.first) * warp / WARPS;
}
