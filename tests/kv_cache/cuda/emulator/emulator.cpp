// Runs one kernel: compiled with KERNEL_SOURCE, the file, and KERNEL, its name. See emulated_ptx.h.
#include KERNEL_SOURCE

alignas(128) u8 shared[256 << 10];

namespace emulator {
Fiber fibers[MAX_THREADS];
Fiber* current;
Barrier block, warps[MAX_THREADS / 32];
u64 slots[MAX_THREADS / 32][32][8];
jmp_buf scheduler;
std::map<u32, Transfers> transfers;
uint3 block_index, grid_size;

const Params* arguments;

void run() {
    KERNEL(*arguments);
    current->done = true;
    for (Barrier* barrier : {&block, &warps[warp()]}) {
        --barrier->members;
        if (barrier->members) barrier->release();
    }
    _longjmp(scheduler, 1);
}

void resume(Fiber& fiber) {
    current = &fiber;
    fiber.waits = nullptr;
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.at, 1);
    fiber.started = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack, fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run, 0);
    setcontext(&fiber.context);
}

bool can_run(const Fiber& f) { return !f.done && (!f.waits || *f.waits != f.until); }

// Returns false if threads wait in vain, or end before their copies.
bool run_block(int threads) {
    block = Barrier{threads};
    transfers.clear();
    for (int w = 0; w < (threads + 31) / 32; ++w) warps[w] = Barrier{min(32, threads - 32 * w)};
    for (int i = 0; i < threads; ++i) {
        Fiber& f = fibers[i];
        if (!f.stack) f.stack = static_cast<char*>(malloc(STACK));
        f.started = f.done = false, f.waits = nullptr, f.thread = {static_cast<unsigned>(i), 0, 0};
        f.fetches.clear();
    }
    for (bool moved = true; moved;) {
        moved = false;
        for (int w = 0; w < threads; w += 32) {
            for (bool again = true; again;) {
                again = false;
                for (int i = w; i < min(w + 32, threads); ++i) {
                    if (can_run(fibers[i])) resume(fibers[i]), again = moved = true;
                }
            }
        }
    }
    for (int i = 0; i < threads; ++i) {
        if (!fibers[i].done || !fibers[i].fetches.empty()) return false;
    }
    return true;
}

}  // namespace emulator

extern "C" int emulate(const void* params, unsigned x, unsigned y, unsigned z, int threads) {
    using namespace emulator;
    arguments = static_cast<const Params*>(params);
    grid_size = {x, y, z};
    for (block_index.z = 0; block_index.z < z; ++block_index.z) {
        for (block_index.y = 0; block_index.y < y; ++block_index.y) {
            for (block_index.x = 0; block_index.x < x; ++block_index.x) {
                memset(shared, 0xff, sizeof shared);
                if (!run_block(threads)) return 1;
            }
        }
    }
    return 0;
}
