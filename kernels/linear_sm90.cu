// The gemms of a linear layer on Hopper: common/gemm_sm90.cuh with the epilogues that store them.
//
//   gemm             left                    right                      out
//   forward          x[T, I]                 weight[O, I], transposed   bf16 assigned (+ bias)
//   backward_input   dout[T, O]              weight[O, I]               bf16 assigned, or f32 accumulated
//   backward_weight  dout[T, O], transposed  x[T, I]                    f32 accumulated
//   swiglu_forward   x[T, I]                 weight[2F, I], transposed  bf16 gate_up[T, 2F] (+ bias) and out[T, F]
//
// T may be anything; I and O must be multiples of 8, and arrays must start on 16 bytes, which tensor maps ask for.
// `tile` is the number of a tile shape in common/gemm_plan_sm90.cuh, or MMPO_PLANNED_TILE.

#include "common/gemm_parts_sm90.cuh"

namespace {

using namespace gemm_sm90;

template <class Lines>
bool is_supported(const GemmOperands& operands, const void* out, int tile) {
    return lines_aligned<Lines>(operands) && vector_rows(operands.shape_n) && vector_aligned(out) &&
           tile < kTileShapeCount;
}

bool empty(const GemmOperands& operands) {
    return operands.shape_m == 0 || operands.shape_n == 0 || operands.shape_k == 0;
}

template <class Lines>
mmpo_status launch_bf16(bf16* out, const bf16* bias, const GemmOperands& operands, int tile, mmpo_stream stream) {
    if (empty(operands)) return kSuccess;
    if (!is_supported<Lines>(operands, out, tile)) return kInvalidValue;
    StoreBf16 epilogue{{}, bias, operands.shape_m, operands.shape_n};
    if (const mmpo_status error = encode_panel_map(&epilogue.out, out, operands.shape_m, operands.shape_n))
        return error;
    const GemmPlan plan = plan_gemm(operands.shape_m, operands.shape_n, operands.shape_k, false, tile);
    return launch_gemm<Lines>(operands, plan, epilogue, stream);
}

// Bytes of the partial sums of out[M, N] with depth K; 0 where the depth is not split.
int64_t parts_bytes(int shape_m, int shape_n, int shape_k, int tile) {
    if (tile >= kTileShapeCount) return 0;
    return gemm_sm90::parts_bytes(plan_gemm(shape_m, shape_n, shape_k, true, tile), shape_m, shape_n);
}

template <class Lines>
mmpo_status launch_add_f32(float* out, void* workspace, const GemmOperands& operands, int tile, mmpo_stream stream) {
    if (empty(operands)) return kSuccess;
    if (!is_supported<Lines>(operands, out, tile)) return kInvalidValue;
    const GemmPlan plan = plan_gemm(operands.shape_m, operands.shape_n, operands.shape_k, true, tile);
    const auto launch = [&](const StoreF32& epilogue) { return launch_gemm<Lines>(operands, plan, epilogue, stream); };
    return launch_sum(out, static_cast<float*>(workspace), operands.shape_m, operands.shape_n, plan, launch, stream);
}

}  // namespace

mmpo_status MMPO_EXPORT(linear_forward_sm90)(mmpo_bf16* out, const mmpo_bf16* x, const mmpo_bf16* weight,
                                             const mmpo_bf16* bias, int32_t rows, int32_t inputs, int32_t outputs,
                                             int32_t tile, mmpo_stream stream) {
    return launch_bf16<ForwardLines>(out, bias, {x, weight, rows, outputs, inputs}, tile, stream);
}

mmpo_status MMPO_EXPORT(linear_swiglu_forward_sm90)(mmpo_bf16* out, mmpo_bf16* gate_up, const mmpo_bf16* x,
                                                    const mmpo_bf16* weight, const mmpo_bf16* bias, int32_t rows,
                                                    int32_t inputs, int32_t width, mmpo_stream stream) {
    const GemmOperands operands{x, weight, rows, 2 * width, inputs};
    if (empty(operands)) return kSuccess;
    const bool mappable = lines_aligned<GatedForwardLines>(operands) && vector_rows(width);
    if (!mappable || !vector_aligned(out, gate_up)) return kInvalidValue;
    StoreSwiGlu epilogue{{}, {}, {}, bias, rows, width};
    if (const mmpo_status error = encode_swiglu_maps(epilogue, out, gate_up)) return error;
    const GemmPlan plan = plan_panel_tiles(rows, 2 * width, inputs);
    return launch_panel_tiles<GatedForwardLines>(operands, plan, epilogue, stream);
}

mmpo_status MMPO_EXPORT(linear_backward_input_sm90)(mmpo_bf16* dx, const mmpo_bf16* dout, const mmpo_bf16* weight,
                                                    int32_t rows, int32_t inputs, int32_t outputs, int32_t tile,
                                                    mmpo_stream stream) {
    return launch_bf16<BackwardInputLines>(dx, nullptr, {dout, weight, rows, inputs, outputs}, tile, stream);
}

int64_t MMPO_EXPORT(linear_backward_input_f32_sm90_workspace)(int32_t rows, int32_t inputs, int32_t outputs,
                                                              int32_t tile) {
    return parts_bytes(rows, inputs, outputs, tile);
}

mmpo_status MMPO_EXPORT(linear_backward_input_f32_sm90)(float* dx, void* workspace, const mmpo_bf16* dout,
                                                        const mmpo_bf16* weight, int32_t rows, int32_t inputs,
                                                        int32_t outputs, int32_t tile, mmpo_stream stream) {
    return launch_add_f32<BackwardInputLines>(dx, workspace, {dout, weight, rows, inputs, outputs}, tile, stream);
}

int64_t MMPO_EXPORT(linear_backward_weight_sm90_workspace)(int32_t rows, int32_t inputs, int32_t outputs,
                                                           int32_t tile) {
    return parts_bytes(outputs, inputs, rows, tile);
}

mmpo_status MMPO_EXPORT(linear_backward_weight_sm90)(float* dweight, void* workspace, const mmpo_bf16* dout,
                                                     const mmpo_bf16* x, int32_t rows, int32_t inputs, int32_t outputs,
                                                     int32_t tile, mmpo_stream stream) {
    return launch_add_f32<BackwardWeightLines>(dweight, workspace, {dout, x, outputs, inputs, rows}, tile, stream);
}

int32_t MMPO_EXPORT(gemm_tiles_sm90)(void) { return kTileShapeCount; }

mmpo_gemm_plan MMPO_EXPORT(gemm_plan_sm90)(int32_t shape_m, int32_t shape_n, int32_t shape_k, int32_t may_split,
                                           int32_t tile) {
    if (tile >= kTileShapeCount) return {};
    const GemmPlan plan = plan_gemm(shape_m, shape_n, shape_k, may_split != 0, tile);
    return {plan.block_m, plan.block_n, plan.cluster, plan.splits, plan.tile_group, plan.efficiency};
}
