//! RMSNorm (Zhang and Sennrich 2019), alone or fused with the residual addition before it.
//!
//! With `r = 1 / sqrt(mean(x^2) + epsilon)`: `out = x r w`, and backward
//! `dx += r (dout w) - x r^3 mean(dout w x)`, `dw += sum over rows of dout x r`.

use rayon::prelude::*;

use super::storage::Storage;
use super::{BLOCK_ELEMENTS, CpuBuffer, CpuDevice, simd};
use crate::device::{AddRmsNorm, Checked, Norm, NormShape, RmsNormBackward};
use crate::error::Result;

/// Columns of one block of the weight's gradient.
const COLUMNS: usize = 64;
/// Rows summed in one f32 run before they are added to the weight's gradient. Short runs keep the rounding error small,
/// however large `T` is.
const RUN: usize = 64;

impl<C: Storage> Norm for CpuDevice<C> {
    /// Nothing to do: the norms take no scratch memory.
    fn reserve_rms_norm(&self, _: NormShape) -> Result<()> {
        Ok(())
    }

    fn run_rms_norm_forward(
        &self,
        out: &mut CpuBuffer<C>,
        rstd: &mut CpuBuffer<f32>,
        x: &CpuBuffer<C>,
        weight: &CpuBuffer<C>,
        shape: NormShape,
        _: Checked,
    ) -> Result<()> {
        self.traced("rms_norm_forward", || {
            let NormShape { rows, width, .. } = shape;
            let size = rows * width;
            if size == 0 {
                return Ok(());
            }
            let (block_rows, weight) = (self.block_rows(width), &weight[..width]);
            let block = block_rows * width;
            self.parallel(|| {
                out[..size]
                    .par_chunks_mut(block)
                    .zip(rstd[..rows].par_chunks_mut(block_rows))
                    .zip(x[..size].par_chunks(block))
                    .for_each(|((out, rstd), x)| {
                        self.vectorized(
                            #[inline(always)]
                            || normalize(out, rstd, x, weight, shape),
                        )
                    });
            });
            Ok(())
        })
    }

    fn run_add_rms_norm_forward(&self, operands: AddRmsNorm<'_, Self>, _: Checked) -> Result<()> {
        self.traced("add_rms_norm_forward", || {
            let AddRmsNorm { sum, out, rstd, x, delta, weight, shape } = operands;
            let NormShape { rows, width, .. } = shape;
            let size = rows * width;
            if size == 0 {
                return Ok(());
            }
            let (block_rows, weight) = (self.block_rows(width), &weight[..width]);
            let block = block_rows * width;
            self.parallel(|| {
                sum[..size]
                    .par_chunks_mut(block)
                    .zip(out[..size].par_chunks_mut(block))
                    .zip(rstd[..rows].par_chunks_mut(block_rows))
                    .zip(x[..size].par_chunks(block).zip(delta[..size].par_chunks(block)))
                    .for_each(|(((sum, out), rstd), (x, delta))| {
                        self.vectorized(
                            #[inline(always)]
                            || {
                                add_values(sum, x, delta);
                                normalize(out, rstd, sum, weight, shape);
                            },
                        )
                    });
            });
            Ok(())
        })
    }

    fn run_add(
        &self,
        sum: &mut CpuBuffer<C>,
        x: &CpuBuffer<C>,
        delta: &CpuBuffer<C>,
        len: usize,
        _: Checked,
    ) -> Result<()> {
        self.traced("add", || {
            self.parallel(|| {
                sum[..len]
                    .par_chunks_mut(BLOCK_ELEMENTS)
                    .zip(x[..len].par_chunks(BLOCK_ELEMENTS).zip(delta[..len].par_chunks(BLOCK_ELEMENTS)))
                    .for_each(|(sum, (x, delta))| {
                        self.vectorized(
                            #[inline(always)]
                            || add_values(sum, x, delta),
                        )
                    });
            });
            Ok(())
        })
    }

    fn run_rms_norm_backward(&self, operands: RmsNormBackward<'_, Self>, _: Checked) -> Result<()> {
        self.traced("rms_norm_backward", || {
            let RmsNormBackward { dx, dweight, dout, x, weight, rstd, shape } = operands;
            let NormShape { rows, width, .. } = shape;
            let size = rows * width;
            if size == 0 {
                return Ok(());
            }
            let (dout, x, weight, rstd) = (&dout[..size], &x[..size], &weight[..width], &rstd[..rows]);
            let block_rows = self.block_rows(width);
            let block = block_rows * width;
            self.parallel(|| {
                dx[..size]
                    .par_chunks_mut(block)
                    .zip(dout.par_chunks(block).zip(x.par_chunks(block)))
                    .zip(rstd.par_chunks(block_rows))
                    .for_each(|((dx, (dout, x)), rstd)| {
                        self.vectorized(
                            #[inline(always)]
                            || input_gradient(dx, dout, x, weight, rstd),
                        )
                    });
                let Some(dweight) = dweight else { return };
                dweight[..width].par_chunks_mut(COLUMNS).enumerate().for_each(|(block, dweight)| {
                    self.vectorized(
                        #[inline(always)]
                        || weight_gradient(dweight, dout, x, rstd, block * COLUMNS, width),
                    )
                });
            });
            Ok(())
        })
    }
}

#[inline(always)]
fn add_values<C: Storage>(sum: &mut [C], x: &[C], delta: &[C]) {
    for ((sum, x), delta) in sum.iter_mut().zip(x).zip(delta) {
        *sum = C::round(x.widen() + delta.widen());
    }
}

#[inline(always)]
fn normalize<C: Storage>(out: &mut [C], rstd: &mut [f32], x: &[C], weight: &[C], shape: NormShape) {
    let width = shape.width;
    for ((out, rstd), x) in out.chunks_exact_mut(width).zip(rstd.iter_mut()).zip(x.chunks_exact(width)) {
        let scale = 1.0 / (simd::dot(x, x) / width as f32 + shape.epsilon).sqrt();
        *rstd = scale;
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = C::round(x.widen() * scale * weight.widen());
        }
    }
}

#[inline(always)]
fn input_gradient<C: Storage>(dx: &mut [C], dout: &[C], x: &[C], weight: &[C], rstd: &[f32]) {
    let width = weight.len();
    for (((dx, dout), x), &rstd) in
        dx.chunks_exact_mut(width).zip(dout.chunks_exact(width)).zip(x.chunks_exact(width)).zip(rstd)
    {
        let mean = simd::sum_terms(
            width,
            #[inline(always)]
            |i| dout[i].widen() * weight[i].widen() * x[i].widen(),
        ) / width as f32;
        let along_x = -mean * rstd * rstd * rstd;
        for (((dx, dout), x), weight) in dx.iter_mut().zip(dout).zip(x).zip(weight) {
            let change = x.widen().mul_add(along_x, dout.widen() * weight.widen() * rstd);
            *dx = C::round(dx.widen() + change);
        }
    }
}

/// Columns `first..first + dweight.len()` of the weight's gradient, rows in order.
#[inline(always)]
fn weight_gradient<C: Storage>(
    dweight: &mut [f32],
    dout: &[C],
    x: &[C],
    rstd: &[f32],
    first: usize,
    width: usize,
) {
    let columns = dweight.len();
    for (run, rstd) in rstd.chunks(RUN).enumerate() {
        let mut sums = [0.0_f32; COLUMNS];
        for (i, &rstd) in rstd.iter().enumerate() {
            let start = (run * RUN + i) * width + first;
            let (dout, x) = (&dout[start..][..columns], &x[start..][..columns]);
            for ((sum, dout), x) in sums.iter_mut().zip(dout).zip(x) {
                *sum = (dout.widen() * rstd).mul_add(x.widen(), *sum);
            }
        }
        for (dweight, sum) in dweight.iter_mut().zip(sums) {
            *dweight += sum;
        }
    }
}
