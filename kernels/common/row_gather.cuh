// out[rows, width] = source[indices[rows], width]: the embedding's lookup, and the selection of the rows that the head
// scores.
#pragma once

#include "vector.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {

// A row's values can be requested only once its index has arrived. Four vectors a lane make up for that wait.
constexpr int kGatherVectors = 4;

template <bool kVectorized>
static __global__ void __launch_bounds__(kBlock)
    gather_kernel(bf16* __restrict__ out, const bf16* __restrict__ source, const uint32_t* __restrict__ indices,
                  int rows, int width) {
    const WarpTile tile = warp_tile<kGatherVectors>(width);
    if (tile.row >= rows) return;
    const bf16* const from = source + int64_t(indices[tile.row]) * width;
    bf16* const to = out + int64_t(tile.row) * width;
    uint4 packed[kGatherVectors];
#pragma unroll
    for (int v = 0; v < kGatherVectors; ++v)
        packed[v] = load8<kVectorized>(from, tile.column + v * kVectorStride, width);
#pragma unroll
    for (int v = 0; v < kGatherVectors; ++v) store8<kVectorized>(to, tile.column + v * kVectorStride, width, packed[v]);
}

inline mmpo_status launch_gather(bf16* out, const bf16* source, const uint32_t* indices, int rows, int width,
                                 mmpo_stream stream) {
    if (rows == 0 || width == 0) return kSuccess;
    const unsigned blocks = warp_tile_blocks<kGatherVectors>(rows, width);
    return vector_rows(width)
               ? LAUNCH(gather_kernel<true>, blocks, kBlock, 0, cuda_stream(stream), out, source, indices, rows, width)
               : LAUNCH(gather_kernel<false>, blocks, kBlock, 0, cuda_stream(stream), out, source, indices, rows,
                        width);
}

}  // namespace MMPO_VARIANT
}  // namespace mmpo
