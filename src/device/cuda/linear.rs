//! Linear layers: `out[rows, outputs] = x[rows, inputs] * weight[outputs, inputs]^T`, and back.
//!
//! Sizes are checked here; `products.rs` says which kernel or library multiplies.

use half::bf16;

use super::products::{LinearProduct, multiply};
use super::{CudaBuffer, CudaDevice, check_sizes, launch_sizes};
use crate::device::LinearShape;
use crate::error::Result;

pub(super) fn forward(
    device: &CudaDevice,
    out: &mut CudaBuffer<bf16>,
    x: &CudaBuffer<bf16>,
    weight: &CudaBuffer<bf16>,
    bias: Option<&CudaBuffer<bf16>>,
    shape: LinearShape,
) -> Result<()> {
    let sizes = [
        ("out", out.len(), shape.rows * shape.outputs),
        ("x", x.len(), shape.rows * shape.inputs),
        ("weight", weight.len(), shape.outputs * shape.inputs),
        ("bias", bias.map_or(shape.outputs, CudaBuffer::len), shape.outputs),
    ];
    check_sizes("linear_forward", &shape, &sizes)?;
    let product = LinearProduct::Forward {
        out: out.start_mut(),
        x: x.start(),
        weight: weight.start(),
        bias: bias.map(CudaBuffer::start),
    };
    // SAFETY: the buffers cover the sizes.
    unsafe { multiply(device, product, shape) }
}

pub(super) fn backward_input(
    device: &CudaDevice,
    dx: &mut CudaBuffer<bf16>,
    dout: &CudaBuffer<bf16>,
    weight: &CudaBuffer<bf16>,
    shape: LinearShape,
) -> Result<()> {
    check_backward_input("linear_backward_input", [dx.len(), dout.len(), weight.len()], shape)?;
    // SAFETY: the buffers cover the sizes.
    unsafe { backward_input_at(device, dx.start_mut(), dout.start(), weight.start(), shape) }
}

/// As [`backward_input`], from the addresses of a buffer's rows.
///
/// # Safety
/// From each address on, the buffers cover `shape`; `dx` overlaps none of the others.
pub(super) unsafe fn backward_input_at(
    device: &CudaDevice,
    dx: *mut bf16,
    dout: *const bf16,
    weight: *const bf16,
    shape: LinearShape,
) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { multiply(device, LinearProduct::BackwardInput { dx, dout, weight }, shape) }
}

impl CudaDevice {
    /// As [`crate::device::Device::linear_backward_input`], accumulated in f32: what the log-prob head's backward does with
    /// the gradients of its logits.
    ///
    /// # Errors
    /// Those of the device, and buffers that are smaller than `shape`.
    pub fn linear_backward_input_f32(
        &self,
        dx: &mut CudaBuffer<f32>,
        dout: &CudaBuffer<bf16>,
        weight: &CudaBuffer<bf16>,
        shape: LinearShape,
    ) -> Result<()> {
        check_backward_input("linear_backward_input_f32", [dx.len(), dout.len(), weight.len()], shape)?;
        // SAFETY: the buffers cover the sizes.
        unsafe { add_backward_input_at(self, dx.start_mut(), dout.start(), weight.start(), shape) }
    }
}

/// `holds`: values of dx, dout and weight.
fn check_backward_input(name: &str, holds: [usize; 3], shape: LinearShape) -> Result<()> {
    let [dx, dout, weight] = holds;
    let sizes = [
        ("dx", dx, shape.rows * shape.inputs),
        ("dout", dout, shape.rows * shape.outputs),
        ("weight", weight, shape.outputs * shape.inputs),
    ];
    check_sizes(name, &shape, &sizes)
}

/// Accumulates `dx[rows, inputs] += dout[rows, outputs] * weight[outputs, inputs]` in f32.
///
/// # Safety
/// From each address on, the memory covers `shape`; `dx` overlaps none of the others.
pub(super) unsafe fn add_backward_input_at(
    device: &CudaDevice,
    dx: *mut f32,
    dout: *const bf16,
    weight: *const bf16,
    shape: LinearShape,
) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { multiply(device, LinearProduct::BackwardInputF32 { dx, dout, weight }, shape) }
}

pub(super) fn backward_weight(
    device: &CudaDevice,
    dweight: &mut CudaBuffer<f32>,
    dbias: Option<&mut CudaBuffer<f32>>,
    dout: &CudaBuffer<bf16>,
    x: &CudaBuffer<bf16>,
    shape: LinearShape,
) -> Result<()> {
    let name = "linear_backward_weight";
    let sizes = [
        ("dweight", dweight.len(), shape.outputs * shape.inputs),
        ("dbias", dbias.as_ref().map_or(shape.outputs, |dbias| dbias.len()), shape.outputs),
        ("dout", dout.len(), shape.rows * shape.outputs),
        ("x", x.len(), shape.rows * shape.inputs),
    ];
    check_sizes(name, &shape, &sizes)?;
    // SAFETY: the buffers cover the sizes.
    unsafe { backward_weight_at(device, dweight.start_mut(), dout.start(), x.start(), shape)? };
    let Some(dbias) = dbias else { return Ok(()) };
    let [rows, outputs] = launch_sizes(name, [shape.rows, shape.outputs])?;
    // SAFETY: the workspace is as large as the launcher's own rule says, and the buffers cover the sizes.
    device.launch_with_workspace(
        "linear_bias_backward",
        &shape,
        |kernels| unsafe { (kernels.linear_bias_backward_workspace)(rows, outputs) },
        |kernels, workspace, stream| unsafe {
            (kernels.linear_bias_backward)(dbias.start_mut(), workspace, dout.start(), rows, outputs, stream)
        },
    )
}

/// As [`backward_weight`] without bias, from the addresses of a buffer's rows.
///
/// # Safety
/// From each address on, the buffers cover `shape`; `dweight` overlaps none of the others.
pub(super) unsafe fn backward_weight_at(
    device: &CudaDevice,
    dweight: *mut f32,
    dout: *const bf16,
    x: *const bf16,
    shape: LinearShape,
) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { multiply(device, LinearProduct::BackwardWeight { dweight, dout, x }, shape) }
}
