//! The operations of low-rank adapters, for the projections of a layer whose modules have one each.

use super::{Case, Maker, WORD, compute_size, outputs};
use crate::bench::inputs::compute;
use crate::bench::shapes::Shape;
use crate::device::{
    AdaptedBackwardInput, AdaptedLinear, AdapterTerms, Device, Dropout, LinearShape, LinearSwiglu,
    LowRankShape, RowPart,
};
use crate::error::Result;

/// The paper's rank.
const RANK: usize = 64;
/// Modules that share `inner`: query, key and value.
const MODULES: usize = 3;
/// The paper's probability.
const DROPOUT: f64 = 0.01;

pub(super) fn makers<D: Device>() -> Vec<Maker<D>> {
    vec![
        |device, shape| low_rank_inner(device, shape, "", None),
        |device, shape| low_rank_inner(device, shape, "with dropout", Some(Dropout::new(1, DROPOUT))),
        low_rank_inner_backward_weight,
        adapted_linear_forward,
        adapted_linear_swiglu_forward,
        |device, shape| adapted_linear_backward_input(device, shape, "", None),
        |device, shape| {
            adapted_linear_backward_input(device, shape, "with dropout", Some(Dropout::new(1, DROPOUT)))
        },
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
    let key_width = (attention.qkv_width() - attention.out_width()) / 2;
    parts(shape.tokens(), &[attention.out_width(), key_width, key_width])[0]
}

/// The products with `b` of modules that share an output, all of which have an adapter.
fn parts(rows: usize, modules: &[usize]) -> Vec<LowRankShape> {
    let mut first = 0;
    let part = |(number, &outputs): (usize, &usize)| {
        first += outputs;
        LowRankShape {
            rows,
            rank: RANK,
            outputs,
            out: RowPart { first: first - outputs, width: modules.iter().sum() },
            inner: RowPart { first: number * RANK, width: modules.len() * RANK },
            first_row: first - outputs,
            scale: 1.0,
        }
    };
    modules.iter().enumerate().map(part).collect()
}

/// Operations of any of the products with `b`, and the values that stand in its operands of the storage type.
fn sizes(shape: LowRankShape) -> (usize, [usize; 3]) {
    let LowRankShape { rows, rank, outputs, .. } = shape;
    (2 * rows * rank * outputs, [rows * outputs, rows * rank, outputs * rank])
}

fn low_rank_inner<D: Device>(
    device: &D,
    shape: &Shape,
    part: &'static str,
    dropout: Option<Dropout>,
) -> Result<Case<D>> {
    let linear = inner_shape(shape);
    let LinearShape { rows, inputs, outputs: columns } = linear;
    let x = compute(device, 1, rows * inputs, 1.0)?;
    let a = compute(device, 2, columns * inputs, 0.02)?;
    let out = outputs(device, &[rows * columns], &[])?;
    let case = Case::new("low_rank_inner", out, move |device: &D, out| {
        device.low_rank_inner(&mut out.compute[0], &x, &a, linear, dropout)
    });
    let bytes = compute_size::<D>() * (rows * inputs + rows * columns + columns * inputs);
    Ok(case.part(part).flops(2 * rows * inputs * columns).bytes(bytes))
}

fn low_rank_inner_backward_weight<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let linear = inner_shape(shape);
    let LinearShape { rows, inputs, outputs: columns } = linear;
    let x = compute(device, 1, rows * inputs, 1.0)?;
    let dinner = compute(device, 2, rows * columns, 1.0)?;
    let out = outputs(device, &[], &[columns * inputs])?;
    let case = Case::new("low_rank_inner_backward_weight", out, move |device: &D, out| {
        let dropout = Some(Dropout::new(1, DROPOUT));
        device.low_rank_inner_backward_weight(&mut out.floats[0], &dinner, &x, linear, dropout)
    });
    let bytes = compute_size::<D>() * rows * (inputs + columns) + 2 * WORD * columns * inputs;
    Ok(case.updates().part("with dropout").flops(2 * rows * inputs * columns).bytes(bytes))
}

/// The products with `a` of modules that share an input.
fn inner_shape(shape: &Shape) -> LinearShape {
    LinearShape { rows: shape.tokens(), inputs: shape.config.hidden_size, outputs: MODULES * RANK }
}

/// Operations of a frozen gemm with these adapters, and the values of its operands of the storage type but for `out`.
fn adapted_sizes(linear: LinearShape, inner_width: usize, adapted: usize) -> (usize, usize) {
    let LinearShape { rows, inputs, outputs } = linear;
    let frozen = rows * inputs + outputs * inputs;
    (2 * rows * (inputs * outputs + adapted * RANK), frozen + rows * inner_width + adapted * RANK)
}

fn adapted_linear_forward<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let attention = shape.config.attention_shape();
    let key_width = (attention.qkv_width() - attention.out_width()) / 2;
    let linear = shape.config.qkv_shape(shape.tokens());
    let parts = parts(linear.rows, &[attention.out_width(), key_width, key_width]);
    let inner_width = MODULES * RANK;
    let x = compute(device, 1, linear.rows * linear.inputs, 1.0)?;
    let weight = compute(device, 2, linear.outputs * linear.inputs, 0.02)?;
    let inner = compute(device, 3, linear.rows * inner_width, 1.0)?;
    let b = compute(device, 4, linear.outputs * RANK, 0.02)?;
    let out = outputs(device, &[linear.rows * linear.outputs], &[])?;
    let case = Case::new("adapted_linear_forward", out, move |device: &D, out| {
        device.adapted_linear_forward(AdaptedLinear {
            out: &mut out.compute[0],
            x: &x,
            weight: &weight,
            bias: None,
            shape: linear,
            terms: AdapterTerms { inner: &inner, b: &b, parts: &parts },
        })
    });
    let (flops, values) = adapted_sizes(linear, inner_width, linear.outputs);
    Ok(case.flops(flops).bytes(compute_size::<D>() * (values + linear.rows * linear.outputs)))
}

fn adapted_linear_swiglu_forward<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let linear = shape.config.gate_up_shape(shape.tokens());
    let width = shape.config.intermediate_size;
    let parts = parts(linear.rows, &[width, width]);
    let x = compute(device, 1, linear.rows * linear.inputs, 1.0)?;
    let weight = compute(device, 2, linear.outputs * linear.inputs, 0.02)?;
    let inner = compute(device, 3, linear.rows * 2 * RANK, 1.0)?;
    let b = compute(device, 4, linear.outputs * RANK, 0.02)?;
    let out = outputs(device, &[linear.rows * width, linear.rows * linear.outputs], &[])?;
    let case = Case::new("adapted_linear_swiglu_forward", out, move |device: &D, out| {
        let [activated, gate_up, ..] = &mut out.compute[..] else { return Ok(()) };
        let terms = AdapterTerms { inner: &inner, b: &b, parts: &parts };
        let operands =
            LinearSwiglu { out: activated, gate_up, x: &x, weight: &weight, bias: None, shape: linear };
        device.adapted_linear_swiglu_forward(operands, terms)
    });
    let (flops, values) = adapted_sizes(linear, 2 * RANK, linear.outputs);
    Ok(case.flops(flops).bytes(compute_size::<D>() * (values + linear.rows * 3 * width)))
}

fn adapted_linear_backward_input<D: Device>(
    device: &D,
    shape: &Shape,
    part: &'static str,
    dropout: Option<Dropout>,
) -> Result<Case<D>> {
    let (linear, inner_width) = (shape.config.qkv_shape(shape.tokens()), MODULES * RANK);
    let LinearShape { rows, inputs, outputs: columns } = linear;
    let dout = compute(device, 1, rows * columns, 1.0)?;
    let weight = compute(device, 2, columns * inputs, 0.02)?;
    let dinner = compute(device, 3, rows * inner_width, 1.0)?;
    let a = compute(device, 4, inner_width * inputs, 0.02)?;
    let out = outputs(device, &[rows * inputs], &[])?;
    let case = Case::new("adapted_linear_backward_input", out, move |device: &D, out| {
        let dx = &mut out.compute[0];
        let (dout, weight, dinner, a) = (&dout, &weight, &dinner, &a);
        let operands =
            AdaptedBackwardInput { dx, dout, weight, dinner, a, shape: linear, inner_width, dropout };
        device.adapted_linear_backward_input(operands)
    });
    let values = rows * (inputs + columns + inner_width) + (columns + inner_width) * inputs;
    Ok(case.part(part).flops(2 * rows * inputs * (columns + inner_width)).bytes(compute_size::<D>() * values))
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
