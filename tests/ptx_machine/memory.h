// Accesses of shared memory, for every instruction that makes some.
#pragma once

#include "machine.h"

namespace ptx {

// A range of shared memory: the block that it belongs to, and where in it.
struct SharedRange {
    Block* block;
    uint32_t address;
    uint8_t* bytes;
};

// Resolves a shared address, of the warp's own block or of another of its cluster, and checks alignment and bounds.
SharedRange shared_range(Warp& warp, int lane, uint32_t address, uint32_t bytes, uint32_t alignment);
// As a generic access: also that it reads nothing unwritten and races with nobody; a write is noted. `lanes` are those
// that make it, `lane` is for messages.
SharedRange generic_shared(Warp& warp, int lane, uint32_t address, uint32_t bytes, uint32_t alignment, Access access,
                           Lanes lanes);
// Whether something wrote all of it; a fault otherwise.
void check_written(const SharedRange& range, uint32_t bytes, int lane);
void mark_written(const SharedRange& range, uint32_t bytes);

// The address of a lane in a 4- or 8-byte register, with the instruction's offset.
inline uint64_t lane_address(Warp& warp, const Instruction& i, int operand, int lane) {
    const uint32_t slot = i.operands[operand];
    const uint64_t base =
        i.widths[operand] == 4 ? warp.values<uint32_t>(slot)[lane] : warp.values<uint64_t>(slot)[lane];
    return base + uint64_t(i.offset);
}

}  // namespace ptx
