//! Linear layers, and matrix products in f32: views of matrices, and calls of the `gemm` crate, which packs the operands,
//! blocks them for the registers, and uses AVX-512 where the machine has it.

use rayon::prelude::*;

use super::shared_rows::SharedRows;
use super::storage::Storage;
use super::{CpuBuffer, CpuDevice};
use crate::device::{Checked, Linear, LinearShape};
use crate::error::Result;

/// Columns of one block of a bias gradient.
const COLUMNS: usize = 64;
/// Rows summed in one f32 run before they are added to the gradient.
const RUN: usize = 64;

/// A strided view of a matrix: element `(r, c)` is `values[r * row_stride + c * column_stride]`.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    values: &'a [f32],
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// Row-major, rows `row_stride` apart.
    #[inline(always)]
    pub(super) fn rows(values: &'a [f32], row_stride: usize) -> Self {
        Matrix { values, row_stride, column_stride: 1 }
    }

    /// The transpose of [`Matrix::rows`].
    #[inline(always)]
    pub(super) fn transposed(values: &'a [f32], row_stride: usize) -> Self {
        Matrix { values, row_stride: 1, column_stride: row_stride }
    }

    /// This view with rows and columns exchanged.
    #[inline(always)]
    pub(super) fn transpose(self) -> Self {
        Matrix { row_stride: self.column_stride, column_stride: self.row_stride, ..self }
    }

    /// Whether `rows x columns` elements lie inside the slice.
    #[inline(always)]
    fn holds(&self, rows: usize, columns: usize) -> bool {
        rows == 0
            || columns == 0
            || (rows - 1) * self.row_stride + (columns - 1) * self.column_stride < self.values.len()
    }
}

/// `out[m, n] = lhs[m, k] * rhs[k, n]`, added to what `out` holds if `accumulate`; `out` is row-major with rows
/// `out_stride` apart.
pub(super) fn multiply(
    out: &mut [f32],
    out_stride: usize,
    accumulate: bool,
    sizes: (usize, usize, usize),
    lhs: Matrix<'_>,
    rhs: Matrix<'_>,
) {
    multiply_scaled(out, out_stride, accumulate, sizes, lhs, rhs, 1.0);
}

/// As [`multiply`], with the product times `scale`.
pub(super) fn multiply_scaled(
    out: &mut [f32],
    out_stride: usize,
    accumulate: bool,
    (m, k, n): (usize, usize, usize),
    lhs: Matrix<'_>,
    rhs: Matrix<'_>,
    scale: f32,
) {
    assert!(
        Matrix::rows(out, out_stride).holds(m, n) && n <= out_stride,
        "product {m} x {n} outside its {} values, rows {out_stride} apart",
        out.len()
    );
    // SAFETY: the assertion keeps the product inside `out`, a unique borrow, and its rows apart.
    unsafe { multiply_into(out.as_mut_ptr(), out_stride, accumulate, (m, k, n), lhs, rhs, scale) }
}

impl SharedRows<'_> {
    /// As [`multiply`], into the columns from `first_column` on.
    ///
    /// # Safety
    /// No other live slice or running product may touch these columns.
    pub(super) unsafe fn multiply(
        &self,
        first_column: usize,
        accumulate: bool,
        sizes: (usize, usize, usize),
        lhs: Matrix<'_>,
        rhs: Matrix<'_>,
    ) {
        // SAFETY: the caller's promise.
        unsafe { self.multiply_scaled(first_column, accumulate, sizes, lhs, rhs, 1.0) };
    }

    /// As [`multiply_scaled`], into the columns from `first_column` on.
    ///
    /// # Safety
    /// No other live slice or running product may touch these columns.
    pub(super) unsafe fn multiply_scaled(
        &self,
        first_column: usize,
        accumulate: bool,
        (m, k, n): (usize, usize, usize),
        lhs: Matrix<'_>,
        rhs: Matrix<'_>,
        scale: f32,
    ) {
        let out = self.columns(m, first_column..first_column + n);
        // SAFETY: `columns` checked the range; unaliased by the caller's promise.
        unsafe {
            multiply_into(out, self.width(), accumulate, (m, k, n), lhs, rhs, scale);
        }
    }
}

/// # Safety
/// `out` must be valid for rows `0..m` of `n` values, `out_stride >= n` apart, and nothing else may touch them meanwhile.
unsafe fn multiply_into(
    out: *mut f32,
    out_stride: usize,
    accumulate: bool,
    (m, k, n): (usize, usize, usize),
    lhs: Matrix<'_>,
    rhs: Matrix<'_>,
    scale: f32,
) {
    assert!(
        lhs.holds(m, k) && rhs.holds(k, n),
        "product {m} x {k} x {n} outside its operands of {} and {} values",
        lhs.values.len(),
        rhs.values.len()
    );
    // SAFETY: the assertion keeps every index of the operands inside its slice; the caller answers for `out`.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out,
            1,
            out_stride as isize,
            accumulate,
            lhs.values.as_ptr(),
            lhs.column_stride as isize,
            lhs.row_stride as isize,
            rhs.values.as_ptr(),
            rhs.column_stride as isize,
            rhs.row_stride as isize,
            1.0,
            scale,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

impl<C: Storage> Linear for CpuDevice<C> {
    fn reserve_linear(&self, shape: LinearShape, _: bool) -> Result<()> {
        C::reserve(self, shape);
        Ok(())
    }

    fn reserve_linear_forward(&self, shape: LinearShape) -> Result<()> {
        self.reserve_linear(shape, false)
    }

    fn run_linear_forward(
        &self,
        out: &mut CpuBuffer<C>,
        x: &CpuBuffer<C>,
        weight: &CpuBuffer<C>,
        bias: Option<&CpuBuffer<C>>,
        shape: LinearShape,
        _: Checked,
    ) -> Result<()> {
        self.traced("linear_forward", || {
            if shape.rows * shape.outputs > 0 {
                C::forward(self, out, x, weight, bias.map(|bias| &bias[..shape.outputs]), shape);
            }
            Ok(())
        })
    }

    fn run_linear_backward_input(
        &self,
        dx: &mut CpuBuffer<C>,
        dout: &CpuBuffer<C>,
        weight: &CpuBuffer<C>,
        shape: LinearShape,
        _: Checked,
    ) -> Result<()> {
        self.traced("linear_backward_input", || {
            if shape.rows * shape.inputs > 0 {
                C::backward_input(self, &mut dx[..shape.rows * shape.inputs], dout, weight, shape);
            }
            Ok(())
        })
    }

    fn run_linear_backward_weight(
        &self,
        dweight: Option<&mut CpuBuffer<f32>>,
        dbias: Option<&mut CpuBuffer<f32>>,
        dout: &CpuBuffer<C>,
        x: &CpuBuffer<C>,
        shape: LinearShape,
        _: Checked,
    ) -> Result<()> {
        self.traced("linear_backward_weight", || {
            let LinearShape { rows, inputs, outputs } = shape;
            if let Some(dweight) = dweight
                && outputs * inputs > 0
            {
                C::backward_weight(self, &mut dweight[..outputs * inputs], dout, x, shape);
            }
            if let Some(dbias) = dbias {
                self.parallel(|| {
                    dbias[..outputs].par_chunks_mut(COLUMNS).enumerate().for_each(|(block, dbias)| {
                        self.vectorized(
                            #[inline(always)]
                            || column_sums(dbias, &dout[..rows * outputs], block * COLUMNS, outputs),
                        )
                    });
                });
            }
            Ok(())
        })
    }
}

/// Adds columns `first..first + sums.len()` of `values[.., width]` to `sums`, row after row.
#[inline(always)]
fn column_sums<C: Storage>(sums: &mut [f32], values: &[C], first: usize, width: usize) {
    let columns = sums.len();
    for run in values.chunks(RUN * width) {
        let mut partial = [0.0_f32; COLUMNS];
        for row in run.chunks_exact(width) {
            for (partial, value) in partial.iter_mut().zip(&row[first..][..columns]) {
                *partial += value.widen();
            }
        }
        for (sum, partial) in sums.iter_mut().zip(partial) {
            *sum += partial;
        }
    }
}
