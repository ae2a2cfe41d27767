// Sums across threads, always in the same order: same inputs, same bits. No atomics.
#pragma once

#include "launch.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {

// Every lane gets the sum; a butterfly adds the same pairs in all lanes, so all get the same bits.
template <class T>
DEVICE T warp_sum(T value) {
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
    return value;
}

// Every thread of a block of kThreads gets the sum. `scratch` holds kThreads / 32 values; one call a kernel, or a
// __syncthreads between two.
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

// The warps of a block that work on one row together.
template <int kWarps>
struct RowGroup {
    static constexpr int kThreads = kWarps * kWarp;
    // Groups of a block.
    static constexpr int kGroups = kBlockWarps / kWarps;
    // f32 values of shared memory that all groups of a block need.
    static constexpr int kScratch = 2 * kBlockWarps;

    // Number of this group in its block.
    int index;
    // Number of this thread in its group.
    int thread;
    float* scratch;
    // Two halves of `scratch` take turns: a warp that is ahead by one sum never overwrites what others still read, so
    // one barrier a sum is enough.
    int turn;

    DEVICE explicit RowGroup(float* block_scratch)
        : index(int(threadIdx.x) / kThreads),
          thread(int(threadIdx.x) % kThreads),
          scratch(block_scratch + index * 2 * kWarps),
          turn(0) {}

    // Every thread of the group gets the sum. Groups do not wait for each other: each has its own named barrier.
    DEVICE float sum(float value) {
        value = warp_sum(value);
        if constexpr (kWarps == 1) {
            return value;
        } else {
            float* const partial = scratch + turn * kWarps;
            turn ^= 1;
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
