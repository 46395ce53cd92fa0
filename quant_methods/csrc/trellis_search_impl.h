// One instruction set's search; PARETO_TRELLIS_SEARCH is its name.
//
// Of a state's bits the lower 16 - 2 bits are its overlap with the pair before, the upper ones that with the next pair. So
// a step needs, of what came before, the least cost of each overlap alone, and the costs of 65,536 states are never stored.
// Which state had an overlap's least cost is not kept either: the way back asks for 128 of them, and computes these again.
//
// A state is branch * overlaps + the overlap before, and branches lie side by side in a vector: what came before is then
// one number for all of its lanes, and the minimum over the states of an overlap goes through vectors, not across them.
#include "trellis_search.h"

#include <stdlib.h>
#include <string.h>

#define PAIRS 128
#define STATES 65536
#define MOST_OVERLAPS 4096  // Of 2 bits.
#define MOST_BRANCHES 256   // Of 4 bits.
#define FAR 1e30f

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef floats floats_anywhere __attribute__((aligned(4)));
typedef ints ints_anywhere __attribute__((aligned(4)));

#if defined(__AVX512F__)
#include <immintrin.h>
static inline floats multiply_add(floats a, floats b, floats c) { return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
static inline floats smaller(floats a, floats b) { return (floats)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
#include <immintrin.h>
static inline floats multiply_add(floats a, floats b, floats c) { return (floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
static inline floats smaller(floats a, floats b) { return (floats)_mm256_min_ps((__m256)a, (__m256)b); }
#else
static inline floats multiply_add(floats a, floats b, floats c) { return a * b + c; }
static inline floats smaller(floats a, floats b) {
    const ints first = a < b;
    return (floats)(((ints)a & first) | ((ints)b & ~first));
}
#endif

static inline float least_of(floats a) {
    float least = a[0];
    for (int l = 1; l < LANES; l++) least = a[l] < least ? a[l] : least;
    return least;
}

// A pair of bfloat16 numbers, each the upper half of a float32.
static inline floats first_of(ints both) { return (floats)(both << 16); }
static inline floats second_of(ints both) { return (floats)(both & (int32_t)0xffff0000); }

// Tiles that are searched side by side, so that what states mean is read from the second cache once for all of them, and
// vectors of branches that are.
#define SIDE 4
#define WIDE 2

typedef struct {
    // [step][overlap]: the least costs before each step, in its pair's units and but for a constant, and after the last.
    float least[PAIRS + 1][MOST_OVERLAPS];
} tile_scratch;

typedef struct {
    tile_scratch of[SIDE];
    // Where the least cost of an overlap, branch * (overlaps / branches) + rest, is: at rest * branches + branch.
    uint16_t place[MOST_OVERLAPS];
} scratch;

// What a pair's costs are made of: w (b - x)^2 is w b^2 + n b and a constant, in units of the pair's second weight. So
// tiles whose weights differ by one factor have the same w, and share w b^2.
typedef struct {
    float w[2], n[2], unit;
} factors;

static inline factors factors_of(const pareto_trellis_search *a, int64_t pair) {
    factors f = {.w = {1, 1}, .unit = 1};
    if (a->weights) {
        const float *w = a->weights + 2 * pair;
        if (w[1] > 0) f.unit = w[1];
        for (int i = 0; i < 2; i++) f.w[i] = w[i] / f.unit;
    }
    for (int i = 0; i < 2; i++) f.n[i] = -2 * f.w[i] * a->targets[2 * pair + i];
    return f;
}

// The least costs of the overlaps of some vectors of branches and one rest, from `first` on.
static inline __attribute__((always_inline)) void some(const pareto_trellis_search *a, const factors *f, int i,
                                                       scratch *s, int first, floats *smallest, const int rest,
                                                       const int wide, const int shared) {
    const int branches = 1 << 2 * a->bits;
    const floats zero = {0};
    floats best[SIDE][WIDE];
    for (int t = 0; t < SIDE; t++)
        for (int k = 0; k < wide; k++) best[t][k] = zero + 4 * FAR;
    for (int low = 0; low < branches; low++) {
        const int before = rest * branches + low, place = s->place[before];
#pragma GCC unroll 4
        for (int k = 0; k < wide; k++) {
            const ints both = *(const ints_anywhere *)(a->turned + before * branches + first + k * LANES);
            const floats b0 = first_of(both), b1 = second_of(both), square0 = b0 * b0, square1 = b1 * b1;
            const floats squares = multiply_add(square0, zero + f[0].w[0], square1);
#pragma GCC unroll 8
            for (int t = 0; t < SIDE; t++) {
                floats cost = zero + s->of[t].least[i][place];
                if (shared)
                    cost += squares;
                else
                    cost = multiply_add(square0, zero + f[t].w[0], multiply_add(square1, zero + f[t].w[1], cost));
                cost = multiply_add(b0, zero + f[t].n[0], multiply_add(b1, zero + f[t].n[1], cost));
                best[t][k] = smaller(best[t][k], cost);
            }
        }
    }
    for (int t = 0; t < SIDE; t++) {
        for (int k = 0; k < wide; k++) {
            *(floats_anywhere *)(s->of[t].least[i + 1] + rest * branches + first + k * LANES) = best[t][k];
            smallest[t] = smaller(smallest[t], best[t][k]);
        }
    }
}

// The costs after one more pair of each tile, step i of the search, from those before it.
static void step(const pareto_trellis_search *a, const int64_t *pairs, const int64_t *next, int i, scratch *s) {
    const int branches = 1 << 2 * a->bits, overlaps = STATES / branches;
    const floats zero = {0};
    factors f[SIDE];
    floats smallest[SIDE];
    int shared = 1;
    for (int t = 0; t < SIDE; t++) {
        f[t] = factors_of(a, pairs[t]), smallest[t] = zero + 4 * FAR;
        const float apart = f[t].w[0] - f[0].w[0], most = 1e-6f * f[0].w[0];
        shared &= f[t].w[1] == 1 && apart <= most && apart >= -most;
    }
    for (int rest = 0; rest < overlaps / branches; rest++) {
        const int wide = branches < WIDE * LANES ? 1 : WIDE;
        for (int first = 0; first < branches; first += wide * LANES) {
            if (shared)
                wide == 1 ? some(a, f, i, s, first, smallest, rest, 1, 1) : some(a, f, i, s, first, smallest, rest, WIDE, 1);
            else
                wide == 1 ? some(a, f, i, s, first, smallest, rest, 1, 0) : some(a, f, i, s, first, smallest, rest, WIDE, 0);
        }
    }
    // Differences count alone, and small numbers have them exactly. In the next pair's units.
    for (int t = 0; t < SIDE; t++) {
        const floats off = zero + least_of(smallest[t]), by = zero + f[t].unit / factors_of(a, next[t]).unit;
        floats_anywhere *least = (floats_anywhere *)s->of[t].least[i + 1];
        for (int p = 0; p < overlaps / LANES; p++) least[p] = (least[p] - off) * by;
    }
}

// Past the last tile that one once more.
static inline int64_t tile_of(const pareto_trellis_search *a, int64_t tile) { return tile < a->tiles ? tile : a->tiles - 1; }

// All pairs, from pair `begin` on and around.
static void forward(const pareto_trellis_search *a, int64_t tile, int begin, scratch *s) {
    for (int i = 0; i < PAIRS; i++) {
        int64_t pairs[SIDE], next[SIDE];
        for (int t = 0; t < SIDE; t++) {
            const int64_t first = tile_of(a, tile + t) * PAIRS;
            pairs[t] = first + (begin + i) % PAIRS, next[t] = first + (begin + i + 1) % PAIRS;
        }
        step(a, pairs, next, i, s);
    }
}

// The state of the least cost of those that leave overlap p after step i.
static int back(const pareto_trellis_search *a, int64_t pair, int i, int p, const scratch *s, int t) {
    const int branches = 1 << 2 * a->bits, overlaps = STATES / branches;
    const factors f = factors_of(a, pair);
    const floats zero = {0};
    float cost[MOST_BRANCHES] __attribute__((aligned(64)));
    for (int low = 0; low < branches; low++)
        cost[low] = s->of[t].least[i][s->place[(p * branches + low) & (overlaps - 1)]];
    floats best = zero + 4 * FAR;
    for (int low = 0; low < branches; low += LANES) {
        const ints both = *(const ints_anywhere *)(a->values + p * branches + low);
        const floats b0 = first_of(both), b1 = second_of(both);
        *(floats *)(cost + low) += b0 * (f.w[0] * b0 + f.n[0]) + b1 * (f.w[1] * b1 + f.n[1]);
        best = smaller(best, *(floats *)(cost + low));
    }
    const float least = least_of(best);
    for (int low = 0; low < branches; low++)
        if (cost[low] == least) return p * branches + low;
    return p * branches;  // No number is equal to itself that is none.
}

int PARETO_TRELLIS_SEARCH(const pareto_trellis_search *a) {
    if (a->bits < 2 || a->bits > 4) return -1;
    const int branches = 1 << 2 * a->bits, overlaps = STATES / branches, rests = overlaps / branches;
    int failed = 0;
#pragma omp parallel num_threads(a->num_threads) if (a->num_threads > 1)
    {
        scratch *s = aligned_alloc(64, (sizeof(scratch) + 63) / 64 * 64);
        if (!s) {
#pragma omp atomic write
            failed = 1;
        } else
            for (int q = 0; q < overlaps; q++) s->place[q] = q % rests * branches + q / rests;
#pragma omp for schedule(dynamic)
        for (int64_t tile = 0; tile < a->tiles; tile += SIDE) {
            if (!s) continue;
            // Once around from the middle: what the best path has at the seam.
            for (int t = 0; t < SIDE; t++) memset(s->of[t].least[0], 0, 4 * overlaps);
            forward(a, tile, PAIRS / 2, s);
            int seam[SIDE];
            for (int t = 0; t < SIDE; t++) {
                const int64_t of = tile_of(a, tile + t);
                const float *least = s->of[t].least[PAIRS];
                int p = 0;
                for (int q = 1; q < overlaps; q++)
                    if (least[s->place[q]] < least[s->place[p]]) p = q;
                for (int i = PAIRS - 1; i >= PAIRS / 2; i--)
                    p = back(a, of * PAIRS + i - PAIRS / 2, i, p, s, t) & (overlaps - 1);
                seam[t] = p;
            }
            // The best path that begins and ends with it.
            for (int t = 0; t < SIDE; t++) {
                for (int q = 0; q < overlaps; q++) s->of[t].least[0][q] = FAR;
                s->of[t].least[0][s->place[seam[t]]] = 0;
            }
            forward(a, tile, 0, s);
            for (int t = 0; t < SIDE && tile + t < a->tiles; t++) {
                int p = seam[t];
                for (int i = PAIRS - 1; i >= 0; i--) {
                    const int64_t pair = (tile + t) * PAIRS + i;
                    a->states[pair] = back(a, pair, i, p, s, t);
                    p = a->states[pair] & (overlaps - 1);
                }
            }
        }
        free(s);
    }
    return failed ? -2 : 0;
}
