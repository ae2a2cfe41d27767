//! The norm over all gradients with the factor that clips it, and AdamW.
//!
//! AdamW (Loshchilov and Hutter 2019) as PyTorch computes it: decoupled decay, bias-corrected moments, epsilon outside
//! the corrected square root.

use rayon::prelude::*;

use super::{BLOCK_ELEMENTS, CpuBuffer, CpuDevice};
use crate::device::{AdamWState, AdamWStep, AdamWUpdate, Checked, Optimizer};
use crate::error::Result;

/// Values of one partial sum; fixed, so that the order of summation does not depend on the threads.
const CHUNK: usize = 64 * 1024;
/// f64 partial sums inside a chunk: two AVX-512 registers; LLVM keeps longer arrays on the stack.
const LANES: usize = 16;

/// One update's numbers, worked out in f64 once.
#[derive(Clone, Copy)]
struct Factors {
    beta1: f32,
    beta2: f32,
    /// `1 - beta`, taken in f64: `1 - 0.999` in f32 is off by 5e-5.
    rest1: f32,
    rest2: f32,
    /// `1 - learning_rate * weight_decay`
    decay: f32,
    /// `learning_rate / (1 - beta1^step)`
    step_size: f32,
    /// `1 / sqrt(1 - beta2^step)`
    root_correction: f32,
    epsilon: f32,
    /// The clipping factor.
    gradient_scale: f32,
}

impl Factors {
    fn new(step: AdamWStep, gradient_scale: f32) -> Self {
        let (beta1, beta2) = (decimal(step.beta1), decimal(step.beta2));
        let power = step.step as i32;
        let learning_rate = step.learning_rate as f64;
        Factors {
            beta1: step.beta1,
            beta2: step.beta2,
            rest1: (1.0 - beta1) as f32,
            rest2: (1.0 - beta2) as f32,
            decay: (1.0 - learning_rate * step.weight_decay as f64) as f32,
            step_size: (learning_rate / (1.0 - beta1.powi(power))) as f32,
            root_correction: (1.0 / (1.0 - beta2.powi(power)).sqrt()) as f32,
            epsilon: step.epsilon,
            gradient_scale,
        }
    }
}

/// The f64 nearest to the short decimal that was rounded to this f32: 0.999 and not 0.99900001287. The bias correction
/// of the first steps divides by `1 - beta2`, which would keep that rounding as a relative error of 1e-5.
fn decimal(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(value as f64)
}

impl Optimizer for CpuDevice {
    fn needs_master(&self) -> bool {
        false
    }

    fn run_gradient_norm(
        &self,
        out: &mut CpuBuffer<f32>,
        gradients: &[&CpuBuffer<f32>],
        max_norm: Option<f32>,
        _: Checked,
    ) -> Result<()> {
        self.traced("gradient_norm", || {
            let partials: Vec<f64> = self.parallel(|| {
                gradients
                    .par_iter()
                    .flat_map(|gradient| gradient.par_chunks(CHUNK))
                    .map(|chunk| {
                        self.vectorized(
                            #[inline(always)]
                            || sum_of_squares(chunk),
                        )
                    })
                    .collect()
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
        step: AdamWStep,
        _: Checked,
    ) -> Result<()> {
        self.traced("adamw", || {
            let factors = Factors::new(step, norm[1]);
            self.parallel(|| {
                updates.par_iter_mut().flat_map(blocks).for_each(|((weight, (first, second)), gradient)| {
                    self.vectorized(
                        #[inline(always)]
                        || update_block(weight, first, second, gradient, factors),
                    )
                });
            });
            Ok(())
        })
    }
}

type Block<'a> = ((&'a mut [f32], (&'a mut [f32], &'a mut [f32])), &'a [f32]);

/// Weights, both moments and gradient of a tensor, a block at a time.
fn blocks<'a>(
    update: &'a mut AdamWUpdate<'_, CpuDevice>,
) -> impl ParallelIterator<Item = Block<'a>> + use<'a> {
    let AdamWState { first_moment, second_moment, .. } = &mut *update.state;
    let moments =
        first_moment.par_chunks_mut(BLOCK_ELEMENTS).zip(second_moment.par_chunks_mut(BLOCK_ELEMENTS));
    let weights = update.weight.par_chunks_mut(BLOCK_ELEMENTS);
    weights.zip(moments).zip(update.gradient.par_chunks(BLOCK_ELEMENTS))
}

#[inline(always)]
fn update_block(
    weight: &mut [f32],
    first: &mut [f32],
    second: &mut [f32],
    gradient: &[f32],
    factors: Factors,
) {
    let values = weight.iter_mut().zip(first).zip(second).zip(gradient);
    for (((weight, first), second), gradient) in values {
        let gradient = gradient * factors.gradient_scale;
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
