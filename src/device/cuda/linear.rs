//! Linear layers: `out[rows, outputs] = x[rows, inputs] * weight[outputs, inputs]^T`, and back.
//!
//! `gemm.rs` says which kernel or library computes a gemm.

use half::bf16;

use super::super::check::check_sizes;
use super::gemm::{self, GemmKind, LinearGemm, multiply};
use super::{CudaBuffer, CudaDevice, launch_sizes};
use crate::device::{Checked, Linear, LinearShape};
use crate::error::Result;

impl Linear for CudaDevice {
    fn reserve_linear(&self, shape: LinearShape, bias: bool) -> Result<()> {
        let shapes: Vec<_> = (1..=shape.rows).map(|rows| LinearShape { rows, ..shape }).collect();
        gemm::reserve(self, GemmKind::BackwardWeight, &shapes)?;
        if !bias {
            return Ok(());
        }
        let name = "linear_bias_backward";
        let [rows, outputs] = launch_sizes(name, [shape.rows, shape.outputs])?;
        // SAFETY: a pure function of two numbers.
        let bytes = self.workspace_bytes(name, &shape, |kernels| unsafe {
            (kernels.linear_bias_backward_workspace)(rows, outputs)
        })?;
        self.workspace.reserve(&self.memory, bytes)
    }

    fn run_linear_forward(
        &self,
        out: &mut CudaBuffer<bf16>,
        x: &CudaBuffer<bf16>,
        weight: &CudaBuffer<bf16>,
        bias: Option<&CudaBuffer<bf16>>,
        shape: LinearShape,
        _: Checked,
    ) -> Result<()> {
        let gemm = LinearGemm::Forward {
            out: out.start_mut(),
            x: x.start(),
            weight: weight.start(),
            bias: bias.map(CudaBuffer::start),
        };
        // SAFETY: the buffers cover the sizes.
        unsafe { multiply(self, gemm, shape) }
    }

    fn run_linear_backward_input(
        &self,
        dx: &mut CudaBuffer<bf16>,
        dout: &CudaBuffer<bf16>,
        weight: &CudaBuffer<bf16>,
        shape: LinearShape,
        _: Checked,
    ) -> Result<()> {
        // SAFETY: the buffers cover the sizes.
        unsafe { backward_input_at(self, dx.start_mut(), dout.start(), weight.start(), shape) }
    }

    fn run_linear_backward_weight(
        &self,
        dweight: Option<&mut CudaBuffer<f32>>,
        dbias: Option<&mut CudaBuffer<f32>>,
        dout: &CudaBuffer<bf16>,
        x: &CudaBuffer<bf16>,
        shape: LinearShape,
        _: Checked,
    ) -> Result<()> {
        let name = "linear_backward_weight";
        if let Some(dweight) = dweight {
            // SAFETY: the buffers cover the sizes.
            unsafe { backward_weight_at(self, dweight.start_mut(), dout.start(), x.start(), shape)? };
        }
        let Some(dbias) = dbias else { return Ok(()) };
        let [rows, outputs] = launch_sizes(name, [shape.rows, shape.outputs])?;
        // SAFETY: the workspace is as large as the launcher's own rule says, and the buffers cover the sizes.
        self.launch_with_workspace(
            "linear_bias_backward",
            &shape,
            |kernels| unsafe { (kernels.linear_bias_backward_workspace)(rows, outputs) },
            |kernels, workspace, stream| unsafe {
                (kernels.linear_bias_backward)(
                    dbias.start_mut(),
                    workspace,
                    dout.start(),
                    rows,
                    outputs,
                    stream,
                )
            },
        )
    }
}

/// Assigns `dx[rows, inputs] = dout[rows, outputs] * weight[outputs, inputs]`.
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
    unsafe { multiply(device, LinearGemm::BackwardInput { dx, dout, weight }, shape) }
}

impl CudaDevice {
    /// As [`Linear::linear_backward_input`], accumulated in f32: what the log-prob head's backward does with
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
        let sizes = [
            ("dx", dx.len(), shape.rows * shape.inputs),
            ("dout", dout.len(), shape.rows * shape.outputs),
            ("weight", weight.len(), shape.outputs * shape.inputs),
        ];
        check_sizes("linear_backward_input_f32", &shape, &sizes)?;
        // SAFETY: the buffers cover the sizes.
        unsafe { add_backward_input_at(self, dx.start_mut(), dout.start(), weight.start(), shape) }
    }
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
    unsafe { multiply(device, LinearGemm::BackwardInputF32 { dx, dout, weight }, shape) }
}

/// Accumulates `dweight[outputs, inputs] += dout[rows, outputs]^T * x[rows, inputs]` in f32.
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
    unsafe { multiply(device, LinearGemm::BackwardWeight { dweight, dout, x }, shape) }
}
