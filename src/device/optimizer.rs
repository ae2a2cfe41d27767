//! The end of an optimiser step: the norm of all gradients, and AdamW.

use super::check::check_sizes;
use super::{Checked, ComputeBuffer, Floats, Memory};
use crate::error::Result;
use crate::optimizer::{AdamWFactors, AdamWStep};

/// One of the tensors that a call of [`Optimizer::adamw`] updates.
#[derive(Debug)]
pub struct AdamWUpdate<'a, D: Memory> {
    /// Updated.
    pub weight: &'a mut ComputeBuffer<D>,
    /// Updated: the weights in f32, for a device that [needs](Optimizer::needs_master) them.
    pub master: Option<&'a mut Floats<D>>,
    /// Updated: running mean of the gradient.
    pub first_moment: &'a mut Floats<D>,
    /// Updated: running mean of the squared gradient.
    pub second_moment: &'a mut Floats<D>,
    /// Gradient of the loss, before clipping.
    pub gradient: &'a Floats<D>,
}

/// Gradient norm and AdamW, over all tensors at once.
///
/// # Errors
/// All methods return [`crate::Error::Bug`] for buffers that are too small and for a step numbered 0, and
/// [`crate::Error::Device`] where the device fails.
pub trait Optimizer: Memory {
    /// Whether AdamW keeps an f32 master copy beside the weights.
    fn needs_master(&self) -> bool;

    /// Assigns `out[0]`, the l2 norm over all `gradients`, and `out[1]`, the factor that clips it to `max_norm`, which
    /// kernels take as f32 (the factor is 1 without clipping). The order of summation is fixed.
    fn gradient_norm(
        &self,
        out: &mut Floats<Self>,
        gradients: &[&Floats<Self>],
        max_norm: Option<f64>,
    ) -> Result<()> {
        let checked = check_sizes("gradient_norm", &gradients.len(), &[("out", self.len(out), 2)])?;
        self.run_gradient_norm(out, gradients, max_norm.map(|norm| norm as f32), checked)
    }

    /// Updates each tensor's `weight`, `master` and moments from `gradient * norm[1]`, in a few launches however many
    /// tensors there are.
    fn adamw(
        &self,
        updates: &mut [AdamWUpdate<'_, Self>],
        norm: &Floats<Self>,
        step: AdamWStep,
    ) -> Result<()> {
        let sizes = [("norm", self.len(norm), 2), ("step number", step.step as usize, 1)];
        let checked = check_sizes("adamw", &step, &sizes)?;
        for update in updates.iter() {
            let len = self.len(update.weight);
            let master = match &update.master {
                Some(master) => self.len(master),
                None if self.needs_master() => 0,
                None => len,
            };
            let sizes = [
                ("master", master, len),
                ("first_moment", self.len(update.first_moment), len),
                ("second_moment", self.len(update.second_moment), len),
                ("gradient", self.len(update.gradient), len),
            ];
            check_sizes("adamw", &len, &sizes)?;
        }
        self.run_adamw(updates, norm, AdamWFactors::new(step), checked)
    }

    /// Sets the scratch memory aside that [`Optimizer::gradient_norm`] takes for these gradients, so that no step
    /// allocates it.
    fn reserve_gradient_norm(&self, gradients: &[&Floats<Self>]) -> Result<()>;

    /// The device's part of [`Optimizer::gradient_norm`].
    fn run_gradient_norm(
        &self,
        out: &mut Floats<Self>,
        gradients: &[&Floats<Self>],
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
