// What runs before and after the head's product: rows' references, and from the statistics of a row's tiles
// (logp_epilogue.cuh) to its lse, log-prob and entropy.
#pragma once

#include "logp_epilogue.cuh"
#include "reduce.cuh"
#include "vector.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {

// Exponentials that are kept without entropies are relative to one reference a row, where they can be: the target's
// logit, the one that is known beforehand at no cost to speak of. The row's largest is no less, and seldom 40 more.
inline TileStatistics begin_statistics(const bf16* exponentials, void* workspace, const uint32_t* targets, int rows,
                                       int vocab, const float* entropy) {
    const bool row_references = exponentials != nullptr && entropy == nullptr;
    return TileStatistics::of(workspace, targets, rows, vocab, entropy != nullptr, row_references);
}

// A warp a row.
template <bool kVectorized>
static __global__ void __launch_bounds__(kBlock)
    target_references_kernel(TileStatistics statistics, const bf16* __restrict__ hidden,
                             const bf16* __restrict__ weight, int width) {
    const int row = int(blockIdx.x) * kBlockWarps + int(threadIdx.x) / kWarp;
    if (row >= statistics.rows) return;
    const bf16* const x = hidden + int64_t(row) * width;
    const bf16* const target = weight + int64_t(statistics.targets[row]) * width;
    float sum = 0.0f;
    for (int column = int(lane_id()) * kVector; column < width; column += kWarp * kVector) {
        float left[kVector], right[kVector];
        unpack8(left, load8<kVectorized>(x, column, width));
        unpack8(right, load8<kVectorized>(target, column, width));
#pragma unroll
        for (int i = 0; i < kVector; ++i) sum = fmaf(left[i], right[i], sum);
    }
    sum = warp_sum(sum);
    if (lane_id() == 0) statistics.row_reference[row] = sum * kLog2E;
}

// Queues it where rows have references.
inline mmpo_status target_references(const TileStatistics& statistics, const bf16* hidden, const bf16* weight,
                                     int width, mmpo_stream stream) {
    if (statistics.row_reference == nullptr) return kSuccess;
    const unsigned blocks = unsigned(ceil_div(statistics.rows, kBlockWarps));
    return vector_rows(width) && vector_aligned(hidden, weight)
               ? LAUNCH(target_references_kernel<true>, blocks, kBlock, 0, cuda_stream(stream), statistics, hidden,
                        weight, width)
               : LAUNCH(target_references_kernel<false>, blocks, kBlock, 0, cuda_stream(stream), statistics, hidden,
                        weight, width);
}

// A block merges the tiles of 32 rows, one a lane: its warps take the tiles in turn, and the warps' results are merged
// in order.
struct MergeScratch {
    float reference[kBlockWarps][kWarp];
    float sum[kBlockWarps][kWarp];
    float weighted[kBlockWarps][kWarp];
};

// Makes the exponentials of a tile relative to its row's reference. Called by a warp; a lane's `shift` is not 0 where
// that of its row is not the tile's.
DEVICE void rebase_tile(bf16* exponentials, const TileStatistics& statistics, int first_row, int tile, float shift) {
    const int first = tile * kStatisticsColumns, end = min(first + kStatisticsColumns, statistics.vocab);
#pragma unroll 1
    for (int lane = 0; lane < kWarp; ++lane) {
        const float row_shift = __shfl_sync(0xffffffffu, shift, lane);
        if (row_shift == 0.0f) continue;
        bf16* const row = exponentials + int64_t(first_row + lane) * statistics.vocab;
        const float factor = exp2_approx(row_shift);
        for (int column = first + int(lane_id()); column < end; column += kWarp) {
            row[column] = to_bf16(to_float(row[column]) * factor);
        }
    }
}

// `entropy` is NULL together with statistics.weighted, `exponentials` together with statistics.row_reference.
static __global__ void __launch_bounds__(kBlock)
    merge_tiles_kernel(float* __restrict__ lse, float* __restrict__ logp, float* __restrict__ entropy,
                       bf16* exponentials, TileStatistics statistics, int tiles) {
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
    bool shifted = false;
    if (valid) {
#pragma unroll 8
        for (int tile = warp; tile < tiles; tile += kBlockWarps) {
            const float shift = statistics.reference[index(tile)] - reference, factor = exp2_approx(shift);
            shifted = shifted || shift != 0.0f;
            const float tile_sum = statistics.sum[index(tile)];
            sum = fmaf(tile_sum, factor, sum);
            // A tile that vanishes may have an infinite shift.
            if (entropy != nullptr && factor > 0.0f) {
                weighted = fmaf(fmaf(tile_sum, shift, statistics.weighted[index(tile)]), factor, weighted);
            }
        }
    }
    // Seldom: a walk over the tiles in which each waits for the one before.
    if (exponentials != nullptr && __any_sync(0xffffffffu, shifted)) {
#pragma unroll 1
        for (int tile = warp; tile < tiles; tile += kBlockWarps) {
            const float shift = valid ? statistics.reference[index(tile)] - reference : 0.0f;
            if (__any_sync(0xffffffffu, shift != 0.0f)) {
                rebase_tile(exponentials, statistics, int(blockIdx.x) * kWarp, tile, shift);
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
    const float target_logp = fmaf(fmaf(statistics.target_logit[row], kLog2E, -reference), kLn2, -log_sum);
    lse[row] = fmaf(reference, kLn2, log_sum);
    logp[row] = target_logp;
    if (entropy != nullptr) entropy[row] = fmaf(-kLn2, weighted / sum, log_sum);
    if (exponentials == nullptr) return;
    statistics.row_reference[row] = reference;
    // In the target's place -(1 - pi), in the same unit as the other probabilities.
    exponentials[int64_t(row) * statistics.vocab + statistics.targets[row]] = to_bf16(expm1f(target_logp) * sum);
}

// Queues it, for what the product has left.
inline mmpo_status merge_tiles(float* lse, float* logp, float* entropy, bf16* exponentials,
                               const TileStatistics& statistics, mmpo_stream stream) {
    // Relative to the tiles' references they stay as they are.
    if (statistics.row_reference == nullptr) exponentials = nullptr;
    return LAUNCH(merge_tiles_kernel, unsigned(ceil_div(statistics.rows, kWarp)), kBlock, sizeof(MergeScratch),
                  cuda_stream(stream), lse, logp, entropy, exponentials, statistics,
                  int(TileStatistics::tiles(statistics.vocab)));
}

}  // namespace MMPO_VARIANT
}  // namespace mmpo
