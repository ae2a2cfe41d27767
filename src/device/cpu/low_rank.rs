//! The products of low-rank adapters, through the same gemms as linear layers.

use rayon::prelude::*;

use super::linear::{Matrix, OUTPUT_BLOCK, block_starts, multiply_scaled};
use super::shared_rows::SharedRows;
use super::{CpuBuffer, CpuDevice};
use crate::device::{Checked, Dropout, LinearShape, LowRank, LowRankShape};
use crate::error::Result;

/// Rows of one task where the outputs are too narrow to be cut by columns.
const ROW_BLOCK: usize = 64;

impl LowRank for CpuDevice {
    fn reserve_low_rank(&self, shape: LinearShape, _: &[LowRankShape], dropout: bool) -> Result<()> {
        if dropout {
            self.scratch.reserve::<f32>(self.threads, ROW_BLOCK * shape.inputs);
        }
        Ok(())
    }

    fn run_dropout(
        &self,
        out: &mut CpuBuffer<f32>,
        x: &CpuBuffer<f32>,
        values: usize,
        dropout: Dropout,
        _: Checked,
    ) -> Result<()> {
        self.traced("dropout", || {
            let block = self.block_rows(1);
            self.parallel(|| {
                let blocks = out[..values].par_chunks_mut(block).zip(x[..values].par_chunks(block));
                blocks.enumerate().for_each(|(number, (out, x))| {
                    self.vectorized(
                        #[inline(always)]
                        || {
                            for (index, (out, x)) in out.iter_mut().zip(x).enumerate() {
                                *out = x * dropout.factor(number * block + index);
                            }
                        },
                    )
                });
            });
            Ok(())
        })
    }

    fn run_low_rank_forward(
        &self,
        out: &mut CpuBuffer<f32>,
        inner: &CpuBuffer<f32>,
        b: &CpuBuffer<f32>,
        shape: LowRankShape,
        _: Checked,
    ) -> Result<()> {
        self.traced("low_rank_forward", || {
            let LowRankShape { rows, rank, outputs, .. } = shape;
            if rows * outputs == 0 {
                return Ok(());
            }
            let out = SharedRows::new(&mut out[..rows * shape.out.width], shape.out.width);
            let blocks = block_starts(outputs);
            self.parallel(|| {
                blocks.for_each(|first| {
                    let count = OUTPUT_BLOCK.min(outputs - first);
                    let inner = Matrix::rows(&inner[shape.inner.first..], shape.inner.width);
                    let b = Matrix::transposed(&b[(shape.first_row + first) * rank..], rank);
                    let sizes = (rows, rank, count);
                    // SAFETY: blocks are disjoint columns, and `out` is this operation's alone.
                    unsafe {
                        out.multiply_scaled(shape.out.first + first, true, sizes, inner, b, shape.scale)
                    };
                });
            });
            Ok(())
        })
    }

    fn run_low_rank_backward_input(
        &self,
        dinner: &mut CpuBuffer<f32>,
        dout: &CpuBuffer<f32>,
        b: &CpuBuffer<f32>,
        shape: LowRankShape,
        _: Checked,
    ) -> Result<()> {
        self.traced("low_rank_backward_input", || {
            let LowRankShape { rows, rank, outputs, out, inner, .. } = shape;
            self.parallel(|| {
                let blocks = dinner[..rows * inner.width].par_chunks_mut(ROW_BLOCK * inner.width);
                blocks.enumerate().for_each(|(block, dinner)| {
                    let sizes = (dinner.len() / inner.width, outputs, rank);
                    let dout = Matrix::rows(&dout[block * ROW_BLOCK * out.width + out.first..], out.width);
                    let b = Matrix::rows(&b[shape.first_row * rank..], rank);
                    let dinner = &mut dinner[inner.first..];
                    multiply_scaled(dinner, inner.width, false, sizes, dout, b, shape.scale);
                });
            });
            Ok(())
        })
    }

    fn run_low_rank_backward_weight(
        &self,
        db: &mut CpuBuffer<f32>,
        dout: &CpuBuffer<f32>,
        inner: &CpuBuffer<f32>,
        shape: LowRankShape,
        _: Checked,
    ) -> Result<()> {
        self.traced("low_rank_backward_weight", || {
            let LowRankShape { rows, rank, outputs, out, first_row, .. } = shape;
            if rows == 0 {
                return Ok(());
            }
            self.parallel(|| {
                let db = &mut db[first_row * rank..(first_row + outputs) * rank];
                db.par_chunks_mut(OUTPUT_BLOCK * rank).enumerate().for_each(|(block, db)| {
                    let sizes = (db.len() / rank, rows, rank);
                    let dout = Matrix::transposed(&dout[out.first + block * OUTPUT_BLOCK..], out.width);
                    let inner = Matrix::rows(&inner[shape.inner.first..], shape.inner.width);
                    multiply_scaled(db, rank, true, sizes, dout, inner, shape.scale);
                });
            });
            Ok(())
        })
    }

    fn run_linear_backward_input_add(
        &self,
        dx: &mut CpuBuffer<f32>,
        dout: &CpuBuffer<f32>,
        weight: &CpuBuffer<f32>,
        shape: LinearShape,
        dropout: Option<Dropout>,
        _: Checked,
    ) -> Result<()> {
        self.traced("linear_backward_input_add", || {
            let LinearShape { rows, inputs, outputs } = shape;
            self.parallel(|| {
                let blocks = dx[..rows * inputs].par_chunks_mut(ROW_BLOCK * inputs);
                blocks.enumerate().for_each(|(block, dx)| {
                    let sizes = (dx.len() / inputs, outputs, inputs);
                    let dout = Matrix::rows(&dout[block * ROW_BLOCK * outputs..], outputs);
                    let weight = Matrix::rows(weight, inputs);
                    let Some(dropout) = dropout else {
                        return multiply_scaled(dx, inputs, true, sizes, dout, weight, 1.0);
                    };
                    let mut sum = self.scratch.take::<f32>(dx.len());
                    multiply_scaled(&mut sum, inputs, false, sizes, dout, weight, 1.0);
                    let first = block * ROW_BLOCK * inputs;
                    self.vectorized(
                        #[inline(always)]
                        || {
                            for (index, (dx, sum)) in dx.iter_mut().zip(sum.iter()).enumerate() {
                                *dx += sum * dropout.factor(first + index);
                            }
                        },
                    );
                });
            });
            Ok(())
        })
    }
}
