// Which thread runs next, how a cluster of blocks starts and ends, and how a grid is spread over the host's cores.
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

// A thread of the block that can go on; null if all wait or have exited.
Thread* pick_within(Block& block) {
    if (block.runnable_warps == 0) return nullptr;
    if (options.schedule == MMPO_EMULATOR_SCHEDULE_RANDOM) {
        Warp& warp = block.warps[size_t(random_bit(block, block.runnable_warps))];
        return warp.threads[random_bit(block, warp.runnable)];
    }
    Warp& warp = block.warps[block.current_warp];
    if (warp.runnable != 0)
        return warp.threads[next_bit(warp.runnable, current_thread != nullptr ? current_thread->lane : 31)];
    Warp& next = block.warps[size_t(next_bit(block.runnable_warps, block.current_warp))];
    return next.threads[lowest_lane(next.runnable)];
}

// Lets one load of the cluster land; false if none is under way.
bool land_in_cluster() {
    for (Block* block : running->cluster->blocks) {
        if (block->loads.empty()) continue;
        const Inside inside(*block);
        land_one_load();
        return true;
    }
    return false;
}

// The next thread to run, or null when all have exited. If all wait, the asynchronous units work first. A block of a
// cluster continues as long as it can, unless the schedule is random.
Thread* pick_next() {
    const Cluster& cluster = *running->cluster;
    const size_t count = cluster.blocks.size();
    for (;;) {
        if (options.async == MMPO_EMULATOR_ASYNC_RANDOM && !running->loads.empty() && running->random() % 8 == 0)
            land_one_load();
        const bool any_block = count > 1 && options.schedule == MMPO_EMULATOR_SCHEDULE_RANDOM;
        const size_t first = any_block ? running->random() % count : running->cluster_rank;
        for (size_t i = 0; i < count; ++i) {
            if (Thread* next = pick_within(*cluster.blocks[(first + i) % count])) return next;
        }
        if (land_in_cluster()) continue;
        if (cluster.live() == 0) return nullptr;
        if (!await_turns()) report_deadlock();
    }
}

void enter(Thread& thread) {
    current_thread = &thread;
    running = thread.block;
    current_block = running;
    running->current_warp = thread.warp;
}

void run_thread(Thread& next) {
    Thread& previous = self();
    if (&next == &previous) return;
    enter(next);
    ++running->counters.switches;
    switch_context(previous.context, next.context);
}

void make_idle(Thread& thread) {
    Warp& warp = thread.block->warps[thread.warp];
    warp.runnable &= ~(1u << thread.lane);
    if (warp.runnable == 0) thread.block->runnable_warps &= ~(1u << thread.warp);
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
    check_cluster_after_exit();
    if (Thread* next = pick_next()) run_thread(*next);
    leave_block();
}

void reset_thread(Block& block, uint32_t linear) {
    Thread& thread = block.pool[linear];
    const dim3 size = block.threads;
    thread.index = {linear % size.x, linear / size.x % size.y, linear / size.x / size.y};
    thread.block = &block;
    thread.linear = linear;
    thread.unit = block.thread_unit(linear);
    thread.lane = linear % 32;
    thread.warp = linear / 32;
    thread.wait = {};
    thread.copies.clear();
    thread.stores.clear();
    thread.turn_unfenced = false;
    thread.wgmma.issued = thread.wgmma.waited = 0;
    thread.wgmma.groups.clear();
    thread.wgmma.fenced = false;
    if (kChecked) {
        thread.clock.reset(block.cluster->units());
        thread.clock.seen[thread.unit] = 1;
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
    block.uses_global_atomics = false;
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

// Runs the blocks of the cluster `index` of the grid.
void run_cluster(Cluster& cluster, uint64_t index) {
    cluster.failed = false;
    cluster.arrived = 0;
    cluster.waiters.clear();
    cluster.clock = {};
    for (Block* block : cluster.blocks) reset_block(*block, index * cluster.blocks.size() + block->cluster_rank);
    running = cluster.blocks[0];
    current_thread = nullptr;
    Thread* first = options.schedule == MMPO_EMULATOR_SCHEDULE_RANDOM ? pick_next() : &running->pool[0];
    enter(*first);
    switch_context(cluster.host, first->context);
    for (Block* block : cluster.blocks) {
        running = block;
        ++block->counters.blocks;
        if (kChecked) finish_traces(*block);
    }
    running = nullptr;
    current_block = nullptr;
}

// The blocks of a cluster, kept for one host thread's part of a launch.
class ClusterBlocks {
public:
    ClusterBlocks(const char* kernel, const Geometry& geometry, Entry entry, const void* arguments, size_t size) {
        for (unsigned rank = 0; rank < geometry.cluster; ++rank) {
            blocks_.push_back(take_block());
            Block& block = *blocks_.back();
            block.kernel = kernel;
            block.entry = entry;
            block.arguments = arguments;
            block.argument_bytes = size;
            block.threads = geometry.block;
            block.blocks = geometry.grid;
            block.cluster_rank = rank;
            block.cluster = &cluster;
            block.thread_count = geometry.block.x * geometry.block.y * geometry.block.z;
            block.warp_count = (block.thread_count + 31) / 32;
            block.dynamic_bytes = uint32_t(geometry.shared_bytes);
            cluster.blocks.push_back(&block);
        }
    }
    ~ClusterBlocks() {
        for (std::unique_ptr<Block>& block : blocks_) give_block(std::move(block));
    }
    ClusterBlocks(const ClusterBlocks&) = delete;
    bool valid() const {
        for (const Block* block : cluster.blocks) {
            if (!block->stacks.valid() || block->shared_memory == nullptr) return false;
        }
        return true;
    }

    Cluster cluster;

private:
    std::vector<std::unique_ptr<Block>> blocks_;
};

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

bool valid_launch(const Geometry& geometry) {
    const dim3 grid = geometry.grid, block = geometry.block;
    const uint64_t threads = uint64_t(block.x) * block.y * block.z;
    return threads >= 1 && threads <= kMaxThreads && block.z <= 64 && geometry.shared_bytes <= kSharedLimit &&
           grid.x >= 1 && grid.x <= 0x7fffffffu && grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 && grid.z <= 65535 &&
           geometry.cluster >= 1 && geometry.cluster <= kMostClusterBlocks && grid.x % geometry.cluster == 0;
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
    thread.block->warps[thread.warp].runnable |= 1u << thread.lane;
    thread.block->runnable_warps |= 1u << thread.warp;
}

void leave_block() {
    Context& context = self().context;
    current_thread = nullptr;
    switch_context(context, running->cluster->host);
}

int run_grid(const char* kernel, const Geometry& geometry, Entry entry, const void* arguments, size_t size) {
    Launch launch(kernel);
    const dim3 grid = geometry.grid, block = geometry.block;
    if (!valid_launch(geometry)) {
        char text[240];
        snprintf(text, sizeof text,
                 "invalid launch: grid (%u, %u, %u), block (%u, %u, %u), clusters of %u, %zu bytes of shared memory",
                 grid.x, grid.y, grid.z, block.x, block.y, block.z, geometry.cluster, geometry.shared_bytes);
        return launch.refuse(text);
    }
    const uint64_t count = uint64_t(grid.x) * grid.y * grid.z / geometry.cluster;
    const BlockOrder order(count, options.schedule == MMPO_EMULATOR_SCHEDULE_RANDOM, options.seed);
    std::atomic<uint64_t> next{0};
    const auto work = [&] {
        ClusterBlocks blocks(kernel, geometry, entry, arguments, size);
        if (!blocks.valid()) {
            launch.record("the host has no memory for the stacks of a block's threads");
            return;
        }
        if (kChecked && blocks.cluster.units() > kMostUnits) {
            launch.record("the cluster has more threads than the race checker can tell apart");
            return;
        }
        launch.enter();
        for (uint64_t i; !launch.stopped() && (i = next++) < count;) {
            run_cluster(blocks.cluster, order[i]);
            if (blocks.cluster.failed) break;
        }
        launch.leave();
    };
    run_on_workers(work, count);
    return launch.finish();
}

}  // namespace emulated
}  // namespace MMPO_VARIANT
}  // namespace mmpo
