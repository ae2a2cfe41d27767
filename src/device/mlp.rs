//! SwiGLU (Shazeer 2020): a row of `gate_up` is `F` gate values, then `F` up values.

use super::check::check_sizes;
use super::{Checked, ComputeBuffer, Linear, LinearShape};
use crate::error::Result;

/// Operands of [`Mlp::linear_swiglu_forward`].
#[derive(Debug)]
pub struct LinearSwiglu<'a, D: Linear> {
    /// Assigned, `[T, F]`.
    pub out: &'a mut ComputeBuffer<D>,
    /// Assigned, `[T, 2F]`.
    pub gate_up: &'a mut ComputeBuffer<D>,
    /// `[T, D]`
    pub x: &'a ComputeBuffer<D>,
    /// `[2F, D]`
    pub weight: &'a ComputeBuffer<D>,
    /// `[2F]`
    pub bias: Option<&'a ComputeBuffer<D>>,
    /// Sizes of the gemm: `outputs` is `2F`.
    pub shape: LinearShape,
}

/// SwiGLU, alone and fused with the gemm before it.
///
/// # Errors
/// All methods return [`crate::Error::Bug`] for buffers that are smaller than the sizes, and
/// [`crate::Error::Device`] where the device fails.
pub trait Mlp: Linear {
    /// Assigns `out[T, F] = silu(gate) * up`.
    fn swiglu_forward(
        &self,
        out: &mut ComputeBuffer<Self>,
        gate_up: &ComputeBuffer<Self>,
        rows: usize,
        width: usize,
    ) -> Result<()> {
        let values = rows * width;
        let sizes = [("out", self.len(out), values), ("gate_up", self.len(gate_up), 2 * values)];
        let checked = check_sizes("swiglu_forward", &[rows, width], &sizes)?;
        self.run_swiglu_forward(out, gate_up, [rows, width], checked)
    }

    /// Assigns `gate_up[T, 2F] = x * weight^T (+ bias)`, then as [`Mlp::swiglu_forward`]. A device that fuses the two
    /// saves one pass over `gate_up`; the results are the same.
    fn linear_swiglu_forward(&self, operands: LinearSwiglu<'_, Self>) -> Result<()> {
        let shape = operands.shape;
        let width = shape.outputs / 2;
        let sizes = [
            ("out", self.len(operands.out), shape.rows * width),
            ("gate_up", self.len(operands.gate_up), shape.rows * 2 * width),
            ("x", self.len(operands.x), shape.rows * shape.inputs),
            ("weight", self.len(operands.weight), 2 * width * shape.inputs),
            ("bias", operands.bias.map_or(2 * width, |bias| self.len(bias)), 2 * width),
        ];
        let checked = check_sizes("linear_swiglu_forward", &shape, &sizes)?;
        self.run_linear_swiglu_forward(operands, checked)
    }

    /// Assigns `dgate_up[T, 2F]`.
    fn swiglu_backward(
        &self,
        dgate_up: &mut ComputeBuffer<Self>,
        dout: &ComputeBuffer<Self>,
        gate_up: &ComputeBuffer<Self>,
        rows: usize,
        width: usize,
    ) -> Result<()> {
        let values = rows * width;
        let sizes = [
            ("dgate_up", self.len(dgate_up), 2 * values),
            ("dout", self.len(dout), values),
            ("gate_up", self.len(gate_up), 2 * values),
        ];
        let checked = check_sizes("swiglu_backward", &[rows, width], &sizes)?;
        self.run_swiglu_backward(dgate_up, dout, gate_up, [rows, width], checked)
    }

    /// The device's part of [`Mlp::swiglu_forward`]; sizes are `[T, F]`.
    fn run_swiglu_forward(
        &self,
        out: &mut ComputeBuffer<Self>,
        gate_up: &ComputeBuffer<Self>,
        sizes: [usize; 2],
        checked: Checked,
    ) -> Result<()>;

    /// The device's part of [`Mlp::linear_swiglu_forward`]; one operation after the other unless the device fuses them.
    fn run_linear_swiglu_forward(&self, operands: LinearSwiglu<'_, Self>, _: Checked) -> Result<()> {
        let LinearSwiglu { out, gate_up, x, weight, bias, shape } = operands;
        self.linear_forward(gate_up, x, weight, bias, shape)?;
        self.swiglu_forward(out, gate_up, shape.rows, shape.outputs / 2)
    }

    /// The device's part of [`Mlp::swiglu_backward`]; sizes are `[T, F]`.
    fn run_swiglu_backward(
        &self,
        dgate_up: &mut ComputeBuffer<Self>,
        dout: &ComputeBuffer<Self>,
        gate_up: &ComputeBuffer<Self>,
        sizes: [usize; 2],
        checked: Checked,
    ) -> Result<()>;
}
