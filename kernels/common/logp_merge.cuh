// From the statistics of a row's tiles (logp_epilogue.cuh) to its lse, log-prob and entropy.
#pragma once

#include "logp_epilogue.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {

// A block merges the tiles of 32 rows, one a lane: its warps take the tiles in turn, and the warps' results are merged
// in order.
struct MergeScratch {
    float reference[kBlockWarps][kWarp];
    float sum[kBlockWarps][kWarp];
    float weighted[kBlockWarps][kWarp];
};

// `entropy` is NULL together with statistics.weighted.
static __global__ void __launch_bounds__(kBlock)
    merge_tiles_kernel(float* __restrict__ lse, float* __restrict__ logp, float* __restrict__ entropy,
                       TileStatistics statistics, int tiles) {
    DYNAMIC_SHARED(shared);
    MergeScratch& scratch = *reinterpret_cast<MergeScratch*>(shared);
    const int lane = int(lane_id()), warp = int(threadIdx.x) / kWarp;
    const int row = int(blockIdx.x) * kWarp + lane;
    const bool valid = row < statistics.rows;
    const auto index = [&](int tile) { return int64_t(tile) * statistics.rows + row; };

    float reference = -FLT_MAX;
    if (valid) {
#pragma unroll 8
        for (int tile = warp; tile < tiles; tile += kBlockWarps) {
            reference = fmaxf(reference, statistics.reference[index(tile)]);
        }
    }
    scratch.reference[warp][lane] = reference;
    __syncthreads();
#pragma unroll
    for (int other = 0; other < kBlockWarps; ++other) reference = fmaxf(reference, scratch.reference[other][lane]);

    // Relative to the row's reference a tile has 2^shift times its sum, and exponents that are larger by the shift.
    float sum = 0.0f, weighted = 0.0f;
    if (valid) {
#pragma unroll 8
        for (int tile = warp; tile < tiles; tile += kBlockWarps) {
            const float shift = statistics.reference[index(tile)] - reference, factor = exp2_approx(shift);
            const float tile_sum = statistics.sum[index(tile)];
            sum = fmaf(tile_sum, factor, sum);
            // A tile that vanishes may have an infinite shift.
            if (entropy != nullptr && factor > 0.0f) {
                weighted = fmaf(fmaf(tile_sum, shift, statistics.weighted[index(tile)]), factor, weighted);
            }
        }
    }
    scratch.sum[warp][lane] = sum;
    scratch.weighted[warp][lane] = weighted;
    __syncthreads();
    if (warp != 0 || !valid) return;
    sum = 0.0f, weighted = 0.0f;
#pragma unroll
    for (int other = 0; other < kBlockWarps; ++other) {
        sum += scratch.sum[other][lane];
        weighted += scratch.weighted[other][lane];
    }
    const float log_sum = logf(sum);
    lse[row] = fmaf(reference, kLn2, log_sum);
    logp[row] = fmaf(fmaf(statistics.target_logit[row], kLog2E, -reference), kLn2, -log_sum);
    if (entropy != nullptr) entropy[row] = fmaf(-kLn2, weighted / sum, log_sum);
}

// Queues it; `entropy` is NULL together with statistics.weighted.
inline mmpo_status merge_tiles(float* lse, float* logp, float* entropy, const TileStatistics& statistics,
                               mmpo_stream stream) {
    return LAUNCH(merge_tiles_kernel, unsigned(ceil_div(statistics.rows, kWarp)), kBlock, sizeof(MergeScratch),
                  cuda_stream(stream), lse, logp, entropy, statistics, int(TileStatistics::tiles(statistics.vocab)));
}

}  // namespace MMPO_VARIANT
}  // namespace mmpo
