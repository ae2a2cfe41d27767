//! The products of low-rank adapters (LoRA, Hu et al. 2021) beside a linear layer, and the dropout of their input.
//!
//! An adapter adds `scale * inner * b^T` to some columns of a layer's output, with `inner = dropout(x) * a^T`. The products
//! with `a` are those of an ordinary linear layer ([`Linear`]); here are those with `b`, which read and write columns of
//! wider matrices because query, key and value (and gate and up) share one output.

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

/// Products with the `b` of an adapter, and what its dropout needs; sums are f32.
///
/// # Errors
/// All methods return [`crate::Error::Bug`] for buffers that are smaller than the shape, and
/// [`crate::Error::Device`] where the device fails.
pub trait LowRank: Linear {
    /// Assigns `out[rows, width]`: `x` with some values dropped and the others scaled.
    fn dropout(
        &self,
        out: &mut ComputeBuffer<Self>,
        x: &ComputeBuffer<Self>,
        [rows, width]: [usize; 2],
        dropout: Dropout,
    ) -> Result<()> {
        let values = rows * width;
        let sizes = [("out", self.len(out), values), ("x", self.len(x), values)];
        let checked = check_sizes("dropout", &[rows, width], &sizes)?;
        self.run_dropout(out, x, values, dropout, checked)
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

    /// Sets aside the scratch memory that [`LowRank::linear_backward_input_add`] takes with a dropout, so that no step
    /// allocates it.
    fn reserve_low_rank(&self, shape: LinearShape) -> Result<()>;

    /// The device's part of [`LowRank::dropout`].
    fn run_dropout(
        &self,
        out: &mut ComputeBuffer<Self>,
        x: &ComputeBuffer<Self>,
        values: usize,
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
