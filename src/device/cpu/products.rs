//! What a storage type has to bring for matrix products. `linear_f32.rs` implements it for f32, on the `gemm` crate,
//! and `linear_bf16.rs` for bf16.

use super::{CpuBuffer, CpuDevice, Storage};
use crate::device::{AdaptedBackwardInput, AdaptedLinear, Dropout, LinearShape, LowRankShape};
use crate::error::Result;

/// An operand of a product. With `i` the index that stays and `k` the one that is summed over, its element is
/// `values[i * stride + k]` where rows are summed along, and `values[k * stride + i]` otherwise.
#[derive(Clone, Copy, Debug)]
pub struct Operand<'a, C> {
    /// The values, from the first element on.
    pub values: &'a [C],
    /// Distance of two rows.
    pub stride: usize,
    /// Whether `k` runs along the rows.
    pub along_rows: bool,
}

impl<'a, C> Operand<'a, C> {
    /// The summed index runs along the rows.
    pub(super) fn along(values: &'a [C], stride: usize) -> Self {
        Operand { values, stride, along_rows: true }
    }

    /// The summed index counts the rows.
    pub(super) fn down(values: &'a [C], stride: usize) -> Self {
        Operand { values, stride, along_rows: false }
    }

    /// Whether `count` elements in the index that stays, and `k` in the other, lie inside the slice.
    pub(super) fn holds(&self, count: usize, k: usize) -> bool {
        let (rows, columns) = if self.along_rows { (count, k) } else { (k, count) };
        rows == 0 || columns == 0 || (rows - 1) * self.stride + columns <= self.values.len()
    }
}

/// The products of linear layers, adapters and the head. Slices have at least the lengths that the shapes ask for.
///
/// Not for use outside the device: it is public only because [`Storage`](super::Storage) is.
pub trait Products: Sized + Send + Sync + 'static {
    /// Sets aside the scratch memory of a layer's products.
    fn reserve(device: &CpuDevice<Self>, shape: LinearShape);

    /// Sets aside the scratch memory of the products beside a layer with an adapter.
    fn reserve_low_rank(device: &CpuDevice<Self>, shape: LinearShape);

    /// Assigns `out = x * weight^T (+ bias)`.
    fn forward(
        device: &CpuDevice<Self>,
        out: &mut [Self],
        x: &[Self],
        weight: &CpuBuffer<Self>,
        bias: Option<&[Self]>,
        shape: LinearShape,
    );

    /// Assigns `out = x * weight^T (+ bias)` and what adapters add; one product after the other unless the type has
    /// one for all.
    fn adapted_forward(device: &CpuDevice<Self>, operands: AdaptedLinear<'_, CpuDevice<Self>>) -> Result<()>
    where
        Self: Storage,
    {
        operands.separately(device)
    }

    /// Assigns `dx = dout * weight` and what adapters add; as above.
    fn adapted_backward_input(
        device: &CpuDevice<Self>,
        operands: AdaptedBackwardInput<'_, CpuDevice<Self>>,
    ) -> Result<()>
    where
        Self: Storage,
    {
        operands.separately(device)
    }

    /// Assigns `dx = dout * weight`.
    fn backward_input(
        device: &CpuDevice<Self>,
        dx: &mut [Self],
        dout: &[Self],
        weight: &CpuBuffer<Self>,
        shape: LinearShape,
    );

    /// `dweight += dout^T * x`.
    fn backward_weight(
        device: &CpuDevice<Self>,
        dweight: &mut [f32],
        dout: &[Self],
        x: &[Self],
        shape: LinearShape,
    );

    /// `dx += (dout * weight)`, times the factors of `dropout`.
    fn backward_input_add(
        device: &CpuDevice<Self>,
        dx: &mut [Self],
        dout: &[Self],
        weight: &CpuBuffer<Self>,
        shape: LinearShape,
        dropout: Option<Dropout>,
    );

    /// `out += scale * inner * b^T`.
    fn low_rank_forward(
        device: &CpuDevice<Self>,
        out: &mut [Self],
        inner: &[Self],
        b: &[Self],
        shape: LowRankShape,
    );

    /// Assigns `dinner = scale * dout * b`.
    fn low_rank_backward_input(
        device: &CpuDevice<Self>,
        dinner: &mut [Self],
        dout: &[Self],
        b: &[Self],
        shape: LowRankShape,
    );

    /// `db += scale * dout^T * inner`.
    fn low_rank_backward_weight(
        device: &CpuDevice<Self>,
        db: &mut [f32],
        dout: &[Self],
        inner: &[Self],
        shape: LowRankShape,
    );

    /// Values of memory that [`Products::head_operand`] takes.
    fn head_operand_values(rows: usize, width: usize) -> usize;

    /// `hidden[rows, D]` as the head's products read it fastest, in `memory` if it has to be another order.
    fn head_operand<'a>(
        hidden: &'a [Self],
        size: (usize, usize),
        memory: &'a mut [Self],
    ) -> Operand<'a, Self>;

    /// The part of attention's softmax scale that packed queries are multiplied by. The rest is for the scores, in f32.
    fn query_scale(scale: f32) -> f32;

    /// f32 values of memory that [`Products::multiply_tile`] takes.
    fn tile_memory(device: &CpuDevice<Self>, sizes: (usize, usize, usize)) -> usize;

    /// As [`Products::multiply`], for tiles that lie in a cache already, with rows of `out` that are `stride` values apart.
    fn multiply_tile(
        device: &CpuDevice<Self>,
        out: (&mut [f32], usize),
        accumulate: bool,
        sizes: (usize, usize, usize),
        lhs: Operand<'_, Self>,
        rhs: Operand<'_, Self>,
        memory: &mut [f32],
    );

    /// `out[m, n] = lhs * rhs` on the thread that calls, added to what `out` holds if `accumulate`; rows of `out` are `n`
    /// values apart.
    fn multiply(
        device: &CpuDevice<Self>,
        out: &mut [f32],
        accumulate: bool,
        sizes: (usize, usize, usize),
        lhs: Operand<'_, Self>,
        rhs: Operand<'_, Self>,
    );
}
