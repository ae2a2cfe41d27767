// Which thread runs next, how a block starts and ends, and how a grid is spread over the host's cores.
#include <atomic>
#include <cerrno>

#include "block.h"
#include "device.h"
#include "memory.h"
#include "workers.h"

namespace mmpo {
inline namespace MMPO_VARIANT {
namespace emulated {

__thread ThreadView* current_thread = nullptr;
__thread BlockView* current_block = nullptr;
__thread Block* running = nullptr;

namespace {

int lowest_lane(uint32_t mask) { return __builtin_ctz(mask); }

// The first set bit after `position`, wrapping round.
int next_bit(uint32_t mask, uint32_t position) {
    const uint32_t after = position >= 31 ? 0 : mask & (kAllLanes << (position + 1));
    return lowest_lane(after != 0 ? after : mask);
}

int random_bit(Block& block, uint32_t mask) {
    for (uint32_t skip = uint32_t(block.random() % uint32_t(__builtin_popcount(mask))); skip != 0; --skip)
        mask &= mask - 1;
    return lowest_lane(mask);
}

// The next thread to run, after letting the asynchronous units work if all wait; null when all have exited.
Thread* pick_next() {
    Block& block = *running;
    for (;;) {
        if (options.async == MMPO_EMULATOR_ASYNC_RANDOM && !block.loads.empty() && block.random() % 8 == 0)
            land_one_load();
        if (options.schedule == MMPO_EMULATOR_SCHEDULE_RANDOM && block.runnable_warps != 0) {
            Warp& warp = block.warps[size_t(random_bit(block, block.runnable_warps))];
            return warp.threads[random_bit(block, warp.runnable)];
        }
        Warp& warp = block.warps[block.current_warp];
        if (warp.runnable != 0)
            return warp.threads[next_bit(warp.runnable, current_thread != nullptr ? current_thread->lane : 31)];
        if (block.runnable_warps != 0) {
            Warp& next = block.warps[size_t(next_bit(block.runnable_warps, block.current_warp))];
            return next.threads[lowest_lane(next.runnable)];
        }
        if (!block.loads.empty()) {
            land_one_load();
            continue;
        }
        if (block.live == 0) return nullptr;
        if (block.turn_waiters.empty() || !await_turns()) report_deadlock();
    }
}

void run_thread(Thread& next) {
    Thread& previous = self();
    if (&next == &previous) return;
    current_thread = &next;
    running->current_warp = next.warp;
    ++running->counters.switches;
    switch_context(previous.context, next.context);
}

void make_idle(Thread& thread) {
    Warp& warp = running->warps[thread.warp];
    warp.runnable &= ~(1u << thread.lane);
    if (warp.runnable == 0) running->runnable_warps &= ~(1u << thread.warp);
}

// First and last function of every emulated thread.
void thread_main() {
    running->entry(running->arguments);
    Thread& thread = self();
    check_thread_exit(thread);
    running->warps[thread.warp].alive &= ~(1u << thread.lane);
    make_idle(thread);
    --running->live;
    if (running->live != 0) check_barrier_after_exit();
    if (Thread* next = pick_next()) run_thread(*next);
    leave_block();
}

void reset_thread(Block& block, uint32_t linear) {
    Thread& thread = block.pool[linear];
    const dim3 size = block.threads;
    thread.index = {linear % size.x, linear / size.x % size.y, linear / size.x / size.y};
    thread.linear = linear;
    thread.lane = linear % 32;
    thread.warp = linear / 32;
    thread.wait = {};
    thread.copies.clear();
    thread.stores.clear();
    thread.wgmma.issued = thread.wgmma.waited = 0;
    thread.wgmma.groups.clear();
    thread.wgmma.fenced = false;
    if (kChecked) {
        thread.clock.reset(block.units());
        thread.clock.seen[linear] = 1;
        thread.visits.clear();
        thread.wgmma.watched.clear();
    }
    thread.context = make_context(block.stacks.top(linear), &thread_main);
    Warp& warp = block.warps[thread.warp];
    warp.threads[thread.lane] = &thread;
    warp.alive |= 1u << thread.lane;
    warp.runnable |= 1u << thread.lane;
    block.runnable_warps |= 1u << thread.warp;
}

void reset_block(Block& block, uint64_t index) {
    block.index = {unsigned(index % block.blocks.x), unsigned(index / block.blocks.x % block.blocks.y),
                   unsigned(index / block.blocks.x / block.blocks.y)};
    block.random_state = (options.seed + 1) * 0x9e3779b97f4a7c15ull + index * 0xda942042e4dd58b5ull + 1;
    block.number = uint32_t(index);
    block.failed = block.uses_global_atomics = false;
    block.live = block.thread_count;
    block.runnable_warps = block.current_warp = 0;
    block.warps.assign(block.warp_count, Warp());
    for (NamedBarrier& barrier : block.barriers) barrier = {};
    block.mbarrier_waiters.clear();
    block.turn_waiters.clear();
    block.loads.clear();
    block.warpgroups.assign((block.thread_count + kWarpgroup - 1) / kWarpgroup, Warpgroup());
    // Bytes never written read as NaN.
    memset(block.shared, kFreshByte, block.dynamic_bytes);
    block.shared_end = (block.dynamic_bytes + 127) / 128 * 128;
    block.static_arrays.clear();
    if (kChecked) {
        block.shadow.reset(block.dynamic_bytes);
        block.mbarrier_clocks.clear();
        block.traces.assign(block.warp_count, {});
    }
    for (uint32_t i = 0; i < block.thread_count; ++i) reset_thread(block, i);
}

void run_block(Block& block, uint64_t index) {
    reset_block(block, index);
    running = &block;
    current_block = &block;
    current_thread = nullptr;
    Thread* first = options.schedule == MMPO_EMULATOR_SCHEDULE_RANDOM ? pick_next() : &block.pool[0];
    current_thread = first;
    block.current_warp = first->warp;
    switch_context(block.host, first->context);
    ++block.counters.blocks;
    if (kChecked) finish_traces(block);
    running = nullptr;
    current_block = nullptr;
}

// A permutation of [0, count) that is cheap to index: an odd multiplier modulo the next power of two, cycle-walked.
class BlockOrder {
public:
    BlockOrder(uint64_t count, bool shuffled, uint64_t seed) : count_(count), shuffled_(shuffled) {
        while (size_ < count) size_ *= 2;
        multiplier_ = (seed * 0x9e3779b97f4a7c15ull >> 7) * 8 + 5;
        offset_ = seed * 0xda942042e4dd58b5ull >> 11;
    }
    uint64_t operator[](uint64_t i) const {
        if (!shuffled_) return i;
        do i = (i * multiplier_ + offset_) & (size_ - 1);
        while (i >= count_);
        return i;
    }

private:
    uint64_t count_, size_ = 1, multiplier_, offset_;
    bool shuffled_;
};

bool valid_launch(dim3 grid, dim3 block, size_t shared_bytes) {
    const uint64_t threads = uint64_t(block.x) * block.y * block.z;
    return threads >= 1 && threads <= kMaxThreads && block.z <= 64 && shared_bytes <= kSharedLimit && grid.x >= 1 &&
           grid.x <= 0x7fffffffu && grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 && grid.z <= 65535;
}

}  // namespace

uint64_t Block::random() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

Block::Block()
    : pool(kMaxThreads),
      shared_memory(static_cast<unsigned char*>(aligned_alloc(1024, kSharedLimit + 2 * kSharedGuard))) {
    shared = shared_memory + kSharedGuard;
}
Block::~Block() { free(shared_memory); }

void wait_for(WaitFor what, uint32_t id, uint32_t detail, Site site, const uint32_t* counter) {
    Thread& thread = self();
    thread.wait = {what, id, detail, site, counter};
    make_idle(thread);
    run_thread(*pick_next());
}

void make_runnable(Thread& thread) {
    thread.wait.what = WaitFor::nothing;
    running->warps[thread.warp].runnable |= 1u << thread.lane;
    running->runnable_warps |= 1u << thread.warp;
}

void leave_block() {
    Context& context = self().context;
    current_thread = nullptr;
    switch_context(context, running->host);
}

int run_grid(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, Entry entry, const void* arguments,
             size_t size) {
    Launch launch(kernel);
    if (!valid_launch(grid, block, shared_bytes)) {
        char text[200];
        snprintf(text, sizeof text, "invalid launch: grid (%u, %u, %u), block (%u, %u, %u), %zu bytes of shared memory",
                 grid.x, grid.y, grid.z, block.x, block.y, block.z, shared_bytes);
        return launch.refuse(text);
    }
    const uint64_t count = uint64_t(grid.x) * grid.y * grid.z;
    const BlockOrder order(count, options.schedule == MMPO_EMULATOR_SCHEDULE_RANDOM, options.seed);
    std::atomic<uint64_t> next{0};
    const auto work = [&] {
        std::unique_ptr<Block> state = take_block();
        if (!state->stacks.valid() || state->shared_memory == nullptr) {
            launch.record("the host has no memory for the stacks of a block's threads");
            return;
        }
        state->kernel = kernel;
        state->entry = entry;
        state->arguments = arguments;
        state->argument_bytes = size;
        state->threads = block;
        state->blocks = grid;
        state->thread_count = block.x * block.y * block.z;
        state->warp_count = (state->thread_count + 31) / 32;
        state->dynamic_bytes = uint32_t(shared_bytes);
        launch.enter();
        for (uint64_t i; !launch.stopped() && (i = next++) < count;) {
            run_block(*state, order[i]);
            if (state->failed) break;
        }
        launch.leave();
        give_block(std::move(state));
    };
    run_on_workers(work, count);
    return launch.finish();
}

}  // namespace emulated
}  // namespace MMPO_VARIANT
}  // namespace mmpo
