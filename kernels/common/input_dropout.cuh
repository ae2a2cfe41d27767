// A gemm one of whose operands is dropout(x), where x[T, width] lies in memory: what low-rank adapters multiply (Hu et
// al. 2021). Values are dropped in shared memory, after a slice of x has arrived and before tensor cores read it, so
// that dropout(x) never goes to memory and back. What is kept stays as it is, and the epilogue multiplies the sums by
// `dropout.keep_scale`.
#pragma once

#include <type_traits>

#include "dropout.cuh"
#include "gemm_operands.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {

struct InputDropout : GemmOperands {
    Dropout dropout;

    InputDropout(GemmOperands operands, Dropout dropout) : GemmOperands(operands), dropout(dropout) {}
};

// The left operand is dropout(x), with the depth along the rows of x.
struct LeftDropout : InputDropout {
    using InputDropout::InputDropout;
    static constexpr bool kLeft = true;

    // Values of a row of x.
    HOST_DEVICE int width() const { return shape_k; }
};

// The right operand is, with the columns of `out` along the rows of x.
struct RightDropout : InputDropout {
    using InputDropout::InputDropout;
    static constexpr bool kLeft = false;

    HOST_DEVICE int width() const { return shape_n; }
};

template <class Operands>
constexpr bool kDropsInput = std::is_base_of<InputDropout, Operands>::value;

struct DroppedForwardLines : ForwardLines {  // dropout(x), a
    using Operands = LeftDropout;
};
struct DroppedBackwardWeightLines : BackwardWeightLines {  // dinner, dropout(x)
    using Operands = RightDropout;
};

}  // namespace MMPO_VARIANT
}  // namespace mmpo
