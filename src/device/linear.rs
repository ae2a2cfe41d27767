//! Linear layers: one gemm forward, two backward.

use super::check::check_sizes;
use super::{Checked, ComputeBuffer, Floats, Memory};
use crate::error::Result;

/// `out[rows, outputs] = x[rows, inputs] * weight[outputs, inputs]^T + bias[outputs]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearShape {
    /// `T`, or `N` for the head.
    pub rows: usize,
    /// Width of the input.
    pub inputs: usize,
    /// Width of the output.
    pub outputs: usize,
}

/// Gemms of linear layers; sums are f32.
///
/// # Errors
/// All methods return [`crate::Error::Bug`] for buffers that are smaller than the shape, and
/// [`crate::Error::Device`] where the device fails.
pub trait Linear: Memory {
    /// Assigns `out[rows, outputs] = x * weight^T (+ bias)`.
    fn linear_forward(
        &self,
        out: &mut ComputeBuffer<Self>,
        x: &ComputeBuffer<Self>,
        weight: &ComputeBuffer<Self>,
        bias: Option<&ComputeBuffer<Self>>,
        shape: LinearShape,
    ) -> Result<()> {
        let LinearShape { rows, inputs, outputs } = shape;
        let sizes = [
            ("out", self.len(out), rows * outputs),
            ("x", self.len(x), rows * inputs),
            ("weight", self.len(weight), outputs * inputs),
            ("bias", bias.map_or(outputs, |bias| self.len(bias)), outputs),
        ];
        let checked = check_sizes("linear_forward", &shape, &sizes)?;
        self.run_linear_forward(out, x, weight, bias, shape, checked)
    }

    /// Assigns `dx[rows, inputs] = dout * weight`.
    fn linear_backward_input(
        &self,
        dx: &mut ComputeBuffer<Self>,
        dout: &ComputeBuffer<Self>,
        weight: &ComputeBuffer<Self>,
        shape: LinearShape,
    ) -> Result<()> {
        let LinearShape { rows, inputs, outputs } = shape;
        let sizes = [
            ("dx", self.len(dx), rows * inputs),
            ("dout", self.len(dout), rows * outputs),
            ("weight", self.len(weight), outputs * inputs),
        ];
        let checked = check_sizes("linear_backward_input", &shape, &sizes)?;
        self.run_linear_backward_input(dx, dout, weight, shape, checked)
    }

    /// Accumulates `dweight[outputs, inputs] += dout^T * x` and `dbias[outputs] += column sums of dout`, each unless it is
    /// `None`: a frozen tensor has no gradient.
    fn linear_backward_weight(
        &self,
        dweight: Option<&mut Floats<Self>>,
        dbias: Option<&mut Floats<Self>>,
        dout: &ComputeBuffer<Self>,
        x: &ComputeBuffer<Self>,
        shape: LinearShape,
    ) -> Result<()> {
        let LinearShape { rows, inputs, outputs } = shape;
        let sizes = [
            (
                "dweight",
                dweight.as_ref().map_or(outputs * inputs, |dweight| self.len(dweight)),
                outputs * inputs,
            ),
            ("dbias", dbias.as_ref().map_or(outputs, |dbias| self.len(dbias)), outputs),
            ("dout", self.len(dout), rows * outputs),
            ("x", self.len(x), rows * inputs),
        ];
        let checked = check_sizes("linear_backward_weight", &shape, &sizes)?;
        self.run_linear_backward_weight(dweight, dbias, dout, x, shape, checked)
    }

    /// Sets aside the scratch memory that the gemms of a layer take for up to `shape.rows` rows, and with `bias` that
    /// of the bias's gradient, so that no step allocates it.
    fn reserve_linear(&self, shape: LinearShape, bias: bool) -> Result<()>;

    /// As [`Linear::reserve_linear`], for the forward alone.
    fn reserve_linear_forward(&self, _: LinearShape) -> Result<()> {
        Ok(())
    }

    /// The device's part of [`Linear::linear_forward`].
    fn run_linear_forward(
        &self,
        out: &mut ComputeBuffer<Self>,
        x: &ComputeBuffer<Self>,
        weight: &ComputeBuffer<Self>,
        bias: Option<&ComputeBuffer<Self>>,
        shape: LinearShape,
        checked: Checked,
    ) -> Result<()>;

    /// The device's part of [`Linear::linear_backward_input`].
    fn run_linear_backward_input(
        &self,
        dx: &mut ComputeBuffer<Self>,
        dout: &ComputeBuffer<Self>,
        weight: &ComputeBuffer<Self>,
        shape: LinearShape,
        checked: Checked,
    ) -> Result<()>;

    /// The device's part of [`Linear::linear_backward_weight`].
    fn run_linear_backward_weight(
        &self,
        dweight: Option<&mut Floats<Self>>,
        dbias: Option<&mut Floats<Self>>,
        dout: &ComputeBuffer<Self>,
        x: &ComputeBuffer<Self>,
        shape: LinearShape,
        checked: Checked,
    ) -> Result<()>;
}
