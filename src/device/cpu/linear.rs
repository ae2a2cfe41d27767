//! Matrix products, all through the `gemm` crate, which packs the operands, blocks them for the registers, and uses
//! AVX-512 where the machine has it. Each task runs one serial gemm, over one block of the result.

use rayon::prelude::*;

use super::shared_rows::SharedRows;
use super::transpose::transpose;
use super::{CpuBuffer, CpuDevice};
use crate::device::{Checked, Linear, LinearShape};
use crate::error::Result;

/// Columns of one block of a bias gradient.
const COLUMNS: usize = 64;
/// Rows summed in one f32 run before they are added to the gradient.
const RUN: usize = 64;

/// From this many rows on, the forward gemm transposes the weights first.
const TRANSPOSE_ROWS: usize = 32;
/// Columns of the result that one task computes (rows, for the weight's gradient). Serial gemms over blocks that stay
/// in the second-level cache beat `gemm`'s own split over threads by up to 20 % when the weights come from memory; 96
/// divides the usual widths evenly.
pub(super) const OUTPUT_BLOCK: usize = 96;

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

impl Linear for CpuDevice {
    fn reserve_linear(&self, shape: LinearShape, _: bool) -> Result<()> {
        if shape.rows >= TRANSPOSE_ROWS {
            self.scratch.reserve::<f32>(self.threads, shape.inputs * OUTPUT_BLOCK.min(shape.outputs));
        }
        Ok(())
    }

    fn reserve_linear_forward(&self, shape: LinearShape) -> Result<()> {
        self.reserve_linear(shape, false)
    }

    /// Each task computes one block of outputs. From `TRANSPOSE_ROWS` rows on it transposes the block's weights first:
    /// `gemm` packs a matrix of the other storage order value by value, striding through the cache (with 1536 inputs
    /// every row starts in one of two cache sets), which costs up to 30 % of the gemm's time. The transpose here runs
    /// in registers, and its result stays in the second-level cache. With fewer rows the weights are used once, and
    /// reading them is the limit.
    fn run_linear_forward(
        &self,
        out: &mut CpuBuffer<f32>,
        x: &CpuBuffer<f32>,
        weight: &CpuBuffer<f32>,
        bias: Option<&CpuBuffer<f32>>,
        shape: LinearShape,
        _: Checked,
    ) -> Result<()> {
        self.traced("linear_forward", || {
            let LinearShape { rows, inputs, outputs } = shape;
            if rows * outputs == 0 {
                return Ok(());
            }
            let out = &mut out[..rows * outputs];
            self.parallel(|| {
                if let Some(bias) = bias {
                    out.par_chunks_exact_mut(outputs).for_each(|row| row.copy_from_slice(&bias[..outputs]));
                }
                let out = SharedRows::new(out, outputs);
                let blocks = block_starts(outputs);
                blocks.for_each(|first| {
                    let count = OUTPUT_BLOCK.min(outputs - first);
                    let weight = &weight[first * inputs..(first + count) * inputs];
                    let sizes = (rows, inputs, count);
                    let x = Matrix::rows(x, inputs);
                    if rows < TRANSPOSE_ROWS {
                        // SAFETY: blocks are disjoint columns, and `out` is this operation's alone.
                        unsafe {
                            out.multiply(first, bias.is_some(), sizes, x, Matrix::transposed(weight, inputs))
                        };
                    } else {
                        let mut turned = self.scratch.take::<f32>(inputs * count);
                        transpose(&mut turned, count, weight, inputs, (count, inputs));
                        // SAFETY: as above.
                        unsafe {
                            out.multiply(first, bias.is_some(), sizes, x, Matrix::rows(&turned, count))
                        };
                    }
                });
            });
            Ok(())
        })
    }

    fn run_linear_backward_input(
        &self,
        dx: &mut CpuBuffer<f32>,
        dout: &CpuBuffer<f32>,
        weight: &CpuBuffer<f32>,
        shape: LinearShape,
        _: Checked,
    ) -> Result<()> {
        self.traced("linear_backward_input", || {
            let LinearShape { rows, inputs, outputs } = shape;
            if rows * inputs == 0 {
                return Ok(());
            }
            let dx = SharedRows::new(&mut dx[..rows * inputs], inputs);
            let blocks = block_starts(inputs);
            self.parallel(|| {
                blocks.for_each(|first| {
                    let count = OUTPUT_BLOCK.min(inputs - first);
                    let (dout, weight) =
                        (Matrix::rows(dout, outputs), Matrix::rows(&weight[first..], inputs));
                    // SAFETY: blocks are disjoint columns, and `dx` is this operation's alone.
                    unsafe { dx.multiply(first, false, (rows, outputs, count), dout, weight) };
                });
            });
            Ok(())
        })
    }

    fn run_linear_backward_weight(
        &self,
        dweight: Option<&mut CpuBuffer<f32>>,
        dbias: Option<&mut CpuBuffer<f32>>,
        dout: &CpuBuffer<f32>,
        x: &CpuBuffer<f32>,
        shape: LinearShape,
        _: Checked,
    ) -> Result<()> {
        self.traced("linear_backward_weight", || {
            let LinearShape { rows, inputs, outputs } = shape;
            self.parallel(|| {
                if let Some(dweight) = dweight {
                    let dweight = &mut dweight[..outputs * inputs];
                    dweight.par_chunks_mut(OUTPUT_BLOCK * inputs).enumerate().for_each(|(block, dweight)| {
                        let sizes = (dweight.len() / inputs, rows, inputs);
                        let dout = Matrix::transposed(&dout[block * OUTPUT_BLOCK..], outputs);
                        multiply(dweight, inputs, true, sizes, dout, Matrix::rows(x, inputs));
                    });
                }
                if let Some(dbias) = dbias {
                    dbias[..outputs].par_chunks_mut(COLUMNS).enumerate().for_each(|(block, dbias)| {
                        self.vectorized(
                            #[inline(always)]
                            || column_sums(dbias, &dout[..rows * outputs], block * COLUMNS, outputs),
                        )
                    });
                }
            });
            Ok(())
        })
    }
}

/// The first columns of the blocks into which a gemm of `columns` columns is cut; each block is one task.
pub(super) fn block_starts(columns: usize) -> impl ParallelIterator<Item = usize> {
    (0..columns.div_ceil(OUTPUT_BLOCK)).into_par_iter().map(|block| block * OUTPUT_BLOCK)
}

/// Adds columns `first..first + sums.len()` of `values[.., width]` to `sums`, row after row.
#[inline(always)]
fn column_sums(sums: &mut [f32], values: &[f32], first: usize, width: usize) {
    let columns = sums.len();
    for run in values.chunks(RUN * width) {
        let mut partial = [0.0_f32; COLUMNS];
        for row in run.chunks_exact(width) {
            for (partial, value) in partial.iter_mut().zip(&row[first..][..columns]) {
                *partial += value;
            }
        }
        for (sum, partial) in sums.iter_mut().zip(partial) {
            *sum += partial;
        }
    }
}
