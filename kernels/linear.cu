// The gemms of a linear layer x[T, I] -> out[T, O] with weight[O, I], on mma.sync (common/gemm.cuh):
//
//   gemm                  left                       right                      out
//   forward               x[T, I]                    weight[O, I], transposed   bf16 assigned (+ bias)
//   backward_input        dout[T, O]                 weight[O, I]               bf16 assigned, or f32 accumulated
//   backward_weight       dout[T, O], transposed     x[T, I]                    f32 accumulated
//
// These run on GPUs where cuBLASLt is missing, and on the emulated device.

#include "common/gemm_launch.cuh"

namespace {

using gemm::Narrow;

// Adds the accumulators to what is there, in f32.
template <bool kAligned>
struct AddF32 : gemm::PlainEpilogue {
    float* out;
    int columns;

    AddF32(float* out, int columns) : out(out), columns(columns) {}

    DEVICE void store(int row, int column, float4 value) const {
        float* const target = out + int64_t(row) * columns + column;
        if constexpr (kAligned) {
            const float4 old = *reinterpret_cast<const float4*>(target);
            *reinterpret_cast<float4*>(target) =
                make_float4(old.x + value.x, old.y + value.y, old.z + value.z, old.w + value.w);
        } else {
            const float values[4] = {value.x, value.y, value.z, value.w};
            const int count = min(4, columns - column);
            for (int i = 0; i < count; ++i) target[i] += values[i];
        }
    }
};

template <class Lines, Narrow kNarrow = Narrow::no>
mmpo_status launch_bf16(bf16* out, const bf16* bias, const GemmOperands& operands, mmpo_stream stream) {
    const bool aligned =
        lines_aligned<Lines>(operands) && gemm::stores_aligned(out, operands.shape_n, operands.shape_n);
    const auto epilogue = [&](auto aligned) {
        return gemm::StoreBf16<decltype(aligned)::value>(out, bias, operands.shape_n);
    };
    return gemm::launch_gemm<Lines, kNarrow>(operands, aligned, epilogue, stream);
}

template <class Lines, Narrow kNarrow = Narrow::no>
mmpo_status launch_add_f32(float* out, const GemmOperands& operands, mmpo_stream stream) {
    const bool aligned =
        lines_aligned<Lines>(operands) && gemm::stores_aligned(out, operands.shape_n, operands.shape_n);
    const auto epilogue = [&](auto aligned) { return AddF32<decltype(aligned)::value>(out, operands.shape_n); };
    return gemm::launch_gemm<Lines, kNarrow>(operands, aligned, epilogue, stream);
}

}  // namespace

mmpo_status MMPO_EXPORT(linear_forward)(mmpo_bf16* out, const mmpo_bf16* x, const mmpo_bf16* weight,
                                        const mmpo_bf16* bias, int32_t rows, int32_t inputs, int32_t outputs,
                                        mmpo_stream stream) {
    return launch_bf16<ForwardLines, Narrow::columns>(out, bias, {x, weight, rows, outputs, inputs}, stream);
}

mmpo_status MMPO_EXPORT(linear_backward_input)(mmpo_bf16* dx, const mmpo_bf16* dout, const mmpo_bf16* weight,
                                               int32_t rows, int32_t inputs, int32_t outputs, mmpo_stream stream) {
    return launch_bf16<BackwardInputLines>(dx, nullptr, {dout, weight, rows, inputs, outputs}, stream);
}

mmpo_status MMPO_EXPORT(linear_backward_input_f32)(float* dx, const mmpo_bf16* dout, const mmpo_bf16* weight,
                                                   int32_t rows, int32_t inputs, int32_t outputs, mmpo_stream stream) {
    return launch_add_f32<BackwardInputLines>(dx, {dout, weight, rows, inputs, outputs}, stream);
}

mmpo_status MMPO_EXPORT(linear_backward_weight)(float* dweight, const mmpo_bf16* dout, const mmpo_bf16* x, int32_t rows,
                                                int32_t inputs, int32_t outputs, mmpo_stream stream) {
    return launch_add_f32<BackwardWeightLines, Narrow::rows>(dweight, {dout, x, outputs, inputs, rows}, stream);
}
