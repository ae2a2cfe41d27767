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

// The same, where the lines of the operands lie further apart than they are long: columns of wider matrices.
struct StridedOperands : GemmOperands {
    // Values from one line of the operand to the next.
    int left_stride, right_stride;

    StridedOperands(GemmOperands operands, int left_stride, int right_stride)
        : GemmOperands(operands), left_stride(left_stride), right_stride(right_stride) {}
};

// Values from one line to the next; `line` is a line's own length.
HOST_DEVICE int left_stride(const GemmOperands&, int line) { return line; }
HOST_DEVICE int right_stride(const GemmOperands&, int line) { return line; }
HOST_DEVICE int left_stride(const StridedOperands& operands, int) { return operands.left_stride; }
HOST_DEVICE int right_stride(const StridedOperands& operands, int) { return operands.right_stride; }

// Which index of an operand is contiguous in memory: the depth K, or the outer index, M or N, which also indexes `out`.
// A "line" of an operand is one run of that index.
enum class Line { depth, outer };

// The operand orders of the three gemms of a linear layer x[T, I] -> out[T, O] with weight[O, I]. Both cores read
// either order, so no operand is ever copied into its transpose. kRightParts: see GatedForwardLines in gemm_sm90.cuh.
struct ForwardLines {  // x, weight
    using Operands = GemmOperands;
    static constexpr Line kLeft = Line::depth, kRight = Line::depth;
    static constexpr int kRightParts = 1;
};
struct BackwardInputLines {  // dout, weight
    using Operands = GemmOperands;
    static constexpr Line kLeft = Line::depth, kRight = Line::outer;
    static constexpr int kRightParts = 1;
};
struct BackwardWeightLines {  // dout, x
    using Operands = GemmOperands;
    static constexpr Line kLeft = Line::outer, kRight = Line::outer;
    static constexpr int kRightParts = 1;
};

// One of these orders, of operands with strides.
template <class Lines>
struct Strided : Lines {
    using Operands = StridedOperands;
};

// Whether every line of both operands starts on a 16-byte boundary, which 16-byte copies and tensor maps need, and
// consists of whole 16-byte chunks: the values after a line with a stride are not zeros but other values.
template <class Lines>
bool lines_aligned(const typename Lines::Operands& operands) {
    const int left_line = Lines::kLeft == Line::depth ? operands.shape_k : operands.shape_m;
    const int right_line = Lines::kRight == Line::depth ? operands.shape_k : operands.shape_n;
    return vector_rows(left_line) && vector_rows(right_line) && vector_rows(left_stride(operands, left_line)) &&
           vector_rows(right_stride(operands, right_line)) && vector_aligned(operands.left, operands.right);
}

}  // namespace MMPO_VARIANT
}  // namespace mmpo
