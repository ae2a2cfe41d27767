//! RMSNorm, alone and behind a residual addition: `kernels/rms_norm.cu`.

use half::bf16;

use super::{CudaBuffer, CudaDevice, check_sizes, launch_sizes};
use crate::device::NormShape;
use crate::error::Result;

pub(super) fn forward(
    device: &CudaDevice,
    out: &mut CudaBuffer<bf16>,
    rstd: &mut CudaBuffer<f32>,
    x: &CudaBuffer<bf16>,
    weight: &CudaBuffer<bf16>,
    shape: NormShape,
) -> Result<()> {
    let name = "rms_norm_forward";
    let values = shape.rows * shape.width;
    let sizes = [
        ("out", out.len(), values),
        ("rstd", rstd.len(), shape.rows),
        ("x", x.len(), values),
        ("weight", weight.len(), shape.width),
    ];
    check_sizes(name, &shape, &sizes)?;
    let [rows, width] = launch_sizes(name, [shape.rows, shape.width])?;
    // SAFETY: the buffers cover the sizes.
    device.launch(name, &shape, |kernels, stream| unsafe {
        (kernels.rms_norm_forward)(
            out.start_mut(),
            rstd.start_mut(),
            x.start(),
            weight.start(),
            rows,
            width,
            shape.epsilon,
            stream,
        )
    })
}

#[allow(clippy::too_many_arguments)]
pub(super) fn add_forward(
    device: &CudaDevice,
    sum: &mut CudaBuffer<bf16>,
    out: &mut CudaBuffer<bf16>,
    rstd: &mut CudaBuffer<f32>,
    x: &CudaBuffer<bf16>,
    delta: &CudaBuffer<bf16>,
    weight: &CudaBuffer<bf16>,
    shape: NormShape,
) -> Result<()> {
    let name = "add_rms_norm_forward";
    let values = shape.rows * shape.width;
    let sizes = [
        ("sum", sum.len(), values),
        ("out", out.len(), values),
        ("rstd", rstd.len(), shape.rows),
        ("x", x.len(), values),
        ("delta", delta.len(), values),
        ("weight", weight.len(), shape.width),
    ];
    check_sizes(name, &shape, &sizes)?;
    let [rows, width] = launch_sizes(name, [shape.rows, shape.width])?;
    // SAFETY: the buffers cover the sizes.
    device.launch(name, &shape, |kernels, stream| unsafe {
        (kernels.add_rms_norm_forward)(
            sum.start_mut(),
            out.start_mut(),
            rstd.start_mut(),
            x.start(),
            delta.start(),
            weight.start(),
            rows,
            width,
            shape.epsilon,
            stream,
        )
    })
}

pub(super) fn add(
    device: &CudaDevice,
    sum: &mut CudaBuffer<bf16>,
    x: &CudaBuffer<bf16>,
    delta: &CudaBuffer<bf16>,
    len: usize,
) -> Result<()> {
    check_sizes("add", &len, &[("sum", sum.len(), len), ("x", x.len(), len), ("delta", delta.len(), len)])?;
    // SAFETY: the buffers cover the length.
    device.launch("add", &len, |kernels, stream| unsafe {
        (kernels.add)(sum.start_mut(), x.start(), delta.start(), len as i64, stream)
    })
}

#[allow(clippy::too_many_arguments)]
pub(super) fn backward(
    device: &CudaDevice,
    dx: &mut CudaBuffer<bf16>,
    dweight: &mut CudaBuffer<f32>,
    dout: &CudaBuffer<bf16>,
    x: &CudaBuffer<bf16>,
    weight: &CudaBuffer<bf16>,
    rstd: &CudaBuffer<f32>,
    shape: NormShape,
) -> Result<()> {
    let name = "rms_norm_backward";
    let values = shape.rows * shape.width;
    let sizes = [
        ("dx", dx.len(), values),
        ("dweight", dweight.len(), shape.width),
        ("dout", dout.len(), values),
        ("x", x.len(), values),
        ("weight", weight.len(), shape.width),
        ("rstd", rstd.len(), shape.rows),
    ];
    check_sizes(name, &shape, &sizes)?;
    let [rows, width] = launch_sizes(name, [shape.rows, shape.width])?;
    // SAFETY: the workspace is as large as the launcher's own rule says, and the buffers cover the sizes.
    device.launch_with_workspace(
        name,
        &shape,
        |kernels| unsafe { (kernels.rms_norm_backward_workspace)(rows, width) },
        |kernels, workspace, stream| unsafe {
            (kernels.rms_norm_backward)(
                dx.start_mut(),
                dweight.start_mut(),
                workspace,
                dout.start(),
                x.start(),
                weight.start(),
                rstd.start(),
                rows,
                width,
                stream,
            )
        },
    )
}
