// bar.sync and bar.arrive, __syncthreads, and mbarriers.
#include <cstdio>

#include "block.h"

namespace mmpo {
inline namespace MMPO_VARIANT {
namespace emulated {

// ---- named barriers

namespace {

constexpr uint32_t kBarriers = 16;

uint32_t expected_now(const NamedBarrier& barrier) {
    return barrier.expected == NamedBarrier::kEveryone ? running->live : barrier.expected;
}

void open_barrier(NamedBarrier& barrier) {
    for (Thread* waiter : barrier.waiters) {
        if (kChecked) race_acquire(*waiter, barrier.clock);
        make_runnable(*waiter);
    }
    barrier.waiters.clear();
    barrier.arrived = barrier.expected = 0;
    if (kChecked) barrier.clock = {};
}

// Counts the calling thread as arrived. True if it is the last one.
bool arrive(uint32_t id, uint32_t threads, const char* what, Site site) {
    if (id >= kBarriers) fail(site, "%s: there is no barrier %u, only 0 to 15", what, id);
    if (threads % 32 != 0 || threads > running->thread_count)
        fail(site, "%s %u: %u threads is not a multiple of 32 up to the block's %u", what, id, threads,
             running->thread_count);
    NamedBarrier& barrier = running->barriers[id];
    const uint32_t expected = threads != 0 ? threads : NamedBarrier::kEveryone;
    if (barrier.arrived != 0 && barrier.expected != expected)
        fail(site, "%s %u of %d threads, but others wait there for %d (-1: all)", what, id, int(expected),
             int(barrier.expected));
    barrier.expected = expected;
    ++barrier.arrived;
    ++running->counters.barriers;
    if (kChecked) race_release(barrier.clock, self());
    return barrier.arrived == expected_now(barrier);
}

}  // namespace

void barrier_sync(uint32_t id, uint32_t threads, Site site) {
    const bool last = arrive(id, threads, "bar.sync", site);
    NamedBarrier& barrier = running->barriers[id];
    if (last) {
        if (kChecked) race_acquire(self(), barrier.clock);
        return open_barrier(barrier);
    }
    barrier.waiters.push_back(&self());
    wait_for(WaitFor::barrier, id, barrier.expected, site);
}

void barrier_arrive(uint32_t id, uint32_t threads, Site site) {
    if (threads == 0) fail(site, "bar.arrive %u needs the number of threads", id);
    if (arrive(id, threads, "bar.arrive", site)) open_barrier(running->barriers[id]);
}

// A thread that exits no longer counts at __syncthreads, so its exit may open the barrier.
void check_barrier_after_exit() {
    for (NamedBarrier& barrier : running->barriers) {
        if (barrier.arrived != 0 && barrier.expected == NamedBarrier::kEveryone && barrier.arrived == running->live)
            open_barrier(barrier);
    }
}

// ---- mbarriers

namespace {

// The opaque 64 bits in shared memory. A phase ends when no arrival is pending and no byte is outstanding.
struct Mbarrier {
    uint64_t pending : 20;
    uint64_t count : 20;
    int64_t bytes : 21;
    uint64_t phase : 1;
    uint64_t valid : 2;
};
static_assert(sizeof(Mbarrier) == 8, "PTX gives it 8 bytes");
constexpr uint64_t kValid = 1;  // fresh shared memory has 3 there, zeros 0
constexpr uint32_t kMaxCount = (1u << 20) - 1;

Mbarrier& mbarrier_at(uint32_t address, const char* what, Site site) {
    Mbarrier& barrier = *reinterpret_cast<Mbarrier*>(shared_storage(address, 8, 8, what, site));
    if (barrier.valid != kValid) fail(site, "%s: shared 0x%x is not an initialised mbarrier", what, address);
    return barrier;
}

// Fails if the initialisation of the mbarrier is not ordered before its use. That is the only check on the barrier's
// own memory: it orders other accesses, and need not be ordered by them.
void check_ordered(uint32_t address, Site site) {
    if (kChecked) race_access(self(), SharedAccess{address - kSharedBase, 8, false, Proxy::generic, false}, site);
}

void end_phase_if_complete(uint32_t address, Mbarrier& barrier) {
    if (barrier.pending != 0 || barrier.bytes != 0) return;
    barrier.phase ^= 1;
    barrier.pending = barrier.count;
    if (kChecked) {
        MbarrierClock& clock = running->mbarrier_clocks[address];
        clock.completed = clock.arriving;
    }
    std::vector<Thread*>& waiters = running->mbarrier_waiters;
    size_t kept = 0;
    for (Thread* waiter : waiters) {
        if (waiter->wait.id == address && waiter->wait.detail != barrier.phase)
            make_runnable(*waiter);
        else
            waiters[kept++] = waiter;
    }
    waiters.resize(kept);
}

// Whether the phase of this parity is complete, which it is once the barrier is in a phase of the other parity.
bool phase_complete(uint32_t address, uint32_t parity, const char* what, Site site) {
    const Mbarrier& barrier = mbarrier_at(address, what, site);
    check_ordered(address, site);
    if (barrier.phase == (parity & 1)) return false;
    if (kChecked) race_acquire(self(), running->mbarrier_clocks[address].completed);
    return true;
}

}  // namespace

void mbarrier_init(uint32_t address, uint32_t count, Site site) {
    Mbarrier& barrier = *reinterpret_cast<Mbarrier*>(shared_storage(address, 8, 8, "mbarrier.init", site));
    if (count == 0 || count > kMaxCount) fail(site, "mbarrier.init: count %u is outside 1 to %u", count, kMaxCount);
    if (kChecked) {
        const uint32_t offset = address - kSharedBase;
        race_access(self(), SharedAccess{offset, 8, true, Proxy::generic, true}, site);
        mark_shared_written(offset, 8);
        MbarrierClock& clock = running->mbarrier_clocks[address];
        clock.arriving.reset(running->cluster->units());
        clock.completed = clock.arriving;
        clock.unit = running->load_unit(uint32_t(running->mbarrier_clocks.size() - 1) % Block::kLoadUnits);
    }
    barrier.pending = barrier.count = count;
    barrier.bytes = 0;
    barrier.phase = 0;
    barrier.valid = kValid;
}

void mbarrier_invalidate(uint32_t address, Site site) { mbarrier_at(address, "mbarrier.inval", site).valid = 0; }

void mbarrier_arrive(uint32_t address, uint32_t count, Site site) {
    Mbarrier& barrier = mbarrier_at(address, "mbarrier.arrive", site);
    if (barrier.pending < count)
        fail(site, "mbarrier.arrive: shared 0x%x expects %u more arrivals in this phase (of %u), not %u", address,
             unsigned(barrier.pending), unsigned(barrier.count), count);
    check_ordered(address, site);
    if (kChecked) race_release(running->mbarrier_clocks[address].arriving, self());
    barrier.pending -= count;
    end_phase_if_complete(address, barrier);
}

void mbarrier_expect_tx(uint32_t address, uint32_t bytes, Site site) {
    Mbarrier& barrier = mbarrier_at(address, "mbarrier.expect_tx", site);
    if (bytes > kMaxCount) fail(site, "mbarrier.expect_tx: %u bytes is more than %u", bytes, kMaxCount);
    check_ordered(address, site);
    barrier.bytes += bytes;
}

// Called when a load lands: takes its bytes off the barrier's count, and makes the time of the load's unit known to the
// threads that wait.
void mbarrier_complete_bytes(const BulkLoad& load) {
    Mbarrier& barrier = mbarrier_at(load.mbarrier, "complete_tx", load.site);
    barrier.bytes -= load.bytes();
    if (kChecked) {
        uint32_t& seen = running->mbarrier_clocks[load.mbarrier].arriving.seen[load.unit];
        seen = std::max(seen, load.tick);
    }
    end_phase_if_complete(load.mbarrier, barrier);
}

bool mbarrier_test_wait(uint32_t address, uint32_t parity, Site site) {
    ++running->counters.mbarrier_waits;
    return phase_complete(address, parity, "mbarrier.test_wait", site);
}

bool mbarrier_try_wait(uint32_t address, uint32_t parity, Site site) {
    ++running->counters.mbarrier_waits;
    if (phase_complete(address, parity, "mbarrier.try_wait", site)) return true;
    running->mbarrier_waiters.push_back(&self());
    wait_for(WaitFor::mbarrier, address, parity & 1, site);
    if (!phase_complete(address, parity, "mbarrier.try_wait", site))
        fail(site, "mbarrier.try_wait: shared 0x%x went through another whole phase before this thread saw parity %u",
             address, parity & 1);
    return true;
}

// The fence itself checks nothing. What it should make visible is checked: a load on a barrier whose initialisation is
// not ordered before the load is a race.
void fence_mbarrier_init(Site) {
    if (kChecked) race_release(running->cluster->clock, self());
}

std::string mbarrier_state(uint32_t address) {
    const Mbarrier& barrier = *reinterpret_cast<const Mbarrier*>(running->shared + (address - kSharedBase));
    char text[160];
    snprintf(text, sizeof text, "which is in phase %u with %u of %u arrivals and %ld bytes to come",
             unsigned(barrier.phase), unsigned(barrier.pending), unsigned(barrier.count), long(barrier.bytes));
    return text;
}

}  // namespace emulated
}  // namespace MMPO_VARIANT
}  // namespace mmpo
