// The gemms of a linear layer x[T, I] -> out[T, O] with weight[O, I], on mma.sync (common/gemm.cuh):
//
//   gemm                  left                       right                      out
//   forward               x[T, I]                    weight[O, I], transposed   bf16 assigned (+ bias)
//   backward_input        dout[T, O]                 weight[O, I]               bf16 assigned, or f32 accumulated
//   backward_weight       dout[T, O], transposed     x[T, I]                    f32 accumulated
//
// These run on GPUs where cuBLASLt is missing, and on the emulated device.

#include "common/gemm.cuh"

namespace {

// Stores the accumulators as they are; four columns at a time where kAligned.
struct PlainEpilogue {
    static constexpr bool kStores = true;

    template <class C>
    DEVICE void transform(gemm::Accumulators<C>&, gemm::TileOrigin, unsigned char*) const {}
};

// Assigns the accumulators plus bias, rounded to bf16.
template <bool kAligned>
struct StoreBf16 : PlainEpilogue {
    bf16* out;
    const bf16* bias;  // [N], or null for none
    int columns;

    StoreBf16(bf16* out, const bf16* bias, int columns) : out(out), bias(bias), columns(columns) {}

    DEVICE void store(int row, int column, float4 value) const {
        float values[4] = {value.x, value.y, value.z, value.w};
        if (bias != nullptr) {
            const int count = min(4, columns - column);
            for (int i = 0; i < count; ++i) values[i] += to_float(bias[column + i]);
        }
        gemm::store_four_bf16<kAligned>(out, columns, row, column, values);
    }
};

// Adds the accumulators to what is there, in f32.
template <bool kAligned>
struct AddF32 : PlainEpilogue {
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

// Large tiles read each operand half as often as small ones. Small tiles are for shapes with which large ones would
// leave multiprocessors, or most of a tile, idle. `epilogue` makes an epilogue for rows of `out` that are aligned to 16
// bytes (true_type) or not (false_type).
template <class Lines, class MakeEpilogue>
mmpo_status launch_gemm(const GemmOperands& operands, const void* out, MakeEpilogue epilogue, mmpo_stream stream) {
    using gemm::LargeTile;
    using gemm::SmallTile;
    if (operands.shape_m == 0 || operands.shape_n == 0 || operands.shape_k == 0) return kSuccess;
    if (!lines_aligned<Lines>(operands) || !vector_rows(operands.shape_n) || !vector_aligned(out)) {
        return gemm::launch_tiles<SmallTile, Lines, false>(operands, epilogue(std::false_type()), stream);
    }
    const auto aligned = epilogue(std::true_type());
    const bool fits_small = operands.shape_m <= SmallTile::BLOCK_M || operands.shape_n <= SmallTile::BLOCK_N;
    return fits_small || gemm::tile_count<LargeTile>(operands) < multiprocessors()
               ? gemm::launch_tiles<SmallTile, Lines, true>(operands, aligned, stream)
               : gemm::launch_tiles<LargeTile, Lines, true>(operands, aligned, stream);
}

template <class Lines>
mmpo_status launch_bf16(bf16* out, const bf16* bias, const GemmOperands& operands, mmpo_stream stream) {
    const auto epilogue = [&](auto aligned) {
        return StoreBf16<decltype(aligned)::value>(out, bias, operands.shape_n);
    };
    return launch_gemm<Lines>(operands, out, epilogue, stream);
}

template <class Lines>
mmpo_status launch_add_f32(float* out, const GemmOperands& operands, mmpo_stream stream) {
    const auto epilogue = [&](auto aligned) { return AddF32<decltype(aligned)::value>(out, operands.shape_n); };
    return launch_gemm<Lines>(operands, out, epilogue, stream);
}

}  // namespace

mmpo_status MMPO_EXPORT(linear_forward)(mmpo_bf16* out, const mmpo_bf16* x, const mmpo_bf16* weight,
                                        const mmpo_bf16* bias, int32_t rows, int32_t inputs, int32_t outputs,
                                        mmpo_stream stream) {
    return launch_bf16<ForwardLines>(out, bias, {x, weight, rows, outputs, inputs}, stream);
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
    return launch_add_f32<BackwardWeightLines>(dweight, {dout, x, outputs, inputs, rows}, stream);
}
