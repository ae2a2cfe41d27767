//! SwiGLU: `kernels/swiglu.cu`, and as the end of the product that makes its input.

use half::bf16;

use super::products::fuses_swiglu;
use super::{CudaBuffer, CudaDevice, check_sizes, launch_sizes, linear};
use crate::device::LinearShape;
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

/// [`forward`] of the product `gate_up = x * weight^T + bias`, `shape.outputs` = 2F: in one kernel where that is the faster
/// way.
pub(super) fn linear_forward(
    device: &CudaDevice,
    out: &mut CudaBuffer<bf16>,
    gate_up: &mut CudaBuffer<bf16>,
    x: &CudaBuffer<bf16>,
    weight: &CudaBuffer<bf16>,
    bias: Option<&CudaBuffer<bf16>>,
    shape: LinearShape,
) -> Result<()> {
    let name = "linear_swiglu_forward";
    let width = shape.outputs / 2;
    let sizes = [
        ("out", out.len(), shape.rows * width),
        ("gate_up", gate_up.len(), shape.rows * 2 * width),
        ("x", x.len(), shape.rows * shape.inputs),
        ("weight", weight.len(), 2 * width * shape.inputs),
        ("bias", bias.map_or(2 * width, CudaBuffer::len), 2 * width),
    ];
    check_sizes(name, &shape, &sizes)?;
    let addresses = [out.start().addr(), gate_up.start().addr(), x.start().addr(), weight.start().addr()];
    if !fuses_swiglu(device, addresses, shape) {
        linear::forward(device, gate_up, x, weight, bias, shape)?;
        return forward(device, out, gate_up, shape.rows, width);
    }
    let bias = bias.map_or(std::ptr::null(), CudaBuffer::start);
    let [rows, inputs, width] = launch_sizes(name, [shape.rows, shape.inputs, width])?;
    // SAFETY: the buffers cover the sizes.
    device.launch("linear_swiglu_forward_sm90", &shape, |kernels, stream| unsafe {
        let (out, gate_up) = (out.start_mut(), gate_up.start_mut());
        (kernels.linear_swiglu_forward_sm90)(
            out,
            gate_up,
            x.start(),
            weight.start(),
            bias,
            rows,
            inputs,
            width,
            stream,
        )
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
