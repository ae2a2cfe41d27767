//! SwiGLU (Shazeer 2020): a row of `gate_up` is `F` gate values, then `F` up values.

use super::check::check_sizes;
use super::{AdaptedLinear, AdapterTerms, Checked, ComputeBuffer, Linear, LinearShape, LowRank};
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
pub trait Mlp: LowRank {
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
        let checked = check_sizes("linear_swiglu_forward", &shape, &swiglu_sizes(self, &operands))?;
        self.run_linear_swiglu_forward(operands, checked)
    }

    /// As [`Mlp::linear_swiglu_forward`] of a layer to whose `gate_up` adapters add.
    fn adapted_linear_swiglu_forward(
        &self,
        operands: LinearSwiglu<'_, Self>,
        terms: AdapterTerms<'_, Self>,
    ) -> Result<()> {
        let name = "adapted_linear_swiglu_forward";
        let checked = check_sizes(name, &operands.shape, &swiglu_sizes(self, &operands))?;
        terms.check(self, name, self.len(operands.gate_up))?;
        self.run_adapted_linear_swiglu_forward(operands, terms, checked)
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

    /// The device's part of [`Mlp::adapted_linear_swiglu_forward`]; as above.
    fn run_adapted_linear_swiglu_forward(
        &self,
        operands: LinearSwiglu<'_, Self>,
        terms: AdapterTerms<'_, Self>,
        _: Checked,
    ) -> Result<()> {
        operands.separately(terms, self)
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

/// What the buffers of a gemm with SwiGLU must hold.
fn swiglu_sizes<D: Linear>(device: &D, operands: &LinearSwiglu<'_, D>) -> [(&'static str, usize, usize); 5] {
    let LinearShape { rows, inputs, outputs } = operands.shape;
    let width = outputs / 2;
    [
        ("out", device.len(operands.out), rows * width),
        ("gate_up", device.len(operands.gate_up), rows * 2 * width),
        ("x", device.len(operands.x), rows * inputs),
        ("weight", device.len(operands.weight), 2 * width * inputs),
        ("bias", operands.bias.map_or(2 * width, |bias| device.len(bias)), 2 * width),
    ]
}

impl<D: Mlp> LinearSwiglu<'_, D> {
    /// The gemm with its adapters, then SwiGLU.
    pub(super) fn separately(self, terms: AdapterTerms<'_, D>, device: &D) -> Result<()> {
        let LinearSwiglu { out, gate_up, x, weight, bias, shape } = self;
        device.adapted_linear_forward(AdaptedLinear { out: &mut *gate_up, x, weight, bias, shape, terms })?;
        device.swiglu_forward(out, gate_up, shape.rows, shape.outputs / 2)
    }
}
