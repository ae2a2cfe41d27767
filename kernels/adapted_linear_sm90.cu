// The gemms of a frozen linear layer with low-rank adapters (LoRA, Hu et al. 2021) on Hopper: common/gemm_sm90.cuh with
// the adapter's slices first (common/low_rank_operands.cuh), and the epilogues of the plain layers.
//
//   gemm            frozen operands            the adapter's                       out
//   forward         x[T, I], weight[O, I]      scale * inner[T, r] * b[O, r]^T     bf16 assigned (+ bias)
//   swiglu_forward  x[T, I], weight[2F, I]     the same                            bf16 gate_up[T, 2F], out[T, F]
//   backward_input  dout[T, O], weight[O, I]   dropout(dinner[T, r] * a[r, I])     bf16 assigned
//
// Ranks, I and O must be multiples of 8, and arrays must start on 16 bytes.

#include "common/adapted_operands.cuh"
#include "common/gemm_epilogues_sm90.cuh"
#include "common/vector.cuh"

namespace {

using namespace gemm_sm90;

template <class Lines>
mmpo_status launch(bf16* out, const bf16* bias, const typename Lines::Operands& operands, int tile,
                   mmpo_stream stream) {
    const int m = operands.shape_m, n = operands.shape_n;
    if (m == 0 || n == 0 || operands.shape_k == 0) return kSuccess;
    if (!parts_aligned<Lines>(operands) || !vector_rows(n) || !vector_aligned(out)) return kInvalidValue;
    StoreBf16 epilogue{{}, bias, m, n};
    if (const mmpo_status error = encode_panel_map(&epilogue.out, out, m, n)) return error;
    return launch_panel_tiles<Lines>(operands, plan_panel_tiles(m, n, operands.shape_k, tile), epilogue, stream);
}

}  // namespace

mmpo_status MMPO_EXPORT(adapted_linear_forward_sm90)(mmpo_bf16* out, const mmpo_bf16* x, const mmpo_bf16* weight,
                                                     const mmpo_bf16* bias, const mmpo_low_rank_part* parts,
                                                     int32_t count, int32_t rows, int32_t inputs, int32_t outputs,
                                                     int32_t tile, mmpo_stream stream) {
    if (count < 0 || count > kMostParts) return kInvalidValue;
    return launch<AdaptedForwardLines>(out, bias, forward_operands(x, weight, parts, count, rows, inputs, outputs),
                                       tile, stream);
}

mmpo_status MMPO_EXPORT(adapted_linear_swiglu_forward_sm90)(mmpo_bf16* out, mmpo_bf16* gate_up, const mmpo_bf16* x,
                                                            const mmpo_bf16* weight, const mmpo_bf16* bias,
                                                            const mmpo_low_rank_part* parts, int32_t count,
                                                            int32_t rows, int32_t inputs, int32_t width, int32_t tile,
                                                            mmpo_stream stream) {
    if (count < 0 || count > kMostParts) return kInvalidValue;
    if (rows == 0 || inputs == 0 || width == 0) return kSuccess;
    const ScaledOperands operands = forward_operands(x, weight, parts, count, rows, inputs, 2 * width);
    const bool mappable = parts_aligned<AdaptedGatedForwardLines>(operands) && vector_rows(width);
    if (!mappable || !vector_aligned(out, gate_up)) return kInvalidValue;
    StoreSwiGlu epilogue{{}, {}, {}, bias, rows, width};
    if (const mmpo_status error = encode_swiglu_maps(epilogue, out, gate_up)) return error;
    const GemmPlan plan = plan_panel_tiles(rows, 2 * width, inputs, tile);
    return launch_panel_tiles<AdaptedGatedForwardLines>(operands, plan, epilogue, stream);
}

mmpo_status MMPO_EXPORT(adapted_linear_backward_input_sm90)(mmpo_bf16* dx, const mmpo_bf16* dout,
                                                            const mmpo_bf16* weight, const mmpo_bf16* dinner,
                                                            const mmpo_bf16* a, int32_t rows, int32_t inputs,
                                                            int32_t outputs, int32_t inner_width, uint64_t key,
                                                            uint32_t threshold, float keep_scale, int32_t tile,
                                                            mmpo_stream stream) {
    const Dropout dropout{key, threshold, keep_scale};
    const GemmOperands frozen{dout, weight, rows, inputs, outputs};
    return launch<AdaptedBackwardInputLines>(
        dx, nullptr, backward_input_operands(frozen, dinner, a, inner_width, dropout), tile, stream);
}
