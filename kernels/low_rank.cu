// What a low-rank adapter (LoRA, Hu et al. 2021) adds to a linear layer, on mma.sync (common/gemm.cuh):
//
//   gemm                       left                          right                   out
//   inner                      dropout(x[T, I])              a[r, I], transposed     inner[T, r], bf16 assigned
//   inner_backward_weight      dinner[T, r], transposed      dropout(x[T, I])        da[r, I], f32 accumulated
//   forward                    inner[T, r]                   b[O, r], transposed     out[T, O], bf16 accumulated
//   backward_input             dout[T, O]                    b[O, r]                 dinner[T, r], bf16 assigned
//   backward_weight            dout[T, O], transposed        inner[T, r]             db[O, r], f32 accumulated
//   linear_backward_input_add  dinner[T, r]                  a[r, I]                 dx[T, I], bf16 accumulated
//
// The first two are ordinary linear layers where nothing is dropped. adapted_linear.cu has the frozen gemm with
// `forward` and `linear_backward_input_add` in its own accumulators; here they stand alone, for a frozen gemm by
// cuBLASLt. `forward`, `backward_input` and `backward_weight` work on columns of wider matrices: query, key and value,
// and gate and up, stand side by side in one output, each with an adapter of its own.

#include "common/gemm_launch.cuh"

namespace {

using gemm::Narrow;
using gemm::PlainEpilogue;

// Where a gemm's result stands: `columns` values of rows that lie `stride` values apart.
template <class T>
struct Target {
    T* values;
    int columns, stride;

    DEVICE T* at(int row, int column) const { return values + int64_t(row) * stride + column; }
};

DEVICE void unpack4(float (&values)[4], uint2 packed) {
    values[0] = low_bf16(packed.x);
    values[1] = high_bf16(packed.x);
    values[2] = low_bf16(packed.y);
    values[3] = high_bf16(packed.y);
}

// Assigns four columns rounded to bf16.
template <bool kAligned>
DEVICE void assign_four(bf16* target, int count, const float (&values)[4]) {
    if constexpr (kAligned) {
        *reinterpret_cast<uint2*>(target) =
            make_uint2(pack_bf16x2(values[0], values[1]), pack_bf16x2(values[2], values[3]));
    } else {
        for (int i = 0; i < count; ++i) target[i] = to_bf16(values[i]);
    }
}

// Adds four columns to what is there, and rounds the sum to bf16.
template <bool kAligned>
DEVICE void add_four(bf16* target, int count, float (&values)[4]) {
    float before[4] = {};
    if constexpr (kAligned) {
        unpack4(before, *reinterpret_cast<const uint2*>(target));
    } else {
        for (int i = 0; i < count; ++i) before[i] = to_float(target[i]);
    }
    for (int i = 0; i < 4; ++i) values[i] += before[i];
    assign_four<kAligned>(target, count, values);
}

template <bool kAligned>
struct AssignScaled : PlainEpilogue {
    Target<bf16> target;
    float scale;

    AssignScaled(Target<bf16> target, float scale) : target(target), scale(scale) {}

    DEVICE void store(int row, int column, float4 value) const {
        const float values[4] = {value.x * scale, value.y * scale, value.z * scale, value.w * scale};
        assign_four<kAligned>(target.at(row, column), min(4, target.columns - column), values);
    }
};

template <bool kAligned>
struct AddScaled : PlainEpilogue {
    Target<bf16> target;
    float scale;

    AddScaled(Target<bf16> target, float scale) : target(target), scale(scale) {}

    DEVICE void store(int row, int column, float4 value) const {
        float values[4] = {value.x * scale, value.y * scale, value.z * scale, value.w * scale};
        add_four<kAligned>(target.at(row, column), min(4, target.columns - column), values);
    }
};

template <bool kAligned>
struct AddScaledF32 : PlainEpilogue {
    Target<float> target;
    float scale;

    AddScaledF32(Target<float> target, float scale) : target(target), scale(scale) {}

    DEVICE void store(int row, int column, float4 value) const {
        float* const out = target.at(row, column);
        if constexpr (kAligned) {
            const float4 old = *reinterpret_cast<const float4*>(out);
            *reinterpret_cast<float4*>(out) = make_float4(old.x + value.x * scale, old.y + value.y * scale,
                                                          old.z + value.z * scale, old.w + value.w * scale);
        } else {
            const float values[4] = {value.x, value.y, value.z, value.w};
            const int count = min(4, target.columns - column);
            for (int i = 0; i < count; ++i) out[i] += values[i] * scale;
        }
    }
};

// Drops values of the gemm before they are added. The target's rows must lie back to back: a value's index in it is its
// place in the mask.
template <bool kAligned>
struct AddKept : PlainEpilogue {
    Target<bf16> target;
    Dropout dropout;

    AddKept(Target<bf16> target, Dropout dropout) : target(target), dropout(dropout) {}

    DEVICE void store(int row, int column, float4 value) const {
        float values[4] = {value.x, value.y, value.z, value.w};
        if (dropout.threshold != 0) {
            const int64_t index = int64_t(row) * target.columns + column;
            for (int i = 0; i < 4; ++i) values[i] = dropout(values[i], index + i);
        }
        add_four<kAligned>(target.at(row, column), min(4, target.columns - column), values);
    }
};

template <class Lines, Narrow kNarrow, class MakeEpilogue>
mmpo_status launch_gemm(const typename Lines::Operands& operands, const void* out, int out_stride,
                        MakeEpilogue epilogue, mmpo_stream stream) {
    const bool aligned = lines_aligned<Lines>(operands) && gemm::stores_aligned(out, operands.shape_n, out_stride);
    return gemm::launch_gemm<Lines, kNarrow>(operands, aligned, epilogue, stream);
}

}  // namespace

mmpo_status MMPO_EXPORT(low_rank_inner)(mmpo_bf16* inner, const mmpo_bf16* x, const mmpo_bf16* a, int32_t rows,
                                        int32_t inputs, int32_t inner_width, uint64_t key, uint32_t threshold,
                                        float keep_scale, mmpo_stream stream) {
    const LeftDropout operands{{x, a, rows, inner_width, inputs}, {key, threshold, keep_scale}};
    const auto epilogue = [&](auto aligned) {
        return AssignScaled<decltype(aligned)::value>({inner, inner_width, inner_width}, keep_scale);
    };
    return launch_gemm<DroppedForwardLines, Narrow::columns>(operands, inner, inner_width, epilogue, stream);
}

mmpo_status MMPO_EXPORT(low_rank_inner_backward_weight)(float* da, const mmpo_bf16* dinner, const mmpo_bf16* x,
                                                        int32_t rows, int32_t inputs, int32_t inner_width, uint64_t key,
                                                        uint32_t threshold, float keep_scale, mmpo_stream stream) {
    const RightDropout operands{{dinner, x, inner_width, inputs, rows}, {key, threshold, keep_scale}};
    const auto epilogue = [&](auto aligned) {
        return AddScaledF32<decltype(aligned)::value>({da, inputs, inputs}, keep_scale);
    };
    return launch_gemm<DroppedBackwardWeightLines, Narrow::rows>(operands, da, inputs, epilogue, stream);
}

mmpo_status MMPO_EXPORT(low_rank_forward)(mmpo_bf16* out, const mmpo_bf16* inner, const mmpo_bf16* b, int32_t rows,
                                          int32_t rank, int32_t outputs, int32_t out_width, int32_t inner_width,
                                          float scale, mmpo_stream stream) {
    const StridedOperands operands({inner, b, rows, outputs, rank}, inner_width, rank);
    const auto epilogue = [&](auto aligned) {
        return AddScaled<decltype(aligned)::value>({out, outputs, out_width}, scale);
    };
    return launch_gemm<Strided<ForwardLines>, Narrow::no>(operands, out, out_width, epilogue, stream);
}

mmpo_status MMPO_EXPORT(low_rank_backward_input)(mmpo_bf16* dinner, const mmpo_bf16* dout, const mmpo_bf16* b,
                                                 int32_t rows, int32_t rank, int32_t outputs, int32_t out_width,
                                                 int32_t inner_width, float scale, mmpo_stream stream) {
    const StridedOperands operands({dout, b, rows, rank, outputs}, out_width, rank);
    const auto epilogue = [&](auto aligned) {
        return AssignScaled<decltype(aligned)::value>({dinner, rank, inner_width}, scale);
    };
    return launch_gemm<Strided<BackwardInputLines>, Narrow::columns>(operands, dinner, inner_width, epilogue, stream);
}

mmpo_status MMPO_EXPORT(low_rank_backward_weight)(float* db, const mmpo_bf16* dout, const mmpo_bf16* inner,
                                                  int32_t rows, int32_t rank, int32_t outputs, int32_t out_width,
                                                  int32_t inner_width, float scale, mmpo_stream stream) {
    const StridedOperands operands({dout, inner, outputs, rank, rows}, out_width, inner_width);
    const auto epilogue = [&](auto aligned) { return AddScaledF32<decltype(aligned)::value>({db, rank, rank}, scale); };
    return launch_gemm<Strided<BackwardWeightLines>, Narrow::columns>(operands, db, rank, epilogue, stream);
}

mmpo_status MMPO_EXPORT(linear_backward_input_add)(mmpo_bf16* dx, const mmpo_bf16* dout, const mmpo_bf16* weight,
                                                   int32_t rows, int32_t inputs, int32_t outputs, uint64_t key,
                                                   uint32_t threshold, float keep_scale, mmpo_stream stream) {
    const auto epilogue = [&](auto aligned) {
        return AddKept<decltype(aligned)::value>({dx, inputs, inputs}, {key, threshold, keep_scale});
    };
    return launch_gemm<BackwardInputLines, Narrow::no>({dout, weight, rows, inputs, outputs}, dx, inputs, epilogue,
                                                       stream);
}
