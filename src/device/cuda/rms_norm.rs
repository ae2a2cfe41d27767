//! RMSNorm, alone and after a residual addition: `kernels/rms_norm.cu`.

use half::bf16;

use super::{CudaBuffer, CudaDevice, launch_sizes};
use crate::device::{AddRmsNorm, Checked, Norm, NormShape, RmsNormBackward};
use crate::error::Result;

impl Norm for CudaDevice {
    fn reserve_rms_norm(&self, shape: NormShape) -> Result<()> {
        let name = "rms_norm_backward";
        let [rows, width] = launch_sizes(name, [shape.rows, shape.width])?;
        // SAFETY: a pure function of two numbers.
        let bytes = self.workspace_bytes(name, &shape, |kernels| unsafe {
            (kernels.rms_norm_backward_workspace)(rows, width)
        })?;
        self.workspace.reserve(&self.memory, bytes)
    }

    fn run_rms_norm_forward(
        &self,
        out: &mut CudaBuffer<bf16>,
        rstd: &mut CudaBuffer<f32>,
        x: &CudaBuffer<bf16>,
        weight: &CudaBuffer<bf16>,
        shape: NormShape,
        _: Checked,
    ) -> Result<()> {
        let name = "rms_norm_forward";
        let [rows, width] = launch_sizes(name, [shape.rows, shape.width])?;
        // SAFETY: the buffers cover the sizes.
        self.launch(name, &shape, |kernels, stream| unsafe {
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

    fn run_add_rms_norm_forward(&self, operands: AddRmsNorm<'_, Self>, _: Checked) -> Result<()> {
        let AddRmsNorm { sum, out, rstd, x, delta, weight, shape } = operands;
        let name = "add_rms_norm_forward";
        let [rows, width] = launch_sizes(name, [shape.rows, shape.width])?;
        // SAFETY: the buffers cover the sizes.
        self.launch(name, &shape, |kernels, stream| unsafe {
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

    fn run_add(
        &self,
        sum: &mut CudaBuffer<bf16>,
        x: &CudaBuffer<bf16>,
        delta: &CudaBuffer<bf16>,
        len: usize,
        _: Checked,
    ) -> Result<()> {
        // SAFETY: the buffers cover the length.
        self.launch("add", &len, |kernels, stream| unsafe {
            (kernels.add)(sum.start_mut(), x.start(), delta.start(), len as i64, stream)
        })
    }

    fn run_rms_norm_backward(&self, operands: RmsNormBackward<'_, Self>, _: Checked) -> Result<()> {
        let RmsNormBackward { dx, dweight, dout, x, weight, rstd, shape } = operands;
        let dweight = dweight.map_or(std::ptr::null_mut(), CudaBuffer::start_mut);
        let name = "rms_norm_backward";
        let [rows, width] = launch_sizes(name, [shape.rows, shape.width])?;
        // SAFETY: the workspace is as large as the launcher's own rule says, and the buffers cover the sizes.
        self.launch_with_workspace(
            name,
            &shape,
            |kernels| unsafe { (kernels.rms_norm_backward_workspace)(rows, width) },
            |kernels, workspace, stream| unsafe {
                (kernels.rms_norm_backward)(
                    dx.start_mut(),
                    dweight,
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
}
