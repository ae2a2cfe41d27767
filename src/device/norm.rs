//! RMSNorm (Zhang and Sennrich 2019), alone and fused with the residual addition before it.

use super::check::check_sizes;
use super::{Checked, ComputeBuffer, Floats, Memory};
use crate::error::Result;

/// RMSNorm over the last axis of `[rows, width]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormShape {
    /// `T`, or `N` for the final norm.
    pub rows: usize,
    /// `D`
    pub width: usize,
    /// Added to the mean square.
    pub epsilon: f32,
}

/// Operands of [`Norm::add_rms_norm_forward`]. Activations are `[rows, width]`.
#[derive(Debug)]
pub struct AddRmsNorm<'a, D: Memory> {
    /// Assigned: `x + delta`.
    pub sum: &'a mut ComputeBuffer<D>,
    /// Assigned: the norm of `sum`.
    pub out: &'a mut ComputeBuffer<D>,
    /// Assigned, `[rows]`: `1 / sqrt(mean(sum^2) + epsilon)`.
    pub rstd: &'a mut Floats<D>,
    /// The residual stream.
    pub x: &'a ComputeBuffer<D>,
    /// What a block adds to it.
    pub delta: &'a ComputeBuffer<D>,
    /// `[width]`
    pub weight: &'a ComputeBuffer<D>,
    /// Sizes.
    pub shape: NormShape,
}

/// Operands of [`Norm::rms_norm_backward`]. Activations are `[rows, width]`.
#[derive(Debug)]
pub struct RmsNormBackward<'a, D: Memory> {
    /// Accumulated: the gradient of `x`.
    pub dx: &'a mut ComputeBuffer<D>,
    /// Accumulated, `[width]`: the gradient of `weight`; `None` where the weight is not trained.
    pub dweight: Option<&'a mut Floats<D>>,
    /// Gradient of the forward's output.
    pub dout: &'a ComputeBuffer<D>,
    /// Input of the forward.
    pub x: &'a ComputeBuffer<D>,
    /// `[width]`
    pub weight: &'a ComputeBuffer<D>,
    /// `[rows]`, as the forward assigned it.
    pub rstd: &'a Floats<D>,
    /// Sizes.
    pub shape: NormShape,
}

/// RMSNorm and the residual addition.
///
/// # Errors
/// All methods return [`crate::Error::Bug`] for buffers that are smaller than the shape, and
/// [`crate::Error::Device`] where the device fails.
pub trait Norm: Memory {
    /// Assigns `out = x * rstd * weight` and `rstd[rows] = 1 / sqrt(mean(x^2) + epsilon)`.
    fn rms_norm_forward(
        &self,
        out: &mut ComputeBuffer<Self>,
        rstd: &mut Floats<Self>,
        x: &ComputeBuffer<Self>,
        weight: &ComputeBuffer<Self>,
        shape: NormShape,
    ) -> Result<()> {
        let values = shape.rows * shape.width;
        let sizes = [
            ("out", self.len(out), values),
            ("rstd", self.len(rstd), shape.rows),
            ("x", self.len(x), values),
            ("weight", self.len(weight), shape.width),
        ];
        let checked = check_sizes("rms_norm_forward", &shape, &sizes)?;
        self.run_rms_norm_forward(out, rstd, x, weight, shape, checked)
    }

    /// Assigns `sum = x + delta`, then as [`Norm::rms_norm_forward`] over `sum`.
    fn add_rms_norm_forward(&self, operands: AddRmsNorm<'_, Self>) -> Result<()> {
        let shape = operands.shape;
        let values = shape.rows * shape.width;
        let sizes = [
            ("sum", self.len(operands.sum), values),
            ("out", self.len(operands.out), values),
            ("rstd", self.len(operands.rstd), shape.rows),
            ("x", self.len(operands.x), values),
            ("delta", self.len(operands.delta), values),
            ("weight", self.len(operands.weight), shape.width),
        ];
        let checked = check_sizes("add_rms_norm_forward", &shape, &sizes)?;
        self.run_add_rms_norm_forward(operands, checked)
    }

    /// Assigns `sum = x + delta` over `[len]`.
    fn add(
        &self,
        sum: &mut ComputeBuffer<Self>,
        x: &ComputeBuffer<Self>,
        delta: &ComputeBuffer<Self>,
        len: usize,
    ) -> Result<()> {
        let sizes = [("sum", self.len(sum), len), ("x", self.len(x), len), ("delta", self.len(delta), len)];
        let checked = check_sizes("add", &len, &sizes)?;
        self.run_add(sum, x, delta, len, checked)
    }

    /// Accumulates the gradient of [`Norm::rms_norm_forward`]: `dx[rows, width] += r (dout w) - x r^3 mean(dout w x)` with
    /// `r = rstd`, and, where it is given, `dweight[width] +=` the sum over the rows of `dout x r`, in f32.
    fn rms_norm_backward(&self, operands: RmsNormBackward<'_, Self>) -> Result<()> {
        let shape = operands.shape;
        let values = shape.rows * shape.width;
        let sizes = [
            ("dx", self.len(operands.dx), values),
            (
                "dweight",
                operands.dweight.as_ref().map_or(shape.width, |dweight| self.len(dweight)),
                shape.width,
            ),
            ("dout", self.len(operands.dout), values),
            ("x", self.len(operands.x), values),
            ("weight", self.len(operands.weight), shape.width),
            ("rstd", self.len(operands.rstd), shape.rows),
        ];
        let checked = check_sizes("rms_norm_backward", &shape, &sizes)?;
        self.run_rms_norm_backward(operands, checked)
    }

    /// Sets aside the scratch memory that [`Norm::rms_norm_backward`] takes for up to `shape.rows` rows, so that no
    /// step allocates it.
    fn reserve_rms_norm(&self, shape: NormShape) -> Result<()>;

    /// The device's part of [`Norm::rms_norm_forward`].
    fn run_rms_norm_forward(
        &self,
        out: &mut ComputeBuffer<Self>,
        rstd: &mut Floats<Self>,
        x: &ComputeBuffer<Self>,
        weight: &ComputeBuffer<Self>,
        shape: NormShape,
        checked: Checked,
    ) -> Result<()>;

    /// The device's part of [`Norm::add_rms_norm_forward`].
    fn run_add_rms_norm_forward(&self, operands: AddRmsNorm<'_, Self>, checked: Checked) -> Result<()>;

    /// The device's part of [`Norm::add`].
    fn run_add(
        &self,
        sum: &mut ComputeBuffer<Self>,
        x: &ComputeBuffer<Self>,
        delta: &ComputeBuffer<Self>,
        len: usize,
        checked: Checked,
    ) -> Result<()>;

    /// The device's part of [`Norm::rms_norm_backward`].
    fn run_rms_norm_backward(&self, operands: RmsNormBackward<'_, Self>, checked: Checked) -> Result<()>;
}
