//! The end of an optimiser step: the norm of all gradients, and AdamW.

use super::check::check_sizes;
use super::{Checked, ComputeBuffer, Floats, Memory};
use crate::error::Result;

/// One AdamW update (decoupled weight decay, as PyTorch's).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWStep {
    /// Learning rate of this update, as the schedule gives it.
    pub learning_rate: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// Share of the weight that an update at learning rate 1 would take away.
    pub weight_decay: f32,
    /// 1-based number of this update, for the bias correction.
    pub step: u32,
}

/// A trainable tensor's optimiser state.
#[derive(Debug)]
pub struct AdamWState<D: Memory> {
    /// The weights in f32, where [`Memory::Compute`] is narrower.
    pub master: Option<Floats<D>>,
    /// Running mean of the gradient.
    pub first_moment: Floats<D>,
    /// Running mean of the squared gradient.
    pub second_moment: Floats<D>,
}

impl<D: Optimizer> AdamWState<D> {
    /// Zero moments for `len` weights. The f32 master copy, where the device keeps one, starts as zero too: upload the
    /// weights to it before the first update.
    ///
    /// # Errors
    /// [`crate::Error::Device`] where the device has no memory for them.
    pub fn new(device: &D, len: usize) -> Result<Self> {
        Ok(AdamWState {
            master: if device.needs_master() { Some(device.alloc(len)?) } else { None },
            first_moment: device.alloc(len)?,
            second_moment: device.alloc(len)?,
        })
    }
}

/// One of the tensors that a call of [`Optimizer::adamw`] updates.
#[derive(Debug)]
pub struct AdamWUpdate<'a, D: Memory> {
    /// Updated.
    pub weight: &'a mut ComputeBuffer<D>,
    /// Updated.
    pub state: &'a mut AdamWState<D>,
    /// Gradient of the loss, before clipping.
    pub gradient: &'a Floats<D>,
}

/// Gradient norm and AdamW, over all tensors at once.
///
/// # Errors
/// All methods return [`crate::Error::Device`] for buffers that are too small, for update number 0, and where the
/// device fails.
pub trait Optimizer: Memory {
    /// Whether AdamW keeps an f32 master copy beside the weights.
    fn needs_master(&self) -> bool;

    /// Assigns `out[0]`, the l2 norm over all `gradients`, and `out[1]`, the factor that clips it to `max_norm`
    /// (1 without clipping). The order of summation is fixed.
    fn gradient_norm(
        &self,
        out: &mut Floats<Self>,
        gradients: &[&Floats<Self>],
        max_norm: Option<f32>,
    ) -> Result<()> {
        let checked = check_sizes("gradient_norm", &gradients.len(), &[("out", self.len(out), 2)])?;
        self.run_gradient_norm(out, gradients, max_norm, checked)
    }

    /// Updates each tensor's `weight` and `state` from `gradient * norm[1]`, in a few launches however many they are.
    fn adamw(
        &self,
        updates: &mut [AdamWUpdate<'_, Self>],
        norm: &Floats<Self>,
        step: AdamWStep,
    ) -> Result<()> {
        let sizes = [("norm", self.len(norm), 2), ("step number", step.step as usize, 1)];
        let checked = check_sizes("adamw", &step, &sizes)?;
        for AdamWUpdate { weight, state, gradient } in updates.iter() {
            let len = self.len(*weight);
            let master = match &state.master {
                Some(master) => self.len(master),
                None if self.needs_master() => 0,
                None => len,
            };
            let sizes = [
                ("master", master, len),
                ("first_moment", self.len(&state.first_moment), len),
                ("second_moment", self.len(&state.second_moment), len),
                ("gradient", self.len(*gradient), len),
            ];
            check_sizes("adamw", &len, &sizes)?;
        }
        self.run_adamw(updates, norm, step, checked)
    }

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
        step: AdamWStep,
        checked: Checked,
    ) -> Result<()>;
}
