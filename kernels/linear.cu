// Matrix products of a linear layer x[T, I] -> out[T, O] with weight[O, I], on the core of common/product.cuh:
//
//   product               left                 right                  out
//   forward               x[T, I]              weight[O, I], by rows  bf16 assigned (+ bias)
//   backward_input        dout[T, O]           weight[O, I]           bf16 assigned, or f32 accumulated
//   backward_weight       dout[T, O], by rows  x[T, I]                f32 accumulated
//
// This runs where cuBLASLt is missing, and on the emulated device.

#include "common/product.cuh"

namespace {

using product::Contiguous;
using product::Operands;

using Forward = product::Order<Contiguous::kDepth, Contiguous::kDepth>;
using BackwardInput = product::Order<Contiguous::kDepth, Contiguous::kOuter>;
using BackwardWeight = product::Order<Contiguous::kOuter, Contiguous::kOuter>;

// The accumulators as they are, to `out`; four columns at a time where kAligned.
struct PlainEpilogue {
    static constexpr bool kStores = true;

    template <class L>
    DEVICE void transform(product::Accumulators<L>&, product::TileOrigin, unsigned char*) const {}
};

// Assigned as bf16, plus bias.
template <bool kAligned>
struct StoreBf16 : PlainEpilogue {
    bf16* out;
    const bf16* bias;  // [N], or null
    int columns;

    StoreBf16(bf16* out, const bf16* bias, int columns) : out(out), bias(bias), columns(columns) {}

    DEVICE void store(int row, int column, float4 value) const {
        float values[4] = {value.x, value.y, value.z, value.w};
        if (bias != nullptr) {
            const int count = min(4, columns - column);
            for (int i = 0; i < count; ++i) values[i] += to_float(bias[column + i]);
        }
        product::store_four_bf16<kAligned>(out, columns, row, column, values);
    }
};

// Accumulated in f32.
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

// Large tiles read each operand half as often; small ones are for shapes that would leave multiprocessors, or most of a
// large tile, idle. `epilogue` makes an epilogue for aligned (true_type) or any (false_type) rows of `out`.
template <class Order, class MakeEpilogue>
mmpo_status launch_product(const Operands& operands, const void* out, MakeEpilogue epilogue, mmpo_stream stream) {
    using product::LargeTile;
    using product::SmallTile;
    if (operands.shape_m == 0 || operands.shape_n == 0 || operands.shape_k == 0) return kSuccess;
    if (!product::lines_aligned<Order>(operands) || !vector_rows(operands.shape_n) || !vector_aligned(out)) {
        return product::launch_tiles<SmallTile, Order, false>(operands, epilogue(std::false_type()), stream);
    }
    const auto aligned = epilogue(std::true_type());
    const bool fits_small = operands.shape_m <= SmallTile::BLOCK_M || operands.shape_n <= SmallTile::BLOCK_N;
    return fits_small || product::tile_count<LargeTile>(operands) < multiprocessors()
               ? product::launch_tiles<SmallTile, Order, true>(operands, aligned, stream)
               : product::launch_tiles<LargeTile, Order, true>(operands, aligned, stream);
}

template <class Order>
mmpo_status launch_bf16(bf16* out, const bf16* bias, const Operands& operands, mmpo_stream stream) {
    const auto epilogue = [&](auto aligned) {
        return StoreBf16<decltype(aligned)::value>(out, bias, operands.shape_n);
    };
    return launch_product<Order>(operands, out, epilogue, stream);
}

template <class Order>
mmpo_status launch_add_f32(float* out, const Operands& operands, mmpo_stream stream) {
    const auto epilogue = [&](auto aligned) { return AddF32<decltype(aligned)::value>(out, operands.shape_n); };
    return launch_product<Order>(operands, out, epilogue, stream);
}

}  // namespace

mmpo_status MMPO_EXPORT(linear_forward)(mmpo_bf16* out, const mmpo_bf16* x, const mmpo_bf16* weight,
                                        const mmpo_bf16* bias, int32_t rows, int32_t inputs, int32_t outputs,
                                        mmpo_stream stream) {
    return launch_bf16<Forward>(out, bias, {x, weight, rows, outputs, inputs}, stream);
}

mmpo_status MMPO_EXPORT(linear_backward_input)(mmpo_bf16* dx, const mmpo_bf16* dout, const mmpo_bf16* weight,
                                               int32_t rows, int32_t inputs, int32_t outputs, mmpo_stream stream) {
    return launch_bf16<BackwardInput>(dx, nullptr, {dout, weight, rows, inputs, outputs}, stream);
}

mmpo_status MMPO_EXPORT(linear_backward_input_f32)(float* dx, const mmpo_bf16* dout, const mmpo_bf16* weight,
                                                   int32_t rows, int32_t inputs, int32_t outputs, mmpo_stream stream) {
    return launch_add_f32<BackwardInput>(dx, {dout, weight, rows, inputs, outputs}, stream);
}

mmpo_status MMPO_EXPORT(linear_backward_weight)(float* dweight, const mmpo_bf16* dout, const mmpo_bf16* x, int32_t rows,
                                                int32_t inputs, int32_t outputs, mmpo_stream stream) {
    return launch_add_f32<BackwardWeight>(dweight, {dout, x, outputs, inputs, rows}, stream);
}
