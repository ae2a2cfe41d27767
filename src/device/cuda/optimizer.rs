//! Gradient norm and AdamW: `kernels/grad_norm.cu`, `kernels/adamw.cu`.

use std::ops::Range;
use std::ptr;

use super::bindings::{
    MMPO_MOMENTS_8BIT, MMPO_MOMENTS_BF16, MMPO_MOMENTS_F32, MMPO_STORAGE_BF16, MMPO_STORAGE_F32,
    mmpo_adamw_step, mmpo_adamw_tensor, mmpo_gradient, mmpo_moments, mmpo_storage,
};
use super::{CudaBuffer, CudaDevice, launch_sizes};
use crate::device::{AdamWUpdate, Checked, Gradient, GradientPart, Optimizer};
use crate::error::Result;
use crate::optimizer::{AdamWFactors, BLOCK, Master, MasterWeights, MomentFormat, Moments};

impl Optimizer for CudaDevice {
    fn needs_master(&self) -> bool {
        true
    }

    fn reserve_gradient_norm_of(&self, gradients: &[Gradient<'_, Self>]) -> Result<()> {
        let name = "gradient_norm";
        let tensors: Vec<_> =
            gradients.iter().map(|&gradient| entry(gradient, &(0..gradient.values(self)))).collect();
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
            let tensors: Vec<_> = gradients.iter().map(|(gradient, part)| entry(*gradient, part)).collect();
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

    /// One call of the launcher for each format of moments, type of gradients and kind of master copy: a run has a few of them.
    fn run_adamw(
        &self,
        updates: &mut [AdamWUpdate<'_, Self>],
        norm: &CudaBuffer<f32>,
        factors: AdamWFactors,
        _: Checked,
    ) -> Result<()> {
        for format in [MMPO_MOMENTS_F32, MMPO_MOMENTS_BF16, MMPO_MOMENTS_8BIT] {
            for kind in [MasterWeights::F32, MasterWeights::Split, MasterWeights::None] {
                for storage in [MMPO_STORAGE_F32, MMPO_STORAGE_BF16] {
                    let of_kind = updates.iter_mut().filter(|update| {
                        moments_format(update) == format
                            && master_kind(update) == kind
                            && storage_of(update.gradient) == storage
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
                    let (step, formats) = (parameters(factors, seed), [format as i32, storage as i32]);
                    // SAFETY: all buffers of a tensor were checked to hold its values, and `updates` borrows those that are
                    // written.
                    self.launch("adamw", &count, |kernels, stream| unsafe {
                        let [moments, gradients] = formats;
                        let (tensors, norm) = (tensors.as_ptr(), norm.start());
                        (kernels.adamw)(tensors, count, norm, step, moments, gradients, stream)
                    })?;
                }
            }
        }
        Ok(())
    }
}

/// The type of a gradient, as launchers number them.
fn storage_of(gradient: Gradient<'_, CudaDevice>) -> mmpo_storage {
    match gradient {
        Gradient::F32(_) => MMPO_STORAGE_F32,
        Gradient::Bf16(_) => MMPO_STORAGE_BF16,
    }
}

/// A part of a gradient as an entry of the list that the launcher of the norm takes.
fn entry(gradient: Gradient<'_, CudaDevice>, part: &Range<usize>) -> mmpo_gradient {
    let values = match gradient {
        Gradient::F32(values) => values.at(part.start).cast(),
        Gradient::Bf16(values) => values.at(part.start).cast(),
    };
    mmpo_gradient { values, length: part.len() as i64, storage: storage_of(gradient) as i32 }
}

fn master_kind(update: &AdamWUpdate<'_, CudaDevice>) -> MasterWeights {
    update.master.as_ref().map_or(MasterWeights::None, |master| master.kind())
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
        master: ptr::null_mut(),
        remainder: ptr::null_mut(),
        first_moment: ptr::null_mut(),
        second_moment: ptr::null_mut(),
        first_scales: ptr::null_mut(),
        second_scales: ptr::null_mut(),
        gradient: match gradient {
            Gradient::F32(values) => values.at(in_gradient.start).cast(),
            Gradient::Bf16(values) => values.at(in_gradient.start).cast(),
        },
        length: part.len() as i64,
        tensor: rounding.tensor,
        first_block: (part.start / BLOCK) as u32,
    };
    match master {
        Some(Master::Whole(values)) => tensor.master = values.start_mut(),
        Some(Master::Remainders(values)) => tensor.remainder = values.start_mut(),
        None => {}
    }
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
