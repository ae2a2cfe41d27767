// Turns: blocks of one launch that wait for one another at counters in global memory. A block whose threads all wait
// puts its host thread to sleep until another passes a turn.
#include <algorithm>

#include "block.h"
#include "device.h"
#include "memory.h"

namespace mmpo {
inline namespace MMPO_VARIANT {
namespace emulated {

namespace {

void check_counter(const uint32_t* counter, const char* what, Site site) {
    if (uintptr_t(counter) % sizeof(uint32_t) != 0 || !GlobalMemory::instance().owns(uintptr_t(counter)))
        fail(site, "%s: the counter at %p is no aligned word of global memory", what,
             static_cast<const void*>(counter));
    check_global(self(), uintptr_t(counter), sizeof(uint32_t), false, site);
    running->uses_global_atomics = true;
}

// Wakes the threads whose turn has come, or is already over, which they then report themselves. True if there are any.
bool wake_due_threads(std::vector<Thread*>& waiters) {
    size_t kept = 0;
    for (Thread* waiter : waiters) {
        if (turn_counter(waiter->wait.counter) >= waiter->wait.id)
            make_runnable(*waiter);
        else
            waiters[kept++] = waiter;
    }
    const bool some = kept != waiters.size();
    waiters.resize(kept);
    return some;
}

}  // namespace

uint32_t turn_counter(const uint32_t* counter) { return __atomic_load_n(counter, __ATOMIC_ACQUIRE); }

bool await_turns() {
    const std::vector<Block*>& blocks = running->cluster->blocks;
    const auto waits = [](const Block* block) { return !block->turn_waiters.empty(); };
    if (std::none_of(blocks.begin(), blocks.end(), waits)) return false;
    return Launch::current().await_others([&] {
        bool some = false;
        for (Block* block : blocks) some |= wake_due_threads(block->turn_waiters);
        return some;
    });
}

void wait_for_turn(const uint32_t* counter, uint32_t turn, Site site) {
    check_counter(counter, "wait_for_turn", site);
    if (turn_counter(counter) < turn) {
        running->turn_waiters.push_back(&self());
        wait_for(WaitFor::turn, turn, 0, site, counter);
    }
    self().turn_unfenced = true;
    const uint32_t now = turn_counter(counter);
    if (now != turn) fail(site, "waits for turn %u of a counter that stands at %u already", turn, now);
}

void fence_proxy_async_global() {
    self().turn_unfenced = false;
    memory_fence();
}

void pass_turn(uint32_t* counter, uint32_t turn, Site site) {
    check_counter(counter, "pass_turn", site);
    if (!self().stores.drained())
        fail(self().stores.operations.back().site, "the thread passes its turn without waiting for this bulk store");
    const uint32_t now = turn_counter(counter);
    if (now != turn) fail(site, "passes turn %u of a counter that stands at %u", turn, now);
    __atomic_store_n(counter, turn + 1, __ATOMIC_RELEASE);
    Launch::current().turn_passed();
}

}  // namespace emulated
}  // namespace MMPO_VARIANT
}  // namespace mmpo
