//! The operations of low-rank adapters, for the query projection of a layer whose query, key and value have one each.

use super::{Case, Maker, WORD, compute_size, outputs};
use crate::bench::inputs::compute;
use crate::bench::shapes::Shape;
use crate::device::{Device, Dropout, LinearShape, LowRankShape, RowPart};
use crate::error::Result;

/// The paper's rank.
const RANK: usize = 64;
/// Modules that share `inner`: query, key and value.
const MODULES: usize = 3;
/// The paper's probability.
const DROPOUT: f64 = 0.01;

pub(super) fn makers<D: Device>() -> Vec<Maker<D>> {
    vec![
        dropout,
        low_rank_forward,
        low_rank_backward_input,
        low_rank_backward_weight,
        |device, shape| linear_backward_input_add(device, shape, "", None),
        |device, shape| {
            linear_backward_input_add(device, shape, "with dropout", Some(Dropout::new(1, DROPOUT)))
        },
    ]
}

fn low_rank_shape(shape: &Shape) -> LowRankShape {
    let attention = shape.config.attention_shape();
    LowRankShape {
        rows: shape.tokens(),
        rank: RANK,
        outputs: attention.out_width(),
        out: RowPart { first: 0, width: attention.qkv_width() },
        inner: RowPart { first: 0, width: MODULES * RANK },
        first_row: 0,
        scale: 1.0,
    }
}

/// Operations of any of the products with `b`, and the values that stand in its operands of the storage type.
fn sizes(shape: LowRankShape) -> (usize, [usize; 3]) {
    let LowRankShape { rows, rank, outputs, .. } = shape;
    (2 * rows * rank * outputs, [rows * outputs, rows * rank, outputs * rank])
}

fn dropout<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let (rows, width) = (shape.tokens(), shape.config.hidden_size);
    let x = compute(device, 1, rows * width, 1.0)?;
    let out = outputs(device, &[rows * width], &[])?;
    let case = Case::new("dropout", out, move |device: &D, out| {
        device.dropout(&mut out.compute[0], &x, [rows, width], Dropout::new(1, DROPOUT))
    });
    Ok(case.bytes(2 * compute_size::<D>() * rows * width))
}

fn low_rank_forward<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let shape = low_rank_shape(shape);
    let (flops, [out_values, inner_values, b_values]) = sizes(shape);
    let inner = compute(device, 1, shape.rows * shape.inner.width, 1.0)?;
    let b = compute(device, 2, b_values, 0.02)?;
    let out = outputs(device, &[shape.rows * shape.out.width], &[])?;
    let case = Case::new("low_rank_forward", out, move |device: &D, out| {
        device.low_rank_forward(&mut out.compute[0], &inner, &b, shape)
    });
    Ok(case.updates().flops(flops).bytes(compute_size::<D>() * (2 * out_values + inner_values + b_values)))
}

fn low_rank_backward_input<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let shape = low_rank_shape(shape);
    let (flops, [out_values, inner_values, b_values]) = sizes(shape);
    let dout = compute(device, 1, shape.rows * shape.out.width, 1.0)?;
    let b = compute(device, 2, b_values, 0.02)?;
    let out = outputs(device, &[shape.rows * shape.inner.width], &[])?;
    let case = Case::new("low_rank_backward_input", out, move |device: &D, out| {
        device.low_rank_backward_input(&mut out.compute[0], &dout, &b, shape)
    });
    // The columns of the other modules keep their values.
    Ok(case.updates().flops(flops).bytes(compute_size::<D>() * (out_values + inner_values + b_values)))
}

fn low_rank_backward_weight<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let shape = low_rank_shape(shape);
    let (flops, [out_values, inner_values, b_values]) = sizes(shape);
    let dout = compute(device, 1, shape.rows * shape.out.width, 1.0)?;
    let inner = compute(device, 2, shape.rows * shape.inner.width, 1.0)?;
    let out = outputs(device, &[], &[b_values])?;
    let case = Case::new("low_rank_backward_weight", out, move |device: &D, out| {
        device.low_rank_backward_weight(&mut out.floats[0], &dout, &inner, shape)
    });
    let bytes = compute_size::<D>() * (out_values + inner_values) + 2 * WORD * b_values;
    Ok(case.updates().flops(flops).bytes(bytes))
}

fn linear_backward_input_add<D: Device>(
    device: &D,
    shape: &Shape,
    part: &'static str,
    dropout: Option<Dropout>,
) -> Result<Case<D>> {
    let (rows, inputs, columns) = (shape.tokens(), shape.config.hidden_size, MODULES * RANK);
    let linear = LinearShape { rows, inputs, outputs: columns };
    let dout = compute(device, 1, rows * columns, 1.0)?;
    let weight = compute(device, 2, columns * inputs, 0.02)?;
    let out = outputs(device, &[rows * inputs], &[])?;
    let case = Case::new("linear_backward_input_add", out, move |device: &D, out| {
        device.linear_backward_input_add(&mut out.compute[0], &dout, &weight, linear, dropout)
    });
    let bytes = compute_size::<D>() * (2 * rows * inputs + rows * columns + columns * inputs);
    Ok(case.updates().part(part).flops(2 * rows * inputs * columns).bytes(bytes))
}
