// mbarrier objects, for the instructions that complete on them.
#pragma once

#include "memory.h"

namespace ptx {

// The initialised mbarrier at a shared address of the warp's block, or of another of its cluster.
Mbarrier& find_mbarrier(Warp& warp, int lane, uint32_t address);
// complete-tx of `bytes` on the mbarrier at `address` of a block, by a copy that landed there.
void complete_transactions(Block& block, uint32_t address, uint32_t bytes);
// Fails unless copies may complete on this mbarrier from where the warp stands.
void check_copy_barrier(Warp& warp, int lane, Block& block, uint32_t address);

}  // namespace ptx
