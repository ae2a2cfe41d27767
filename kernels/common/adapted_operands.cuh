// Turns the arguments of the launchers in adapted_linear.cu and adapted_linear_sm90.cu into their gemms' operands.
#pragma once

#include "low_rank_operands.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {

inline ScaledOperands forward_operands(const bf16* x, const bf16* weight, const mmpo_low_rank_part* parts, int count,
                                       int rows, int inputs, int outputs) {
    ScaledOperands operands({x, weight, rows, outputs, inputs});
    operands.count = count;
    for (int i = 0; i < count; ++i) {
        const mmpo_low_rank_part& part = parts[i];
        operands.parts[i] = {part.inner, part.b, part.inner_width, part.rank, part.first, part.outputs, part.scale};
    }
    return operands;
}

// The adapters of all modules reach all columns of dx, so their inner values are one product.
inline DroppedOperands backward_input_operands(GemmOperands frozen, const bf16* dinner, const bf16* a, int inner_width,
                                               Dropout dropout) {
    DroppedOperands operands(frozen, dropout);
    operands.count = 1;
    operands.parts[0] = {dinner, a, inner_width, inner_width, 0, frozen.shape_n, 1.0f};
    return operands;
}

}  // namespace MMPO_VARIANT
}  // namespace mmpo
