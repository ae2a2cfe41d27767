//! The products of low-rank adapters, and the dropout of their input.

use rayon::prelude::*;

use super::storage::Storage;
use super::{CpuBuffer, CpuDevice};
use crate::device::{
    AdaptedBackwardInput, AdaptedLinear, Checked, Dropout, LinearShape, LowRank, LowRankShape,
};
use crate::error::Result;

impl<C: Storage> LowRank for CpuDevice<C> {
    fn reserve_low_rank(&self, shape: LinearShape, _: &[LowRankShape], dropout: bool) -> Result<()> {
        if dropout {
            C::reserve_low_rank(self, shape);
        }
        Ok(())
    }

    fn run_dropout(
        &self,
        out: &mut CpuBuffer<C>,
        x: &CpuBuffer<C>,
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
                                *out = C::round(x.widen() * dropout.factor(number * block + index));
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
