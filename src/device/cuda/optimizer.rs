//! Gradient norm and AdamW: `kernels/grad_norm.cu`, `kernels/adamw.cu`.

use super::bindings::{mmpo_adamw_step, mmpo_adamw_tensor};
use super::{CudaBuffer, CudaDevice, launch_sizes};
use crate::device::{AdamWUpdate, Checked, Optimizer};
use crate::error::{Error, Result};
use crate::optimizer::AdamWFactors;

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
        factors: AdamWFactors,
        _: Checked,
    ) -> Result<()> {
        let tensors = updates.iter_mut().map(tensor).collect::<Result<Vec<_>>>()?;
        let [count] = launch_sizes("adamw", [tensors.len()])?;
        let parameters = parameters(factors);
        // SAFETY: all buffers of a tensor were checked to hold its values, and `updates` borrows those that are written.
        self.launch("adamw", &count, |kernels, stream| unsafe {
            (kernels.adamw)(tensors.as_ptr(), count, norm.start(), parameters, stream)
        })
    }
}

/// A tensor as the launcher takes it.
fn tensor(update: &mut AdamWUpdate<'_, CudaDevice>) -> Result<mmpo_adamw_tensor> {
    let AdamWUpdate { weight, master, first_moment, second_moment, gradient } = update;
    let len = weight.len();
    let Some(master) = master else {
        let message = "adamw: bf16 weights are updated through an f32 master copy, and this state has none";
        return Err(Error::bug(message));
    };
    Ok(mmpo_adamw_tensor {
        weight: weight.start_mut(),
        master: master.start_mut(),
        first_moment: first_moment.start_mut(),
        second_moment: second_moment.start_mut(),
        gradient: gradient.start(),
        length: len as i64,
    })
}

/// The factors as the launcher takes them.
fn parameters(factors: AdamWFactors) -> mmpo_adamw_step {
    let AdamWFactors { beta1, beta2, rest1, rest2, decay, step_size, root_correction, epsilon } = factors;
    mmpo_adamw_step { beta1, beta2, rest1, rest2, decay, step_size, root_correction, epsilon }
}
