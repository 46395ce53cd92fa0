// Products of activations with weights of 2 to 7 bits: y[column, row] = sum over channels of x[column, channel] *
// weight[row, channel], for few columns (while decoding), where reading the codes is most of the work.
//
// Codes are the tensor cores' 16-row operand: a bit-plane's bits become the low bits of a 16-bit float's mantissa (128 +
// code in bfloat16, 1,024 + code in float16), from which one instruction takes the zero-point. Or, with TABLE, bytes of
// each row's look-up table are permuted into place. Sums are float32; a group's are scaled once.
//
// A unit is 16 rows by 128 channels, a warp's work at a time. In it, step s (of 8) covers the channels 16 s to 16 s + 15,
// of which the lanes with t = lane % 4 hold 4 t to 4 t + 3. A lane's 32 codes of a row are 16 pairs; a plane of w bits
// keeps 16 / w pairs in a word, the first of each in the low half. pack() in low_bit_cuda.py writes this layout.
//
// Macros: BITS (2 to 7), IN_BFLOAT, TABLE (0 or 1; BITS 3 or 4), WARPS of a thread block, COLUMN_TILES of 8 columns,
// GROUP_STEPS (2, 4 or 8: groups of 32, 64 or 128 channels).
#include "ptx.cuh"

constexpr int ROWS = 16, CHANNELS = 128, STEPS = 8, AHEAD = 2;
constexpr u32 MAGIC = IN_BFLOAT ? 0x43004300u : 0x64006400u, ONE = IN_BFLOAT ? 0x3f803f80u : 0x3c003c00u;

struct Params {
    const u32* words;  // [row tiles][units][64 * BITS]: planes of 4, 2 and 1 bits, each [lane][row g, row g + 8][words].
    const u16* groups; // [row tiles][groups][2][16]: scales, and -(128 or 1,024) - zero-point, in the type of x.
    const u32* table;  // TABLE: [row tiles][16][low bytes, high bytes of 2^BITS entries].
    const u16* x;      // [columns, channels], rows of 8 bytes' alignment.
    u16* y;            // [columns, rows].
    i64 x_stride;      // Elements.
    i64 y_stride;      // Elements.
    int columns;
    int channels;
    int rows;
    int units;         // Of a row tile: ceil(channels / 128).
    int tiles;         // Of rows.
};

DEVICE float to_float(u16 x) { return IN_BFLOAT ? from_bfloat(x) : from_half(x); }

// A lane's codes of a unit: [row g or g + 8][word of each plane].
struct Words {
    u32 four[2][4], two[2][2], one[2][1];

    DEVICE void load(const Params& p, int tile, int unit) {
        const int lane = threadIdx.x % 32;
        const u32* from = p.words + (static_cast<i64>(tile) * p.units + unit) * 64 * BITS;
        if constexpr (BITS & 4) {
            const uint4* at = reinterpret_cast<const uint4*>(from) + 2 * lane;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const uint4 v = load_constant(at + r);
                four[r][0] = v.x, four[r][1] = v.y, four[r][2] = v.z, four[r][3] = v.w;
            }
        }
        if constexpr (BITS & 2) {
            const uint4 v = load_constant(reinterpret_cast<const uint4*>(from + 64 * (BITS & 4)) + lane);
            two[0][0] = v.x, two[0][1] = v.y, two[1][0] = v.z, two[1][1] = v.w;
        }
        if constexpr (BITS & 1) {
            const uint2 v = load_constant(reinterpret_cast<const uint2*>(from + 64 * (BITS & 6)) + lane);
            one[0][0] = v.x, one[1][0] = v.y;
        }
    }

    // Pair q of a row: its bits over those of `onto`, at 0 and 16.
    template <int WIDTH, int OFFSET>
    static DEVICE u32 add_plane(const u32* words, int q, u32 onto) {
        constexpr int PAIRS = 16 / WIDTH;
        constexpr u32 MASK = ((1u << WIDTH) - 1) << OFFSET;
        const int shift = WIDTH * (q % PAIRS) - OFFSET;
        const u32 word = words[q / PAIRS];
        return and_or(shift >= 0 ? word >> shift : word << -shift, MASK * 0x10001u, onto);
    }

    DEVICE u32 pair(int row, int q, u32 onto) const {
        if constexpr (BITS & 4) onto = add_plane<4, 0>(four[row], q, onto);
        if constexpr (BITS & 2) onto = add_plane<2, BITS & 4>(two[row], q, onto);
        if constexpr (BITS & 1) onto = add_plane<1, BITS & 6>(one[row], q, onto);
        return onto;
    }
};

#if TABLE
// A row's look-up table, low bytes and high bytes.
struct Table {
    u32 bytes[2][1 << (BITS - 2)];

    DEVICE void load(const u32* from) {
#pragma unroll
        for (int i = 0; i < 2 << (BITS - 2); ++i) bytes[i / (1 << (BITS - 2))][i % (1 << (BITS - 2))] = from[i];
    }

    // The entries that two pairs of codes name, as two pairs.
    DEVICE void look_up(u32 first, u32 second, u32& a, u32& b) const {
        const u32 both = first | second << 4;                    // Nibbles: first, second; 16 bits further up again.
        const u32 codes = __byte_perm(both, 0, 0x4420) & 0xffff; // first low, second low, first high, second high.
        u32 found[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const u32* t = bytes[i];
            if constexpr (BITS == 3) {
                found[i] = __byte_perm(t[0], t[1], codes);
            } else {
                const u32 low = __byte_perm(t[0], t[1], codes & 0x7777), high = __byte_perm(t[2], t[3], codes & 0x7777);
                found[i] = __byte_perm(low, high, 0x3210 | (codes & 0x8888) >> 1);
            }
        }
        a = __byte_perm(found[0], found[1], 0x6240), b = __byte_perm(found[0], found[1], 0x7351);
    }
};
#endif

extern "C" __global__ __launch_bounds__(32 * WARPS) void multiply(const __grid_constant__ Params p) {
    SHARED __align__(16) float sums[WARPS][8 * COLUMN_TILES][ROWS + 1];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int first_column = blockIdx.y * 8 * COLUMN_TILES;
    Words words[AHEAD + 1];
    // The unit that this warp fetches next: units come in the order of use, one row tile after the other.
    int next_tile = warp < p.units ? blockIdx.x : p.tiles, next_unit = warp;
    auto fetch = [&](Words& to) {
        if (next_tile >= p.tiles) return;
        to.load(p, next_tile, next_unit);
        next_unit += WARPS;
        if (next_unit >= p.units) next_unit = warp, next_tile += gridDim.x;
    };
    // Codes are constants of the model: there is no need to wait for them.
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) fetch(words[i]);
    wait_for_previous_kernel();
    let_next_kernel_start();
    for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
        float total[COLUMN_TILES][4] = {};
#if TABLE
        Table tables[2];
        for (int r = 0; r < 2; ++r) tables[r].load(p.table + (static_cast<i64>(tile) * ROWS + g + 8 * r) * (2 << (BITS - 2)));
#endif
        for (int unit = warp; unit < p.units; unit += WARPS) {
            fetch(words[AHEAD]);
            const Words& now = words[0];
            uint2 x[COLUMN_TILES][STEPS];
#pragma unroll
            for (int c = 0; c < COLUMN_TILES; ++c) {
                const int column = first_column + 8 * c + g;
#pragma unroll
                for (int s = 0; s < STEPS; ++s) {
                    const int channel = unit * CHANNELS + 16 * s + 4 * t;
                    x[c][s] = {0, 0};
                    if (column < p.columns && channel < p.channels)
                        x[c][s] = *reinterpret_cast<const uint2*>(p.x + column * p.x_stride + channel);
                }
            }
#if TABLE
#pragma unroll
            for (int s = 0; s < STEPS; ++s) {
                u32 a[4];
#pragma unroll
                for (int r = 0; r < 2; ++r) tables[r].look_up(now.pair(r, 2 * s, 0), now.pair(r, 2 * s + 1, 0), a[r], a[r + 2]);
#pragma unroll
                for (int c = 0; c < COLUMN_TILES; ++c) {
                    if constexpr (IN_BFLOAT) mma_bfloat(total[c], a, x[c][s].x, x[c][s].y);
                    else mma(total[c], a, x[c][s].x, x[c][s].y);
                }
            }
#else
            constexpr int GROUPS = STEPS / GROUP_STEPS;
            const u16* group = p.groups + (static_cast<i64>(tile) * p.units + unit) * GROUPS * 2 * ROWS;
#pragma unroll
            for (int i = 0; i < GROUPS; ++i) {
                const float scale[2] = {to_float(group[i * 2 * ROWS + g]), to_float(group[i * 2 * ROWS + g + 8])};
                const u32 low = group[i * 2 * ROWS + ROWS + g], high = group[i * 2 * ROWS + ROWS + g + 8];
                const u32 offset[2] = {low * 0x10001u, high * 0x10001u};
                float part[COLUMN_TILES][4] = {};
#pragma unroll
                for (int s = i * GROUP_STEPS; s < (i + 1) * GROUP_STEPS; ++s) {
                    u32 a[4];
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        const u32 code = now.pair(j % 2, 2 * s + j / 2, MAGIC);
                        a[j] = IN_BFLOAT ? fma_bfloat2(code, ONE, offset[j % 2]) : fma_half2(code, ONE, offset[j % 2]);
                    }
#pragma unroll
                    for (int c = 0; c < COLUMN_TILES; ++c) {
                        if constexpr (IN_BFLOAT) mma_bfloat(part[c], a, x[c][s].x, x[c][s].y);
                        else mma(part[c], a, x[c][s].x, x[c][s].y);
                    }
                }
#pragma unroll
                for (int c = 0; c < COLUMN_TILES; ++c) {
#pragma unroll
                    for (int j = 0; j < 4; ++j) total[c][j] = fmaf(scale[j / 2], part[c][j], total[c][j]);
                }
            }
#endif
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) words[i] = words[i + 1];
        }
        __syncthreads();  // The sums of the tile before are read.
#pragma unroll
        for (int c = 0; c < COLUMN_TILES; ++c) {
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[warp][8 * c + 2 * t + j % 2][g + 8 * (j / 2)] = total[c][j];
        }
        __syncthreads();
        for (int i = threadIdx.x; i < 8 * COLUMN_TILES * ROWS; i += 32 * WARPS) {
            const int column = i / ROWS, row = i % ROWS;
            float sum = 0;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) sum += sums[w][column][row];
            if (first_column + column < p.columns && tile * ROWS + row < p.rows)
                p.y[(first_column + column) * p.y_stride + tile * ROWS + row] = IN_BFLOAT ? to_bfloat(sum) : to_half(sum);
        }
    }
}

// The weights themselves in the type of x, for products with many columns: y is [rows, channels], a unit a warp.
extern "C" __global__ __launch_bounds__(32 * WARPS) void expand(const __grid_constant__ Params p) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int tile = blockIdx.x, unit = blockIdx.y * WARPS + threadIdx.x / 32;
    if (unit >= p.units) return;
    Words words;
    words.load(p, tile, unit);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = tile * ROWS + g + 8 * r;
#if TABLE
        Table table;
        table.load(p.table + (static_cast<i64>(tile) * ROWS + g + 8 * r) * (2 << (BITS - 2)));
#endif
#pragma unroll
        for (int s = 0; s < STEPS; ++s) {
            u32 pairs[2];
#if TABLE
            table.look_up(words.pair(r, 2 * s, 0), words.pair(r, 2 * s + 1, 0), pairs[0], pairs[1]);
#else
            constexpr int GROUPS = STEPS / GROUP_STEPS;
            const u16* group = p.groups + ((static_cast<i64>(tile) * p.units + unit) * GROUPS + s / GROUP_STEPS) * 2 * ROWS;
            const float scale = to_float(group[g + 8 * r]);
            const u32 offset = group[ROWS + g + 8 * r] * 0x10001u;
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const u32 code = words.pair(r, 2 * s + j, MAGIC);
                const u32 whole = IN_BFLOAT ? fma_bfloat2(code, ONE, offset) : fma_half2(code, ONE, offset);
                const float low = scale * to_float(whole & 0xffff), high = scale * to_float(whole >> 16);
                pairs[j] = IN_BFLOAT ? pack_bfloat2(low, high) : pack_half2(low, high);
            }
#endif
            const int channel = unit * CHANNELS + 16 * s + 4 * t;
            if (row < p.rows && channel < p.channels)
                *reinterpret_cast<uint2*>(p.y + row * p.y_stride + channel) = {pairs[0], pairs[1]};
        }
    }
}
