// Column sums in two kernels: blocks leave rows of partial sums, which the kernel here adds up in a fixed order.
#pragma once

#include "launch.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {

// There are few columns (18 blocks at a width of 576), so a block is as large as possible, to have a few hundred rows
// under way at once.
constexpr int kPartialThreads = 1024;
constexpr int kPartialSlices = kPartialThreads / kWarp;

// Accumulates out[width] += the column sums of partials[count, width]. A block has 32 columns, one a lane. Its warps
// take the rows in rotation, and then their sums are added in order.
static __global__ void __launch_bounds__(kPartialThreads)
    add_partials_kernel(float* out, const float* __restrict__ partials, int count, int width) {
    DYNAMIC_SHARED(shared);
    float (*const slice_sums)[kWarp] = reinterpret_cast<float (*)[kWarp]>(shared);
    const int lane = int(lane_id());
    const int slice = int(threadIdx.x) / kWarp;
    const int column = int(blockIdx.x) * kWarp + lane;
    float sum = 0.0f;
    if (column < width) {
#pragma unroll 8
        for (int row = slice; row < count; row += kPartialSlices) sum += partials[int64_t(row) * width + column];
    }
    slice_sums[slice][lane] = sum;
    __syncthreads();
    if (slice != 0 || column >= width) return;
    float total = 0.0f;
#pragma unroll
    for (int other = 0; other < kPartialSlices; ++other) total += slice_sums[other][lane];
    out[column] += total;
}

inline mmpo_status add_partials(float* out, const float* partials, int count, int width, mmpo_stream stream) {
    return LAUNCH(add_partials_kernel, unsigned(ceil_div(width, kWarp)), kPartialThreads,
                  kPartialThreads * sizeof(float), cuda_stream(stream), out, partials, count, width);
}

}  // namespace MMPO_VARIANT
}  // namespace mmpo
