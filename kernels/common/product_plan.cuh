// How a Hopper product is cut into tiles: a pure function of its shape, so that the same product always gives the same
// bits. It never asks the GPU: H100 and H200 (SXM) have 132 multiprocessors, and one with fewer runs the same tiles in
// more waves.
#pragma once

#include "launch.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {

// Depth of a stage: 64 bf16 values are the 128 bytes of the widest swizzle.
constexpr int kSliceDepth = 64;

constexpr int kPlannedMultiprocessors = 132;
// Tensor cores of one multiprocessor, dense bf16: 64 x 256 x 16 in 128 cycles.
constexpr int kProductsPerCycle = 2048;
// What one multiprocessor takes in from L2 when all do. An estimate between published microbenchmarks (25 to 30) and
// what unclustered 128 x 256 products reach (36 and more): it decides how much smaller tiles are worth.
constexpr int kOperandBytesPerCycle = 40;
// Values that the consumers of a block turn into panels in a cycle: what the next tile's products wait for.
constexpr int kEpilogueValuesPerCycle = 32;
// Blocks of a cluster wait for one another at every slice: the slower of the two decides.
constexpr double kPairedCost = 1.01;
// Latency of a tile's first operands when no earlier tile hides it: about 0.6 us.
constexpr int kFillCycles = 1000;
// Partial sums of a split product pass through L2 twice, at what all multiprocessors write and read together.
constexpr int kPartialBytesPerCycle = 1500;
// Launch and tail of the kernel that adds them up: about 2 us.
constexpr int kSecondLaunchCycles = 3500;
// More splits than this fill no GPU better, and cost memory.
constexpr int kMostSplits = 16;
// A split shorter than this spends more time on its epilogue than on products.
constexpr int kLeastSlicesPerSplit = 8;

struct ProductPlan {
    int block_m, block_n;
    // Blocks that share the right operand's slices, their tiles one below the other.
    int cluster;
    // Parts of the depth that are summed apart, then added in order; 1: the depth is not split.
    int splits;
    // Rows of tiles that are walked together before the next column of tiles.
    int tile_group;
    // What the cost model predicts: tensor-core time of the useful products over all multiprocessors / estimated time.
    double efficiency;
};

struct TileShape {
    int block_m, block_n, cluster;
};
// Widest first: on a tie the tile that reads less wins.
constexpr TileShape kTileShapes[] = {
    // Two consumers of 64 x 256: the most that their registers hold, and 43 products a byte loaded.
    {128, 256, 1},
    // The same by two blocks, each of which loads half of the right operand for both: 64 products a byte.
    {128, 256, 2},
    // Three consumers of 64 x 192. Divides 576 and 960, widths of SmolLM2-135M, where 256 would leave half a tile idle:
    // 8192 x 576 is one wave of 129 tiles, with nothing but its last row of tiles cut off.
    {192, 192, 1},
    {192, 192, 2},
    // As narrow, for fewer rows.
    {128, 192, 1},
    {128, 192, 2},
    // For products with too few of the larger ones.
    {128, 128, 1},
    {128, 128, 2},
    // For a handful of rows: batches of short pairs, the last rows of an evaluation.
    {64, 128, 1},
};

// Tiles, those that only complete a cluster included.
HOST_DEVICE constexpr int64_t tiles_of(TileShape shape, int64_t shape_m, int64_t shape_n) {
    return ceil_div(shape_m, shape.block_m * shape.cluster) * shape.cluster * ceil_div(shape_n, shape.block_n);
}

// Estimated cycles of a product, all multiprocessors taking tiles in waves.
inline double estimated_cycles(TileShape shape, int splits, int64_t shape_m, int64_t shape_n, int64_t shape_k) {
    const int64_t waves = ceil_div(tiles_of(shape, shape_m, shape_n) * splits, kPlannedMultiprocessors);
    const int64_t slices = ceil_div(ceil_div(shape_k, kSliceDepth), splits);
    const double products = double(shape.block_m) * shape.block_n * kSliceDepth / kProductsPerCycle;
    const double lines = shape.block_m + double(shape.block_n) / shape.cluster;
    const double loads = lines * kSliceDepth * sizeof(bf16) / kOperandBytesPerCycle;
    // A tile that only completes a cluster takes power and L2 from the others, if no time of theirs.
    const double completed = double(tiles_of(shape, shape_m, shape_n)) /
                             double(tiles_of({shape.block_m, shape.block_n, 1}, shape_m, shape_n));
    const double paired = shape.cluster > 1 ? kPairedCost * completed : 1.0;
    const double slice = (products > loads ? products : loads) * paired;
    const double epilogue = double(shape.block_m) * shape.block_n / kEpilogueValuesPerCycle;
    const double tile = double(slices) * slice + epilogue;
    const double partials = double(shape_m) * double(shape_n) * sizeof(float) * splits * 2;
    const double second = splits > 1 ? partials / kPartialBytesPerCycle + kSecondLaunchCycles : 0.0;
    return double(waves) * tile + kFillCycles + second;
}

// Rows of tiles, in whole clusters, such that a wave's block of tiles is about square in `out`: it then touches the
// fewest bytes of both operands, which is what L2 has to bring in.
inline int square_tile_group(TileShape shape) {
    int group = 1;
    while ((group + 1) * (group + 1) * shape.block_m <= kPlannedMultiprocessors * shape.block_n) ++group;
    return int(ceil_div(group, shape.cluster)) * shape.cluster;
}

// The plan of out[M, N] with depth K, in one of the tiles shapes[0 .. count]. Only products whose caller adds partial
// sums up in order may be split, and only where the tiles would occupy less than half of the multiprocessors.
inline ProductPlan plan_among(const TileShape* shapes, int count, int64_t shape_m, int64_t shape_n, int64_t shape_k,
                              bool may_split) {
    ProductPlan best{};
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
    const double useful = double(shape_m) * double(shape_n) * double(shape_k) / kProductsPerCycle;
    best.efficiency = useful / kPlannedMultiprocessors / least;
    return best;
}

// Considers only tiles whose columns per consumer are a multiple of 128, so that each half is a whole number of panels.
inline ProductPlan plan_panel_tiles(int64_t shape_m, int64_t shape_n, int64_t shape_k) {
    constexpr TileShape kShapes[] = {{128, 256, 1}, {128, 256, 2}, {128, 128, 1}, {128, 128, 2}};
    return plan_among(kShapes, 4, shape_m, shape_n, shape_k, false);
}

constexpr int kTileShapeCount = int(sizeof kTileShapes / sizeof *kTileShapes);

// With tile shape number `tile`, or the best of them for MMPO_PLANNED_TILE.
inline ProductPlan plan_product(int64_t shape_m, int64_t shape_n, int64_t shape_k, bool may_split, int tile) {
    return tile < 0 ? plan_among(kTileShapes, kTileShapeCount, shape_m, shape_n, shape_k, may_split)
                    : plan_among(kTileShapes + tile, 1, shape_m, shape_n, shape_k, may_split);
}

}  // namespace MMPO_VARIANT
}  // namespace mmpo
