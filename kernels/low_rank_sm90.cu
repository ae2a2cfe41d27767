// The products of low-rank adapters that stand alone (low_rank.cu), on Hopper: common/gemm_sm90.cuh with tiles as wide
// as the adapters' ranks, in clusters of four blocks, so that the wide operand is read once, and the narrow one once
// for 512 rows of the wide one.
//
//   gemm                   left                      right                  out
//   inner                  dropout(x[T, I])          a[r, I], transposed    inner[T, r], bf16 assigned
//   inner_backward_weight  dinner[T, r], transposed  dropout(x[T, I])       da[r, I], f32 accumulated
//   backward_input         dout[T, O]                b[O, r]                dinner[T, r], bf16 assigned
//   backward_weight        dout[T, O], transposed    inner[T, r]            db[O, r], f32 accumulated
//
// The gradient of a has tiles of plain layers (plan_narrow_tiles), and without dropout it is an ordinary linear
// layer's. The last two work on columns of wider matrices. All sizes but T must be multiples of 8, and all addresses of
// 16 bytes.

#include "common/gemm_parts_sm90.cuh"

namespace {

using namespace gemm_sm90;

// An epilogue whose accumulators are scaled first.
template <class Epilogue>
struct Scaled {
    Epilogue epilogue;
    float scale;

    template <int kCount, class Panels>
    DEVICE void operator()(const float (&d)[kCount], int row, int column, Panels& panels) const {
        float scaled[kCount];
#pragma unroll
        for (int i = 0; i < kCount; ++i) scaled[i] = d[i] * scale;
        epilogue(scaled, row, column, panels);
    }
};

bool empty(const GemmOperands& operands) {
    return operands.shape_m == 0 || operands.shape_n == 0 || operands.shape_k == 0;
}

constexpr TileShape kNarrowShape = {128, 64, 4};

GemmPlan narrow_plan(int shape_m, int shape_n, int shape_k, bool may_split) {
    return plan_among(&kNarrowShape, 1, shape_m, shape_n, shape_k, may_split);
}

template <class Tile, class Lines, class Epilogue>
mmpo_status launch_inner_tiles(const typename Lines::Operands& operands, const Epilogue& epilogue, mmpo_stream stream) {
    constexpr TileShape kShape = {Tile::BLOCK_M, Tile::BLOCK_N, 4};
    const GemmPlan plan = plan_among(&kShape, 1, operands.shape_m, operands.shape_n, operands.shape_k, false);
    return launch_tiles<Quad<Tile>, Lines>(operands, plan, epilogue, stream);
}

// In one tile for all columns, up to three modules of rank 64.
template <class Lines, class Epilogue>
mmpo_status launch_inner(const typename Lines::Operands& operands, const Epilogue& epilogue, mmpo_stream stream) {
    const int columns = operands.shape_n;
    if (columns <= Tile128x64::BLOCK_N) return launch_inner_tiles<Tile128x64, Lines>(operands, epilogue, stream);
    if (columns <= Tile128x128::BLOCK_N) return launch_inner_tiles<Tile128x128, Lines>(operands, epilogue, stream);
    return launch_inner_tiles<Tile128x192, Lines>(operands, epilogue, stream);
}

}  // namespace

mmpo_status MMPO_EXPORT(low_rank_inner_sm90)(mmpo_bf16* inner, const mmpo_bf16* x, const mmpo_bf16* a, int32_t rows,
                                             int32_t inputs, int32_t inner_width, uint64_t key, uint32_t threshold,
                                             float keep_scale, mmpo_stream stream) {
    const GemmOperands operands{x, a, rows, inner_width, inputs};
    if (empty(operands)) return kSuccess;
    const bool aligned = lines_aligned<ForwardLines>(operands) && vector_rows(inner_width) && vector_aligned(inner);
    if (!aligned) return kInvalidValue;
    StoreBf16 epilogue{{}, nullptr, rows, inner_width};
    if (const mmpo_status error = encode_panel_map(&epilogue.out, inner, rows, inner_width)) return error;
    if (threshold == 0) return launch_inner<ForwardLines>(operands, epilogue, stream);
    const LeftDropout dropped{operands, {key, threshold, keep_scale}};
    return launch_inner<DroppedForwardLines>(dropped, Scaled<StoreBf16>{epilogue, keep_scale}, stream);
}

int64_t MMPO_EXPORT(low_rank_inner_backward_weight_sm90_workspace)(int32_t rows, int32_t inputs, int32_t inner_width,
                                                                   int32_t tile) {
    return parts_bytes(plan_narrow_tiles(inner_width, inputs, rows, tile), inner_width, inputs);
}

mmpo_status MMPO_EXPORT(low_rank_inner_backward_weight_sm90)(float* da, void* workspace, const mmpo_bf16* dinner,
                                                             const mmpo_bf16* x, int32_t rows, int32_t inputs,
                                                             int32_t inner_width, uint64_t key, uint32_t threshold,
                                                             float keep_scale, int32_t tile, mmpo_stream stream) {
    using Lines = DroppedBackwardWeightLines;
    const RightDropout operands{{dinner, x, inner_width, inputs, rows}, {key, threshold, keep_scale}};
    if (empty(operands)) return kSuccess;
    if (!lines_aligned<Lines>(operands) || !vector_aligned(da)) return kInvalidValue;
    const GemmPlan plan = plan_narrow_tiles(inner_width, inputs, rows, tile);
    const auto launch = [&](const StoreF32& epilogue) {
        return launch_narrow_tiles<Lines>(operands, plan, Scaled<StoreF32>{epilogue, keep_scale}, stream);
    };
    return launch_sum(da, static_cast<float*>(workspace), inner_width, inputs, plan, launch, stream);
}

mmpo_status MMPO_EXPORT(low_rank_backward_input_sm90)(mmpo_bf16* dinner, const mmpo_bf16* dout, const mmpo_bf16* b,
                                                      int32_t rows, int32_t rank, int32_t outputs, int32_t out_width,
                                                      int32_t inner_width, float scale, mmpo_stream stream) {
    using Lines = Strided<BackwardInputLines>;
    const StridedOperands operands({dout, b, rows, rank, outputs}, out_width, rank);
    if (empty(operands)) return kSuccess;
    if (!lines_aligned<Lines>(operands) || !vector_rows(inner_width) || !vector_aligned(dinner)) return kInvalidValue;
    Scaled<StoreBf16> epilogue{{{}, nullptr, rows, rank}, scale};
    if (const mmpo_status error = encode_panel_map(&epilogue.epilogue.out, dinner, rows, rank, inner_width))
        return error;
    return launch_tiles<Quad<Tile128x64>, Lines>(operands, narrow_plan(rows, rank, outputs, false), epilogue, stream);
}

int64_t MMPO_EXPORT(low_rank_backward_weight_sm90_workspace)(int32_t rows, int32_t rank, int32_t outputs) {
    return parts_bytes(narrow_plan(outputs, rank, rows, true), outputs, rank);
}

mmpo_status MMPO_EXPORT(low_rank_backward_weight_sm90)(float* db, void* workspace, const mmpo_bf16* dout,
                                                       const mmpo_bf16* inner, int32_t rows, int32_t rank,
                                                       int32_t outputs, int32_t out_width, int32_t inner_width,
                                                       float scale, mmpo_stream stream) {
    using Lines = Strided<BackwardWeightLines>;
    const StridedOperands operands({dout, inner, outputs, rank, rows}, out_width, inner_width);
    if (empty(operands)) return kSuccess;
    if (!lines_aligned<Lines>(operands) || !vector_aligned(db)) return kInvalidValue;
    const GemmPlan plan = narrow_plan(outputs, rank, rows, true);
    const auto launch = [&](const StoreF32& epilogue) {
        return launch_tiles<Quad<Tile128x64>, Lines>(operands, plan, Scaled<StoreF32>{epilogue, scale}, stream);
    };
    return launch_sum(db, static_cast<float*>(workspace), outputs, rank, plan, launch, stream);
}
