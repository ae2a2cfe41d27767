// Tensor maps and the copies that use them.
#pragma once

#include <cuda.h>

#include "decode.h"

namespace ptx {

// Fills the 128 bytes of a map in, as the driver's cuTensorMapEncodeTiled, whose rules it checks.
CUresult encode_tensor_map(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* base,
                           const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                           const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                           CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill);
// cp.async.bulk.tensor and cp.reduce.async.bulk.tensor.
void decode_tensor_copy(Operands& operands, const InstructionText& text, Instruction& out);
// The address that the hardware uses for a shared address: 16-byte chunks permuted in rows of `bytes`; 0: as it is.
inline uint32_t swizzled(uint32_t address, uint32_t bytes) {
    return bytes == 0 ? address : address ^ ((address >> 7 & (bytes / 16 - 1)) << 4);
}

}  // namespace ptx
