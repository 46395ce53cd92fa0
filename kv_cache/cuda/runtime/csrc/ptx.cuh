// The few PTX instructions that the kernels use. No CUDA header is included, so that NVRTC needs none installed. The
// tests run the kernels on a CPU too, with EMULATED defined and the same functions in plain C++.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#ifdef EMULATED
#include <emulated_ptx.h>
#else
#define DEVICE __device__ __forceinline__
#define SHARED __shared__
#define DYNAMIC_SHARED extern __shared__
#endif

#define NEG_INF __int_as_float(0xff800000)
constexpr u32 ALL_LANES = 0xffffffffu;

#ifndef EMULATED
DEVICE u32 shared_address(const void* pointer) { return static_cast<u32>(__cvta_generic_to_shared(pointer)); }

// A load of what the block has written once and for all, behind a barrier. The address is computed as it is written:
// of a pointer, the compiler may take apart what was added before.
DEVICE u32 load_shared(u32 address) {
    u32 v;
    asm("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
    return v;
}

// c += a * b on the tensor cores: a is 16 x 16, b is 16 x 8, both float16; c is 16 x 8 float32.
DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same of bfloat16 operands.
DEVICE void mma_bfloat(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c += a * b on the tensor cores' sparse side: a is 16 x 32, of which each row holds two of every four neighbours, b is
// 32 x 8, both float16; c is 16 x 8 float32. `places` are a nibble for each four, the first one's place in the lower two
// bits and the second's, which is larger, above: lane 4 g + 2 * PAIR has those of columns 0 to 15, row g below row g + 8,
// and the lane after it those of columns 16 to 31.
template <int PAIR>
DEVICE void mma_sparse(float (&c)[4], const u32 (&a)[4], const u32 (&b)[4], u32 places) {
    asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, %13;"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(places), "n"(PAIR));
}

// The same of bfloat16 operands.
template <int PAIR>
DEVICE void mma_sparse_bfloat(float (&c)[4], const u32 (&a)[4], const u32 (&b)[4], u32 places) {
    asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, %13;"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(places), "n"(PAIR));
}

// Loads four 8 x 8 matrices of 16-bit elements from shared memory: `row` is where lane 8 i + j finds row j of matrix i, 16
// bytes, and of matrix i lane 4 g + t gets elements 2 t and 2 t + 1 of row g.
DEVICE void load_matrices(u32 (&y)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(y[0]), "=r"(y[1]), "=r"(y[2]), "=r"(y[3]) : "r"(shared_address(row)));
}

// Transpose an 8 x 8 matrix of 16-bit elements held by the warp, one row to each four lanes.
DEVICE u32 transpose(u32 x) {
    u32 y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

DEVICE u32 pack_half2(float low, float high) {
    u32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

DEVICE u32 pack_bfloat2(float low, float high) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

// a * b + c of pairs of bfloat16.
DEVICE u32 fma_bfloat2(u32 a, u32 b, u32 c) {
    u32 y;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
    return y;
}

// The sum of a pair of bfloat16, rounded to bfloat16.
DEVICE u16 add_bfloats(u32 pair) {
    u16 y;
    asm("{.reg .b16 low, high, one;\nmov.b32 {low, high}, %1;\nmov.b16 one, 0x3f80;\nfma.rn.bf16 %0, low, one, high;\n}"
        : "=h"(y) : "r"(pair));
    return y;
}

// The same of float16.
DEVICE u32 fma_half2(u32 a, u32 b, u32 c) {
    u32 y;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
    return y;
}

DEVICE u16 to_half(float x) {
    u16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

DEVICE u16 to_bfloat(float x) {
    u16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

DEVICE float from_half(u16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// (a & mask) | b in one instruction.
DEVICE u32 and_or(u32 a, u32 mask, u32 b) {
    u32 y;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(a), "r"(mask), "r"(b));
    return y;
}

// (a & mask) | (b & ~mask) in one instruction.
DEVICE u32 select_bits(u32 mask, u32 a, u32 b) {
    u32 y;
    asm("lop3.b32 %0, %1, %2, %3, 0xe4;" : "=r"(y) : "r"(a), "r"(b), "r"(mask));
    return y;
}

// (a & mask) ^ b in one instruction.
DEVICE u32 and_xor(u32 a, u32 mask, u32 b) {
    u32 y;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(y) : "r"(a), "r"(mask), "r"(b));
    return y;
}

// Four of the bytes of a and b, by the selector's nibbles: 0 to 7 a byte, 8 to 15 eight times the highest bit of one.
DEVICE u32 permute_bytes(u32 a, u32 b, u32 selector) {
    u32 y;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(selector));
    return y;
}

// A load of what no kernel writes while a model runs: the compiler may move it past stores and waits.
DEVICE float load_constant(const float* p) {
    float v;
    asm("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"(p));
    return v;
}

DEVICE float2 load_constant(const float2* p) {
    float2 v;
    asm("ld.global.nc.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(p));
    return v;
}

DEVICE float4 load_constant(const float4* p) {
    float4 v;
    asm("ld.global.nc.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p));
    return v;
}

DEVICE uint2 load_constant(const uint2* p) {
    uint2 v;
    asm("ld.global.nc.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}

DEVICE uint4 load_constant(const uint4* p) {
    uint4 v;
    asm("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

// Loads past L1, whose lines may be older than what another block has written.
DEVICE float4 load_l2(const float4* p) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p));
    return v;
}

DEVICE float2 load_l2(const float2* p) {
    float2 v;
    asm volatile("ld.global.cg.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(p));
    return v;
}

DEVICE u16 load_l2(const u16* p) {
    u16 v;
    asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(v) : "l"(p));
    return v;
}

// Counts one more and returns the count before. What the block wrote before a barrier is there for those who see the count.
DEVICE int arrive(int* count) {
    int before;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(before) : "l"(count) : "memory");
    return before;
}

// Codes are read once: let them leave the L2 cache first.
DEVICE u64 evict_first() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

#if BULK_COPY
// Hopper's bulk copies: one lane asks for a range, and a barrier in shared memory counts its bytes in.
DEVICE void barrier_init(u32 barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}

DEVICE void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

DEVICE void barrier_wait(u32 barrier, u32 phase) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(barrier),
        "r"(phase)
        : "memory");
}

DEVICE void bulk_copy(u32 to, const void* from, u32 bytes, u32 barrier, u64 policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
        ::"r"(to), "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier), "l"(policy)
        : "memory");
}

// Orders this thread's ordinary accesses to shared memory before bulk copies into it that follow the next barrier.
DEVICE void fence_bulk() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#else
DEVICE void copy_16(u32 to, const void* from, u64 policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;"
                 ::"r"(to), "l"(__cvta_generic_to_global(from)), "l"(policy) : "memory");
}

DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }
#endif

// 16 bytes into shared memory; they are there for this thread after fetches_done.
DEVICE void fetch_16(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                 ::"r"(shared_address(to)), "l"(__cvta_generic_to_global(from)) : "memory");
}

// The same with 4 bytes.
DEVICE void fetch_4(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;"
                 ::"r"(shared_address(to)), "l"(__cvta_generic_to_global(from)) : "memory");
}

// The first to an address in shared memory, or 16 bytes of zeros; a copy of those before copy_commit.
DEVICE void fetch_16_or_zeros(u32 to, const void* from, bool read) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 ::"r"(to), "l"(__cvta_generic_to_global(from)), "r"(read ? 16 : 0) : "memory");
}

DEVICE void fetches_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Programmatic dependent launch (sm_90): wait for the kernel before this one; let the next one start.
DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
#endif

DEVICE float from_bfloat(u16 x) { return __uint_as_float(static_cast<u32>(x) << 16); }

// Two numbers as the sum of two pairs of bfloat16: 16 bits of each. Infinity and NaN stay what they are.
DEVICE void split_bfloat2(float low, float high, u32& head, u32& tail) {
    head = pack_bfloat2(low, high);
    const auto finite = [](float x) { return fabsf(x) < __int_as_float(0x7f800000) ? x : 0.0f; };
    tail = pack_bfloat2(finite(low - __uint_as_float(head << 16)), finite(high - __uint_as_float(head & 0xffff0000u)));
}
