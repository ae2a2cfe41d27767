// The operands of a gemm, out[M, N] = left[M, K] * right[K, N], as both cores take them: gemm.cuh on mma.sync and
// gemm_sm90.cuh on wgmma.
#pragma once

#include "launch.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {

struct GemmOperands {
    const bf16* left;
    const bf16* right;
    int shape_m, shape_n, shape_k;
};

// Which index of an operand is contiguous in memory: the depth K, or the outer index, M or N, which also indexes `out`.
// A "line" of an operand is one run of that index.
enum class Line { depth, outer };

// The operand orders of the three gemms of a linear layer x[T, I] -> out[T, O] with weight[O, I]. Both cores read
// either order, so no operand is ever copied into its transpose. kRightParts: see GatedForwardLines in gemm_sm90.cuh.
struct ForwardLines {  // x, weight
    static constexpr Line kLeft = Line::depth, kRight = Line::depth;
    static constexpr int kRightParts = 1;
};
struct BackwardInputLines {  // dout, weight
    static constexpr Line kLeft = Line::depth, kRight = Line::outer;
    static constexpr int kRightParts = 1;
};
struct BackwardWeightLines {  // dout, x
    static constexpr Line kLeft = Line::outer, kRight = Line::outer;
    static constexpr int kRightParts = 1;
};

// Whether every line of both operands starts on a 16-byte boundary: 16-byte copies and tensor maps need that.
template <class Lines>
bool lines_aligned(const GemmOperands& operands) {
    const int left_line = Lines::kLeft == Line::depth ? operands.shape_k : operands.shape_m;
    const int right_line = Lines::kRight == Line::depth ? operands.shape_k : operands.shape_n;
    return vector_rows(left_line) && vector_rows(right_line) && vector_aligned(operands.left, operands.right);
}

}  // namespace MMPO_VARIANT
}  // namespace mmpo
