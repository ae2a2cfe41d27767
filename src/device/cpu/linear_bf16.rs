//! The products of linear layers, adapters and the head in bf16: which operand is which, and what becomes of the f32 sums.

use half::bf16;
use rayon::prelude::*;

use super::adapted_bf16::{self as adapted, Adapters};
use super::bf16_gemm::{Term, product, reserve, serial_product, tile_memory, tile_product};
#[cfg(target_arch = "x86_64")]
use super::bf16_kernel as kernel;
use super::products::{Operand, Products};
use super::shared_rows::SharedRows;
use super::storage::{Storage, round};
use super::{CpuBuffer, CpuDevice};
use crate::device::{AdaptedBackwardInput, AdaptedLinear, Dropout, LinearShape, LowRankShape};
use crate::error::Result;

/// Up to this many rows, each row of the weight is read once and multiplied as it lies: packing it would cost more than the
/// product.
pub(super) const FEW_ROWS: usize = 8;
/// Outputs of a task with few rows.
pub(super) const FEW_ROWS_OUTPUTS: usize = 64;

impl Products for bf16 {
    fn reserve(device: &CpuDevice<bf16>, _: LinearShape) {
        reserve(device);
    }

    fn reserve_low_rank(device: &CpuDevice<bf16>, _: LinearShape) {
        reserve(device);
    }

    fn forward(
        device: &CpuDevice<bf16>,
        out: &mut [bf16],
        x: &[bf16],
        weight: &CpuBuffer<bf16>,
        bias: Option<&[bf16]>,
        shape: LinearShape,
    ) {
        adapted::forward(device, out, x, weight, bias, shape, None);
    }

    fn adapted_forward(device: &CpuDevice<bf16>, operands: AdaptedLinear<'_, CpuDevice<bf16>>) -> Result<()> {
        let AdaptedLinear { out, x, weight, bias, shape, terms } = operands;
        device.traced("adapted_linear_forward", || {
            let adapters = Adapters { inner: terms.inner, b: terms.b, parts: terms.parts };
            let bias = bias.map(|bias| &bias[..shape.outputs]);
            adapted::forward(device, out, x, weight, bias, shape, Some(adapters));
            Ok(())
        })
    }

    fn adapted_backward_input(
        device: &CpuDevice<bf16>,
        operands: AdaptedBackwardInput<'_, CpuDevice<bf16>>,
    ) -> Result<()> {
        device.traced("adapted_linear_backward_input", || {
            adapted::backward_input(device, operands);
            Ok(())
        })
    }

    fn backward_input(
        device: &CpuDevice<bf16>,
        dx: &mut [bf16],
        dout: &[bf16],
        weight: &CpuBuffer<bf16>,
        shape: LinearShape,
    ) {
        let dx = SharedRows::new(dx, shape.inputs);
        input_gradient(device, dout, weight, shape, &|row, column, sums: &[f32]| {
            // SAFETY: each sum is handed over once.
            let dx = unsafe { dx.row_mut(row, column..column + sums.len()) };
            device.vectorized(
                #[inline(always)]
                || round(dx, sums),
            );
        });
    }

    fn backward_weight(
        device: &CpuDevice<bf16>,
        dweight: &mut [f32],
        dout: &[bf16],
        x: &[bf16],
        shape: LinearShape,
    ) {
        let LinearShape { rows, inputs, outputs } = shape;
        let dweight = SharedRows::new(dweight, inputs);
        let term = Term { lhs: Operand::down(dout, outputs), rhs: Operand::down(x, inputs), k: rows };
        product(device, (outputs, inputs), &[term], &|row, column, sums: &[f32]| {
            // SAFETY: each sum is handed over once.
            let dweight = unsafe { dweight.row_mut(row, column..column + sums.len()) };
            device.vectorized(
                #[inline(always)]
                || add_scaled(dweight, sums, 1.0),
            );
        });
    }

    fn backward_input_add(
        device: &CpuDevice<bf16>,
        dx: &mut [bf16],
        dout: &[bf16],
        weight: &CpuBuffer<bf16>,
        shape: LinearShape,
        dropout: Option<Dropout>,
    ) {
        let inputs = shape.inputs;
        let dx = SharedRows::new(dx, inputs);
        input_gradient(device, dout, weight, shape, &|row, column, sums: &[f32]| {
            // SAFETY: each sum is handed over once.
            let dx = unsafe { dx.row_mut(row, column..column + sums.len()) };
            let first = row * inputs + column;
            device.vectorized(
                #[inline(always)]
                || match dropout {
                    None => add_scaled(dx, sums, 1.0),
                    Some(dropout) => {
                        for (index, (dx, sum)) in dx.iter_mut().zip(sums).enumerate() {
                            *dx = Storage::round(dx.widen() + sum * dropout.factor(first + index));
                        }
                    }
                },
            );
        });
    }

    fn low_rank_forward(
        device: &CpuDevice<bf16>,
        out: &mut [bf16],
        inner: &[bf16],
        b: &[bf16],
        shape: LowRankShape,
    ) {
        let LowRankShape { rows, rank, outputs, .. } = shape;
        let out = SharedRows::new(out, shape.out.width);
        let lhs = Operand::along(&inner[shape.inner.first..], shape.inner.width);
        let rhs = Operand::along(&b[shape.first_row * rank..], rank);
        product(device, (rows, outputs), &[Term { lhs, rhs, k: rank }], &|row, column, sums: &[f32]| {
            let first = shape.out.first + column;
            // SAFETY: each sum is handed over once.
            let out = unsafe { out.row_mut(row, first..first + sums.len()) };
            device.vectorized(
                #[inline(always)]
                || add_scaled(out, sums, shape.scale),
            );
        });
    }

    fn low_rank_backward_input(
        device: &CpuDevice<bf16>,
        dinner: &mut [bf16],
        dout: &[bf16],
        b: &[bf16],
        shape: LowRankShape,
    ) {
        let LowRankShape { rows, rank, outputs, .. } = shape;
        let dinner = SharedRows::new(dinner, shape.inner.width);
        let lhs = Operand::along(&dout[shape.out.first..], shape.out.width);
        let rhs = Operand::down(&b[shape.first_row * rank..], rank);
        product(device, (rows, rank), &[Term { lhs, rhs, k: outputs }], &|row, column, sums: &[f32]| {
            let first = shape.inner.first + column;
            // SAFETY: each sum is handed over once.
            let dinner = unsafe { dinner.row_mut(row, first..first + sums.len()) };
            device.vectorized(
                #[inline(always)]
                || {
                    for (dinner, sum) in dinner.iter_mut().zip(sums) {
                        *dinner = Storage::round(sum * shape.scale);
                    }
                },
            );
        });
    }

    fn low_rank_backward_weight(
        device: &CpuDevice<bf16>,
        db: &mut [f32],
        dout: &[bf16],
        inner: &[bf16],
        shape: LowRankShape,
    ) {
        let LowRankShape { rows, rank, outputs, first_row, .. } = shape;
        let db = SharedRows::new(&mut db[first_row * rank..], rank);
        let lhs = Operand::down(&dout[shape.out.first..], shape.out.width);
        let rhs = Operand::down(&inner[shape.inner.first..], shape.inner.width);
        product(device, (outputs, rank), &[Term { lhs, rhs, k: rows }], &|row, column, sums: &[f32]| {
            // SAFETY: each sum is handed over once.
            let db = unsafe { db.row_mut(row, column..column + sums.len()) };
            device.vectorized(
                #[inline(always)]
                || add_scaled(db, sums, shape.scale),
            );
        });
    }

    fn head_operand_values(_: usize, _: usize) -> usize {
        0
    }

    /// As it lies: packing turns it anyway.
    fn head_operand<'a>(
        hidden: &'a [bf16],
        (_, width): (usize, usize),
        _: &'a mut [bf16],
    ) -> Operand<'a, bf16> {
        Operand::along(hidden, width)
    }

    /// None of it: queries are as they are stored, and their products with keys are exact but for the sums.
    fn query_scale(_: f32) -> f32 {
        1.0
    }

    fn tile_memory(device: &CpuDevice<bf16>, sizes: (usize, usize, usize)) -> usize {
        tile_memory(device, sizes)
    }

    fn multiply_tile(
        device: &CpuDevice<bf16>,
        out: (&mut [f32], usize),
        accumulate: bool,
        (m, k, n): (usize, usize, usize),
        lhs: Operand<'_, bf16>,
        rhs: Operand<'_, bf16>,
        memory: &mut [f32],
    ) {
        tile_product(device, out, accumulate, (m, n), Term { lhs, rhs, k }, memory);
    }

    fn multiply(
        device: &CpuDevice<bf16>,
        out: &mut [f32],
        accumulate: bool,
        (m, k, n): (usize, usize, usize),
        lhs: Operand<'_, bf16>,
        rhs: Operand<'_, bf16>,
    ) {
        serial_product(device, (m, n), &[Term { lhs, rhs, k }], |row, column, sums| {
            let out = &mut out[row * n + column..][..sums.len()];
            match accumulate {
                false => out.copy_from_slice(sums),
                true => device.vectorized(
                    #[inline(always)]
                    || add_scaled(out, sums, 1.0),
                ),
            }
        });
    }
}

/// `dout * weight` over all parts of the weight, in order.
fn input_gradient(
    device: &CpuDevice<bf16>,
    dout: &[bf16],
    weight: &CpuBuffer<bf16>,
    shape: LinearShape,
    finish: &(impl Fn(usize, usize, &[f32]) + Sync),
) {
    let LinearShape { rows, inputs, outputs } = shape;
    let mut first = 0;
    let mut terms: Vec<Term<'_>> = Vec::with_capacity(weight.parts().len());
    for part in weight.parts() {
        let k = (part.len() / inputs.max(1)).min(outputs - first);
        let (lhs, rhs) = (Operand::along(&dout[first..], outputs), Operand::down(part, inputs));
        terms.push(Term { lhs, rhs, k });
        first += k;
    }
    product(device, (rows, inputs), &terms, finish);
}

/// The product of few rows with each row of the weight as it lies. Tasks take consecutive rows of it.
#[cfg(target_arch = "x86_64")]
pub(super) fn few_rows(
    device: &CpuDevice<bf16>,
    x: &[bf16],
    weight: &[bf16],
    (rows, inputs, outputs): (usize, usize, usize),
    finish: &(impl Fn(usize, usize, &[f32]) + Sync),
) {
    if inputs == 0 {
        let zeros = vec![0.0; outputs];
        return (0..rows).for_each(|row| finish(row, 0, &zeros));
    }
    device.parallel(|| {
        weight[..outputs * inputs].par_chunks(FEW_ROWS_OUTPUTS * inputs).enumerate().for_each(
            |(task, weight)| {
                let mut sums = [[0.0; FEW_ROWS_OUTPUTS]; FEW_ROWS];
                for (group, weight) in weight.chunks(kernel::DOT_OUTPUTS * inputs).enumerate() {
                    for (block, x) in x[..rows * inputs].chunks(kernel::DOT_ROWS * inputs).enumerate() {
                        let mut dots = [[0.0; kernel::DOT_ROWS]; kernel::DOT_OUTPUTS];
                        // SAFETY: the device's `has_bf16` says that the processor has the instructions.
                        unsafe { kernel::dots(&mut dots, weight, x, inputs) };
                        for (output, dots) in dots.iter().enumerate() {
                            for (row, dot) in dots.iter().enumerate() {
                                sums[block * kernel::DOT_ROWS + row][group * kernel::DOT_OUTPUTS + output] =
                                    *dot;
                            }
                        }
                    }
                }
                for (row, sums) in sums.iter().take(rows).enumerate() {
                    finish(row, task * FEW_ROWS_OUTPUTS, &sums[..weight.len() / inputs]);
                }
            },
        );
    });
}

/// There are no instructions for it.
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn few_rows(
    _: &CpuDevice<bf16>,
    _: &[bf16],
    _: &[bf16],
    _: (usize, usize, usize),
    _: &(impl Fn(usize, usize, &[f32]) + Sync),
) {
    unreachable!("there are no instructions for bf16 products")
}

/// `out = bias + sums`, rounded once.
#[inline(always)]
pub(super) fn add_rounded(out: &mut [bf16], bias: &[bf16], sums: &[f32]) {
    for ((out, bias), sum) in out.iter_mut().zip(bias).zip(sums) {
        *out = Storage::round(bias.widen() + sum);
    }
}

/// `out += sums * scale`, rounded once.
#[inline(always)]
fn add_scaled<C: Storage>(out: &mut [C], sums: &[f32], scale: f32) {
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = C::round(out.widen() + sum * scale);
    }
}
