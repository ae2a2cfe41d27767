// Sums across threads, always in the same order, so that the same inputs give the same bits. No atomics.
#pragma once

#include "launch.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {

// Every lane gets the sum, and all get the same bits, because the butterfly adds the same pairs in all lanes.
template <class T>
DEVICE T warp_sum(T value) {
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
    return value;
}

// Every thread of a block of kThreads gets the sum. `scratch` holds kThreads / 32 values. Call it once a kernel, or put
// a __syncthreads between two calls.
template <int kThreads, class T>
DEVICE T block_sum(T value, T* scratch) {
    value = warp_sum(value);
    if (lane_id() == 0) scratch[threadIdx.x / kWarp] = value;
    __syncthreads();
    T total = 0;
#pragma unroll
    for (int warp = 0; warp < kThreads / kWarp; ++warp) total += scratch[warp];
    return total;
}

// A group of kWarps warps of a block that work on one row together.
template <int kWarps>
struct RowGroup {
    static constexpr int kThreads = kWarps * kWarp;
    // Groups in a block.
    static constexpr int kGroups = kBlockWarps / kWarps;
    // f32 values of shared memory that all groups of a block need.
    static constexpr int kScratch = 2 * kBlockWarps;

    // The number of this group in its block.
    int index;
    // The number of this thread in its group.
    int thread;
    float* scratch;
    // Which half of `scratch` the next sum uses. The halves alternate, so that a warp that is one sum ahead never
    // overwrites what others still read; one barrier a sum is then enough.
    int half;

    DEVICE explicit RowGroup(float* block_scratch)
        : index(int(threadIdx.x) / kThreads),
          thread(int(threadIdx.x) % kThreads),
          scratch(block_scratch + index * 2 * kWarps),
          half(0) {}

    // Every thread of the group gets the sum. Groups do not wait for each other, as each has its own named barrier.
    DEVICE float sum(float value) {
        value = warp_sum(value);
        if constexpr (kWarps == 1) {
            return value;
        } else {
            float* const partial = scratch + half * kWarps;
            half ^= 1;
            if (lane_id() == 0) partial[thread / kWarp] = value;
            bar_sync(1 + index, kThreads);
            float total = 0.0f;
#pragma unroll
            for (int warp = 0; warp < kWarps; ++warp) total += partial[warp];
            return total;
        }
    }
};

}  // namespace MMPO_VARIANT
}  // namespace mmpo
