// What csrc/ptx.cuh offers, in plain C++, and as much of CUDA as the kernels use: a thread block's threads are fibers
// that run in turn until they wait for each other. Slow, and blind to races, but it runs the kernels' own source.
#pragma once

#include <cmath>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <map>
#include <ucontext.h>
#include <vector>

#define DEVICE inline
#define SHARED static
#define DYNAMIC_SHARED extern
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __CUDA_ARCH__ 900

struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) ushort4 { unsigned short x, y, z, w; };
struct uint3 { unsigned x, y, z; };

// A kernel has this name, and so has a function of the C library.
#define read emulated_read

extern u8 shared[];

namespace emulator {

constexpr int MAX_THREADS = 1024, STACK = 256 << 10;

struct Barrier {
    int members = 0, arrived = 0;
    u64 generation = 0;
    void release() {
        if (arrived == members) arrived = 0, ++generation;
    }
};

struct Copy {
    void* to;
    const void* from;
    u32 bytes;
};

// What one of a block's barriers in shared memory waits for.
struct Transfers {
    std::vector<Copy> copies;
    u32 expected = 0, phases = 0;
};

struct Fiber {
    jmp_buf at;
    ucontext_t context;
    bool started = false, done = false;
    const u64* waits = nullptr;  // A barrier's generation, and the one it waits to end.
    u64 until = 0;
    uint3 thread;
    char* stack = nullptr;
    std::vector<Copy> fetches;
};

extern Fiber fibers[MAX_THREADS];
extern Fiber* current;
extern Barrier block, warps[MAX_THREADS / 32];
extern u64 slots[MAX_THREADS / 32][32][8];  // What lanes of a warp show each other.
extern jmp_buf scheduler;
extern std::map<u32, Transfers> transfers;  // By the barrier's address.
extern uint3 block_index, grid_size;

inline void wait(Barrier& barrier) {
    const u64 generation = barrier.generation;
    if (++barrier.arrived == barrier.members) return barrier.release();
    current->waits = &barrier.generation, current->until = generation;
    if (!_setjmp(current->at)) _longjmp(scheduler, 1);
}

inline void wait_in_vain() {
    static u64 never = 0;
    current->waits = &never, current->until = never;
    _longjmp(scheduler, 1);
}

inline int lane() { return current->thread.x % 32; }
inline int warp() { return current->thread.x / 32; }
inline void sync_warp() { wait(warps[warp()]); }

// Shows words to the warp and returns everybody's; call `seen` when done with them.
inline u64 (*show(const u64* words, int count))[8] {
    for (int i = 0; i < count; ++i) slots[warp()][lane()][i] = words[i];
    sync_warp();
    return slots[warp()];
}
inline void seen() { sync_warp(); }

inline u64 from_lane(u64 x, int source) {
    const u64 y = show(&x, 1)[source & 31][0];
    seen();
    return y;
}

template <class T>
T shuffle(T x, int source) {
    u64 bits = 0;
    memcpy(&bits, &x, sizeof x);
    bits = from_lane(bits, source);
    memcpy(&x, &bits, sizeof x);
    return x;
}

}  // namespace emulator

#define threadIdx (emulator::current->thread)
#define blockIdx emulator::block_index
#define gridDim emulator::grid_size

template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }

DEVICE void __syncthreads() { emulator::wait(emulator::block); }
DEVICE void __syncwarp() { emulator::sync_warp(); }
DEVICE void __threadfence() {}
template <class T> T __shfl_sync(u32, T x, int source) { return emulator::shuffle(x, source); }
template <class T> T __shfl_xor_sync(u32, T x, int mask) { return emulator::shuffle(x, emulator::lane() ^ mask); }
template <class T> T __shfl_up_sync(u32, T x, int by) {
    return emulator::shuffle(x, emulator::lane() < by ? emulator::lane() : emulator::lane() - by);
}
DEVICE u32 __ballot_sync(u32, bool x) {
    const u64 word = x;
    const auto all = emulator::show(&word, 1);
    u32 bits = 0;
    for (int i = 0; i < 32; ++i) bits |= static_cast<u32>(all[i][0]) << i;
    emulator::seen();
    return bits;
}
DEVICE bool __any_sync(u32 mask, bool x) { return __ballot_sync(mask, x) != 0; }
DEVICE int __ffs(u32 x) { return __builtin_ffs(static_cast<int>(x)); }
DEVICE int atomicAdd(int* to, int x) { return (*to += x) - x; }

DEVICE float __uint_as_float(u32 x) { float y; memcpy(&y, &x, 4); return y; }
DEVICE u32 __float_as_uint(float x) { u32 y; memcpy(&y, &x, 4); return y; }
DEVICE float __int_as_float(u32 x) { return __uint_as_float(x); }
DEVICE float __fadd_rn(float a, float b) { return a + b; }
DEVICE float __fsub_rn(float a, float b) { return a - b; }
DEVICE float __fmul_rn(float a, float b) { return a * b; }
DEVICE float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
DEVICE float __frcp_rn(float x) { return 1.0f / x; }
DEVICE u32 __funnelshift_r(u32 low, u32 high, u32 by) {
    return static_cast<u32>((static_cast<u64>(high) << 32 | low) >> (by & 31));
}
DEVICE u32 __funnelshift_rc(u32 low, u32 high, u32 by) { return by < 32 ? __funnelshift_r(low, high, by) : high; }
DEVICE int __popc(u32 x) { return __builtin_popcount(x); }
DEVICE u32 __byte_perm(u32 a, u32 b, u32 selector) {
    const u64 bytes = a | static_cast<u64>(b) << 32;
    u32 y = 0;
    for (int i = 0; i < 4; ++i) {
        const u32 pick = selector >> 4 * i & 15, byte = static_cast<u32>(bytes >> 8 * (pick & 7)) & 255;
        y |= (pick & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * i;
    }
    return y;
}

DEVICE u16 to_bfloat(float x) {
    const u32 bits = __float_as_uint(x);
    return x != x ? 0x7fff : static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

DEVICE float from_half(u16 x) {
    const int exponent = x >> 10 & 31, mantissa = x & 1023;
    const float size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                       : exponent     ? ldexpf(1024 + mantissa, exponent - 25)
                                      : ldexpf(mantissa, -24);
    return x & 0x8000 ? -size : size;
}

DEVICE u16 to_half(float x) {
    const u16 sign = static_cast<u16>(__float_as_uint(x) >> 16 & 0x8000);
    x = fabsf(x);
    if (x != x) return 0x7fff;
    if (x == 0) return sign;
    if (x >= 65520.0f) return sign | 0x7c00;
    int exponent;
    frexpf(x, &exponent);  // x is in [2^(exponent - 1), 2^exponent).
    const int step = max(exponent, -13) - 11;
    const int steps = static_cast<int>(nearbyintf(ldexpf(x, -step)));  // At most 2048; ties to even.
    return sign | static_cast<u16>(steps + ((step + 24) << 10));  // A number of 2048 steps carries into the exponent.
}

DEVICE u32 pack_half2(float low, float high) { return to_half(low) | static_cast<u32>(to_half(high)) << 16; }
DEVICE u32 pack_bfloat2(float low, float high) { return to_bfloat(low) | static_cast<u32>(to_bfloat(high)) << 16; }
DEVICE u32 fma_bfloat2(u32 a, u32 b, u32 c) {
    const auto part = [](u32 x, int i) { return __uint_as_float((x >> 16 * i) << 16); };
    return pack_bfloat2(fmaf(part(a, 0), part(b, 0), part(c, 0)), fmaf(part(a, 1), part(b, 1), part(c, 1)));
}
DEVICE u16 add_bfloats(u32 pair) { return to_bfloat(__uint_as_float(pair << 16) + __uint_as_float(pair & 0xffff0000)); }
DEVICE u32 fma_half2(u32 a, u32 b, u32 c) {
    const auto part = [](u32 x, int i) { return from_half(static_cast<u16>(x >> 16 * i)); };
    return pack_half2(fmaf(part(a, 0), part(b, 0), part(c, 0)), fmaf(part(a, 1), part(b, 1), part(c, 1)));
}
DEVICE float exp2_fast(float x) { return exp2f(x); }
DEVICE float reciprocal(float x) { return 1.0f / x; }
DEVICE u32 and_or(u32 a, u32 mask, u32 b) { return (a & mask) | b; }
DEVICE u32 and_xor(u32 a, u32 mask, u32 b) { return (a & mask) ^ b; }
DEVICE u32 permute_bytes(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }
DEVICE u32 select_bits(u32 mask, u32 a, u32 b) { return (a & mask) | (b & ~mask); }

// mma.m16n8k16: lane 4g + t holds of A rows g, g + 8 and columns 2t, 2t + 1, 2t + 8, 2t + 9; of B those rows of column
// g; of C rows g, g + 8 and columns 2t, 2t + 1 (PTX ISA).
template <class Convert>
void emulated_mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, Convert convert) {
    const u64 words[3] = {a[0] | static_cast<u64>(a[1]) << 32, a[2] | static_cast<u64>(a[3]) << 32,
                          b0 | static_cast<u64>(b1) << 32};
    const auto all = emulator::show(words, 3);
    const int g = emulator::lane() / 4, t = emulator::lane() % 4;
    for (int i = 0; i < 4; ++i) {
        const int row_half = i / 2, column = 2 * t + i % 2;
        float sum = c[i];
        for (int k = 0; k < 16; ++k) {
            const u32 left = static_cast<u32>(all[4 * g + k % 8 / 2][k / 8] >> 32 * row_half);
            const u32 right = static_cast<u32>(all[4 * column + k % 8 / 2][2] >> 32 * (k / 8));
            sum += convert(static_cast<u16>(left >> 16 * (k % 2))) * convert(static_cast<u16>(right >> 16 * (k % 2)));
        }
        c[i] = sum;
    }
    emulator::seen();
}
DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    static float table[1 << 16];
    static bool filled = false;
    if (!filled) {
        for (int i = 0; i < 1 << 16; ++i) table[i] = from_half(static_cast<u16>(i));
        filled = true;
    }
    emulated_mma(c, a, b0, b1, [](u16 x) { return table[x]; });
}
DEVICE void mma_bfloat(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    emulated_mma(c, a, b0, b1, [](u16 x) { return __uint_as_float(static_cast<u32>(x) << 16); });
}

// mma.sp.m16n8k32 (PTX ISA): lane 4g + t holds of A two of each four columns, those of columns 4t to 4t + 3 and 4t + 16 to
// 4t + 19 of rows g, g + 8, g (the second), g + 8 (the second); of B rows 2t, 2t + 1 and these plus 8, 16, 24 of column g;
// of C what m16n8k16 has. Metadata are indices of 2 bits: of the lanes that the selector picks, 2 * selector and the one
// behind in each four, the first has columns 0 to 15 and the second 16 to 31, row g in the lower half, g + 8 in the upper.
template <class Convert>
void emulated_mma_sparse(float (&c)[4], const u32 (&a)[4], const u32 (&b)[4], u32 metadata, int selector, Convert convert) {
    const u64 words[5] = {a[0] | static_cast<u64>(a[1]) << 32, a[2] | static_cast<u64>(a[3]) << 32,
                          b[0] | static_cast<u64>(b[1]) << 32, b[2] | static_cast<u64>(b[3]) << 32, metadata};
    const auto all = emulator::show(words, 5);
    const int g = emulator::lane() / 4, t = emulator::lane() % 4;
    for (int i = 0; i < 4; ++i) {
        const int row_half = i / 2, column = 2 * t + i % 2;
        float dense[32] = {}, sum = c[i];
        for (int four = 0; four < 8; ++four) {
            const u32 of_lane = static_cast<u32>(all[4 * g + 2 * selector + four / 4][4]) >> 16 * row_half;
            const int first = of_lane >> 4 * (four % 4) & 3, second = of_lane >> 4 * (four % 4) + 2 & 3;
            const u32 pair = static_cast<u32>(all[4 * g + four % 4][four / 4] >> 32 * row_half);
            // Indices that do not rise are undefined.
            const float poison = first < second ? 0.0f : NAN;
            dense[4 * four + first] = convert(static_cast<u16>(pair)) + poison;
            dense[4 * four + second] = convert(static_cast<u16>(pair >> 16)) + poison;
        }
        for (int k = 0; k < 32; ++k) {
            const u32 pair = static_cast<u32>(all[4 * column + k % 8 / 2][2 + k / 16] >> 32 * (k / 8 % 2));
            sum += dense[k] * convert(static_cast<u16>(pair >> 16 * (k % 2)));
        }
        c[i] = sum;
    }
    emulator::seen();
}
template <int PAIR>
void mma_sparse(float (&c)[4], const u32 (&a)[4], const u32 (&b)[4], u32 places) {
    emulated_mma_sparse(c, a, b, places, PAIR, [](u16 x) { return from_half(x); });
}
template <int PAIR>
void mma_sparse_bfloat(float (&c)[4], const u32 (&a)[4], const u32 (&b)[4], u32 places) {
    emulated_mma_sparse(c, a, b, places, PAIR, [](u16 x) { return __uint_as_float(static_cast<u32>(x) << 16); });
}
// ldmatrix.x4: lane 8i + j has the address of row j of matrix i; of each matrix lane 4g + t gets columns 2t, 2t + 1 of row g.
DEVICE void load_matrices(u32 (&y)[4], const void* row) {
    const u64 address = reinterpret_cast<u64>(row);
    if (address % 16) emulator::wait_in_vain();
    const auto all = emulator::show(&address, 1);
    for (int i = 0; i < 4; ++i) {
        y[i] = reinterpret_cast<const u32*>(all[8 * i + emulator::lane() / 4][0])[emulator::lane() % 4];
    }
    emulator::seen();
}
// Lane 4g + t holds columns 2t and 2t + 1 of row g.
DEVICE u32 transpose(u32 x) {
    const u64 word = x;
    const auto all = emulator::show(&word, 1);
    const int g = emulator::lane() / 4, t = emulator::lane() % 4;
    const auto at = [&](int row, int column) { return static_cast<u32>(all[4 * row + column / 2][0] >> 16 * (column % 2)) & 0xffff; };
    const u32 y = at(2 * t, g) | at(2 * t + 1, g) << 16;
    emulator::seen();
    return y;
}

template <class T> T load_constant(const T* p) { return *p; }
template <class T> T load_l2(const T* p) { return *p; }
DEVICE int arrive(int* count) { return (*count)++; }
DEVICE u64 evict_first() { return 0; }

// Addresses in shared memory count from its start.
DEVICE u32 shared_address(const void* p) { return static_cast<u32>(static_cast<const u8*>(p) - shared); }
DEVICE u32 load_shared(u32 address) { return *reinterpret_cast<const u32*>(shared + address); }
DEVICE void barrier_init(u32 barrier) { emulator::transfers[barrier] = {}; }
DEVICE void barrier_expect(u32 barrier, u32 bytes) { emulator::transfers[barrier].expected += bytes; }
DEVICE void bulk_copy(u32 to, const void* from, u32 bytes, u32 barrier, u64) {
    emulator::transfers[barrier].copies.push_back({shared + to, from, bytes});
}
// Bulk copies are done once they are waited for. If they are not of the bytes expected, the wait never ends.
DEVICE void barrier_wait(u32 barrier, u32 phase) {
    emulator::Transfers& t = emulator::transfers[barrier];
    if (t.phases % 2 != phase) return;
    u32 bytes = 0;
    for (const auto& copy : t.copies) bytes += copy.bytes;
    if (!bytes || bytes != t.expected) emulator::wait_in_vain();
    for (const auto& copy : t.copies) memcpy(copy.to, copy.from, copy.bytes);
    t.copies.clear(), t.expected = 0, ++t.phases;
}
DEVICE void fence_bulk() {}
DEVICE void copy_16(u32 to, const void* from, u64) { memcpy(shared + to, from, 16); }
DEVICE void copy_commit() {}
template <int PENDING> void copy_wait() {}
// These copies are done no sooner than they are waited for, so that who forgets to wait finds nothing.
DEVICE void fetch_16(void* to, const void* from) { emulator::current->fetches.push_back({to, from, 16}); }
DEVICE void fetch_4(void* to, const void* from) { emulator::current->fetches.push_back({to, from, 4}); }
DEVICE void fetch_16_or_zeros(u32 to, const void* from, bool read) {
    memset(shared + to, 0, 16);
    if (read) memcpy(shared + to, from, 16);
}
DEVICE void fetches_done() {
    for (const auto& copy : emulator::current->fetches) memcpy(copy.to, copy.from, copy.bytes);
    emulator::current->fetches.clear();
}
DEVICE void wait_for_previous_kernel() {}
DEVICE void let_next_kernel_start() {}
