//! AdamW (Loshchilov and Hutter 2019) as PyTorch computes it: decoupled decay, bias-corrected moments, epsilon outside
//! the corrected square root. Moments are f32, bf16, or 8-bit by blocks.
//!
//! An f32 weight is its own master copy. A bf16 weight has one beside it, whole or in part, or is rounded stochastically.

use std::ops::Range;

use half::bf16;
use rayon::iter::Either;
use rayon::prelude::*;

use super::storage::{MasterSlice, Storage};
use super::{BLOCK_ELEMENTS, CpuDevice};
use crate::device::{AdamWUpdate, Gradient};
use crate::optimizer::{
    AdamWFactors, BLOCK, DynamicMap, Master, MomentPair, Moments, StochasticRounding, quantize_block,
};

/// Blocks of quantised values in a block of parallel work.
const SCALES: usize = BLOCK_ELEMENTS / BLOCK;
const _: () = assert!(BLOCK_ELEMENTS.is_multiple_of(BLOCK), "parallel work is cut between blocks");

/// The numbers of an update, and the factor that clips gradients.
#[derive(Clone, Copy)]
pub(super) struct Numbers {
    pub factors: AdamWFactors,
    pub clip: f32,
}

/// Updates one tensor, a block at a time. Call it on the device's pool.
pub(super) fn update<C: Storage>(
    device: &CpuDevice<C>,
    update: &mut AdamWUpdate<'_, CpuDevice<C>>,
    numbers: Numbers,
) {
    let (part, in_gradient) = (update.range(device), update.in_gradient(device));
    match update.gradient {
        Gradient::F32(gradient) => update_from(device, update, (&gradient[in_gradient], part), numbers),
        Gradient::Bf16(gradient) => update_from(device, update, (&gradient[in_gradient], part), numbers),
    }
}

/// Updates a part of a tensor from the gradient of that part.
fn update_from<C: Storage, G: Storage>(
    device: &CpuDevice<C>,
    update: &mut AdamWUpdate<'_, CpuDevice<C>>,
    (gradient, part): (&[G], Range<usize>),
    numbers: Numbers,
) {
    let in_weight = update.in_weight(device);
    let blocks = Blocks { device, start: part.start, rounding: update.rounding, step: numbers.factors.step };
    let weights = update.weight[in_weight].par_chunks_mut(BLOCK_ELEMENTS);
    let masters = match &mut update.master {
        Some(Master::Whole(master)) => {
            Either::Left(master.par_chunks_mut(BLOCK_ELEMENTS).map(MasterSlice::Whole))
        }
        Some(Master::Remainders(master)) => {
            Either::Right(Either::Left(master.par_chunks_mut(BLOCK_ELEMENTS).map(MasterSlice::Remainders)))
        }
        None => Either::Right(Either::Right((0..weights.len()).into_par_iter().map(|_| MasterSlice::None))),
    };
    let gradients = gradient.par_chunks(BLOCK_ELEMENTS);
    let values = weights.zip(masters).zip(gradients).enumerate();
    match &mut *update.moments {
        Moments::F32(MomentPair { first, second }) => {
            let moments = first.par_chunks_mut(BLOCK_ELEMENTS).zip(second.par_chunks_mut(BLOCK_ELEMENTS));
            values.zip(moments).for_each(|((block, (weights, gradient)), (first, second))| {
                blocks.update(
                    (block, weights),
                    #[inline(always)]
                    |weight| update_f32(weight, gradient, first, second, numbers),
                );
            });
        }
        Moments::Bf16(MomentPair { first, second }) => {
            let moments = first.par_chunks_mut(BLOCK_ELEMENTS).zip(second.par_chunks_mut(BLOCK_ELEMENTS));
            values.zip(moments).for_each(|((block, (weights, gradient)), (first, second))| {
                blocks.update(
                    (block, weights),
                    #[inline(always)]
                    |weight| update_bf16(weight, gradient, first, second, numbers),
                );
            });
        }
        Moments::EightBit { codes, scales } => {
            let codes =
                codes.first.par_chunks_mut(BLOCK_ELEMENTS).zip(codes.second.par_chunks_mut(BLOCK_ELEMENTS));
            let scales = scales.first.par_chunks_mut(SCALES).zip(scales.second.par_chunks_mut(SCALES));
            values.zip(codes).zip(scales).for_each(|(((block, (weights, gradient)), codes), scales)| {
                blocks.update(
                    (block, weights),
                    #[inline(always)]
                    |weight| update_8bit((weight, gradient), codes, scales, numbers),
                );
            });
        }
    }
}

/// The blocks of a part of a tensor, and what the rounding of weights without a master copy depends on.
struct Blocks<'a, C: Storage> {
    device: &'a CpuDevice<C>,
    /// Place of the first block's first value in the tensor.
    start: usize,
    rounding: StochasticRounding,
    step: u32,
}

impl<C: Storage> Blocks<'_, C> {
    /// Lets `change` update the f32 values of block number `block`, in vector instructions, and stores them.
    #[inline(always)]
    fn update(
        &self,
        (block, (weight, master)): (usize, (&mut [C], MasterSlice<'_>)),
        change: impl FnOnce(&mut [f32]),
    ) {
        let first = self.start + block * BLOCK_ELEMENTS;
        self.device.vectorized(
            #[inline(always)]
            || {
                C::update(
                    weight,
                    master,
                    change,
                    #[inline(always)]
                    |value, index| self.rounding.round(value, self.step, (first + index) as u64),
                );
            },
        );
    }
}

#[inline(always)]
fn update_f32<G: Storage>(
    weight: &mut [f32],
    gradient: &[G],
    first: &mut [f32],
    second: &mut [f32],
    numbers: Numbers,
) {
    for (((weight, first), second), gradient) in weight.iter_mut().zip(first).zip(second).zip(gradient) {
        update_value(weight, first, second, gradient.widen(), numbers);
    }
}

#[inline(always)]
fn update_bf16<G: Storage>(
    weight: &mut [f32],
    gradient: &[G],
    first: &mut [bf16],
    second: &mut [bf16],
    numbers: Numbers,
) {
    for (((weight, first), second), gradient) in weight.iter_mut().zip(first).zip(second).zip(gradient) {
        let (mut wide_first, mut wide_second) = (first.to_f32(), second.to_f32());
        update_value(weight, &mut wide_first, &mut wide_second, gradient.widen(), numbers);
        (*first, *second) = (bf16::from_f32(wide_first), bf16::from_f32(wide_second));
    }
}

/// `scales` has a value for each [`BLOCK`] of the others.
#[inline(always)]
fn update_8bit<G: Storage>(
    (weight, gradient): (&mut [f32], &[G]),
    (first, second): (&mut [u8], &mut [u8]),
    (first_scales, second_scales): (&mut [f32], &mut [f32]),
    numbers: Numbers,
) {
    let values = weight.chunks_mut(BLOCK).zip(gradient.chunks(BLOCK));
    let codes = first.chunks_mut(BLOCK).zip(second.chunks_mut(BLOCK));
    let scales = first_scales.iter_mut().zip(second_scales);
    for (((weight, gradient), (first, second)), (first_scale, second_scale)) in values.zip(codes).zip(scales)
    {
        let (mut firsts, mut seconds) = ([0.0; BLOCK], [0.0; BLOCK]);
        for (value, code) in firsts.iter_mut().zip(&*first) {
            *value = DynamicMap::Signed.decode(*code) * *first_scale;
        }
        for (value, code) in seconds.iter_mut().zip(&*second) {
            *value = DynamicMap::Unsigned.decode(*code) * *second_scale;
        }
        let len = weight.len();
        update_f32(weight, gradient, &mut firsts[..len], &mut seconds[..len], numbers);
        *first_scale = quantize_block(first, &firsts[..len], DynamicMap::Signed);
        *second_scale = quantize_block(second, &seconds[..len], DynamicMap::Unsigned);
    }
}

#[inline(always)]
fn update_value(weight: &mut f32, first: &mut f32, second: &mut f32, gradient: f32, numbers: Numbers) {
    let Numbers { factors, clip } = numbers;
    let gradient = gradient * clip;
    *first = factors.beta1.mul_add(*first, factors.rest1 * gradient);
    *second = factors.beta2.mul_add(*second, factors.rest2 * gradient * gradient);
    let denominator = second.sqrt().mul_add(factors.root_correction, factors.epsilon);
    *weight = weight.mul_add(factors.decay, -factors.step_size * *first / denominator);
}
