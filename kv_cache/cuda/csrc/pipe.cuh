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
        : p(params), cut(cut), walk(walk), tiles(ring), ring(shared_address(ring)), lane(threadIdx.x % 32),
          policy(evict_first()) {
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
        return tiles + stage * TILE_BYTES;
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
            const int token = next * TILE;
            // The query's own tokens may just have been written by the kernel before.
            if (token + TILE > fresh) wait_for_previous_kernel();
            if (page_of(token) >= page_base + 32) {
                page_base += 32;
                ids = next_ids, next_ids = page_id(page_base + 32 + lane);
            }
            copy(token, min(UNITS, div_up(tokens - token, UNIT)), ring + slot * TILE_BYTES, slot);
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
        page_base = page_of(next * TILE);
        page_count = div_up(min(tokens, stop * TILE), BLOCK_SIZE);
        ids = page_id(page_base + lane), next_ids = page_id(page_base + 32 + lane);
        return true;
    }

    DEVICE int page_id(int page) const { return page < page_count ? table[page] : 0; }

    static DEVICE u32 page_of(u32 token) { return token / BLOCK_SIZE; }

    // A token's page, one token to each lane; tokens are of the 32 pages from page_base on, or of a tile that goes
    // beyond.
    DEVICE const u8* page_at(u32 token) const {
        const u32 index = page_of(token) - page_base;
        int id = __shfl_sync(ALL_LANES, ids, index % 32);
        if constexpr (TILE % BLOCK_SIZE && BLOCK_SIZE % TILE) {
            const int beyond = __shfl_sync(ALL_LANES, next_ids, index % 32);
            if (index >= 32) id = beyond;
        }
        return pages + id * p.block_stride;
    }

    // Copy the units from a token on.
#if BULK_COPY
    DEVICE void copy(u32 token, int units, u32 to, int slot) {
        token += lane * UNIT;  // Each lane has a unit to copy, if there are so many.
        const u8* from = page_at(token);
        const u32 done = barrier + 8 * slot, row = token % BLOCK_SIZE;  // The unit's first token in the page.
        if (lane == 0) barrier_expect(done, units * UNIT_BYTES);
        if (lane >= units) return;
        to += lane * UNIT_BYTES;
        if constexpr (BLOCK_SIZE == UNIT) {
            bulk_copy(to, from, UNIT_BYTES, done, policy);
        } else {
            int offset = 0;
#pragma unroll
            for (const int row_bytes : PLANE_ROWS) {
                const u8* plane = from + offset * (BLOCK_SIZE / UNIT) + row_bytes * row;
                if (row_bytes) bulk_copy(to + offset, plane, row_bytes * UNIT, done, policy);
                offset += row_bytes * UNIT;
            }
        }
    }
#else
    DEVICE void copy(u32 token, int units, u32 to, int) {
#pragma unroll
        for (int u = 0; u < UNITS; ++u) {
            if (u >= units) break;
            const u8* from = page_at(token + u * UNIT);
            const u32 row = (token + u * UNIT) % BLOCK_SIZE;
#pragma unroll
            for (int base = 0; base < UNIT_BYTES; base += 512) {
                const int at = base + lane * 16;
                if (at >= UNIT_BYTES) break;
                int source = at, offset = 0;
#pragma unroll
                for (const int row_bytes : PLANE_ROWS) {
                    const bool inside = at >= offset && at < offset + row_bytes * UNIT;
                    if (inside) source = offset * (BLOCK_SIZE / UNIT) + row_bytes * row + at - offset;
                    offset += row_bytes * UNIT;
                }
                copy_16(to + u * UNIT_BYTES + at, from + source, policy);
            }
        }
    }
#endif

    const Params& p;
    const Cut& cut;
    Walk* walk;
    const u8* tiles;
    u32 ring;
    int lane;
    u64 policy;
    u32 barrier = 0;
    int stage = 0;
    u32 phase = 0;
    const int* table = nullptr;
    const u8* pages = nullptr;
    int tokens = 0, fresh = 0, next = 0, stop = 0;
    int page_count = 0;
    u32 page_base = 0;
    int ids = 0, next_ids = 0;  // The blocks of pages page_base + lane, and of the 32 pages after them.
};
