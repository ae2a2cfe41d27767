// How a Hopper gemm is cut into tiles. The plan is a pure function of the shape, so that the same gemm always gives the
// same bits. It never asks the GPU: it plans for kPlannedMultiprocessors, and a GPU with fewer runs the same tiles in
// more waves. (A wave is as many tiles as run at one time.)
#pragma once

#include "launch.cuh"
#include "limits.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {

// Depth of a slice, which is one stage: 64 bf16 values are the 128 bytes that the widest swizzle spans.
constexpr int kSliceDepth = 64;

// What one multiprocessor's tensor cores do with dense bf16: a wgmma of 64 x 256 x 16 takes 128 cycles.
constexpr int kMultiplyAddsPerCycle = 2048;
// Bytes that one multiprocessor receives from L2 in a cycle when all of them load. This is an estimate between
// published microbenchmarks (25 to 30) and what unclustered 128 x 256 tiles reach (36 and more). It decides how much
// smaller tiles cost.
constexpr int kOperandBytesPerCycle = 40;
// Values that the consumers of a block convert and write to panels in a cycle. The next tile waits for this.
constexpr int kEpilogueValuesPerCycle = 32;
// The blocks of a cluster wait for one another at every slice, so the slower one decides.
constexpr double kPairedCost = 1.01;
// Latency of a tile's first operands when no earlier tile hides it: about 0.6 us.
constexpr int kFillCycles = 1000;
// Partial sums of a split gemm are written to L2 and read again. This is what all multiprocessors together move.
constexpr int kPartialBytesPerCycle = 1500;
// Launch and tail of the kernel that adds the partial sums: about 2 us.
constexpr int kSecondLaunchCycles = 3500;
// More splits than this fill no GPU better, and cost memory.
constexpr int kMostSplits = 16;
// A shorter split spends more time in its epilogue than in its wgmmas.
constexpr int kLeastSlicesPerSplit = 8;

struct GemmPlan {
    int block_m, block_n;
    // Blocks that share the right operand's slices; their tiles lie one below the other.
    int cluster;
    // Parts of the depth that are summed separately and then added in order; 1 means that the depth is not split.
    int splits;
    // Rows of tiles that are walked together before the next column of tiles.
    int tile_group;
    // The cost model's prediction: the tensor-core time of the useful work on all multiprocessors / the estimated time.
    double efficiency;
};

struct TileShape {
    int block_m, block_n, cluster;
};
// The largest tiles first: of two that cost the same, the first one wins, and it reads less.
constexpr TileShape kTileShapes[] = {
    // Two consumers of 64 x 256, the most that their registers hold: 43 multiply-adds for each byte loaded.
    {128, 256, 1},
    // The same by two blocks, each of which loads half of the right operand for both: 64 multiply-adds a byte.
    {128, 256, 2},
    // Three consumers of 64 x 192. 192 divides 576 and 960, widths of SmolLM2, where 256 would leave half a tile idle:
    // 8192 x 576 is one wave of 129 tiles, of which only the last row of tiles is cut off.
    {192, 192, 1},
    {192, 192, 2},
    // The same width, for fewer rows.
    {128, 192, 1},
    {128, 192, 2},
    // For a gemm that has too few of the larger tiles.
    {128, 128, 1},
    {128, 128, 2},
    // For a handful of rows: batches of short pairs, the last rows of an evaluation.
    {64, 128, 1},
};
constexpr int kTileShapeCount = int(sizeof kTileShapes / sizeof *kTileShapes);

// The number of tiles, including those outside `out` that only complete a cluster.
HOST_DEVICE constexpr int64_t tiles_of(TileShape shape, int64_t shape_m, int64_t shape_n) {
    return ceil_div(shape_m, shape.block_m * shape.cluster) * shape.cluster * ceil_div(shape_n, shape.block_n);
}

// Estimated cycles of a gemm whose tiles run in waves on all multiprocessors.
inline double estimated_cycles(TileShape shape, int splits, int64_t shape_m, int64_t shape_n, int64_t shape_k) {
    const int64_t waves = ceil_div(tiles_of(shape, shape_m, shape_n) * splits, kPlannedMultiprocessors);
    const int64_t slices = ceil_div(ceil_div(shape_k, kSliceDepth), splits);
    const double multiply_adds = double(shape.block_m) * shape.block_n * kSliceDepth / kMultiplyAddsPerCycle;
    const double lines = shape.block_m + double(shape.block_n) / shape.cluster;
    const double loads = lines * kSliceDepth * sizeof(bf16) / kOperandBytesPerCycle;
    // A tile that only completes a cluster takes no time from the others, but power and L2 bandwidth.
    const double completed = double(tiles_of(shape, shape_m, shape_n)) /
                             double(tiles_of({shape.block_m, shape.block_n, 1}, shape_m, shape_n));
    const double paired = shape.cluster > 1 ? kPairedCost * completed : 1.0;
    const double slice = (multiply_adds > loads ? multiply_adds : loads) * paired;
    const double epilogue = double(shape.block_m) * shape.block_n / kEpilogueValuesPerCycle;
    const double tile = double(slices) * slice + epilogue;
    const double partials = double(shape_m) * double(shape_n) * sizeof(float) * splits * 2;
    const double second = splits > 1 ? partials / kPartialBytesPerCycle + kSecondLaunchCycles : 0.0;
    return double(waves) * tile + kFillCycles + second;
}

// Rows of tiles to walk together, in whole clusters, chosen so that the tiles of a wave cover about a square of `out`.
// Such a wave reads the fewest bytes of both operands, which L2 has to fetch.
inline int square_tile_group(TileShape shape) {
    int group = 1;
    while ((group + 1) * (group + 1) * shape.block_m <= kPlannedMultiprocessors * shape.block_n) ++group;
    return int(ceil_div(group, shape.cluster)) * shape.cluster;
}

// The plan of out[M, N] with depth K in the best of the tiles shapes[0 .. count]. The depth may be split only if the
// caller adds the partial sums up in order, and is split only where the tiles would occupy less than half of the
// multiprocessors.
inline GemmPlan plan_among(const TileShape* shapes, int count, int64_t shape_m, int64_t shape_n, int64_t shape_k,
                           bool may_split) {
    GemmPlan best{};
    double least = 0.0;
    for (const TileShape* shape = shapes; shape != shapes + count; ++shape) {
        const bool few = 2 * tiles_of(*shape, shape_m, shape_n) <= kPlannedMultiprocessors;
        const int64_t longest = ceil_div(shape_k, kSliceDepth) / kLeastSlicesPerSplit;
        const int64_t most = may_split && few ? (longest < kMostSplits ? longest : kMostSplits) : 1;
        for (int splits = 1; splits <= (most > 1 ? most : 1); ++splits) {
            const double cycles = estimated_cycles(*shape, splits, shape_m, shape_n, shape_k);
            if (best.block_m != 0 && cycles >= least) continue;
            least = cycles;
            best = {shape->block_m, shape->block_n, shape->cluster, splits, square_tile_group(*shape), 0.0};
        }
    }
    const double useful = double(shape_m) * double(shape_n) * double(shape_k) / kMultiplyAddsPerCycle;
    best.efficiency = useful / kPlannedMultiprocessors / least;
    return best;
}

// The plan in the best of these tiles, or in the tile shape number `tile` where it is one of them.
template <int kCount>
GemmPlan plan_named_or_best(const TileShape (&shapes)[kCount], int64_t shape_m, int64_t shape_n, int64_t shape_k,
                            bool may_split, int tile) {
    for (const TileShape& shape : shapes) {
        const bool wanted = tile >= 0 && tile < kTileShapeCount && shape.block_m == kTileShapes[tile].block_m &&
                            shape.block_n == kTileShapes[tile].block_n && shape.cluster == kTileShapes[tile].cluster;
        if (wanted) return plan_among(&shape, 1, shape_m, shape_n, shape_k, may_split);
    }
    return plan_among(shapes, kCount, shape_m, shape_n, shape_k, may_split);
}

// Considers only tiles whose columns per consumer are a multiple of 128, so that each half is a whole number of panels.
inline GemmPlan plan_panel_tiles(int64_t shape_m, int64_t shape_n, int64_t shape_k, int tile = -1) {
    constexpr TileShape kShapes[] = {{128, 256, 1}, {128, 256, 2}, {128, 128, 1}, {128, 128, 2}};
    return plan_named_or_best(kShapes, shape_m, shape_n, shape_k, false, tile);
}

// For an `out` of few rows, as wide as a layer, whose depth may be split: the gradient of the adapters' A.
inline GemmPlan plan_narrow_tiles(int64_t shape_m, int64_t shape_n, int64_t shape_k, int tile) {
    constexpr TileShape kShapes[] = {{128, 128, 1}, {128, 128, 2}, {64, 128, 1}};
    return plan_named_or_best(kShapes, shape_m, shape_n, shape_k, true, tile);
}

// Uses the tile shape number `tile`, or the best of all for MMPO_PLANNED_TILE.
inline GemmPlan plan_gemm(int64_t shape_m, int64_t shape_n, int64_t shape_k, bool may_split, int tile) {
    return tile < 0 ? plan_among(kTileShapes, kTileShapeCount, shape_m, shape_n, shape_k, may_split)
                    : plan_among(kTileShapes + tile, 1, shape_m, shape_n, shape_k, may_split);
}

}  // namespace MMPO_VARIANT
}  // namespace mmpo
