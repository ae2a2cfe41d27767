// The gemms of a frozen linear layer with low-rank adapters (LoRA, Hu et al. 2021), on mma.sync (common/gemm.cuh). A
// tile's accumulators begin with the adapter's product (common/low_rank_operands.cuh):
//
//   gemm            frozen operands           the adapter's                       out
//   forward         x[T, I], weight[O, I]     scale * inner[T, r] * b[O, r]^T     bf16 assigned (+ bias)
//   backward_input  dout[T, O], weight[O, I]  dropout(dinner[T, r] * a[r, I])     bf16 assigned
//
// adapted_linear_sm90.cu has the same for Hopper.

#include "common/adapted_operands.cuh"
#include "common/gemm_launch.cuh"

namespace {

template <class Lines>
mmpo_status launch(bf16* out, const bf16* bias, const typename Lines::Operands& operands, mmpo_stream stream) {
    const bool aligned =
        parts_aligned<Lines>(operands) && gemm::stores_aligned(out, operands.shape_n, operands.shape_n);
    const auto epilogue = [&](auto aligned) {
        return gemm::StoreBf16<decltype(aligned)::value>(out, bias, operands.shape_n);
    };
    return gemm::launch_gemm<Lines, gemm::Narrow::no>(operands, aligned, epilogue, stream);
}

}  // namespace

mmpo_status MMPO_EXPORT(adapted_linear_forward)(mmpo_bf16* out, const mmpo_bf16* x, const mmpo_bf16* weight,
                                                const mmpo_bf16* bias, const mmpo_low_rank_part* parts, int32_t count,
                                                int32_t rows, int32_t inputs, int32_t outputs, mmpo_stream stream) {
    if (count < 0 || count > kMostParts) return kInvalidValue;
    return launch<AdaptedForwardLines>(out, bias, forward_operands(x, weight, parts, count, rows, inputs, outputs),
                                       stream);
}

mmpo_status MMPO_EXPORT(adapted_linear_backward_input)(mmpo_bf16* dx, const mmpo_bf16* dout, const mmpo_bf16* weight,
                                                       const mmpo_bf16* dinner, const mmpo_bf16* a, int32_t rows,
                                                       int32_t inputs, int32_t outputs, int32_t inner_width,
                                                       uint64_t key, uint32_t threshold, float keep_scale,
                                                       mmpo_stream stream) {
    const Dropout dropout{key, threshold, keep_scale};
    return launch<AdaptedBackwardInputLines>(
        dx, nullptr, backward_input_operands({dout, weight, rows, inputs, outputs}, dinner, a, inner_width, dropout),
        stream);
}
