//! SwiGLU: `kernels/swiglu.cu`, or fused into the gemm that computes its input.

use half::bf16;

use super::gemm::fuses_swiglu;
use super::{CudaBuffer, CudaDevice, adapted_linear, launch_sizes};
use crate::device::{AdapterTerms, Checked, Linear, LinearSwiglu, Mlp};
use crate::error::Result;

impl Mlp for CudaDevice {
    fn run_swiglu_forward(
        &self,
        out: &mut CudaBuffer<bf16>,
        gate_up: &CudaBuffer<bf16>,
        [rows, width]: [usize; 2],
        _: Checked,
    ) -> Result<()> {
        let name = "swiglu_forward";
        let [rows, width] = launch_sizes(name, [rows, width])?;
        // SAFETY: the buffers cover the sizes.
        self.launch(name, &[rows, width], |kernels, stream| unsafe {
            (kernels.swiglu_forward)(out.start_mut(), gate_up.start(), rows, width, stream)
        })
    }

    /// SwiGLU after the gemm `gate_up = x * weight^T + bias`, `shape.outputs` = 2F: one kernel computes both where that
    /// is faster.
    fn run_linear_swiglu_forward(&self, operands: LinearSwiglu<'_, Self>, _: Checked) -> Result<()> {
        let LinearSwiglu { out, gate_up, x, weight, bias, shape } = operands;
        let name = "linear_swiglu_forward";
        let width = shape.outputs / 2;
        let addresses = [out.start().addr(), gate_up.start().addr(), x.start().addr(), weight.start().addr()];
        if !fuses_swiglu(self, addresses, shape) {
            self.linear_forward(gate_up, x, weight, bias, shape)?;
            return self.swiglu_forward(out, gate_up, shape.rows, width);
        }
        let bias = bias.map_or(std::ptr::null(), CudaBuffer::start);
        let [rows, inputs, width] = launch_sizes(name, [shape.rows, shape.inputs, width])?;
        // SAFETY: the buffers cover the sizes.
        self.launch("linear_swiglu_forward_sm90", &shape, |kernels, stream| unsafe {
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

    fn run_adapted_linear_swiglu_forward(
        &self,
        operands: LinearSwiglu<'_, Self>,
        terms: AdapterTerms<'_, Self>,
        _: Checked,
    ) -> Result<()> {
        let separate = adapted_linear::swiglu_forward(self, operands, terms)?;
        separate.map_or(Ok(()), |(operands, terms)| operands.separately(terms, self))
    }

    fn run_swiglu_backward(
        &self,
        dgate_up: &mut CudaBuffer<bf16>,
        dout: &CudaBuffer<bf16>,
        gate_up: &CudaBuffer<bf16>,
        [rows, width]: [usize; 2],
        _: Checked,
    ) -> Result<()> {
        let name = "swiglu_backward";
        let [rows, width] = launch_sizes(name, [rows, width])?;
        // SAFETY: the buffers cover the sizes.
        self.launch(name, &[rows, width], |kernels, stream| unsafe {
            (kernels.swiglu_backward)(
                dgate_up.start_mut(),
                dout.start(),
                gate_up.start(),
                rows,
                width,
                stream,
            )
        })
    }
}
