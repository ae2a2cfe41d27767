//! The norm over all gradients with the factor that clips it, and AdamW.
//!
//! AdamW (Loshchilov and Hutter 2019) as PyTorch computes it: decoupled decay, bias-corrected moments, epsilon outside
//! the corrected square root.

use rayon::prelude::*;

use super::shared_rows::SharedRows;
use super::{BLOCK_ELEMENTS, CpuBuffer, CpuDevice};
use crate::device::{AdamWUpdate, Checked, Optimizer};
use crate::error::Result;
use crate::optimizer::AdamWFactors;

/// Values of one partial sum; fixed, so that the order of summation does not depend on the threads.
const CHUNK: usize = 64 * 1024;
/// f64 partial sums inside a chunk: two AVX-512 registers; LLVM keeps longer arrays on the stack.
const LANES: usize = 16;

impl Optimizer for CpuDevice {
    fn needs_master(&self) -> bool {
        false
    }

    fn reserve_gradient_norm(&self, gradients: &[&CpuBuffer<f32>]) -> Result<()> {
        self.scratch.reserve::<f64>(1, chunks(gradients));
        Ok(())
    }

    fn run_gradient_norm(
        &self,
        out: &mut CpuBuffer<f32>,
        gradients: &[&CpuBuffer<f32>],
        max_norm: Option<f32>,
        _: Checked,
    ) -> Result<()> {
        self.traced("gradient_norm", || {
            let mut partials = self.scratch.take::<f64>(chunks(gradients));
            let cells = SharedRows::new(&mut partials[..], 1);
            self.parallel(|| {
                let tensors = gradients.par_iter().enumerate();
                let all = tensors.flat_map(|(tensor, gradient)| {
                    let first = chunks(&gradients[..tensor]);
                    gradient.par_chunks(CHUNK).enumerate().map(move |(index, chunk)| (first + index, chunk))
                });
                all.for_each(|(index, chunk)| {
                    // SAFETY: each chunk has a cell of its own.
                    let cell = unsafe { cells.row_mut(index, 0..1) };
                    cell[0] = self.vectorized(
                        #[inline(always)]
                        || sum_of_squares(chunk),
                    );
                });
            });
            let norm = partials.iter().sum::<f64>().sqrt();
            // As torch.nn.utils.clip_grad_norm_: 1e-6 keeps a zero norm finite. Written so that a NaN norm gives a NaN factor.
            let factor = match max_norm.map(|max_norm| max_norm as f64 / (norm + 1e-6)) {
                Some(factor) if factor < 1.0 || factor.is_nan() => factor,
                _ => 1.0,
            };
            out[0] = norm as f32;
            out[1] = factor as f32;
            Ok(())
        })
    }

    fn run_adamw(
        &self,
        updates: &mut [AdamWUpdate<'_, Self>],
        norm: &CpuBuffer<f32>,
        factors: AdamWFactors,
        _: Checked,
    ) -> Result<()> {
        self.traced("adamw", || {
            let clip = norm[1];
            self.parallel(|| {
                updates.par_iter_mut().flat_map(blocks).for_each(|((weight, (first, second)), gradient)| {
                    self.vectorized(
                        #[inline(always)]
                        || update_block(weight, first, second, gradient, (factors, clip)),
                    )
                });
            });
            Ok(())
        })
    }
}

/// Number of partial sums of the norm over these gradients.
fn chunks(gradients: &[&CpuBuffer<f32>]) -> usize {
    gradients.iter().map(|gradient| gradient.len().div_ceil(CHUNK)).sum()
}

type Block<'a> = ((&'a mut [f32], (&'a mut [f32], &'a mut [f32])), &'a [f32]);

/// Weights, both moments and gradient of a tensor, a block at a time.
fn blocks<'a>(
    update: &'a mut AdamWUpdate<'_, CpuDevice>,
) -> impl ParallelIterator<Item = Block<'a>> + use<'a> {
    let AdamWUpdate { weight, first_moment, second_moment, gradient, .. } = update;
    let moments =
        first_moment.par_chunks_mut(BLOCK_ELEMENTS).zip(second_moment.par_chunks_mut(BLOCK_ELEMENTS));
    let weights = weight.par_chunks_mut(BLOCK_ELEMENTS);
    weights.zip(moments).zip(gradient.par_chunks(BLOCK_ELEMENTS))
}

#[inline(always)]
fn update_block(
    weight: &mut [f32],
    first: &mut [f32],
    second: &mut [f32],
    gradient: &[f32],
    (factors, clip): (AdamWFactors, f32),
) {
    let values = weight.iter_mut().zip(first).zip(second).zip(gradient);
    for (((weight, first), second), gradient) in values {
        let gradient = gradient * clip;
        *first = factors.beta1.mul_add(*first, factors.rest1 * gradient);
        *second = factors.beta2.mul_add(*second, factors.rest2 * gradient * gradient);
        let denominator = second.sqrt().mul_add(factors.root_correction, factors.epsilon);
        *weight = weight.mul_add(factors.decay, -factors.step_size * *first / denominator);
    }
}

#[inline(always)]
fn sum_of_squares(values: &[f32]) -> f64 {
    let mut lanes = [0.0_f64; LANES];
    let (blocks, rest) = values.as_chunks::<LANES>();
    for block in blocks {
        for i in 0..LANES {
            let value = block[i] as f64;
            lanes[i] = value.mul_add(value, lanes[i]);
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(rest) {
        *lane += value as f64 * value as f64;
    }
    lanes.iter().sum()
}
