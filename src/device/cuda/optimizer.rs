//! Gradient norm and AdamW: `kernels/grad_norm.cu`, `kernels/adamw.cu`.

use half::bf16;

use super::bindings::mmpo_adamw_step;
use super::{CudaBuffer, CudaDevice, REPORT, check_sizes};
use crate::device::{AdamWState, AdamWStep};
use crate::error::{Error, Result};

pub(super) fn gradient_norm(
    device: &CudaDevice,
    out: &mut CudaBuffer<f32>,
    gradients: &[&CudaBuffer<f32>],
    max_norm: Option<f32>,
) -> Result<()> {
    let name = "gradient_norm";
    check_sizes(name, &gradients.len(), &[("out", out.len(), 2)])?;
    // Each tensor's partial sums follow those of the one before it, so that their order never changes.
    let mut partials = 0;
    let mut first_partial = Vec::with_capacity(gradients.len());
    for gradient in gradients {
        first_partial.push(partials);
        partials += device.ask(name, &gradient.len(), |kernels| {
            // SAFETY: a pure function of a number.
            unsafe { (kernels.gradient_norm_partials)(gradient.len() as i64) }
        })?;
    }
    let max_norm = max_norm.unwrap_or(f32::INFINITY);
    let bytes = partials as usize * size_of::<f32>();
    device.workspace.with(&device.memory, bytes, |workspace| {
        let workspace: *mut f32 = workspace.cast();
        for (gradient, &first) in gradients.iter().zip(&first_partial) {
            let partials = workspace.wrapping_add(first as usize);
            // SAFETY: the workspace holds the partial sums of all tensors, and this one's begin at `first`.
            device.launch("gradient_norm_partial", &gradient.len(), |kernels, stream| unsafe {
                (kernels.gradient_norm_partial)(partials, gradient.start(), gradient.len() as i64, stream)
            })?;
        }
        // SAFETY: the launches above fill all `partials` values.
        device.launch("gradient_norm_finish", &gradients.len(), |kernels, stream| unsafe {
            (kernels.gradient_norm_finish)(out.start_mut(), workspace, partials, max_norm, stream)
        })
    })
}

pub(super) fn adamw(
    device: &CudaDevice,
    weight: &mut CudaBuffer<bf16>,
    state: &mut AdamWState<CudaDevice>,
    gradient: &CudaBuffer<f32>,
    norm: &CudaBuffer<f32>,
    step: AdamWStep,
) -> Result<()> {
    let len = weight.len();
    let Some(master) = state.master.as_mut() else {
        let message = "adamw: bf16 weights are updated through an f32 master copy, and this state has none";
        return Err(Error::device(message, REPORT));
    };
    let sizes = [
        ("master", master.len(), len),
        ("first_moment", state.first_moment.len(), len),
        ("second_moment", state.second_moment.len(), len),
        ("gradient", gradient.len(), len),
        ("norm", norm.len(), 2),
        ("step number", step.step as usize, 1),
    ];
    check_sizes("adamw", &len, &sizes)?;
    if step.step == 0 {
        return Err(Error::device(
            "adamw: update number 0 has no bias correction; updates are numbered from 1",
            "this is a mistake in the program, not in your input; please report it",
        ));
    }
    let parameters = parameters(step);
    // SAFETY: all buffers hold `len` values.
    device.launch("adamw", &len, |kernels, stream| unsafe {
        (kernels.adamw)(
            weight.start_mut(),
            master.start_mut(),
            state.first_moment.start_mut(),
            state.second_moment.start_mut(),
            gradient.start(),
            norm.start(),
            len as i64,
            parameters,
            stream,
        )
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
