//! The products of linear layers, adapters and the head in f32. Each task runs one serial gemm of the `gemm` crate, over one
//! block of the result.

use rayon::prelude::*;

use super::linear::{Matrix, multiply, multiply_scaled};
use super::products::{Operand, Products};
use super::shared_rows::SharedRows;
use super::transpose::transpose;
use super::{CpuBuffer, CpuDevice};
use crate::device::{Dropout, LinearShape, LowRankShape};

/// From this many rows on, the forward gemm transposes the weights first.
const TRANSPOSE_ROWS: usize = 32;
/// Columns of the result that one task computes (rows, for the weight's gradient). Serial gemms over blocks that stay
/// in the second-level cache beat `gemm`'s own split over threads by up to 20 % when the weights come from memory; 96
/// divides the usual widths evenly.
const OUTPUT_BLOCK: usize = 96;
/// Rows of one task where the outputs are too narrow to be cut by columns.
const ROW_BLOCK: usize = 64;

impl Products for f32 {
    fn reserve(device: &CpuDevice, shape: LinearShape) {
        if shape.rows >= TRANSPOSE_ROWS {
            device.scratch.reserve::<f32>(device.threads, shape.inputs * OUTPUT_BLOCK.min(shape.outputs));
        }
    }

    fn reserve_low_rank(device: &CpuDevice, shape: LinearShape) {
        device.scratch.reserve::<f32>(device.threads, ROW_BLOCK * shape.inputs);
    }

    /// Each task computes one block of outputs. From `TRANSPOSE_ROWS` rows on it transposes the block's weights first:
    /// `gemm` packs a matrix of the other storage order value by value, striding through the cache (with 1536 inputs
    /// every row starts in one of two cache sets), which costs up to 30 % of the gemm's time. The transpose here runs
    /// in registers, and its result stays in the second-level cache. With fewer rows the weights are used once, and
    /// reading them is the limit.
    fn forward(
        device: &CpuDevice,
        out: &mut [f32],
        x: &[f32],
        weight: &CpuBuffer<f32>,
        bias: Option<&[f32]>,
        shape: LinearShape,
    ) {
        let LinearShape { rows, inputs, outputs } = shape;
        let out = &mut out[..rows * outputs];
        device.parallel(|| {
            if let Some(bias) = bias {
                out.par_chunks_exact_mut(outputs).for_each(|row| row.copy_from_slice(bias));
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
                    let mut turned = device.scratch.take::<f32>(inputs * count);
                    transpose(&mut turned, count, weight, inputs, (count, inputs));
                    // SAFETY: as above.
                    unsafe { out.multiply(first, bias.is_some(), sizes, x, Matrix::rows(&turned, count)) };
                }
            });
        });
    }

    fn backward_input(
        device: &CpuDevice,
        dx: &mut [f32],
        dout: &[f32],
        weight: &CpuBuffer<f32>,
        shape: LinearShape,
    ) {
        let LinearShape { rows, inputs, outputs } = shape;
        let dx = SharedRows::new(dx, inputs);
        let blocks = block_starts(inputs);
        device.parallel(|| {
            blocks.for_each(|first| {
                let count = OUTPUT_BLOCK.min(inputs - first);
                let (dout, weight) = (Matrix::rows(dout, outputs), Matrix::rows(&weight[first..], inputs));
                // SAFETY: blocks are disjoint columns, and `dx` is this operation's alone.
                unsafe { dx.multiply(first, false, (rows, outputs, count), dout, weight) };
            });
        });
    }

    fn backward_weight(device: &CpuDevice, dweight: &mut [f32], dout: &[f32], x: &[f32], shape: LinearShape) {
        let LinearShape { rows, inputs, outputs } = shape;
        device.parallel(|| {
            dweight.par_chunks_mut(OUTPUT_BLOCK * inputs).enumerate().for_each(|(block, dweight)| {
                let sizes = (dweight.len() / inputs, rows, inputs);
                let dout = Matrix::transposed(&dout[block * OUTPUT_BLOCK..], outputs);
                multiply(dweight, inputs, true, sizes, dout, Matrix::rows(x, inputs));
            });
        });
    }

    fn backward_input_add(
        device: &CpuDevice,
        dx: &mut [f32],
        dout: &[f32],
        weight: &CpuBuffer<f32>,
        shape: LinearShape,
        dropout: Option<Dropout>,
    ) {
        let LinearShape { inputs, outputs, .. } = shape;
        device.parallel(|| {
            dx.par_chunks_mut(ROW_BLOCK * inputs).enumerate().for_each(|(block, dx)| {
                let sizes = (dx.len() / inputs, outputs, inputs);
                let dout = Matrix::rows(&dout[block * ROW_BLOCK * outputs..], outputs);
                let weight = Matrix::rows(weight, inputs);
                let Some(dropout) = dropout else {
                    return multiply_scaled(dx, inputs, true, sizes, dout, weight, 1.0);
                };
                let mut sum = device.scratch.take::<f32>(dx.len());
                multiply_scaled(&mut sum, inputs, false, sizes, dout, weight, 1.0);
                let first = block * ROW_BLOCK * inputs;
                device.vectorized(
                    #[inline(always)]
                    || {
                        for (index, (dx, sum)) in dx.iter_mut().zip(sum.iter()).enumerate() {
                            *dx += sum * dropout.factor(first + index);
                        }
                    },
                );
            });
        });
    }

    fn low_rank_forward(device: &CpuDevice, out: &mut [f32], inner: &[f32], b: &[f32], shape: LowRankShape) {
        let LowRankShape { rows, rank, outputs, .. } = shape;
        let out = SharedRows::new(out, shape.out.width);
        let blocks = block_starts(outputs);
        device.parallel(|| {
            blocks.for_each(|first| {
                let count = OUTPUT_BLOCK.min(outputs - first);
                let inner = Matrix::rows(&inner[shape.inner.first..], shape.inner.width);
                let b = Matrix::transposed(&b[(shape.first_row + first) * rank..], rank);
                let sizes = (rows, rank, count);
                // SAFETY: blocks are disjoint columns, and `out` is this operation's alone.
                unsafe { out.multiply_scaled(shape.out.first + first, true, sizes, inner, b, shape.scale) };
            });
        });
    }

    fn low_rank_backward_input(
        device: &CpuDevice,
        dinner: &mut [f32],
        dout: &[f32],
        b: &[f32],
        shape: LowRankShape,
    ) {
        let LowRankShape { rank, outputs, out, inner, .. } = shape;
        device.parallel(|| {
            dinner.par_chunks_mut(ROW_BLOCK * inner.width).enumerate().for_each(|(block, dinner)| {
                let sizes = (dinner.len() / inner.width, outputs, rank);
                let dout = Matrix::rows(&dout[block * ROW_BLOCK * out.width + out.first..], out.width);
                let b = Matrix::rows(&b[shape.first_row * rank..], rank);
                let dinner = &mut dinner[inner.first..];
                multiply_scaled(dinner, inner.width, false, sizes, dout, b, shape.scale);
            });
        });
    }

    fn low_rank_backward_weight(
        device: &CpuDevice,
        db: &mut [f32],
        dout: &[f32],
        inner: &[f32],
        shape: LowRankShape,
    ) {
        let LowRankShape { rows, rank, outputs, out, first_row, .. } = shape;
        device.parallel(|| {
            let db = &mut db[first_row * rank..(first_row + outputs) * rank];
            db.par_chunks_mut(OUTPUT_BLOCK * rank).enumerate().for_each(|(block, db)| {
                let sizes = (db.len() / rank, rows, rank);
                let dout = Matrix::transposed(&dout[out.first + block * OUTPUT_BLOCK..], out.width);
                let inner = Matrix::rows(&inner[shape.inner.first..], shape.inner.width);
                multiply_scaled(db, rank, true, sizes, dout, inner, shape.scale);
            });
        });
    }

    fn head_operand_values(rows: usize, width: usize) -> usize {
        rows * width
    }

    /// Transposed once here, on all threads, and not again by every tile's gemm.
    fn head_operand<'a>(
        hidden: &'a [f32],
        (rows, width): (usize, usize),
        memory: &'a mut [f32],
    ) -> Operand<'a, f32> {
        const COLUMNS: usize = 64;
        memory.par_chunks_mut(COLUMNS * rows).enumerate().for_each(|(block, out)| {
            let columns = out.len() / rows;
            transpose(out, rows, &hidden[block * COLUMNS..], width, (rows, columns));
        });
        Operand::down(memory, rows)
    }

    /// All of it: f32 queries are rounded in any case.
    fn query_scale(scale: f32) -> f32 {
        scale
    }

    fn tile_memory(_: &CpuDevice, (_, k, n): (usize, usize, usize)) -> usize {
        k * n
    }

    fn multiply_tile(
        _: &CpuDevice,
        (out, stride): (&mut [f32], usize),
        accumulate: bool,
        (m, k, n): (usize, usize, usize),
        lhs: Operand<'_, f32>,
        rhs: Operand<'_, f32>,
        memory: &mut [f32],
    ) {
        let rhs = if rhs.along_rows {
            // Transposed here, because `gemm` would transpose it value by value.
            transpose(memory, n, rhs.values, rhs.stride, (n, k));
            Matrix::rows(memory, n)
        } else {
            matrix(rhs).transpose()
        };
        multiply(out, stride, accumulate, (m, k, n), matrix(lhs), rhs);
    }

    fn multiply(
        _: &CpuDevice,
        out: &mut [f32],
        accumulate: bool,
        (m, k, n): (usize, usize, usize),
        lhs: Operand<'_, f32>,
        rhs: Operand<'_, f32>,
    ) {
        multiply(out, n, accumulate, (m, k, n), matrix(lhs), matrix(rhs).transpose());
    }
}

/// The first columns of the blocks into which a gemm of `columns` columns is cut; each block is one task.
fn block_starts(columns: usize) -> impl ParallelIterator<Item = usize> {
    (0..columns.div_ceil(OUTPUT_BLOCK)).into_par_iter().map(|block| block * OUTPUT_BLOCK)
}

/// The operand as a matrix with the summed index in its columns.
fn matrix(operand: Operand<'_, f32>) -> Matrix<'_> {
    match operand.along_rows {
        true => Matrix::rows(operand.values, operand.stride),
        false => Matrix::transposed(operand.values, operand.stride),
    }
}
