// Clusters: their barrier and addresses of other blocks' shared memory. PTX ISA 9.0, sections 9.7.13
// (barrier.cluster) and 9.7.9.23 (mapa).
#include "decode.h"
#include "lanes.h"
#include "warp.h"

namespace ptx {

uint32_t Cluster::live_threads() const {
    uint32_t live = 0;
    for (const auto& block : blocks) live += block->live_threads();
    return live;
}

namespace {

// `flags` is 1 for arrive.relaxed, which hands on nothing but initialised mbarriers.
Step arrive(Warp& warp, const Instruction& i) {
    if (!gathered(warp, warp.live)) return Step::gathering;
    if (warp.cluster_arrived) fail("arrives at the cluster's barrier twice without a wait");
    Cluster& cluster = *warp.block->cluster;
    warp.cluster_arrived = true;
    warp.cluster_phase = cluster.phase;
    if (i.flags == 1) {
        cluster.orders.release_barriers(warp.actor, cluster.barrier_clock);
    } else {
        cluster.orders.release(warp.actor, cluster.barrier_clock);
    }
    cluster.arrived += uint32_t(__builtin_popcount(warp.live));
    complete_cluster_barrier(cluster);
    return Step::next;
}

Step wait(Warp& warp, const Instruction&) {
    if (!gathered(warp, warp.live)) return Step::gathering;
    Cluster& cluster = *warp.block->cluster;
    if (!warp.cluster_arrived) fail("waits for the cluster's barrier without having arrived");
    if (cluster.phase == warp.cluster_phase) return Step::again;
    warp.cluster_arrived = false;
    cluster.orders.acquire(warp.actor, cluster.barrier_clock_done);
    return Step::next;
}

// mapa.shared::cluster.u32 d, a, rank: the address of `a` in the block of that rank.
Step map_address(Warp& warp, const Instruction& i) {
    uint32_t* const d = warp.values<uint32_t>(i.operands[0]);
    const uint32_t* const a = warp.values<uint32_t>(i.operands[1]);
    const uint32_t* const rank = warp.values<uint32_t>(i.operands[2]);
    for_lanes(warp, d, [=](int lane) { return (a[lane] & ((1u << kRankShift) - 1)) | (rank[lane] + 1) << kRankShift; });
    return Step::next;
}

void decode_map_address(Operands& operands, const InstructionText& text, Instruction& out) {
    expect_operands(text, 3);
    if (text.parts.back() != "u32" || !has(text, "shared::cluster")) return;
    for (int k = 0; k < 3; ++k) out.operands[k] = operands.value(text.operands[k], 4);
    out.execute = &map_address;
}

}  // namespace

void complete_cluster_barrier(Cluster& cluster) {
    if (cluster.arrived == 0 || cluster.arrived < cluster.live_threads()) return;
    cluster.arrived = 0;
    ++cluster.phase;
    ++cluster.progress;
    cluster.barrier_clock_done = cluster.barrier_clock;
}

void decode_cluster_barrier(Operands&, const InstructionText& text, Instruction& out) {
    expect_operands(text, 0);
    out.flags = has(text, "relaxed") ? 1 : 0;
    out.execute = has(text, "arrive") ? &arrive : has(text, "wait") ? &wait : nullptr;
}

void add_clusters(OpcodeTable& table) { table["mapa"] = &decode_map_address; }

}  // namespace ptx
