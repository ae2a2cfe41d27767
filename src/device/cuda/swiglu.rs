//! SwiGLU: `kernels/swiglu.cu`.

use half::bf16;

use super::{CudaBuffer, CudaDevice, check_sizes, launch_sizes};
use crate::error::Result;

pub(super) fn forward(
    device: &CudaDevice,
    out: &mut CudaBuffer<bf16>,
    gate_up: &CudaBuffer<bf16>,
    rows: usize,
    width: usize,
) -> Result<()> {
    let name = "swiglu_forward";
    let values = rows * width;
    check_sizes(name, &[rows, width], &[("out", out.len(), values), ("gate_up", gate_up.len(), 2 * values)])?;
    let [rows, width] = launch_sizes(name, [rows, width])?;
    // SAFETY: the buffers cover the sizes.
    device.launch(name, &[rows, width], |kernels, stream| unsafe {
        (kernels.swiglu_forward)(out.start_mut(), gate_up.start(), rows, width, stream)
    })
}

pub(super) fn backward(
    device: &CudaDevice,
    dgate_up: &mut CudaBuffer<bf16>,
    dout: &CudaBuffer<bf16>,
    gate_up: &CudaBuffer<bf16>,
    rows: usize,
    width: usize,
) -> Result<()> {
    let name = "swiglu_backward";
    let values = rows * width;
    let sizes = [
        ("dgate_up", dgate_up.len(), 2 * values),
        ("dout", dout.len(), values),
        ("gate_up", gate_up.len(), 2 * values),
    ];
    check_sizes(name, &[rows, width], &sizes)?;
    let [rows, width] = launch_sizes(name, [rows, width])?;
    // SAFETY: the buffers cover the sizes.
    device.launch(name, &[rows, width], |kernels, stream| unsafe {
        (kernels.swiglu_backward)(dgate_up.start_mut(), dout.start(), gate_up.start(), rows, width, stream)
    })
}
