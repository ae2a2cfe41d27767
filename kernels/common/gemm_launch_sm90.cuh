// How a Hopper gemm (gemm_sm90.cuh) is launched: its problem with the tensor maps, and the choice among the tile shapes
// that a launcher has.
#pragma once

#include "gemm_sm90.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {
namespace gemm_sm90 {

// Rows that each split has in the array that its epilogue writes: whole clusters, so that splits do not overlap.
inline int64_t split_rows(const GemmPlan& plan, int shape_m) {
    const int64_t rows = int64_t(plan.block_m) * plan.cluster;
    return ceil_div(shape_m, rows) * rows;
}

// Fills in the tensor maps of the low-rank parts.
template <class C, class Problem>
mmpo_status encode_parts(Problem& problem, const typename C::Lines::Operands& operands) {
    problem.operands = operands;
    for (int i = 0; i < operands.count; ++i) {
        const LowRankPart& part = operands.parts[i];
        if (const mmpo_status error =
                C::Left::encode(&problem.left_parts[i], part.left, operands.shape_m, part.depth, part.left_stride))
            return error;
        if (const mmpo_status error =
                C::RightPart::encode(&problem.right_parts[i], part.right, part.columns, part.depth,
                                     C::RightPart::line_length(part.columns, part.depth)))
            return error;
    }
    return kSuccess;
}

template <class Tile, class Lines, class Epilogue>
mmpo_status launch_tiles(const typename Lines::Operands& operands, const GemmPlan& plan, const Epilogue& epilogue,
                         mmpo_stream stream) {
    using C = Config<Tile, Lines>;
    const int64_t tiles_m = ceil_div(operands.shape_m, Tile::BLOCK_M * Tile::kCluster);
    const int64_t tiles_n = ceil_div(operands.shape_n, Tile::BLOCK_N);
    const int64_t count = tiles_m * tiles_n * plan.splits;
    const int64_t rows = tiles_m * Tile::BLOCK_M * Tile::kCluster;
    if (count > INT32_MAX || rows * plan.splits > INT32_MAX) return kInvalidValue;
    const int64_t slices = ceil_div(operands.shape_k, BLOCK_K);
    const int group = plan.tile_group / Tile::kCluster, last_rows = int(tiles_m % group);
    Problem<Epilogue, OperandsOf<Lines>> problem{};
    problem.tiles_m = int(tiles_m);
    problem.tiles_n = int(tiles_n);
    problem.splits = plan.splits;
    problem.tile_group = group;
    problem.split_slices = int(slices / plan.splits);
    problem.longer_splits = int(slices % plan.splits);
    problem.by_tiles = Divisor::of(tiles_m * tiles_n);
    problem.by_group_tiles = Divisor::of(group * tiles_n);
    problem.by_group_rows = Divisor::of(group);
    problem.by_last_rows = Divisor::of(last_rows > 0 ? last_rows : 1);
    problem.split_rows = int(rows);
    problem.right_part = operands.shape_n / Lines::kRightParts;
    problem.epilogue = epilogue;
    const int m = operands.shape_m, n = operands.shape_n, k = operands.shape_k;
    if (const mmpo_status error =
            C::Left::encode(&problem.left, operands.left, m, k, left_stride(operands, C::Left::line_length(m, k))))
        return error;
    if (const mmpo_status error = C::RightPart::encode(&problem.right, operands.right, n, k,
                                                       right_stride(operands, C::RightPart::line_length(n, k))))
        return error;
    if constexpr (kHasParts<typename Lines::Operands>) {
        if (const mmpo_status error = encode_parts<C>(problem, operands)) return error;
    }
    if constexpr (kDropsInput<typename Lines::Operands>) {
        problem.dropout = operands.dropout;
        problem.input_width = operands.width();
    }
    const int64_t resident = multiprocessors() / Tile::kCluster > 0 ? multiprocessors() / Tile::kCluster : 1;
    const unsigned blocks = unsigned(count < resident ? count : resident) * Tile::kCluster;
    if constexpr (Tile::kCluster == 1) {
        return LAUNCH((gemm_sm90_kernel<Tile, Lines, Epilogue>), dim3(blocks), dim3(C::kThreads), Shared<C>::kBytes,
                      cuda_stream(stream), problem);
    } else {
        return LAUNCH_CLUSTERS((gemm_sm90_kernel<Tile, Lines, Epilogue>), Tile::kCluster, dim3(blocks),
                               dim3(C::kThreads), Shared<C>::kBytes, cuda_stream(stream), problem);
    }
}

// Runs the tile in clusters of one block or two, as the plan says.
template <class Tile, class Lines, class Epilogue>
mmpo_status launch_single_or_paired(const typename Lines::Operands& operands, const GemmPlan& plan,
                                    const Epilogue& epilogue, mmpo_stream stream) {
    return plan.cluster == 1 ? launch_tiles<Tile, Lines>(operands, plan, epilogue, stream)
                             : launch_tiles<Paired<Tile>, Lines>(operands, plan, epilogue, stream);
}

// Queues one gemm in the tile shape that `plan` names. If the plan splits the depth, `out` has splits * split_rows
// rows.
template <class Lines, class Epilogue>
mmpo_status launch_gemm(const typename Lines::Operands& operands, const GemmPlan& plan, const Epilogue& epilogue,
                        mmpo_stream stream) {
    if (plan.block_m == 64) return launch_tiles<Tile64x128, Lines>(operands, plan, epilogue, stream);
    if (plan.block_n == 128) return launch_single_or_paired<Tile128x128, Lines>(operands, plan, epilogue, stream);
    if (plan.block_m == 192) return launch_single_or_paired<Tile192x192, Lines>(operands, plan, epilogue, stream);
    if (plan.block_n == 192) return launch_single_or_paired<Tile128x192, Lines>(operands, plan, epilogue, stream);
    return launch_single_or_paired<Tile128x256, Lines>(operands, plan, epilogue, stream);
}

// As launch_gemm, for a plan of plan_panel_tiles.
template <class Lines, class Epilogue>
mmpo_status launch_panel_tiles(const typename Lines::Operands& operands, const GemmPlan& plan, const Epilogue& epilogue,
                               mmpo_stream stream) {
    return plan.block_n == 128 ? launch_single_or_paired<Tile128x128, Lines>(operands, plan, epilogue, stream)
                               : launch_single_or_paired<Tile128x256, Lines>(operands, plan, epilogue, stream);
}

// As launch_gemm, for a plan of plan_narrow_tiles.
template <class Lines, class Epilogue>
mmpo_status launch_narrow_tiles(const typename Lines::Operands& operands, const GemmPlan& plan,
                                const Epilogue& epilogue, mmpo_stream stream) {
    return plan.block_m == 64 ? launch_tiles<Tile64x128, Lines>(operands, plan, epilogue, stream)
                              : launch_single_or_paired<Tile128x128, Lines>(operands, plan, epilogue, stream);
}

}  // namespace gemm_sm90
}  // namespace MMPO_VARIANT
}  // namespace mmpo
