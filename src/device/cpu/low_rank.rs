//! The products of low-rank adapters, and the dropout of their input.

use rayon::prelude::*;

use super::scratch::Scratch;
use super::storage::Storage;
use super::{CpuBuffer, CpuDevice};
use crate::device::{
    AdaptedBackwardInput, AdaptedLinear, Checked, Dropout, Linear, LinearShape, LowRank, LowRankShape,
    RowPart,
};
use crate::error::Result;

/// The products with `a` as products with `b`, which have a scale: `x` stands for `inner`, and `inner` for the output.
fn scaled(shape: LinearShape, dropout: Dropout) -> LowRankShape {
    let LinearShape { rows, inputs, outputs } = shape;
    LowRankShape {
        rows,
        rank: inputs,
        outputs,
        out: RowPart { first: 0, width: outputs },
        inner: RowPart { first: 0, width: inputs },
        first_row: 0,
        scale: dropout.scale,
    }
}

impl<C: Storage> CpuDevice<C> {
    /// `x` with some values dropped. The others are not scaled, so that they are not rounded: the products scale their sums.
    fn dropped(&self, x: &[C], dropout: Dropout) -> Scratch<'_, C> {
        let mut dropped = self.scratch.take::<C>(x.len());
        let mask = Dropout { scale: 1.0, ..dropout };
        let block = self.block_rows(1);
        self.parallel(|| {
            let blocks = dropped.par_chunks_mut(block).zip(x.par_chunks(block));
            blocks.enumerate().for_each(|(number, (dropped, x))| {
                self.vectorized(
                    #[inline(always)]
                    || {
                        for (index, (dropped, x)) in dropped.iter_mut().zip(x).enumerate() {
                            *dropped = C::round(x.widen() * mask.factor(number * block + index));
                        }
                    },
                )
            });
        });
        dropped
    }
}

impl<C: Storage> LowRank for CpuDevice<C> {
    fn reserve_low_rank(&self, shape: LinearShape, _: &[LowRankShape], dropout: bool) -> Result<()> {
        if dropout {
            // Held while the products with `a` take theirs.
            let dropped = self.scratch.take::<C>(shape.rows * shape.inputs);
            C::reserve_low_rank(self, shape);
            drop(dropped);
        }
        Ok(())
    }

    fn run_low_rank_inner(
        &self,
        inner: &mut CpuBuffer<C>,
        x: &CpuBuffer<C>,
        a: &CpuBuffer<C>,
        shape: LinearShape,
        dropout: Option<Dropout>,
        _: Checked,
    ) -> Result<()> {
        let Some(dropout) = dropout else { return self.linear_forward(inner, x, a, None, shape) };
        self.traced("low_rank_inner", || {
            let LinearShape { rows, inputs, outputs } = shape;
            let inner = &mut inner[..rows * outputs];
            inner.fill(C::default());
            if rows * outputs > 0 {
                let dropped = self.dropped(&x[..rows * inputs], dropout);
                C::low_rank_forward(self, inner, &dropped, a, scaled(shape, dropout));
            }
            Ok(())
        })
    }

    fn run_low_rank_inner_backward_weight(
        &self,
        da: &mut CpuBuffer<f32>,
        dinner: &CpuBuffer<C>,
        x: &CpuBuffer<C>,
        shape: LinearShape,
        dropout: Dropout,
        _: Checked,
    ) -> Result<()> {
        self.traced("low_rank_inner_backward_weight", || {
            let LinearShape { rows, inputs, outputs } = shape;
            if rows * outputs * inputs > 0 {
                let dropped = self.dropped(&x[..rows * inputs], dropout);
                let da = &mut da[..outputs * inputs];
                C::low_rank_backward_weight(self, da, dinner, &dropped, scaled(shape, dropout));
            }
            Ok(())
        })
    }

    fn run_low_rank_forward(
        &self,
        out: &mut CpuBuffer<C>,
        inner: &CpuBuffer<C>,
        b: &CpuBuffer<C>,
        shape: LowRankShape,
        _: Checked,
    ) -> Result<()> {
        self.traced("low_rank_forward", || {
            if shape.rows * shape.outputs > 0 {
                C::low_rank_forward(self, &mut out[..shape.rows * shape.out.width], inner, b, shape);
            }
            Ok(())
        })
    }

    fn run_low_rank_backward_input(
        &self,
        dinner: &mut CpuBuffer<C>,
        dout: &CpuBuffer<C>,
        b: &CpuBuffer<C>,
        shape: LowRankShape,
        _: Checked,
    ) -> Result<()> {
        self.traced("low_rank_backward_input", || {
            let dinner = &mut dinner[..shape.rows * shape.inner.width];
            C::low_rank_backward_input(self, dinner, dout, b, shape);
            Ok(())
        })
    }

    fn run_low_rank_backward_weight(
        &self,
        db: &mut CpuBuffer<f32>,
        dout: &CpuBuffer<C>,
        inner: &CpuBuffer<C>,
        shape: LowRankShape,
        _: Checked,
    ) -> Result<()> {
        self.traced("low_rank_backward_weight", || {
            if shape.rows > 0 {
                C::low_rank_backward_weight(self, db, dout, inner, shape);
            }
            Ok(())
        })
    }

    fn run_adapted_linear_forward(&self, operands: AdaptedLinear<'_, Self>, _: Checked) -> Result<()> {
        C::adapted_forward(self, operands)
    }

    fn run_adapted_linear_backward_input(
        &self,
        operands: AdaptedBackwardInput<'_, Self>,
        _: Checked,
    ) -> Result<()> {
        C::adapted_backward_input(self, operands)
    }

    fn run_linear_backward_input_add(
        &self,
        dx: &mut CpuBuffer<C>,
        dout: &CpuBuffer<C>,
        weight: &CpuBuffer<C>,
        shape: LinearShape,
        dropout: Option<Dropout>,
        _: Checked,
    ) -> Result<()> {
        self.traced("linear_backward_input_add", || {
            let dx = &mut dx[..shape.rows * shape.inputs];
            C::backward_input_add(self, dx, dout, weight, shape, dropout);
            Ok(())
        })
    }
}
