// The kernels before and after the head's gemm. target_references_kernel forms the rows' references before it, and
// merge_tiles_kernel turns the statistics of a row's tiles (logp_epilogue.cuh) into the row's lse, log-prob and entropy
// after it.
#pragma once

#include "logp_epilogue.cuh"
#include "reduce.cuh"
#include "vector.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {

// Lays the statistics of a forward out in `workspace`. If exponentials are kept and no entropy is wanted, they are
// relative to one reference for the whole row wherever possible. That reference is the target's logit, because it costs
// almost nothing to know in advance; the row's largest logit is at least as large, and seldom more than 40 larger.
inline TileStatistics begin_statistics(const bf16* exponentials, void* workspace, const uint32_t* targets, int rows,
                                       int vocab, const float* entropy) {
    const bool row_references = exponentials != nullptr && entropy == nullptr;
    return TileStatistics::of(workspace, targets, rows, vocab, entropy != nullptr, row_references);
}

// One warp per row.
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

// Queues target_references_kernel if rows have references.
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

// ---- the merge
//
// A block merges the tiles of 32 rows, one row per lane.

// The block's warps take the tiles in rotation, and merge their results in a fixed order through this.
struct MergeScratch {
    float reference[kBlockWarps][kWarp];
    float sum[kBlockWarps][kWarp];
    float weighted[kBlockWarps][kWarp];
};

// The row of a lane, and which tiles its warp takes: number `warp` and every kBlockWarps-th after it.
struct MergedRow {
    int row, lane, warp, tiles;
    bool valid;  // false past the last row

    DEVICE int64_t index(const TileStatistics& statistics, int tile) const {
        return int64_t(tile) * statistics.rows + row;
    }
};

// The largest reference of the row's tiles, which becomes the row's own.
DEVICE float largest_reference(const TileStatistics& statistics, MergeScratch& scratch, const MergedRow& at) {
    float reference = -FLT_MAX;
    if (at.valid) {
#pragma unroll 8
        for (int tile = at.warp; tile < at.tiles; tile += kBlockWarps) {
            reference = fmaxf(reference, statistics.reference[at.index(statistics, tile)]);
        }
    }
    scratch.reference[at.warp][at.lane] = reference;
    __syncthreads();
#pragma unroll
    for (int other = 0; other < kBlockWarps; ++other) {
        reference = fmaxf(reference, scratch.reference[other][at.lane]);
    }
    return reference;
}

// Sums over the warp's tiles, relative to the row's reference.
struct MergedSums {
    float sum = 0.0f, weighted = 0.0f;
    bool shifted = false;  // some tile has another reference than the row
};

// A tile whose reference is `shift` above the row's contributes 2^shift times its sum, with exponents that are larger
// by `shift`.
DEVICE MergedSums sum_tiles(const TileStatistics& statistics, const MergedRow& at, float reference, bool entropy) {
    MergedSums merged;
    if (!at.valid) return merged;
#pragma unroll 8
    for (int tile = at.warp; tile < at.tiles; tile += kBlockWarps) {
        const int64_t index = at.index(statistics, tile);
        const float shift = statistics.reference[index] - reference, factor = exp2_approx(shift);
        merged.shifted = merged.shifted || shift != 0.0f;
        const float tile_sum = statistics.sum[index];
        merged.sum = fmaf(tile_sum, factor, merged.sum);
        // The shift of a tile whose factor is 0 may be infinite.
        if (entropy && factor > 0.0f) {
            merged.weighted = fmaf(fmaf(tile_sum, shift, statistics.weighted[index]), factor, merged.weighted);
        }
    }
    return merged;
}

// Makes the exponentials of one tile relative to the rows' references. A warp calls it; a lane's `shift` is the tile's
// reference less that of the lane's row.
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

// Rebases the warp's tiles where they need it. The loop is slow, because each tile waits for the one before it, but it
// seldom runs.
DEVICE void rebase_tiles(bf16* exponentials, const TileStatistics& statistics, const MergedRow& at, float reference) {
#pragma unroll 1
    for (int tile = at.warp; tile < at.tiles; tile += kBlockWarps) {
        const float shift = at.valid ? statistics.reference[at.index(statistics, tile)] - reference : 0.0f;
        if (__any_sync(0xffffffffu, shift != 0.0f)) {
            rebase_tile(exponentials, statistics, int(blockIdx.x) * kWarp, tile, shift);
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
    const MergedRow at{row, lane, warp, tiles, row < statistics.rows};

    const float reference = largest_reference(statistics, scratch, at);
    const MergedSums merged = sum_tiles(statistics, at, reference, entropy != nullptr);
    if (exponentials != nullptr && __any_sync(0xffffffffu, merged.shifted)) {
        rebase_tiles(exponentials, statistics, at, reference);
    }
    scratch.sum[warp][lane] = merged.sum;
    scratch.weighted[warp][lane] = merged.weighted;
    __syncthreads();
    if (warp != 0 || !at.valid) return;
    float sum = 0.0f, weighted = 0.0f;
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
    // The target's place gets -(1 - pi), in the unit of the row's other exponentials, which are probabilities times
    // `sum`.
    exponentials[int64_t(row) * statistics.vocab + statistics.targets[row]] = to_bf16(expm1f(target_logp) * sum);
}

// Queues merge_tiles_kernel for what the gemm has left.
inline mmpo_status merge_tiles(float* lse, float* logp, float* entropy, bf16* exponentials,
                               const TileStatistics& statistics, mmpo_stream stream) {
    // Without row references the exponentials stay relative to their tiles' references.
    if (statistics.row_reference == nullptr) exponentials = nullptr;
    return LAUNCH(merge_tiles_kernel, unsigned(ceil_div(statistics.rows, kWarp)), kBlock, sizeof(MergeScratch),
                  cuda_stream(stream), lse, logp, entropy, exponentials, statistics,
                  int(TileStatistics::tiles(statistics.vocab)));
}

}  // namespace MMPO_VARIANT
}  // namespace mmpo
