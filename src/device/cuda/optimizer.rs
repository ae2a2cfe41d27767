//! Gradient norm and AdamW: `kernels/grad_norm.cu`, `kernels/adamw.cu`.

use std::ptr;

use super::bindings::{
    MMPO_MOMENTS_8BIT, MMPO_MOMENTS_BF16, MMPO_MOMENTS_F32, mmpo_adamw_step, mmpo_adamw_tensor, mmpo_floats,
    mmpo_moments,
};
use super::{CudaBuffer, CudaDevice, launch_sizes};
use crate::device::{AdamWUpdate, Checked, GradientPart, Optimizer};
use crate::error::Result;
use crate::optimizer::{AdamWFactors, BLOCK, MomentFormat, Moments};

impl Optimizer for CudaDevice {
    fn needs_master(&self) -> bool {
        true
    }

    fn reserve_gradient_norm(&self, gradients: &[&CudaBuffer<f32>]) -> Result<()> {
        let name = "gradient_norm";
        let tensors: Vec<_> = gradients.iter().map(|gradient| gradient.as_tensor()).collect();
        let [count] = launch_sizes(name, [tensors.len()])?;
        // SAFETY: reads `count` lengths in host memory.
        let bytes = self.workspace_bytes(name, &count, |kernels| unsafe {
            (kernels.gradient_norm_workspace)(tensors.as_ptr(), count)
        })?;
        self.workspace.reserve(&self.memory, bytes)
    }

    fn run_gradient_norm(
        &self,
        out: &mut CudaBuffer<f32>,
        gradients: &[GradientPart<'_, Self>],
        max_norm: Option<f32>,
        _: Checked,
    ) -> Result<()> {
        self.trace.scope("gradient_norm", || {
            let name = "gradient_norm";
            let tensors: Vec<_> = gradients
                .iter()
                .map(|(gradient, part)| mmpo_floats {
                    values: gradient.at(part.start).cast_mut(),
                    length: part.len() as i64,
                })
                .collect();
            let [count] = launch_sizes(name, [tensors.len()])?;
            let max_norm = max_norm.unwrap_or(f32::INFINITY);
            self.launch_with_workspace(
                name,
                &count,
                // SAFETY: reads `count` lengths in host memory.
                |kernels| unsafe { (kernels.gradient_norm_workspace)(tensors.as_ptr(), count) },
                // SAFETY: the workspace is as large as was asked for, and each part was checked to lie in its buffer.
                |kernels, workspace, stream| unsafe {
                    (kernels.gradient_norm)(
                        out.start_mut(),
                        workspace,
                        tensors.as_ptr(),
                        count,
                        max_norm,
                        stream,
                    )
                },
            )
        })
    }

    /// One call of the launcher for each format of moments, with and without master copies: a run has one or two of them.
    fn run_adamw(
        &self,
        updates: &mut [AdamWUpdate<'_, Self>],
        norm: &CudaBuffer<f32>,
        factors: AdamWFactors,
        _: Checked,
    ) -> Result<()> {
        for format in [MMPO_MOMENTS_F32, MMPO_MOMENTS_BF16, MMPO_MOMENTS_8BIT] {
            for has_master in [true, false] {
                let of_kind = updates.iter_mut().filter(|update| {
                    moments_format(update) == format && update.master.is_some() == has_master
                });
                let mut seed = 0;
                let tensors: Vec<_> = of_kind
                    .map(|update| {
                        seed = update.rounding.seed;
                        tensor(self, update)
                    })
                    .collect();
                if tensors.is_empty() {
                    continue;
                }
                let [count] = launch_sizes("adamw", [tensors.len()])?;
                let step = parameters(factors, seed);
                // SAFETY: all buffers of a tensor were checked to hold its values, and `updates` borrows those that are
                // written.
                self.launch("adamw", &count, |kernels, stream| unsafe {
                    (kernels.adamw)(tensors.as_ptr(), count, norm.start(), step, format as i32, stream)
                })?;
            }
        }
        Ok(())
    }
}

/// The format of a tensor's moments, as the launcher numbers them.
fn moments_format(update: &AdamWUpdate<'_, CudaDevice>) -> mmpo_moments {
    match update.moments.format() {
        MomentFormat::F32 => MMPO_MOMENTS_F32,
        MomentFormat::Bf16 => MMPO_MOMENTS_BF16,
        MomentFormat::EightBit => MMPO_MOMENTS_8BIT,
    }
}

/// A tensor as the launcher takes it.
fn tensor(device: &CudaDevice, update: &mut AdamWUpdate<'_, CudaDevice>) -> mmpo_adamw_tensor {
    let part = update.range(device);
    let (in_weight, in_gradient) = (update.in_weight(device), update.in_gradient(device));
    let AdamWUpdate { weight, master, moments, rounding, gradient, .. } = update;
    let mut tensor = mmpo_adamw_tensor {
        weight: weight.at_mut(in_weight.start),
        master: master.as_mut().map_or(ptr::null_mut(), |master| master.start_mut()),
        first_moment: ptr::null_mut(),
        second_moment: ptr::null_mut(),
        first_scales: ptr::null_mut(),
        second_scales: ptr::null_mut(),
        gradient: gradient.at(in_gradient.start),
        length: part.len() as i64,
        tensor: rounding.tensor,
        first_block: (part.start / BLOCK) as u32,
    };
    (tensor.first_moment, tensor.second_moment) = match moments {
        Moments::F32(pair) => (pair.first.start_mut().cast(), pair.second.start_mut().cast()),
        Moments::Bf16(pair) => (pair.first.start_mut().cast(), pair.second.start_mut().cast()),
        Moments::EightBit { codes, scales } => {
            (tensor.first_scales, tensor.second_scales) =
                (scales.first.start_mut(), scales.second.start_mut());
            (codes.first.start_mut().cast(), codes.second.start_mut().cast())
        }
    };
    tensor
}

/// The factors as the launcher takes them.
fn parameters(factors: AdamWFactors, seed: u64) -> mmpo_adamw_step {
    let AdamWFactors { beta1, beta2, rest1, rest2, decay, step_size, root_correction, epsilon, step } =
        factors;
    let (seed_low, seed_high) = (seed as u32, (seed >> 32) as u32);
    mmpo_adamw_step {
        beta1,
        beta2,
        rest1,
        rest2,
        decay,
        step_size,
        root_correction,
        epsilon,
        step,
        seed_low,
        seed_high,
    }
}
