// Lanes that must be together.
#pragma once

#include "decode.h"
#include "machine.h"

namespace ptx {

// Whether all lanes of `wanted` that exist execute the present instruction; if not, the caller returns Step::gathering.
bool gathered(Warp& warp, Mask wanted);
// The same for an instruction that says .aligned: all 32.
bool whole_warp(Warp& warp);
// bar.warp.sync, which shares its first word with block barriers.
void decode_warp_barrier(Operands& operands, const InstructionText& text, Instruction& out);
// barrier.cluster, likewise.
void decode_cluster_barrier(Operands& operands, const InstructionText& text, Instruction& out);

}  // namespace ptx
