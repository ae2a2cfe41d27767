// Blocks that run together: barrier.cluster, and what reaches into another block's shared memory.
#include "block.h"

namespace mmpo {
inline namespace MMPO_VARIANT {
namespace emulated {

namespace {

void open_barrier(Cluster& cluster) {
    for (Thread* waiter : cluster.waiters) {
        if (kChecked) race_acquire(*waiter, cluster.clock);
        make_runnable(*waiter);
    }
    cluster.waiters.clear();
    cluster.arrived = 0;
    cluster.clock = {};
}

}  // namespace

uint32_t Cluster::live() const {
    uint32_t threads = 0;
    for (const Block* block : blocks) threads += block->live;
    return threads;
}

uint32_t Cluster::units() const { return uint32_t(blocks.size()) * blocks[0]->units(); }

void cluster_sync(Site site) {
    Cluster& cluster = *running->cluster;
    ++running->counters.barriers;
    if (kChecked) race_release(cluster.clock, self());
    if (++cluster.arrived == cluster.live()) {
        if (kChecked) race_acquire(self(), cluster.clock);
        return open_barrier(cluster);
    }
    cluster.waiters.push_back(&self());
    wait_for(WaitFor::cluster, 0, 0, site);
}

// A thread that exits no longer counts.
void check_cluster_after_exit() {
    Cluster& cluster = *running->cluster;
    if (cluster.arrived != 0 && cluster.arrived == cluster.live()) open_barrier(cluster);
}

void require_present(const Block& block, const char* what, Site site) {
    if (block.live == 0)
        fail(site, "%s: the cluster's block %u has exited, and its shared memory with it", what, block.cluster_rank);
}

void mbarrier_arrive_at(uint32_t address, uint32_t rank, Site site) {
    const std::vector<Block*>& blocks = running->cluster->blocks;
    if (rank >= blocks.size())
        fail(site, "mbarrier.arrive: there is no block %u in a cluster of %zu", rank, blocks.size());
    require_present(*blocks[rank], "mbarrier.arrive", site);
    const Inside inside(*blocks[rank]);
    mbarrier_arrive(address, 1, site);
}

}  // namespace emulated
}  // namespace MMPO_VARIANT
}  // namespace mmpo
