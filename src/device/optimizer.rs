//! The end of an optimiser step: the norm of all gradients, and AdamW.

use std::ops::Range;

use half::bf16;

use super::check::check_sizes;
use super::{Checked, ComputeBuffer, Floats, Memory};
use crate::error::{Error, Result};
use crate::optimizer::{AdamWFactors, AdamWStep, BLOCK, Master, Moments, StochasticRounding};

/// The gradient of a tensor, in the type in which it was summed over micro-batches.
#[derive(Debug)]
pub enum Gradient<'a, D: Memory> {
    /// f32.
    F32(&'a Floats<D>),
    /// bf16.
    Bf16(&'a D::Buffer<bf16>),
}

impl<D: Memory> Clone for Gradient<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<D: Memory> Copy for Gradient<'_, D> {}

impl<D: Memory> Gradient<'_, D> {
    /// How many values there are.
    pub fn values(self, device: &D) -> usize {
        match self {
            Gradient::F32(values) => device.len(values),
            Gradient::Bf16(values) => device.len(values),
        }
    }
}

/// One of the tensors that a call of [`Optimizer::adamw`] updates, or a part of one.
#[derive(Debug)]
pub struct AdamWUpdate<'a, D: Memory> {
    /// Updated.
    pub weight: &'a mut ComputeBuffer<D>,
    /// Updated: the weights' f32 copy, beside weights of a narrower type. Without it such a weight is its own master copy and is
    /// rounded stochastically.
    pub master: Option<&'a mut Master<D>>,
    /// Updated: running means of the gradient and of its square.
    pub moments: &'a mut Moments<D>,
    /// How a weight without a master copy is rounded.
    pub rounding: StochasticRounding,
    /// Gradient of the loss, before clipping.
    pub gradient: Gradient<'a, D>,
    /// The values of the tensor that are updated, from a multiple of [`BLOCK`] on; `None` is all of them. Master copy
    /// and moments begin with the part's first value.
    pub part: Option<Range<usize>>,
    /// The value of the tensor with which `weight` begins: 0, or the part's first where it holds no other.
    pub first_weight: usize,
    /// As `first_weight`, of `gradient`.
    pub first_gradient: usize,
}

impl<D: Memory> AdamWUpdate<'_, D> {
    /// The values that are updated.
    pub fn range(&self, device: &D) -> Range<usize> {
        self.part.clone().unwrap_or_else(|| 0..device.len(self.weight))
    }

    /// Where those values lie in `weight`.
    pub fn in_weight(&self, device: &D) -> Range<usize> {
        let range = self.range(device);
        range.start - self.first_weight..range.end - self.first_weight
    }

    /// Where those values lie in `gradient`.
    pub fn in_gradient(&self, device: &D) -> Range<usize> {
        let range = self.range(device);
        range.start - self.first_gradient..range.end - self.first_gradient
    }
}

/// A gradient, and the values of it that count.
pub type GradientPart<'a, D> = (Gradient<'a, D>, Range<usize>);

/// Gradient norm and AdamW, over all tensors at once.
///
/// # Errors
/// All methods return [`crate::Error::Bug`] for buffers that are too small and for a step numbered 0, and
/// [`crate::Error::Device`] where the device fails.
pub trait Optimizer: Memory {
    /// Whether weights are narrower than f32, so that AdamW may keep an f32 master copy beside them.
    fn needs_master(&self) -> bool;

    /// Assigns `out[0]`, the l2 norm over all `gradients`, and `out[1]`, the factor that clips it to `max_norm`, which
    /// kernels take as f32 (the factor is 1 without clipping). The order of summation is fixed.
    fn gradient_norm(
        &self,
        out: &mut Floats<Self>,
        gradients: &[&Floats<Self>],
        max_norm: Option<f64>,
    ) -> Result<()> {
        let gradients: Vec<_> = gradients.iter().map(|gradient| Gradient::F32(*gradient)).collect();
        self.gradient_norm_of(out, &gradients, max_norm)
    }

    /// As [`Optimizer::gradient_norm`], over gradients of either type.
    fn gradient_norm_of(
        &self,
        out: &mut Floats<Self>,
        gradients: &[Gradient<'_, Self>],
        max_norm: Option<f64>,
    ) -> Result<()> {
        let whole: Vec<GradientPart<'_, Self>> =
            gradients.iter().map(|&gradient| (gradient, 0..gradient.values(self))).collect();
        self.gradient_norm_of_parts(out, &whole, max_norm)
    }

    /// As [`Optimizer::gradient_norm_of`], over parts of buffers. [`Optimizer::reserve_gradient_norm_of`] of the whole buffers is
    /// enough for it.
    fn gradient_norm_of_parts(
        &self,
        out: &mut Floats<Self>,
        gradients: &[GradientPart<'_, Self>],
        max_norm: Option<f64>,
    ) -> Result<()> {
        let mut checked = check_sizes("gradient_norm", &gradients.len(), &[("out", self.len(out), 2)])?;
        for (gradient, part) in gradients {
            let sizes = [("gradient", gradient.values(self), part.end), ("part", part.end, part.start)];
            checked = check_sizes("gradient_norm", part, &sizes)?;
        }
        self.run_gradient_norm(out, gradients, max_norm.map(|norm| norm as f32), checked)
    }

    /// Updates each tensor's `weight`, `master` and moments from `gradient * norm[1]`, in a few launches however many
    /// tensors there are. The moments of this update move the weight as they are, before they are rounded to their format.
    fn adamw(
        &self,
        updates: &mut [AdamWUpdate<'_, Self>],
        norm: &Floats<Self>,
        step: AdamWStep,
    ) -> Result<()> {
        let sizes = [("norm", self.len(norm), 2), ("step number", step.step as usize, 1)];
        let checked = check_sizes("adamw", &step, &sizes)?;
        for update in updates.iter() {
            self.check_update(update)?;
        }
        self.run_adamw(updates, norm, AdamWFactors::new(step), checked)
    }

    /// The size check of one tensor of [`Optimizer::adamw`].
    fn check_update(&self, update: &AdamWUpdate<'_, Self>) -> Result<()> {
        let part = update.range(self);
        let len = part.len();
        if !part.start.is_multiple_of(BLOCK) {
            return Err(Error::bug(format!(
                "adamw: the part {part:?} does not begin at a block of {BLOCK} values"
            )));
        }
        let master = update.master.as_ref().map_or(len, |master| master.len(self));
        let (moments, scales) = match &*update.moments {
            Moments::F32(pair) => ([self.len(&pair.first), self.len(&pair.second)], None),
            Moments::Bf16(pair) => ([self.len(&pair.first), self.len(&pair.second)], None),
            Moments::EightBit { codes, scales } => (
                [self.len(&codes.first), self.len(&codes.second)],
                Some([self.len(&scales.first), self.len(&scales.second)]),
            ),
        };
        let blocks = len.div_ceil(BLOCK);
        let scales = scales.unwrap_or([blocks; 2]);
        if part.start < update.first_weight.max(update.first_gradient) {
            return Err(Error::bug(format!("adamw: weight or gradient begins after the part {part:?}")));
        }
        let sizes = [
            ("weight", self.len(update.weight), update.in_weight(self).end),
            ("part", part.end, part.start),
            ("master", master, len),
            ("first_moment", moments[0], len),
            ("second_moment", moments[1], len),
            ("first_scales", scales[0], blocks),
            ("second_scales", scales[1], blocks),
            ("gradient", update.gradient.values(self), update.in_gradient(self).end),
        ];
        check_sizes("adamw", &len, &sizes).map(|_| ())
    }

    /// Sets aside the scratch memory that [`Optimizer::gradient_norm`] takes for these gradients, so that no step
    /// allocates it.
    fn reserve_gradient_norm(&self, gradients: &[&Floats<Self>]) -> Result<()> {
        let gradients: Vec<_> = gradients.iter().map(|gradient| Gradient::F32(*gradient)).collect();
        self.reserve_gradient_norm_of(&gradients)
    }

    /// As [`Optimizer::reserve_gradient_norm`], for [`Optimizer::gradient_norm_of`].
    fn reserve_gradient_norm_of(&self, gradients: &[Gradient<'_, Self>]) -> Result<()>;

    /// The device's part of [`Optimizer::gradient_norm`].
    fn run_gradient_norm(
        &self,
        out: &mut Floats<Self>,
        gradients: &[GradientPart<'_, Self>],
        max_norm: Option<f32>,
        checked: Checked,
    ) -> Result<()>;

    /// The device's part of [`Optimizer::adamw`].
    fn run_adamw(
        &self,
        updates: &mut [AdamWUpdate<'_, Self>],
        norm: &Floats<Self>,
        factors: AdamWFactors,
        checked: Checked,
    ) -> Result<()>;
}
