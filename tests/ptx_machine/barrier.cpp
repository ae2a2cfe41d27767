// Barriers of a block: bar.sync, bar.arrive and their synonyms. PTX ISA 9.0, section 9.7.13, "bar{.cta},
// barrier{.cta}". A warp arrives as a whole and counts as 32 threads.
#include "decode.h"
#include "warp.h"

namespace ptx {

uint32_t Block::live_threads() const {
    uint32_t live = 0;
    for (const Warp& warp : warps) live += uint32_t(__builtin_popcount(warp.live));
    return live;
}

namespace {

// Threads of the warps that have not exited, in whole warps.
uint32_t arriving_threads(const Block& block) {
    uint32_t threads = 0;
    for (const Warp& warp : block.warps) threads += warp.live != 0 ? kLanes : 0;
    return threads;
}

void complete_if_all_here(Block& block, uint32_t id) {
    NamedBarrier& barrier = block.barriers[id];
    if (barrier.arrived < barrier.expected) return;
    if (barrier.arrived > barrier.expected) {
        fail("barrier %u: %u threads arrive, %u are expected", id, barrier.arrived, barrier.expected);
    }
    Orders& orders = block.cluster->orders;
    for (Warp& warp : block.warps) {
        if (warp.state != Warp::State::at_barrier || warp.barrier != id) continue;
        orders.acquire(warp.actor, barrier.clock);
        warp.state = Warp::State::running;
        ++warp.pc;
    }
    barrier = NamedBarrier{};
    block.cluster->progress++;
}

// operands: barrier, threads. `flags` bit 0: waits; bit 1: a number of threads is named.
Step barrier(Warp& warp, const Instruction& i) {
    if (!gathered(warp, warp.live)) return Step::gathering;
    Block& block = *warp.block;
    const int lane = __builtin_ctz(warp.lanes);
    const uint32_t id = warp.values<uint32_t>(i.operands[0])[lane];
    const bool named = (i.flags & 2) != 0;
    const uint32_t expected = named ? warp.values<uint32_t>(i.operands[1])[lane] : arriving_threads(block);
    if (id >= block.barriers.size()) fail("there is no barrier %u: a block has 16", id);
    if (expected == 0 || expected % kLanes != 0)
        fail("barrier %u expects %u threads, which are no whole warps", id, expected);
    if (expected > block.warps.size() * kLanes) {
        fail("barrier %u expects %u threads, the block has %u", id, expected, block.threads);
    }
    NamedBarrier& at = block.barriers[id];
    if (at.arrived != 0 && at.expected != expected) {
        fail("barrier %u: mismatched counts, this warp expects %u threads, an earlier one %u", id, expected,
             at.expected);
    }
    at.expected = expected;
    at.all_threads = !named;
    at.arrived += kLanes;
    block.cluster->orders.release(warp.actor, at.clock);
    block.cluster->progress++;
    const bool waits = (i.flags & 1) != 0;
    if (waits) {
        warp.state = Warp::State::at_barrier;
        warp.barrier = id;
    }
    complete_if_all_here(block, id);
    if (!waits) return Step::next;
    return warp.state == Warp::State::running ? Step::jumped : Step::blocked;
}

void decode_barrier(Operands& operands, const InstructionText& text, Instruction& out) {
    if (has(text, "warp")) return decode_warp_barrier(operands, text, out);
    if (text.parts[0] == "barrier" && has(text, "cluster")) return decode_cluster_barrier(operands, text, out);
    if (text.operands.empty() || text.operands.size() > 2) return;
    if (!has(text, "sync") && !has(text, "arrive")) return;
    for (size_t k = 0; k < text.operands.size(); ++k) out.operands[k] = operands.value(text.operands[k], 4);
    out.flags = (has(text, "sync") ? 1 : 0) | (text.operands.size() == 2 ? 2 : 0);
    if (out.flags == 0) throw Unknown("bar.arrive names its number of threads");
    out.execute = &barrier;
}

}  // namespace

void warp_exits_barriers(Warp& warp) {
    Block& block = *warp.block;
    for (uint32_t id = 0; id < block.barriers.size(); ++id) {
        NamedBarrier& at = block.barriers[id];
        if (at.arrived == 0 || !at.all_threads) continue;
        at.expected = arriving_threads(block);
        complete_if_all_here(block, id);
    }
}

void add_barriers(OpcodeTable& table) { table["bar"] = table["barrier"] = &decode_barrier; }

}  // namespace ptx
