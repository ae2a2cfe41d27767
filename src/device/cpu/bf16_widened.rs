//! bf16 products on processors without instructions for them: blocks are widened to f32, and the `gemm` crate multiplies.

use half::bf16;

use super::linear::{Matrix, multiply};
use super::products::Operand;
use super::storage::widen;

/// `sums[rows, columns] (+)= lhs * rhs` over `k` values from `first_k` on, of the rows and columns given by their first and
/// their number; rows of `sums` are `stride` apart. `memory` holds `(rows + columns) * k` values.
pub(super) fn add_block(
    sums: &mut [f32],
    stride: usize,
    accumulate: bool,
    (lhs, rhs): (Operand<'_, bf16>, Operand<'_, bf16>),
    (rows, columns): ((usize, usize), (usize, usize)),
    (first_k, k): (usize, usize),
    memory: &mut [f32],
) {
    let (lhs_memory, rhs_memory) = memory.split_at_mut(rows.1 * k);
    let lhs = widened(lhs_memory, lhs, rows, (first_k, k));
    let rhs = widened(rhs_memory, rhs, columns, (first_k, k)).transpose();
    multiply(sums, stride, accumulate, (rows.1, k, columns.1), lhs, rhs);
}

/// A block of an operand in f32, as a matrix with the summed index in its columns.
fn widened<'a>(
    memory: &'a mut [f32],
    operand: Operand<'_, bf16>,
    (first, count): (usize, usize),
    (first_k, k): (usize, usize),
) -> Matrix<'a> {
    let ((first_row, rows), (first_column, columns)) = match operand.along_rows {
        true => ((first, count), (first_k, k)),
        false => ((first_k, k), (first, count)),
    };
    for (row, out) in memory.chunks_exact_mut(columns).take(rows).enumerate() {
        widen(out, &operand.values[(first_row + row) * operand.stride + first_column..][..columns]);
    }
    match operand.along_rows {
        true => Matrix::rows(memory, columns),
        false => Matrix::transposed(memory, columns),
    }
}
