// Products of activations with weights of 2 to 7 bits: y[column, row] = sum over channels of x[column, channel] *
// weight[row, channel], for up to 64 columns, where reading the codes is most of the work (while decoding).
//
// A thread block's step is ROW_WARPS units of rows by UNITS * WARPS / ROW_WARPS of channels, UNITS for each warp. Codes,
// scales and activations of the STAGES - 1 steps ahead are on their way into a ring in shared memory. The block's
// activations are for all of its warps, which wait for each other at every step; with ALONE each warp has a copy of those
// that it needs, and goes on by itself. Warps of the same rows add up their sums when a tile of rows is complete.
//
// The steps of all tiles, one tile after the other, are dealt out in equal runs to the blocks (or whole tiles are); of a
// tile that several blocks worked on, the last one to finish adds up what all have left in p.parts, always in the same
// order. Sums are float32; those of a group are scaled once.
//
// Macros: TRELLIS, SEMI_SPARSE and BITMAP (0 or 1), those of low_bit_codes.cuh, low_bit_trellis.cuh, low_bit_semi_sparse.cuh or
// low_bit_bitmap.cuh (for these three TABLE is 0, for others than the last CODE_WORDS is), WARPS of a thread block, ROW_WARPS
// (divides WARPS), UNITS (1 or, without a bitmap, 2: of channels, that a warp has in a step), COLUMN_TILES of 8 columns, STAGES,
// ALONE (0 or 1), RESIDENT (thread blocks of a multiprocessor that registers are to suffice for), PARAMS_BYTES (what the host
// takes `Params` to be).
#if TRELLIS
#include "low_bit_trellis.cuh"
#elif SEMI_SPARSE
#include "low_bit_semi_sparse.cuh"
#elif BITMAP
#include "low_bit_bitmap.cuh"
#else
#include "low_bit_codes.cuh"
#endif

static_assert(!BITMAP || UNITS == 1, "a unit's codes have the end of its slot");
constexpr int DEPTH_WARPS = WARPS / ROW_WARPS, THREADS = 32 * WARPS, DEPTH_UNITS = DEPTH_WARPS * UNITS;
constexpr int SLOT_WORDS = UNITS * UNIT_WORDS + (TABLE ? 1 : UNITS) * SIDE_WORDS + CODE_WORDS;
constexpr int X_THREADS = ALONE ? 32 : THREADS;                          // That share activations.
constexpr int X_CHUNKS = CHANNELS * (ALONE ? UNITS : DEPTH_UNITS) / 8;   // Of 16 bytes in a row of a step's activations.
// Bytes: two neighbouring rows begin in different halves of the banks, or eight in different eighths.
constexpr int X_STRIDE = 16 * X_CHUNKS + (SEMI_SPARSE ? 16 : 64);
constexpr int VECTORS = 2 * COLUMN_TILES;     // Of a lane's sums.

struct Params {
    const u32* words;  // [row tiles][units][UNIT_WORDS]
    const u32* side;   // [row tiles][units][SIDE_WORDS], or with TABLE [row tiles][SIDE_WORDS].
    const u32* kept;   // With BITMAP, lines of 4 words: codes.
    const int* starts; // With BITMAP, [row tiles * units + 1], the line where each unit's codes begin.
    const u16* x;      // [columns, channels], rows of 16 bytes' alignment.
    u16* y;            // [columns, rows]
    float4* parts;     // [blocks][a run's first tile, its last][ROW_WARPS][VECTORS][lane]; unused where tiles are whole.
    int* arrivals;     // [blocks] zeros, and zeros again afterwards.
    i64 x_stride;      // Elements.
    i64 y_stride;      // Elements.
    int columns;
    int channels;
    int rows;
    int units;         // Of a row tile: ceil(channels / CHANNELS).
    int tiles;         // Of ROWS rows.
    int steps;         // Of a tile of ROW_WARPS row tiles: ceil(units / DEPTH_UNITS).
    int grain;         // Steps that are dealt out together: 1, or those of a tile.
    int share;         // What each block gets at least, in grains.
    int larger;        // Blocks that get one more; the first ones.
};
static_assert(sizeof(Params) == PARAMS_BYTES, "the host passes other parameters");

DYNAMIC_SHARED __align__(128) u8 shared[];

// Which steps are whose.
DEVICE int run_begin(const Params& p, int block) { return (block * p.share + min(block, p.larger)) * p.grain; }
DEVICE int run_of(const Params& p, int step) {
    const int grain = step / p.grain, in_larger = p.larger * (p.share + 1);
    return grain < in_larger ? grain / (p.share + 1) : p.larger + (grain - in_larger) / p.share;
}

// Of the ring's stages, each a slot for every warp's codes and what goes with them, and then rows of activations.
DEVICE int stage_bytes(const Params& p) { return 4 * WARPS * SLOT_WORDS + p.columns * X_STRIDE * (THREADS / X_THREADS); }
DEVICE int x_begin(const Params& p) {
    return 4 * WARPS * SLOT_WORDS + p.columns * X_STRIDE * (static_cast<int>(threadIdx.x) / X_THREADS);
}

#if BITMAP
// The table of selectors, behind the ring and the warps' sums.
DEVICE u32* selectors(const Params& p) {
    return reinterpret_cast<u32*>(shared + STAGES * stage_bytes(p) + 1024 * COLUMN_TILES * (WARPS - ROW_WARPS));
}
#endif

// A thread's place in a run of steps.
struct Place {
    int tile, step, stage;
    int unit, units;  // The warp's first in the step, and how many there are of its rows.

    DEVICE Place(const Params& p, int at) : tile(at / p.steps), step(at % p.steps), stage(0) { seek(p); }
    DEVICE int row_tile() const { return tile * ROW_WARPS + static_cast<int>(threadIdx.x) / 32 / DEPTH_WARPS; }
    DEVICE bool has_unit(int u) const { return unit + u < units; }
    DEVICE int x_channel() const { return CHANNELS * (ALONE ? unit : step * DEPTH_UNITS) + threadIdx.x % X_CHUNKS * 8; }

    DEVICE void seek(const Params& p) {
        unit = step * DEPTH_UNITS + static_cast<int>(threadIdx.x) / 32 % DEPTH_WARPS * UNITS;
        units = row_tile() < p.tiles ? p.units : 0;
    }

    // Returns whether the tile is another one now.
    DEVICE bool next(const Params& p) {
        if (++stage == STAGES) stage = 0;
        unit += DEPTH_UNITS;
        if (++step < p.steps) return false;
        step = 0, ++tile;
        seek(p);
        return true;
    }
};

// Asks for the codes and activations of one step after the other.
struct Fetcher {
    Place place;
    u64 policy;
    const u32 *words, *side;  // The lane's of the place.
    int line, line_end;       // With BITMAP, where the place's codes are.
    const u16* x;             // The thread's first, in the place's step.

    DEVICE Fetcher(const Params& p, int begin) : place(p, begin), policy(evict_first()) { seek(p); }

    DEVICE void seek(const Params& p) {
        const i64 unit = static_cast<i64>(place.row_tile()) * p.units + place.unit;
        words = p.words + unit * UNIT_WORDS + threadIdx.x % 32 * 4;
        side = p.side + (TABLE ? place.row_tile() : unit) * SIDE_WORDS + threadIdx.x % 32 * 4;
        x = p.x + threadIdx.x % X_THREADS / X_CHUNKS * p.x_stride + place.x_channel();
        find_lines(p);
    }

    // A step ahead of the copies that need to know.
    DEVICE void find_lines(const Params& p) {
#if BITMAP
        if (!place.has_unit(0)) return;
        const int* at = p.starts + static_cast<i64>(place.row_tile()) * p.units + place.unit;
        line = at[0], line_end = at[1];
#endif
    }

    DEVICE void next(const Params& p) {
        if (place.next(p)) return seek(p);
        words += DEPTH_UNITS * UNIT_WORDS, side += TABLE ? 0 : DEPTH_UNITS * SIDE_WORDS;
        x += CHANNELS * DEPTH_UNITS;
        find_lines(p);
    }

    DEVICE void fetch_codes(const Params& p) const {
        if (!place.has_unit(0)) return;
        const u32 to = shared_address(shared) + place.stage * stage_bytes(p) + threadIdx.x / 32 * SLOT_WORDS * 4 +
                       threadIdx.x % 32 * 16;
#pragma unroll
        for (int i = 0; i < UNITS * UNIT_WORDS; i += 128) {
            if (i < UNIT_WORDS || place.has_unit(i / UNIT_WORDS)) copy_16(to + 4 * i, words + i, policy);
        }
        const int side_words = SIDE_WORDS * (TABLE || !place.has_unit(UNITS - 1) ? 1 : UNITS);
#pragma unroll
        for (int i = 0; i < (TABLE ? 1 : UNITS) * SIDE_WORDS; i += 128) {
            if (i + threadIdx.x % 32 * 4 < side_words) copy_16(to + 4 * (UNITS * UNIT_WORDS + i), side + i, policy);
        }
#if BITMAP
        const int own = line + static_cast<int>(threadIdx.x) % 32;
        const u32* from = p.kept + 4 * static_cast<i64>(own);
#pragma unroll
        for (int i = 0; i < CODE_WORDS; i += 128) {
            if (own + i / 4 < line_end) copy_16(to + 4 * (UNIT_WORDS + SIDE_WORDS + i), from + i, policy);
        }
#endif
    }

    // Past the last channel there are zeros.
    DEVICE void fetch_activations(const Params& p) const {
        constexpr int COLUMNS = X_THREADS / X_CHUNKS;  // At a time.
        const int column = threadIdx.x % X_THREADS / X_CHUNKS;
        const bool inside = place.x_channel() < p.channels;
        const u32 to = shared_address(shared) + place.stage * stage_bytes(p) + x_begin(p) + column * X_STRIDE +
                       threadIdx.x % X_CHUNKS * 16;
#pragma unroll
        for (int i = 0; i < 8 * COLUMN_TILES; i += COLUMNS) {
            if (i >= p.columns) break;
            if (i + column < p.columns) fetch_16_or_zeros(to + i * X_STRIDE, inside ? x + i * p.x_stride : p.x, inside);
        }
    }
};

#if SEMI_SPARSE
template <int PAIR>
DEVICE void sparse_product(float (&c)[4], const u32 (&a)[4], const u32 (&b)[4], u32 places) {
    if constexpr (IN_BFLOAT) mma_sparse_bfloat<PAIR>(c, a, b, places);
    else mma_sparse<PAIR>(c, a, b, places);
}
#endif

DEVICE void product(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    if constexpr (IN_BFLOAT) mma_bfloat(c, a, b0, b1);
    else mma(c, a, b0, b1);
}

// A lane's sums: [its first two rows, the others][columns 8 c + 2 t and the next].
struct Sums {
    float of[2][COLUMN_TILES][4];

    DEVICE float4 vector(int i) const {
        const float(&v)[4] = of[i / COLUMN_TILES][i % COLUMN_TILES];
        return {v[0], v[1], v[2], v[3]};
    }
    DEVICE void add(int i, float4 by) {
        float(&v)[4] = of[i / COLUMN_TILES][i % COLUMN_TILES];
        v[0] += by.x, v[1] += by.y, v[2] += by.z, v[3] += by.w;
    }

    // The products of steps of 32 channels; x is where the lane's first column's are of the unit's first.
#if SEMI_SPARSE
    DEVICE void add_products(const Unit& unit, int from, int to, const u8* x, const int (&columns)[COLUMN_TILES]) {
#pragma unroll
        for (int j = from; j < to; ++j) {
            u32 a[2][4];  // Of 16 rows each.
#pragma unroll
            for (int i = 0; i < 2; ++i) unit.operand(i, j, a[i]);
#pragma unroll
            for (int c = 0; c < COLUMN_TILES; ++c) {
                u32 b[4];
                load_matrices(b, x + columns[c] + 64 * j);
                sparse_product<0>(of[0][c], a[0], b, unit.places[j]);
                sparse_product<1>(of[1][c], a[1], b, unit.places[j]);
            }
        }
    }
#else
    DEVICE void add_products(const Unit& unit, int from, int to, const u8* x, const int (&columns)[COLUMN_TILES]) {
#pragma unroll
        for (int j = from; j < to; ++j) {
            u32 a[2][2][4];  // Of 16 channels each; of 16 rows each.
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                u32 pairs[4];
                unit.pairs(r, j, pairs);
#pragma unroll
                for (int h = 0; h < 4; ++h) a[h / 2][r / 2][r % 2 + 2 * (h % 2)] = pairs[h];
            }
#pragma unroll
            for (int c = 0; c < COLUMN_TILES; ++c) {
                const uint4 b = *reinterpret_cast<const uint4*>(x + columns[c] + 64 * j);
#pragma unroll
                for (int i = 0; i < 2; ++i) product(of[i][c], a[0][i], b.x, b.y);
#pragma unroll
                for (int i = 0; i < 2; ++i) product(of[i][c], a[1][i], b.z, b.w);
            }
        }
    }
#endif

    DEVICE void add_unit(const Params& p, const u32* words, const u32* side, const u8* x, const int (&columns)[COLUMN_TILES]) {
        Unit unit;
#if BITMAP
        unit.load(words, side + SIDE_WORDS, selectors(p));
#else
        unit.load(words, side);
#endif
#if TABLE
        add_products(unit, 0, 4, x, columns);
#else
#pragma unroll
        for (int group = 0; group < GROUPS; ++group) {
            float scales[4];
            unit.set_group(side, group, scales);
            Sums part = {};
            part.add_products(unit, group * GROUP_STEPS / 2, (group + 1) * GROUP_STEPS / 2, x, columns);
#pragma unroll
            for (int i = 0; i < 8 * COLUMN_TILES; ++i) {
                const int rows = i / 4 / COLUMN_TILES, c = i / 4 % COLUMN_TILES, j = i % 4;
                of[rows][c][j] = fmaf(scales[2 * rows + j / 2], part.of[rows][c][j], of[rows][c][j]);
            }
        }
#endif
    }

    DEVICE void store(const Params& p, int row_tile) const {
        const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int i = 0; i < 8 * COLUMN_TILES; ++i) {
            const int rows = i / 4 / COLUMN_TILES, c = i / 4 % COLUMN_TILES, j = i % 4;
            const int row = row_tile * ROWS + Unit::row(g, 2 * rows + j / 2), column = 8 * c + 2 * t + j % 2;
            if (row < p.rows && column < p.columns) p.y[column * p.y_stride + row] = from_float(of[rows][c][j]);
        }
    }
};

// Adds up the sums of the warps of the same rows; the first of these has them.
DEVICE void add_up_warps(const Params& p, Sums& sums) {
    if constexpr (DEPTH_WARPS > 1) {
        const int depth = threadIdx.x / 32 % DEPTH_WARPS, row_warp = threadIdx.x / 32 / DEPTH_WARPS;
        float4* left = reinterpret_cast<float4*>(shared + STAGES * stage_bytes(p)) + threadIdx.x % 32;
        left += row_warp * (DEPTH_WARPS - 1) * VECTORS * 32;
        if (ALONE) __syncthreads();  // What is left of the tile before is read.
        if (depth) {
#pragma unroll
            for (int i = 0; i < VECTORS; ++i) left[((depth - 1) * VECTORS + i) * 32] = sums.vector(i);
        }
        __syncthreads();
        if (!depth) {
            for (int w = 0; w < DEPTH_WARPS - 1; ++w) {
#pragma unroll
                for (int i = 0; i < VECTORS; ++i) sums.add(i, left[(w * VECTORS + i) * 32]);
            }
        }
    }
}

// Leaves a part of a tile's sums for the other blocks that work on it. Returns whether all have, and then the whole sums.
DEVICE bool add_up_blocks(const Params& p, int tile, Sums& sums) {
    SHARED bool is_last;
    const int warp = threadIdx.x / 32;
    const int first = run_of(p, tile * p.steps), last = run_of(p, (tile + 1) * p.steps - 1);
    // A block begins at most one tile without finishing it, its run's last, and finishes at most one, its run's first.
    const auto part = [&](int block) {
        return p.parts + ((2 * block + (block == first)) * ROW_WARPS + warp / DEPTH_WARPS) * VECTORS * 32 + threadIdx.x % 32;
    };
    if (warp % DEPTH_WARPS == 0) {
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) part(blockIdx.x)[32 * i] = sums.vector(i);
    }
    __syncthreads();
    if (threadIdx.x == 0) is_last = arrive(p.arrivals + first) == last - first;
    __syncthreads();
    if (!is_last) return false;
    if (threadIdx.x == 0) p.arrivals[first] = 0;
    if (warp % DEPTH_WARPS == 0) {
        sums = {};
        for (int block = first; block <= last; ++block) {
#pragma unroll
            for (int i = 0; i < VECTORS; ++i) sums.add(i, load_l2(part(block) + 32 * i));
        }
    }
    return true;
}

extern "C" __global__ __launch_bounds__(THREADS, RESIDENT) void multiply(const __grid_constant__ Params p) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, depth = warp % DEPTH_WARPS;
    const int begin = run_begin(p, blockIdx.x), end = run_begin(p, blockIdx.x + 1);
    Fetcher ahead(p, begin);
    Place now = ahead.place;
    // Codes are constants of the model: there is no need to wait for them.
    Fetcher first = ahead;
#if BITMAP
    fill_selectors(selectors(p), THREADS);
    __syncthreads();
#endif
    for (int i = 0; i < STAGES - 1 && begin + i < end; ++i, first.next(p)) first.fetch_codes(p);
    wait_for_previous_kernel();
    let_next_kernel_start();
    for (int i = 0; i < STAGES - 1; ++i, ahead.next(p)) {
        if (begin + i < end) ahead.fetch_activations(p);
        copy_commit();
    }
    // Where a lane's columns are in a stage; those past the last one are like it, and nobody reads their sums. It loads
    // eight channels of a column for itself, or for the lanes that the sparse tensor cores want them in.
    int columns[COLUMN_TILES];
    const int column = SEMI_SPARSE ? lane % 8 : lane / 4, chunk = SEMI_SPARSE ? lane / 8 : lane % 4;
#pragma unroll
    for (int c = 0; c < COLUMN_TILES; ++c) columns[c] = min(8 * c + column, p.columns - 1) * X_STRIDE;
    const int codes = 4 * SLOT_WORDS * warp, x = x_begin(p) + (ALONE ? 0 : 2 * CHANNELS * UNITS * depth) + chunk * 16;
    Sums sums = {};
    for (int at = begin; at < end; ++at) {
        copy_wait<STAGES - 2>();
        // The copies of all are there, and all are done with the stage before.
        if (ALONE) __syncwarp();
        else __syncthreads();
        if (at + STAGES - 1 < end) ahead.fetch_codes(p), ahead.fetch_activations(p);
        copy_commit();
        ahead.next(p);
        const u8* stage = shared + now.stage * stage_bytes(p);
        const u32* slot = reinterpret_cast<const u32*>(stage + codes);
#pragma unroll
        for (int u = 0; u < UNITS; ++u) {
            const u32* side = slot + UNITS * UNIT_WORDS + (TABLE ? 0 : u * SIDE_WORDS);
            if (now.has_unit(u)) sums.add_unit(p, slot + u * UNIT_WORDS, side, stage + x + 2 * CHANNELS * u, columns);
        }
        const int tile = now.tile, row_tile = now.row_tile();
        const bool ended = now.next(p);
        if (!ended && at + 1 < end) continue;
        add_up_warps(p, sums);
        const bool whole = ended && begin <= tile * p.steps;
        if ((whole || add_up_blocks(p, tile, sums)) && depth == 0) sums.store(p, row_tile);
        sums = {};
    }
}

// The weights themselves in the type of x, for products with many columns: y is [rows, channels], a unit a warp.
extern "C" __global__ __launch_bounds__(THREADS) void expand(const __grid_constant__ Params p) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int tile = blockIdx.x, at = blockIdx.y * WARPS + threadIdx.x / 32;
#if BITMAP
    u32* table = reinterpret_cast<u32*>(shared);
    fill_selectors(table, THREADS);
    __syncthreads();
#endif
    if (at >= p.units) return;
    const i64 index = static_cast<i64>(tile) * p.units + at;
    const u32* side = p.side + (TABLE ? tile : index) * SIDE_WORDS;
    Unit unit;
#if BITMAP
    unit.load(p.words + index * UNIT_WORDS, p.kept + 4 * static_cast<i64>(p.starts[index]), table);
#else
    unit.load(p.words + index * UNIT_WORDS, side);
#endif
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#if !TABLE
        float scales[4];
        unit.set_group(side, 2 * j / GROUP_STEPS, scales);
#endif
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            u32 pairs[4];
            unit.pairs(r, j, pairs);
#if !TABLE
#pragma unroll
            for (int h = 0; h < 4; ++h) {
                const float low = scales[r] * to_float(pairs[h] & 0xffff), high = scales[r] * to_float(pairs[h] >> 16);
                pairs[h] = IN_BFLOAT ? pack_bfloat2(low, high) : pack_half2(low, high);
            }
#endif
            const int row = tile * ROWS + Unit::row(g, r), channel = at * CHANNELS + 32 * j + (SEMI_SPARSE ? 4 : 8) * t;
            u16* y = p.y + row * p.y_stride + channel;
            if (row >= p.rows) continue;
#if SEMI_SPARSE
            if (channel < p.channels) *reinterpret_cast<uint2*>(y) = {pairs[0], pairs[1]};
            if (channel + 16 < p.channels) *reinterpret_cast<uint2*>(y + 16) = {pairs[2], pairs[3]};
#else
            if (channel < p.channels) *reinterpret_cast<uint4*>(y) = {pairs[0], pairs[1], pairs[2], pairs[3]};
#endif
        }
    }
}
