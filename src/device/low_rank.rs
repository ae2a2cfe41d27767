//! The products of low-rank adapters (LoRA, Hu et al. 2021) beside a linear layer, and the dropout of their input.
//!
//! An adapter adds `scale * inner * b^T` to some columns of a layer's output, with `inner = dropout(x) * a^T`. Here are the
//! products with `a`, which drop values of `x` where they read it; those with `b`, which read and write columns of wider
//! matrices because query, key and value (and gate and up) share one output; and the frozen gemms that an adapter adds to,
//! as one operation each.

use super::check::check_sizes;
use super::{Checked, ComputeBuffer, Floats, Linear, LinearShape};
use crate::error::Result;

/// Values `first ..` of each row of a matrix whose rows have `width` values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowPart {
    /// The first of the values.
    pub first: usize,
    /// Values from one row to the next.
    pub width: usize,
}

/// Sizes of the products of one adapted module.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LowRankShape {
    /// `T`
    pub rows: usize,
    /// `r`
    pub rank: usize,
    /// Outputs of the module.
    pub outputs: usize,
    /// Where they stand in a row of the layer's output.
    pub out: RowPart,
    /// Where the module's `rank` values stand in a row of `inner`.
    pub inner: RowPart,
    /// The module's first row in `b`, which may hold the rows of several modules.
    pub first_row: usize,
    /// Factor of the adapter's output.
    pub scale: f32,
}

impl LowRankShape {
    /// What the buffers of any of the three products must hold.
    fn sizes(&self, out: usize, inner: usize, b: usize) -> [(&'static str, usize, usize); 5] {
        [
            ("out", out, self.rows * self.out.width),
            ("inner", inner, self.rows * self.inner.width),
            ("b", b, (self.first_row + self.outputs) * self.rank),
            ("a row of out", self.out.width, self.out.first + self.outputs),
            ("a row of inner", self.inner.width, self.inner.first + self.rank),
        ]
    }
}

/// What the adapters of a layer's modules add to its output.
#[derive(Debug)]
pub struct AdapterTerms<'a, D: LowRank> {
    /// `[T, inner width]`: the input of each `b`.
    pub inner: &'a ComputeBuffer<D>,
    /// `[outputs of the adapted modules, r]`
    pub b: &'a ComputeBuffer<D>,
    /// The product of each module, at most three, with columns of their own.
    pub parts: &'a [LowRankShape],
}

/// Operands of [`LowRank::adapted_linear_forward`].
#[derive(Debug)]
pub struct AdaptedLinear<'a, D: LowRank> {
    /// Assigned, `[T, outputs]`.
    pub out: &'a mut ComputeBuffer<D>,
    /// `[T, inputs]`
    pub x: &'a ComputeBuffer<D>,
    /// `[outputs, inputs]`
    pub weight: &'a ComputeBuffer<D>,
    /// `[outputs]`
    pub bias: Option<&'a ComputeBuffer<D>>,
    /// Sizes of the frozen gemm.
    pub shape: LinearShape,
    /// What is added to it.
    pub terms: AdapterTerms<'a, D>,
}

/// Operands of [`LowRank::adapted_linear_backward_input`].
#[derive(Debug)]
pub struct AdaptedBackwardInput<'a, D: LowRank> {
    /// Assigned, `[T, inputs]`.
    pub dx: &'a mut ComputeBuffer<D>,
    /// `[T, outputs]`
    pub dout: &'a ComputeBuffer<D>,
    /// `[outputs, inputs]`
    pub weight: &'a ComputeBuffer<D>,
    /// `[T, inner_width]`
    pub dinner: &'a ComputeBuffer<D>,
    /// `[inner_width, inputs]`
    pub a: &'a ComputeBuffer<D>,
    /// Sizes of the frozen gemm.
    pub shape: LinearShape,
    /// Rows of `a`, of all modules.
    pub inner_width: usize,
    /// What the forward dropped of the adapters' input.
    pub dropout: Option<Dropout>,
}

impl<D: LowRank> AdapterTerms<'_, D> {
    /// Checks the operands of a layer's output `[rows, width]`.
    pub(super) fn check(&self, device: &D, operation: &str, out: usize) -> Result<()> {
        for shape in self.parts {
            check_sizes(operation, shape, &shape.sizes(out, device.len(self.inner), device.len(self.b)))?;
        }
        let count = [("adapters of a layer, at most", MOST_ADAPTERS, self.parts.len())];
        check_sizes(operation, &self.parts.len(), &count).map(drop)
    }
}

impl<D: LowRank> AdaptedLinear<'_, D> {
    /// One product after the other.
    pub(super) fn separately(self, device: &D) -> Result<()> {
        let AdaptedLinear { out, x, weight, bias, shape, terms } = self;
        device.linear_forward(out, x, weight, bias, shape)?;
        terms.parts.iter().try_for_each(|&shape| device.low_rank_forward(out, terms.inner, terms.b, shape))
    }
}

impl<D: LowRank> AdaptedBackwardInput<'_, D> {
    /// One product after the other.
    pub(super) fn separately(self, device: &D) -> Result<()> {
        let AdaptedBackwardInput { dx, dout, weight, dinner, a, shape, inner_width, dropout } = self;
        device.linear_backward_input(dx, dout, weight, shape)?;
        let inner = LinearShape { outputs: inner_width, ..shape };
        device.linear_backward_input_add(dx, dinner, a, inner, dropout)
    }
}

/// Modules that share an output: query, key and value.
const MOST_ADAPTERS: usize = 3;

/// Which values of a matrix are dropped, as a function of a key and of a value's place alone: the same key gives the same
/// values on every device, at any number of threads, and after a resume.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Key of the mask.
    pub key: u64,
    /// A value is dropped where 32 bits of its hash lie below this.
    pub threshold: u32,
    /// Factor of what is kept, `1 / (1 - probability)`.
    pub scale: f32,
}

impl Dropout {
    /// Drops each value with this probability, `0 <= probability < 1`, in steps of `2^-32`.
    pub fn new(key: u64, probability: f64) -> Self {
        let steps = (1u64 << 32) as f64;
        let threshold = (probability * steps).round().clamp(0.0, f64::from(u32::MAX)) as u32;
        Dropout { key, threshold, scale: (1.0 / (1.0 - probability)) as f32 }
    }

    /// The factor of the value with this row-major index: 0 where it is dropped. Two neighbours share one hash.
    #[inline(always)]
    pub fn factor(&self, index: usize) -> f32 {
        let bits = hash(self.key, index as u64 / 2);
        let half = (bits >> (32 * (index as u64 % 2))) as u32;
        if half < self.threshold { 0.0 } else { self.scale }
    }
}

/// Number `counter` of the stream named `key`: SplitMix64 (Steele, Lea and Flood 2014) at that position.
#[inline(always)]
pub fn hash(key: u64, counter: u64) -> u64 {
    let mut bits = key.wrapping_add(counter.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    bits ^ (bits >> 31)
}

/// Products with the `a` and the `b` of an adapter, and frozen gemms together with them; sums are f32.
///
/// # Errors
/// All methods return [`crate::Error::Bug`] for buffers that are smaller than the shape, and
/// [`crate::Error::Device`] where the device fails.
pub trait LowRank: Linear {
    /// Assigns `inner[rows, outputs] = dropout(x) * a^T`: without dropout [`Linear::linear_forward`] with as few outputs as
    /// adapters have, for which a device may have kernels of its own.
    fn low_rank_inner(
        &self,
        inner: &mut ComputeBuffer<Self>,
        x: &ComputeBuffer<Self>,
        a: &ComputeBuffer<Self>,
        shape: LinearShape,
        dropout: Option<Dropout>,
    ) -> Result<()> {
        let LinearShape { rows, inputs, outputs } = shape;
        let sizes = [
            ("inner", self.len(inner), rows * outputs),
            ("x", self.len(x), rows * inputs),
            ("a", self.len(a), outputs * inputs),
        ];
        let checked = check_sizes("low_rank_inner", &shape, &sizes)?;
        self.run_low_rank_inner(inner, x, a, shape, dropout, checked)
    }

    /// Accumulates `da[outputs, inputs] += dinner[rows, outputs]^T * dropout(x[rows, inputs])`: without dropout
    /// [`Linear::linear_backward_weight`].
    fn low_rank_inner_backward_weight(
        &self,
        da: &mut Floats<Self>,
        dinner: &ComputeBuffer<Self>,
        x: &ComputeBuffer<Self>,
        shape: LinearShape,
        dropout: Option<Dropout>,
    ) -> Result<()> {
        let LinearShape { rows, inputs, outputs } = shape;
        let sizes = [
            ("da", self.len(da), outputs * inputs),
            ("dinner", self.len(dinner), rows * outputs),
            ("x", self.len(x), rows * inputs),
        ];
        let checked = check_sizes("low_rank_inner_backward_weight", &shape, &sizes)?;
        match dropout {
            None => self.linear_backward_weight(Some(da), None, dinner, x, shape),
            Some(dropout) => self.run_low_rank_inner_backward_weight(da, dinner, x, shape, dropout, checked),
        }
    }

    /// Accumulates `out += scale * inner * b^T`, in the module's columns.
    fn low_rank_forward(
        &self,
        out: &mut ComputeBuffer<Self>,
        inner: &ComputeBuffer<Self>,
        b: &ComputeBuffer<Self>,
        shape: LowRankShape,
    ) -> Result<()> {
        let sizes = shape.sizes(self.len(out), self.len(inner), self.len(b));
        let checked = check_sizes("low_rank_forward", &shape, &sizes)?;
        self.run_low_rank_forward(out, inner, b, shape, checked)
    }

    /// Assigns `dinner = scale * dout * b`, in the module's columns of `dinner`.
    fn low_rank_backward_input(
        &self,
        dinner: &mut ComputeBuffer<Self>,
        dout: &ComputeBuffer<Self>,
        b: &ComputeBuffer<Self>,
        shape: LowRankShape,
    ) -> Result<()> {
        let sizes = shape.sizes(self.len(dout), self.len(dinner), self.len(b));
        let checked = check_sizes("low_rank_backward_input", &shape, &sizes)?;
        self.run_low_rank_backward_input(dinner, dout, b, shape, checked)
    }

    /// Accumulates `db += scale * dout^T * inner`, in the module's rows of `db`.
    fn low_rank_backward_weight(
        &self,
        db: &mut Floats<Self>,
        dout: &ComputeBuffer<Self>,
        inner: &ComputeBuffer<Self>,
        shape: LowRankShape,
    ) -> Result<()> {
        let sizes = shape.sizes(self.len(dout), self.len(inner), self.len(db));
        let checked = check_sizes("low_rank_backward_weight", &shape, &sizes)?;
        self.run_low_rank_backward_weight(db, dout, inner, shape, checked)
    }

    /// As [`Linear::linear_backward_input`], added to what `dx` holds, with the values of the sum dropped that
    /// `dropout` dropped from the input.
    fn linear_backward_input_add(
        &self,
        dx: &mut ComputeBuffer<Self>,
        dout: &ComputeBuffer<Self>,
        weight: &ComputeBuffer<Self>,
        shape: LinearShape,
        dropout: Option<Dropout>,
    ) -> Result<()> {
        let LinearShape { rows, inputs, outputs } = shape;
        let sizes = [
            ("dx", self.len(dx), rows * inputs),
            ("dout", self.len(dout), rows * outputs),
            ("weight", self.len(weight), outputs * inputs),
        ];
        let checked = check_sizes("linear_backward_input_add", &shape, &sizes)?;
        self.run_linear_backward_input_add(dx, dout, weight, shape, dropout, checked)
    }

    /// Assigns `out[rows, outputs] = x * weight^T (+ bias)` and what the adapters add in their modules' columns, as
    /// [`Linear::linear_forward`] and then [`LowRank::low_rank_forward`] of each would. A device that has one kernel for all
    /// saves their passes over `out` and rounds once.
    fn adapted_linear_forward(&self, operands: AdaptedLinear<'_, Self>) -> Result<()> {
        let LinearShape { rows, inputs, outputs } = operands.shape;
        let sizes = [
            ("out", self.len(operands.out), rows * outputs),
            ("x", self.len(operands.x), rows * inputs),
            ("weight", self.len(operands.weight), outputs * inputs),
            ("bias", operands.bias.map_or(outputs, |bias| self.len(bias)), outputs),
        ];
        let name = "adapted_linear_forward";
        let checked = check_sizes(name, &operands.shape, &sizes)?;
        operands.terms.check(self, name, self.len(operands.out))?;
        self.run_adapted_linear_forward(operands, checked)
    }

    /// Assigns `dx[rows, inputs] = dout * weight + dropout(dinner * a)`, as [`Linear::linear_backward_input`] and then
    /// [`LowRank::linear_backward_input_add`] would.
    fn adapted_linear_backward_input(&self, operands: AdaptedBackwardInput<'_, Self>) -> Result<()> {
        let AdaptedBackwardInput { shape: LinearShape { rows, inputs, outputs }, inner_width, .. } = operands;
        let sizes = [
            ("dx", self.len(operands.dx), rows * inputs),
            ("dout", self.len(operands.dout), rows * outputs),
            ("weight", self.len(operands.weight), outputs * inputs),
            ("dinner", self.len(operands.dinner), rows * inner_width),
            ("a", self.len(operands.a), inner_width * inputs),
        ];
        let checked = check_sizes("adapted_linear_backward_input", &operands.shape, &sizes)?;
        self.run_adapted_linear_backward_input(operands, checked)
    }

    /// Sets aside the scratch memory that the operations of a layer's adapters take for up to `shape.rows` rows, so that no
    /// step allocates it. `shape` is that of the products with `a`; `parts` are the products with `b`, and `dropout` says whether
    /// there is one.
    fn reserve_low_rank(&self, shape: LinearShape, parts: &[LowRankShape], dropout: bool) -> Result<()>;

    /// The device's part of [`LowRank::low_rank_inner`].
    fn run_low_rank_inner(
        &self,
        inner: &mut ComputeBuffer<Self>,
        x: &ComputeBuffer<Self>,
        a: &ComputeBuffer<Self>,
        shape: LinearShape,
        dropout: Option<Dropout>,
        checked: Checked,
    ) -> Result<()>;

    /// The device's part of [`LowRank::low_rank_inner_backward_weight`] with dropout.
    fn run_low_rank_inner_backward_weight(
        &self,
        da: &mut Floats<Self>,
        dinner: &ComputeBuffer<Self>,
        x: &ComputeBuffer<Self>,
        shape: LinearShape,
        dropout: Dropout,
        checked: Checked,
    ) -> Result<()>;

    /// The device's part of [`LowRank::low_rank_forward`].
    fn run_low_rank_forward(
        &self,
        out: &mut ComputeBuffer<Self>,
        inner: &ComputeBuffer<Self>,
        b: &ComputeBuffer<Self>,
        shape: LowRankShape,
        checked: Checked,
    ) -> Result<()>;

    /// The device's part of [`LowRank::low_rank_backward_input`].
    fn run_low_rank_backward_input(
        &self,
        dinner: &mut ComputeBuffer<Self>,
        dout: &ComputeBuffer<Self>,
        b: &ComputeBuffer<Self>,
        shape: LowRankShape,
        checked: Checked,
    ) -> Result<()>;

    /// The device's part of [`LowRank::low_rank_backward_weight`].
    fn run_low_rank_backward_weight(
        &self,
        db: &mut Floats<Self>,
        dout: &ComputeBuffer<Self>,
        inner: &ComputeBuffer<Self>,
        shape: LowRankShape,
        checked: Checked,
    ) -> Result<()>;

    /// The device's part of [`LowRank::linear_backward_input_add`].
    fn run_linear_backward_input_add(
        &self,
        dx: &mut ComputeBuffer<Self>,
        dout: &ComputeBuffer<Self>,
        weight: &ComputeBuffer<Self>,
        shape: LinearShape,
        dropout: Option<Dropout>,
        checked: Checked,
    ) -> Result<()>;

    /// The device's part of [`LowRank::adapted_linear_forward`]; one product after the other unless the device fuses them.
    fn run_adapted_linear_forward(&self, operands: AdaptedLinear<'_, Self>, _: Checked) -> Result<()> {
        operands.separately(self)
    }

    /// The device's part of [`LowRank::adapted_linear_backward_input`]; as above.
    fn run_adapted_linear_backward_input(
        &self,
        operands: AdaptedBackwardInput<'_, Self>,
        _: Checked,
    ) -> Result<()> {
        operands.separately(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first numbers of SplitMix64 from seed 0, as its authors' reference code gives them.
    #[test]
    fn hash_is_splitmix64() {
        assert_eq!(
            [0, 1, 2].map(|counter| hash(0, counter)),
            [0xE220_A839_7B1D_CDAF, 0x6E78_9E6A_A1B9_65F4, 0x06C4_5D18_8009_454F]
        );
    }

    /// As many values are dropped as the probability says, in either half of a hash; those that are kept keep the mean.
    #[test]
    fn dropout_keeps_the_mean() {
        for probability in [0.0, 0.01, 0.1, 0.5, 0.9] {
            let dropout = Dropout::new(7, probability);
            for half in 0..2 {
                let factors = (0..100_000).map(|index| f64::from(dropout.factor(2 * index + half)));
                let mean = factors.sum::<f64>() / 1e5;
                // Five standard deviations.
                let error = 5.0 * (probability / (1.0 - probability) / 1e5).sqrt();
                assert!((mean - 1.0).abs() <= error + 1e-6, "{probability} {half}: {mean}");
            }
        }
    }
}
