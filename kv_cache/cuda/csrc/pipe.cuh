// One warp's ring of tiles in shared memory, filled by asynchronous copies from the pages STAGES tiles ahead, also
// beyond the end of a piece. A warp fills and empties its own ring, so warps never wait for each other.
#pragma once
#include "work.cuh"

constexpr int TILE_BYTES = UNITS * UNIT_BYTES;
constexpr int RING_BYTES = STAGES * TILE_BYTES;

class Pipe {
public:
    // `walk` is in shared memory, this warp's alone: it is touched once a piece.
    DEVICE Pipe(const Params& params, const Cut& cut, Walk* walk, u8* ring, u64* barriers)
        : p(params), cut(cut), walk(walk), ring(ring), lane(threadIdx.x % 32), policy(evict_first()) {
#if BULK_COPY
        barrier = shared_address(barriers);
        if (lane == 0) {
            for (int i = 0; i < STAGES; ++i) barrier_init(barrier + 8 * i);
            fence_bulk();
        }
        __syncwarp();
#endif
#pragma unroll 1
        for (int i = 0; i < STAGES; ++i) issue(i);
    }

    // Wait for the oldest tile.
    DEVICE const u8* wait() {
#if BULK_COPY
        barrier_wait(barrier + 8 * stage, phase);
#else
        copy_wait<STAGES - 1>();
        __syncwarp();
#endif
        return ring + stage * TILE_BYTES;
    }

    // The warp is done with the oldest tile: read another into its place.
    DEVICE void release() {
        __syncwarp();
        issue(stage);
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }

private:
    // Read the next tile, if there is one, into a slot of the ring.
    DEVICE void issue(int slot) {
        if (next < stop || next_piece()) {
            // The query's own tokens may just have been written by the kernel before.
            if ((next + 1) * TILE > fresh) wait_for_previous_kernel();
            const int units = min(UNITS, div_up(tokens - next * TILE, UNIT));
#if BULK_COPY
            if (lane == 0) barrier_expect(barrier + 8 * slot, units * UNIT_BYTES);
#endif
            const u32 to = shared_address(ring + slot * TILE_BYTES);
#pragma unroll
            for (int u = 0; u < UNITS; ++u) {
                if (u < units) copy_unit(next * UNITS + u, to + u * UNIT_BYTES, slot);
            }
            ++next;
        }
#if !BULK_COPY
        copy_commit();
#endif
    }

    // Turn to the next piece of which this warp has a tile; false if there is none.
    DEVICE bool next_piece() {
        const int warp = threadIdx.x / 32;
        Walk w = *walk;
        Piece piece;
        bool there;
        while ((there = w.next(p, cut, piece))) {
            next = warp_begin(piece, warp), stop = warp_begin(piece, warp + 1);
            if (next < stop) break;
        }
        __syncwarp();
        if (lane == 0) *walk = w;
        __syncwarp();
        if (!there) return false;
        table = p.block_table + piece.request * p.table_stride;
        pages = p.cache + piece.head * p.head_stride;
        tokens = piece.length, fresh = piece.length - piece.query;
        page_base = next * TILE / BLOCK_SIZE;
        page_count = div_up(min(tokens, stop * TILE), BLOCK_SIZE);
        ids = page_id(page_base + lane), next_ids = page_id(page_base + 32 + lane);
        return true;
    }

    DEVICE int page_id(int page) const { return page < page_count ? table[page] : 0; }

    DEVICE void copy_unit(int unit, u32 to, int slot) {
        const int page = unit * UNIT / BLOCK_SIZE;
        if (page >= page_base + 32) {
            page_base += 32;
            ids = next_ids, next_ids = page_id(page_base + 32 + lane);
        }
        const u8* from = pages + __shfl_sync(ALL_LANES, ids, page - page_base) * p.block_stride;
        const int row = unit * UNIT % BLOCK_SIZE;  // The unit's first token in the page.
#if BULK_COPY
        if (lane == 0) {
            if constexpr (BLOCK_SIZE == UNIT) {
                bulk_copy(to, from, UNIT_BYTES, barrier + 8 * slot, policy);
            } else {
                int offset = 0;
#pragma unroll
                for (const int row_bytes : PLANE_ROWS) {
                    const u8* plane = from + offset * (BLOCK_SIZE / UNIT) + row_bytes * row;
                    if (row_bytes) bulk_copy(to + offset, plane, row_bytes * UNIT, barrier + 8 * slot, policy);
                    offset += row_bytes * UNIT;
                }
            }
        }
#else
#pragma unroll
        for (int base = 0; base < UNIT_BYTES; base += 512) {
            const int at = base + lane * 16;
            if (at >= UNIT_BYTES) break;
            int source = at;
            if constexpr (BLOCK_SIZE != UNIT) {
                int offset = 0;
#pragma unroll
                for (const int row_bytes : PLANE_ROWS) {
                    const bool inside = at >= offset && at < offset + row_bytes * UNIT;
                    if (inside) source = offset * (BLOCK_SIZE / UNIT) + row_bytes * row + at - offset;
                    offset += row_bytes * UNIT;
                }
            }
            copy_16(to + at, from + source, policy);
        }
#endif
    }

    const Params& p;
    const Cut& cut;
    Walk* walk;
    u8* ring;
    int lane;
    u64 policy;
    u32 barrier = 0;
    int stage = 0;
    u32 phase = 0;
    const int* table = nullptr;
    const u8* pages = nullptr;
    int tokens = 0, fresh = 0, next = 0, stop = 0;
    int page_base = 0, page_count = 0;  // `ids` are the blocks of pages page_base + lane.
    int ids = 0, next_ids = 0;
};
