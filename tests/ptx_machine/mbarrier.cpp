// mbarrier.init, .inval, .arrive, .expect_tx, .test_wait and .try_wait. PTX ISA 9.0, section 9.7.13.15,
// "mbarrier". A phase is complete when no arrival is pending and its transaction count is zero; then the next begins
// with the parity flipped.
#include "mbarrier.h"

#include "decode.h"

namespace ptx {
namespace {

// "mbarrier: Supported operations": counts of arrivals and of transactions.
constexpr uint32_t kMostArrivals = (1u << 20) - 1;
constexpr int64_t kMostTransactions = (1 << 20) - 1;
// What an initialised object holds in memory here, to find out who overwrites one.
constexpr uint64_t kMark = 0x7261626d52494e42ull;

void check_mark(const SharedRange& at, int lane) {
    uint64_t mark;
    memcpy(&mark, at.bytes, sizeof mark);
    if (mark != kMark || at.block->mbarriers.count(at.address) == 0) {
        fail_lane(lane, "no mbarrier is initialised at shared address %#x", at.address);
    }
}

void flip_if_complete(Block& block, Mbarrier& m) {
    if (m.pending != 0 || m.transactions != 0) return;
    m.phase ^= 1;
    m.pending = m.expected;
    m.completed.join(m.arrivals);
    block.cluster->progress++;
}

void expect_transactions(Mbarrier& m, int lane, uint32_t bytes) {
    m.transactions += bytes;
    if (m.transactions > kMostTransactions)
        fail_lane(lane, "an mbarrier expects %lld bytes, too many", static_cast<long long>(m.transactions));
}

Step init(Warp& warp, const Instruction& i) {
    each_lane(warp.lanes, [&](int lane) {
        const SharedRange at = shared_range(warp, lane, uint32_t(lane_address(warp, i, 1, lane)), 8, 8);
        const uint32_t count = warp.values<uint32_t>(i.operands[2])[lane];
        if (count == 0 || count > kMostArrivals) fail_lane(lane, "an mbarrier of %u arrivals", count);
        memcpy(at.bytes, &kMark, sizeof kMark);
        Mbarrier m;
        m.expected = m.pending = count;
        at.block->mbarriers[at.address] = m;
        at.block->cluster->orders.barrier_initialised(warp.actor, at.block->rank, at.address);
    });
    return Step::next;
}

Step invalidate(Warp& warp, const Instruction& i) {
    each_lane(warp.lanes, [&](int lane) {
        const SharedRange at = shared_range(warp, lane, uint32_t(lane_address(warp, i, 1, lane)), 8, 8);
        check_mark(at, lane);
        at.block->mbarriers.erase(at.address);
        memset(at.bytes, 0xff, 8);
    });
    return Step::next;
}

// operands: -, address, bytes. `flags` bit 0: expects transactions first; bit 1: a count of arrivals.
Step arrive(Warp& warp, const Instruction& i) {
    each_lane(warp.lanes, [&](int lane) {
        const SharedRange at = shared_range(warp, lane, uint32_t(lane_address(warp, i, 1, lane)), 8, 8);
        Mbarrier& m = find_mbarrier(warp, lane, uint32_t(lane_address(warp, i, 1, lane)));
        const uint32_t operand = i.flags != 0 ? warp.values<uint32_t>(i.operands[2])[lane] : 0;
        if (i.flags & 1) expect_transactions(m, lane, operand);
        const uint32_t count = i.flags & 2 ? operand : 1;
        if (count > m.pending)
            fail_lane(lane, "more arrivals at the mbarrier at %#x than its phase expects", at.address);
        m.pending -= count;
        at.block->cluster->orders.release(warp.actor, m.arrivals);
        at.block->cluster->progress++;
        flip_if_complete(*at.block, m);
    });
    return Step::next;
}

Step expect(Warp& warp, const Instruction& i) {
    each_lane(warp.lanes, [&](int lane) {
        expect_transactions(find_mbarrier(warp, lane, uint32_t(lane_address(warp, i, 1, lane))), lane,
                            warp.values<uint32_t>(i.operands[2])[lane]);
    });
    return Step::next;
}

// Lets what completes on the mbarrier land: nobody can tell it from a copy that took this long.
void land_pending(Cluster& cluster, uint32_t rank, uint32_t address) {
    for (size_t k = 0; k < cluster.pending.size();) {
        if (cluster.pending[k].rank != rank || cluster.pending[k].mbarrier != address) {
            ++k;
            continue;
        }
        const std::function<void()> land = std::move(cluster.pending[k].land);
        cluster.pending.erase(cluster.pending.begin() + std::ptrdiff_t(k));
        land();
    }
}

// operands: p, address, parity.
Step test(Warp& warp, const Instruction& i) {
    Cluster& cluster = *warp.block->cluster;
    Mask done = 0;
    each_lane(warp.lanes, [&](int lane) {
        const auto address = uint32_t(lane_address(warp, i, 1, lane));
        const SharedRange at = shared_range(warp, lane, address, 8, 8);
        Mbarrier& m = find_mbarrier(warp, lane, address);
        const uint32_t parity = warp.values<uint32_t>(i.operands[2])[lane];
        if (parity > 1) fail_lane(lane, "a phase parity of %u", parity);
        if (m.phase == parity) land_pending(cluster, at.block->rank, at.address);
        if (m.phase == parity) return;
        done |= 1u << lane;
        cluster.orders.acquire(warp.actor, m.completed);
    });
    Mask& p = warp.predicates[i.operands[0]];
    p = (p & ~warp.lanes) | done;
    return done == warp.lanes ? Step::next : Step::yielded;
}

void decode_address(Operands& operands, const std::string& text, Instruction& out) {
    const uint32_t width = operands.address_width(text);
    out.widths[1] = uint8_t(width != 0 ? width : 4);
    out.operands[1] = operands.address(text, out.widths[1], out.offset);
}

void decode_mbarrier(Operands& operands, const InstructionText& text, Instruction& out) {
    if (text.parts.back() != "b64") return;
    const std::string& what = text.parts[1];
    if (what == "init" || what == "expect_tx") {
        expect_operands(text, 2);
        decode_address(operands, text.operands[0], out);
        out.operands[2] = operands.value(text.operands[1], 4);
        out.execute = what == "init" ? &init : &expect;
    } else if (what == "inval") {
        expect_operands(text, 1);
        decode_address(operands, text.operands[0], out);
        out.execute = &invalidate;
    } else if (what == "arrive") {
        if (text.operands.size() < 2 || text.operands.size() > 3 || text.operands[0] != "_" || has(text, "noComplete"))
            return;
        decode_address(operands, text.operands[1], out);
        if (text.operands.size() == 3) out.operands[2] = operands.value(text.operands[2], 4);
        out.flags = has(text, "expect_tx") ? 1 : text.operands.size() == 3 ? 2 : 0;
        out.execute = &arrive;
    } else if ((what == "try_wait" || what == "test_wait") && has(text, "parity")) {
        if (text.operands.size() < 3) return;
        out.operands[0] = operands.predicate(text.operands[0]);
        decode_address(operands, text.operands[1], out);
        out.operands[2] = operands.value(text.operands[2], 4);
        out.execute = &test;
    }
}

}  // namespace

Mbarrier& find_mbarrier(Warp& warp, int lane, uint32_t address) {
    const SharedRange at = shared_range(warp, lane, address, 8, 8);
    check_mark(at, lane);
    at.block->cluster->orders.barrier_used(warp.actor, at.block->rank, at.address);
    return at.block->mbarriers[at.address];
}

void complete_transactions(Block& block, uint32_t address, uint32_t bytes) {
    const auto found = block.mbarriers.find(address);
    if (found == block.mbarriers.end()) fail("a copy completes on %#x, where no mbarrier is", address);
    found->second.transactions -= bytes;
    if (found->second.transactions < -kMostTransactions)
        fail("more bytes complete on the mbarrier at %#x than it can count", address);
    block.cluster->orders.release_async(block.rank, found->second.arrivals);
    block.cluster->progress++;
    flip_if_complete(block, found->second);
}

void check_copy_barrier(Warp& warp, int lane, Block& block, uint32_t address) {
    if (address % 8 != 0 || block.mbarriers.count(address) == 0) {
        fail_lane(lane, "no mbarrier is initialised at shared address %#x of block %u of the cluster", address,
                  block.rank);
    }
    block.cluster->orders.barrier_used_by_async(warp.actor, block.rank, address);
}

void add_mbarriers(OpcodeTable& table) { table["mbarrier"] = &decode_mbarrier; }

}  // namespace ptx
