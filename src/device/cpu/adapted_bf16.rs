//! Frozen linear layers together with their low-rank adapters, in bf16: both products go into the same f32 sums, which are
//! rounded once. The adapters' product comes first, because its sums are scaled and the frozen product's are not.

use std::ops::Range;

use half::bf16;

use super::bf16_gemm::{Scale, Term, scaled_product};
use super::linear_bf16::{FEW_ROWS, FEW_ROWS_OUTPUTS, add_rounded, few_rows};
use super::products::Operand;
use super::shared_rows::SharedRows;
use super::storage::round;
use super::{CpuBuffer, CpuDevice, simd};
use crate::device::{AdaptedBackwardInput, LinearShape, LowRankShape};

/// What adapters add to a layer's output: the modules that have one, and operands that hold those of all modules.
#[derive(Clone, Copy)]
pub(super) struct Adapters<'a> {
    pub inner: &'a [bf16],
    pub b: &'a [bf16],
    pub parts: &'a [LowRankShape],
}

impl Adapters<'_> {
    const NONE: Adapters<'static> = Adapters { inner: &[], b: &[], parts: &[] };

    /// Cuts `outputs` where modules begin and end; gives the first piece, with its module if it has an adapter.
    fn first_piece(&self, outputs: Range<usize>) -> (Range<usize>, Option<&LowRankShape>) {
        let start = outputs.start;
        let range = |part: &LowRankShape| part.out.first..part.out.first + part.outputs;
        let module = self.parts.iter().find(|part| range(part).contains(&start));
        let borders = self.parts.iter().flat_map(|part| [range(part).start, range(part).end]);
        let end = borders.filter(|border| outputs.contains(border) && *border > start).min();
        (start..end.unwrap_or(outputs.end), module)
    }
}

/// Assigns `out[rows, outputs] = x * weight^T (+ bias)` and what the adapters add in their modules' columns. The weight's
/// parts, and the modules, are one product each.
pub(super) fn forward(
    device: &CpuDevice<bf16>,
    out: &mut [bf16],
    x: &[bf16],
    weight: &CpuBuffer<bf16>,
    bias: Option<&[bf16]>,
    shape: LinearShape,
    adapters: Option<Adapters<'_>>,
) {
    let LinearShape { rows, inputs, outputs } = shape;
    let adapters = adapters.unwrap_or(Adapters::NONE);
    let out = SharedRows::new(&mut out[..rows * outputs], outputs);
    let mut first = 0;
    for part in weight.parts() {
        // Without inputs every output is its bias, and what an adapter adds.
        let count = part.len().checked_div(inputs).unwrap_or(outputs).min(outputs - first);
        let mut rest = first..first + count;
        while !rest.is_empty() {
            let (columns, module) = adapters.first_piece(rest.clone());
            let weight = &part[(columns.start - first) * inputs..(columns.end - first) * inputs];
            rest.start = columns.end;
            let piece = Piece { device, out: &out, x, weight, bias, rows, inputs, columns };
            piece.forward(module.map(|module| (adapters, module)));
        }
        first += count;
    }
}

/// Columns of a layer's output that one product gives.
struct Piece<'a> {
    device: &'a CpuDevice<bf16>,
    out: &'a SharedRows<'a, bf16>,
    x: &'a [bf16],
    /// The rows of the weight for these columns.
    weight: &'a [bf16],
    /// One value for each of all columns.
    bias: Option<&'a [bf16]>,
    rows: usize,
    inputs: usize,
    columns: Range<usize>,
}

impl Piece<'_> {
    fn forward(&self, adapter: Option<(Adapters<'_>, &LowRankShape)>) {
        let (rows, count) = (self.rows, self.columns.len());
        let frozen = Term {
            lhs: Operand::along(self.x, self.inputs),
            rhs: Operand::along(self.weight, self.inputs),
            k: self.inputs,
        };
        let store = |row: usize, column: usize, sums: &[f32]| self.store(row, column, sums);
        if rows <= FEW_ROWS && self.device.has_bf16 {
            let sizes = (rows, self.inputs, count);
            return match adapter {
                None => few_rows(self.device, self.x, self.weight, sizes, &store),
                Some(adapter) => few_rows(
                    self.device,
                    self.x,
                    self.weight,
                    sizes,
                    &|row: usize, column: usize, sums: &[f32]| self.add_and_store(adapter, row, column, sums),
                ),
            };
        }
        let Some((adapters, module)) = adapter else {
            return scaled_product(self.device, (rows, count), &[frozen], None, &store);
        };
        let added = Term {
            lhs: Operand::along(&adapters.inner[module.inner.first..], module.inner.width),
            rhs: Operand::along(&adapters.b[self.first_row_of_b(module) * module.rank..], module.rank),
            k: module.rank,
        };
        let scale = |_: usize, _: usize, sums: &mut [f32]| {
            self.device.vectorized(
                #[inline(always)]
                || sums.iter_mut().for_each(|sum| *sum *= module.scale),
            );
        };
        let scale: Option<Scale<'_>> = if module.scale == 1.0 { None } else { Some(&scale) };
        scaled_product(self.device, (rows, count), &[added, frozen], scale, &store);
    }

    /// The row of `b` that belongs to the first of these columns.
    fn first_row_of_b(&self, module: &LowRankShape) -> usize {
        module.first_row + self.columns.start - module.out.first
    }

    /// Rounds the sums of a row, with its bias, from `column` of these columns on.
    fn store(&self, row: usize, column: usize, sums: &[f32]) {
        let first = self.columns.start + column;
        // SAFETY: each sum is handed over once, and pieces have columns of their own.
        let out = unsafe { self.out.row_mut(row, first..first + sums.len()) };
        self.device.vectorized(
            #[inline(always)]
            || match self.bias {
                None => round(out, sums),
                Some(bias) => add_rounded(out, &bias[first..], sums),
            },
        );
    }

    /// As [`Piece::store`], with what the adapter adds to the sums.
    fn add_and_store(
        &self,
        (adapters, module): (Adapters<'_>, &LowRankShape),
        row: usize,
        column: usize,
        sums: &[f32],
    ) {
        let rank = module.rank;
        let inner = &adapters.inner[row * module.inner.width + module.inner.first..][..rank];
        for (block, sums) in sums.chunks(FEW_ROWS_OUTPUTS).enumerate() {
            let first = column + block * FEW_ROWS_OUTPUTS;
            let b = &adapters.b[(self.first_row_of_b(module) + first) * rank..][..sums.len() * rank];
            let mut added = [0.0; FEW_ROWS_OUTPUTS];
            self.device.vectorized(
                #[inline(always)]
                || {
                    for (index, (added, sum)) in added.iter_mut().zip(sums).enumerate() {
                        *added = sum + module.scale * simd::dot(inner, &b[index * rank..][..rank]);
                    }
                },
            );
            self.store(row, first, &added[..sums.len()]);
        }
    }
}

/// Assigns `dx[rows, inputs] = dout * weight + dropout(dinner * a)`.
pub(super) fn backward_input(device: &CpuDevice<bf16>, operands: AdaptedBackwardInput<'_, CpuDevice<bf16>>) {
    let AdaptedBackwardInput { dx, dout, weight, dinner, a, shape, inner_width, dropout } = operands;
    let LinearShape { rows, inputs, outputs } = shape;
    let dx = SharedRows::new(&mut dx[..rows * inputs], inputs);
    let mut terms = Vec::with_capacity(1 + weight.parts().len());
    let (lhs, rhs) = (Operand::along(&dinner[..], inner_width), Operand::down(&a[..], inputs));
    terms.push(Term { lhs, rhs, k: inner_width });
    let mut first = 0;
    for part in weight.parts() {
        let k = (part.len() / inputs.max(1)).min(outputs - first);
        let (lhs, rhs) = (Operand::along(&dout[first..], outputs), Operand::down(part, inputs));
        terms.push(Term { lhs, rhs, k });
        first += k;
    }
    let scale = dropout.map(|dropout| {
        move |row: usize, column: usize, sums: &mut [f32]| {
            let first = row * inputs + column;
            device.vectorized(
                #[inline(always)]
                || {
                    for (index, sum) in sums.iter_mut().enumerate() {
                        *sum *= dropout.factor(first + index);
                    }
                },
            );
        }
    });
    let scale = scale.as_ref().map(|scale| scale as Scale<'_>);
    scaled_product(device, (rows, inputs), &terms, scale, &|row, column, sums: &[f32]| {
        // SAFETY: each sum is handed over once.
        let dx = unsafe { dx.row_mut(row, column..column + sums.len()) };
        device.vectorized(
            #[inline(always)]
            || round(dx, sums),
        );
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::RowPart;

    /// Pieces end where a module begins or ends, and where the weight's part does.
    #[test]
    fn outputs_are_cut_at_modules() {
        let module = |first: usize, outputs: usize| LowRankShape {
            rows: 1,
            rank: 1,
            outputs,
            out: RowPart { first, width: 20 },
            inner: RowPart { first: 0, width: 1 },
            first_row: 0,
            scale: 1.0,
        };
        let parts = [module(2, 5), module(7, 3)];
        let adapters = Adapters { inner: &[], b: &[], parts: &parts };
        let cut = |outputs: Range<usize>| {
            let (range, module) = adapters.first_piece(outputs);
            (range, module.map(|module| module.out.first))
        };
        assert_eq!(cut(0..20), (0..2, None));
        assert_eq!(cut(2..20), (2..7, Some(2)));
        assert_eq!(cut(4..6), (4..6, Some(2)));
        assert_eq!(cut(7..20), (7..10, Some(7)));
        assert_eq!(cut(10..20), (10..20, None));
        assert_eq!(Adapters::NONE.first_piece(3..9), (3..9, None));
    }
}
