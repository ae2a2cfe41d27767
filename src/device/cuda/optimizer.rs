//! Gradient norm and AdamW: `kernels/grad_norm.cu`, `kernels/adamw.cu`.

use super::bindings::{mmpo_adamw_step, mmpo_adamw_tensor};
use super::{CudaBuffer, CudaDevice, REPORT, launch_sizes};
use crate::device::{AdamWStep, AdamWUpdate, Checked, Optimizer};
use crate::error::{Error, Result};

impl Optimizer for CudaDevice {
    fn needs_master(&self) -> bool {
        true
    }

    fn run_gradient_norm(
        &self,
        out: &mut CudaBuffer<f32>,
        gradients: &[&CudaBuffer<f32>],
        max_norm: Option<f32>,
        _: Checked,
    ) -> Result<()> {
        self.trace.scope("gradient_norm", || {
            let name = "gradient_norm";
            let tensors: Vec<_> = gradients.iter().map(|gradient| gradient.as_tensor()).collect();
            let [count] = launch_sizes(name, [tensors.len()])?;
            let max_norm = max_norm.unwrap_or(f32::INFINITY);
            self.launch_with_workspace(
                name,
                &count,
                // SAFETY: reads `count` lengths in host memory.
                |kernels| unsafe { (kernels.gradient_norm_workspace)(tensors.as_ptr(), count) },
                // SAFETY: the workspace is as large as was asked for, and each tensor a whole buffer.
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

    fn run_adamw(
        &self,
        updates: &mut [AdamWUpdate<'_, Self>],
        norm: &CudaBuffer<f32>,
        step: AdamWStep,
        _: Checked,
    ) -> Result<()> {
        let tensors = updates.iter_mut().map(tensor).collect::<Result<Vec<_>>>()?;
        let [count] = launch_sizes("adamw", [tensors.len()])?;
        let parameters = parameters(step);
        // SAFETY: all buffers of a tensor were checked to hold its values, and `updates` borrows those that are written.
        self.launch("adamw", &count, |kernels, stream| unsafe {
            (kernels.adamw)(tensors.as_ptr(), count, norm.start(), parameters, stream)
        })
    }
}

/// A tensor as the launcher takes it.
fn tensor(update: &mut AdamWUpdate<'_, CudaDevice>) -> Result<mmpo_adamw_tensor> {
    let AdamWUpdate { weight, state, gradient } = update;
    let len = weight.len();
    let Some(master) = state.master.as_mut() else {
        let message = "adamw: bf16 weights are updated through an f32 master copy, and this state has none";
        return Err(Error::device(message, REPORT));
    };
    Ok(mmpo_adamw_tensor {
        weight: weight.start_mut(),
        master: master.start_mut(),
        first_moment: state.first_moment.start_mut(),
        second_moment: state.second_moment.start_mut(),
        gradient: gradient.start(),
        length: len as i64,
    })
}

/// The factors of one update, in f64 until the end.
fn parameters(step: AdamWStep) -> mmpo_adamw_step {
    let (beta1, beta2) = (decimal(step.beta1), decimal(step.beta2));
    let power = f64::from(step.step);
    let learning_rate = f64::from(step.learning_rate);
    mmpo_adamw_step {
        beta1: step.beta1,
        beta2: step.beta2,
        rest1: (1.0 - beta1) as f32,
        rest2: (1.0 - beta2) as f32,
        decay: (1.0 - learning_rate * f64::from(step.weight_decay)) as f32,
        step_size: (learning_rate / (1.0 - beta1.powf(power))) as f32,
        root_correction: (1.0 / (1.0 - beta2.powf(power)).sqrt()) as f32,
        epsilon: step.epsilon,
    }
}

/// The f64 nearest to the short decimal that was rounded to this f32: 0.999 and not 0.99900001287, whose difference to 1
/// is off by 1e-5.
fn decimal(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}
