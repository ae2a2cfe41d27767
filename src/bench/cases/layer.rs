//! The operations of the embedding and the layers.

use super::{Case, Maker, WORD, batch, compute_size, outputs};
use crate::bench::inputs::{compute, filled};
use crate::bench::shapes::Shape;
use crate::device::cuda::{AttentionOrder, CudaDevice};
use crate::device::{
    AddRmsNorm, AttentionGradient, AttentionShape, Device, LinearShape, LinearSwiglu, NormShape,
    RmsNormBackward, RopeDirection,
};
use crate::error::Result;

pub(super) fn makers<D: Device>() -> Vec<Maker<D>> {
    vec![
        copy,
        embedding_forward,
        embedding_backward,
        rms_norm_forward,
        add_rms_norm_forward,
        add,
        rms_norm_backward,
        |device, shape| gemm_forward(device, shape, Gemm::Qkv),
        |device, shape| gemm_forward(device, shape, Gemm::AttentionOut),
        |device, shape| gemm_forward(device, shape, Gemm::GateUp),
        |device, shape| gemm_forward(device, shape, Gemm::Down),
        |device, shape| gemm_backward_input(device, shape, Gemm::Qkv),
        |device, shape| gemm_backward_input(device, shape, Gemm::AttentionOut),
        |device, shape| gemm_backward_input(device, shape, Gemm::GateUp),
        |device, shape| gemm_backward_input(device, shape, Gemm::Down),
        |device, shape| gemm_backward_weight(device, shape, Gemm::Qkv),
        |device, shape| gemm_backward_weight(device, shape, Gemm::AttentionOut),
        |device, shape| gemm_backward_weight(device, shape, Gemm::GateUp),
        |device, shape| gemm_backward_weight(device, shape, Gemm::Down),
        gemm_backward_bias,
        rope,
        attention_forward,
        |device, shape| attention_backward(device, shape, AttentionOrder::Fixed),
        |device, shape| attention_backward(device, shape, AttentionOrder::Any),
        attention_decode,
        swiglu_forward,
        linear_swiglu_forward,
        swiglu_backward,
    ]
}

fn copy<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let values = shape.tokens() * shape.config.hidden_size;
    let source = compute(device, 1, values, 1.0)?;
    let out = outputs(device, &[values], &[])?;
    let case = Case::new("copy", out, move |device: &D, out| {
        device.copy(&mut out.compute[0], 0, &source, 0, values)
    });
    Ok(case.bytes(2 * compute_size::<D>() * values))
}

fn embedding_forward<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let (rows, width) = (shape.tokens(), shape.config.hidden_size);
    let table = compute(device, 1, shape.config.vocab_size * width, 1.0)?;
    let batch = batch(device, shape)?;
    let out = outputs(device, &[rows * width], &[])?;
    let case = Case::new("embedding_forward", out, move |device: &D, out| {
        device.embedding_forward(&mut out.compute[0], &table, &batch.token_ids, rows, width)
    });
    Ok(case.bytes(2 * compute_size::<D>() * rows * width + WORD * rows))
}

fn embedding_backward<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let (rows, width) = (shape.tokens(), shape.config.hidden_size);
    let pairs = crate::bench::inputs::pairs(shape.lengths, shape.pairs, shape.config.vocab_size);
    let mut tokens: Vec<u32> = pairs
        .iter()
        .flat_map(|pair| [&pair.prompt, &pair.chosen, &pair.rejected])
        .flatten()
        .copied()
        .collect();
    tokens.sort_unstable();
    tokens.dedup();
    let dout = compute(device, 1, rows * width, 1.0)?;
    let batch = batch(device, shape)?;
    let out = outputs(device, &[], &[shape.config.vocab_size * width])?;
    let case = Case::new("embedding_backward", out, move |device: &D, out| {
        device.embedding_backward(&mut out.floats[0], &dout, &batch, rows, width)
    });
    let gradients = 2 * WORD * tokens.len() * width;
    Ok(case.updates().bytes(compute_size::<D>() * rows * width + 2 * WORD * rows + gradients))
}

fn norm_shape(shape: &Shape) -> NormShape {
    NormShape { rows: shape.tokens(), width: shape.config.hidden_size, epsilon: shape.config.rms_norm_eps }
}

fn rms_norm_forward<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let norm = norm_shape(shape);
    let values = norm.rows * norm.width;
    let (x, weight) = (compute(device, 1, values, 1.0)?, compute(device, 2, norm.width, 1.0)?);
    let out = outputs(device, &[values], &[norm.rows])?;
    let case = Case::new("rms_norm_forward", out, move |device: &D, out| {
        device.rms_norm_forward(&mut out.compute[0], &mut out.floats[0], &x, &weight, norm)
    });
    Ok(case.bytes(compute_size::<D>() * (2 * values + norm.width) + WORD * norm.rows))
}

fn add_rms_norm_forward<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let norm = norm_shape(shape);
    let values = norm.rows * norm.width;
    let (x, delta) = (compute(device, 1, values, 1.0)?, compute(device, 2, values, 1.0)?);
    let weight = compute(device, 3, norm.width, 1.0)?;
    let out = outputs(device, &[values, values], &[norm.rows])?;
    let case = Case::new("add_rms_norm_forward", out, move |device: &D, out| {
        let (sum, normed) = out.compute.split_at_mut(1);
        let rstd = &mut out.floats[0];
        device.add_rms_norm_forward(AddRmsNorm {
            sum: &mut sum[0],
            out: &mut normed[0],
            rstd,
            x: &x,
            delta: &delta,
            weight: &weight,
            shape: norm,
        })
    });
    Ok(case.bytes(compute_size::<D>() * (4 * values + norm.width) + WORD * norm.rows))
}

fn add<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let values = shape.tokens() * shape.config.hidden_size;
    let (x, delta) = (compute(device, 1, values, 1.0)?, compute(device, 2, values, 1.0)?);
    let out = outputs(device, &[values], &[])?;
    let case =
        Case::new("add", out, move |device: &D, out| device.add(&mut out.compute[0], &x, &delta, values));
    Ok(case.bytes(3 * compute_size::<D>() * values))
}

fn rms_norm_backward<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let norm = norm_shape(shape);
    let values = norm.rows * norm.width;
    let (dout, x) = (compute(device, 1, values, 1.0)?, compute(device, 2, values, 1.0)?);
    let weight = compute(device, 3, norm.width, 1.0)?;
    let rstd = filled(device, &vec![1.0f32; norm.rows])?;
    let out = outputs(device, &[values], &[norm.width])?;
    let case = Case::new("rms_norm_backward", out, move |device: &D, out| {
        let (dx, dweight) = (&mut out.compute[0], &mut out.floats[0]);
        device.rms_norm_backward(RmsNormBackward {
            dx,
            dweight: Some(dweight),
            dout: &dout,
            x: &x,
            weight: &weight,
            rstd: &rstd,
            shape: norm,
        })
    });
    let bytes = compute_size::<D>() * (4 * values + norm.width) + WORD * (norm.rows + 2 * norm.width);
    Ok(case.updates().bytes(bytes))
}

/// The gemms of a layer, and those of the head's gradients.
#[derive(Clone, Copy)]
enum Gemm {
    Qkv,
    AttentionOut,
    GateUp,
    Down,
    Head,
}

impl Gemm {
    fn name(self) -> &'static str {
        match self {
            Gemm::Qkv => "qkv",
            Gemm::AttentionOut => "attention_out",
            Gemm::GateUp => "gate_up",
            Gemm::Down => "down",
            Gemm::Head => "head",
        }
    }

    fn shape(self, shape: &Shape) -> LinearShape {
        let (config, rows) = (&shape.config, shape.tokens());
        let attention = config.attention_shape();
        let (inputs, outputs) = match self {
            Gemm::Qkv => (config.hidden_size, attention.qkv_width()),
            Gemm::AttentionOut => (attention.out_width(), config.hidden_size),
            Gemm::GateUp => (config.hidden_size, 2 * config.intermediate_size),
            Gemm::Down => (config.intermediate_size, config.hidden_size),
            Gemm::Head => (config.hidden_size, config.vocab_size),
        };
        LinearShape { rows, inputs, outputs }
    }
}

/// The shape of the gemm that is called `part`; that of `down` for a name that none has.
pub fn linear_shape(shape: &Shape, part: &str) -> LinearShape {
    let all = [Gemm::Qkv, Gemm::AttentionOut, Gemm::GateUp, Gemm::Head];
    all.into_iter().find(|gemm| gemm.name() == part).unwrap_or(Gemm::Down).shape(shape)
}

fn gemm_flops(linear: LinearShape) -> usize {
    2 * linear.rows * linear.inputs * linear.outputs
}

fn gemm_forward<D: Device>(device: &D, shape: &Shape, gemm: Gemm) -> Result<Case<D>> {
    let linear = gemm.shape(shape);
    let LinearShape { rows, inputs, outputs: columns } = linear;
    let (x, weight) = (compute(device, 1, rows * inputs, 1.0)?, compute(device, 2, columns * inputs, 0.02)?);
    let out = outputs(device, &[rows * columns], &[])?;
    let case = Case::new("linear_forward", out, move |device: &D, out| {
        device.linear_forward(&mut out.compute[0], &x, &weight, None, linear)
    });
    let values = rows * inputs + inputs * columns + rows * columns;
    Ok(case.part(gemm.name()).flops(gemm_flops(linear)).bytes(compute_size::<D>() * values))
}

fn gemm_backward_input<D: Device>(device: &D, shape: &Shape, gemm: Gemm) -> Result<Case<D>> {
    let linear = gemm.shape(shape);
    let LinearShape { rows, inputs, outputs: columns } = linear;
    let (dout, weight) =
        (compute(device, 1, rows * columns, 1.0)?, compute(device, 2, columns * inputs, 0.02)?);
    let out = outputs(device, &[rows * inputs], &[])?;
    let case = Case::new("linear_backward_input", out, move |device: &D, out| {
        device.linear_backward_input(&mut out.compute[0], &dout, &weight, linear)
    });
    let values = rows * inputs + inputs * columns + rows * columns;
    Ok(case.part(gemm.name()).flops(gemm_flops(linear)).bytes(compute_size::<D>() * values))
}

fn gemm_backward_weight<D: Device>(device: &D, shape: &Shape, gemm: Gemm) -> Result<Case<D>> {
    let linear = gemm.shape(shape);
    let LinearShape { rows, inputs, outputs: columns } = linear;
    let (dout, x) = (compute(device, 1, rows * columns, 1.0)?, compute(device, 2, rows * inputs, 1.0)?);
    let out = outputs(device, &[], &[columns * inputs])?;
    let case = Case::new("linear_backward_weight", out, move |device: &D, out| {
        device.linear_backward_weight(Some(&mut out.floats[0]), None, &dout, &x, linear)
    });
    let bytes = compute_size::<D>() * rows * (inputs + columns) + 2 * WORD * inputs * columns;
    Ok(case.updates().part(gemm.name()).flops(gemm_flops(linear)).bytes(bytes))
}

/// The gemms of the head's backward over the logits' gradients `[N, V]`: the gradient of the scored tokens, which are
/// all tokens here, and that of the embedding. Only CUDA has the first as an operation of its own.
pub fn head_gemms() -> Vec<Maker<CudaDevice>> {
    vec![head_backward_input, |device, shape| gemm_backward_weight(device, shape, Gemm::Head)]
}

fn head_backward_input(device: &CudaDevice, shape: &Shape) -> Result<Case<CudaDevice>> {
    let linear = Gemm::Head.shape(shape);
    let LinearShape { rows, inputs, outputs: columns } = linear;
    let (dout, weight) =
        (compute(device, 1, rows * columns, 1.0)?, compute(device, 2, columns * inputs, 0.02)?);
    let out = outputs(device, &[], &[rows * inputs])?;
    let case = Case::new("linear_backward_input_f32", out, move |device: &CudaDevice, out| {
        device.linear_backward_input_f32(&mut out.floats[0], &dout, &weight, linear)
    });
    let bytes = compute_size::<CudaDevice>() * columns * (rows + inputs) + 2 * WORD * rows * inputs;
    Ok(case.updates().part(Gemm::Head.name()).flops(gemm_flops(linear)).bytes(bytes))
}

/// With the gradient of a bias, as models with biases have it on q, k and v.
fn gemm_backward_bias<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let linear = Gemm::Qkv.shape(shape);
    let LinearShape { rows, inputs, outputs: columns } = linear;
    let (dout, x) = (compute(device, 1, rows * columns, 1.0)?, compute(device, 2, rows * inputs, 1.0)?);
    let out = outputs(device, &[], &[columns * inputs, columns])?;
    let case = Case::new("linear_backward_weight", out, move |device: &D, out| {
        let (dweight, dbias) = out.floats.split_at_mut(1);
        device.linear_backward_weight(Some(&mut dweight[0]), Some(&mut dbias[0]), &dout, &x, linear)
    });
    let bytes = compute_size::<D>() * rows * (inputs + columns) + 2 * WORD * (inputs + 1) * columns;
    Ok(case.updates().part("qkv and bias").flops(gemm_flops(linear)).bytes(bytes))
}

fn rope<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let (rows, attention) = (shape.tokens(), shape.config.attention_shape());
    let positions = shape.lengths.tokens();
    let table = filled(device, &shape.config.rope_table(positions))?;
    let qkv = compute(device, 1, rows * attention.qkv_width(), 1.0)?;
    let batch = batch(device, shape)?;
    let out = super::Outputs { compute: vec![qkv], floats: Vec::new() };
    let case = Case::new("rope", out, move |device: &D, out| {
        let direction = RopeDirection::Forward;
        device.rope(&mut out.compute[0], &table, &batch.positions, rows, attention, direction)
    });
    let rotated = rows * (attention.heads + attention.kv_heads) * attention.head_size;
    let table = WORD * positions.min(rows) * attention.head_size;
    Ok(case.updates().bytes(2 * compute_size::<D>() * rotated + table + WORD * rows))
}

/// Bytes of q, k, v and the output, and of the lse.
fn attention_bytes<D: Device>(rows: usize, attention: AttentionShape) -> usize {
    compute_size::<D>() * rows * (attention.qkv_width() + attention.out_width())
        + WORD * rows * attention.heads
}

fn attention_forward<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let (rows, attention) = (shape.tokens(), shape.config.attention_shape());
    let qkv = compute(device, 1, rows * attention.qkv_width(), 1.0)?;
    let batch = batch(device, shape)?;
    let out = outputs(device, &[rows * attention.out_width()], &[rows * attention.heads])?;
    let case = Case::new("attention_forward", out, move |device: &D, out| {
        device.attention_forward(&mut out.compute[0], &mut out.floats[0], &qkv, &batch, attention)
    });
    // q k^T and p v, two operations each.
    let flops = 4 * shape.visible() * attention.out_width();
    Ok(case.flops(flops).bytes(attention_bytes::<D>(rows, attention)))
}

fn attention_backward<D: Device>(device: &D, shape: &Shape, order: AttentionOrder) -> Result<Case<D>> {
    let (rows, attention) = (shape.tokens(), shape.config.attention_shape());
    let qkv = compute(device, 1, rows * attention.qkv_width(), 1.0)?;
    let dout = compute(device, 2, rows * attention.out_width(), 1.0)?;
    let batch = batch(device, shape)?;
    let mut out = device.alloc(rows * attention.out_width())?;
    let mut lse = device.alloc(rows * attention.heads)?;
    device.attention_forward(&mut out, &mut lse, &qkv, &batch, attention)?;
    let gradient = outputs(device, &[rows * attention.qkv_width()], &[])?;
    let (part, other) = match order {
        AttentionOrder::Fixed => ("", None),
        AttentionOrder::Any => ("any order", device.in_any_order()),
    };
    let redundant = order == AttentionOrder::Any && other.is_none();
    let case = Case::new("attention_backward", gradient, move |device: &D, gradient| {
        let device = other.as_ref().unwrap_or(device);
        device.attention_backward(AttentionGradient {
            dqkv: &mut gradient.compute[0],
            dout: &dout,
            out: &out,
            lse: &lse,
            qkv: &qkv,
            batch: &batch,
            shape: attention,
        })
    });
    let case = case.part(part).redundant(redundant);
    // q k^T again, then dv, dp, dq and dk.
    let flops = 10 * shape.visible() * attention.out_width();
    let gradients = compute_size::<D>() * rows * (attention.qkv_width() + attention.out_width());
    Ok(case.flops(flops).bytes(attention_bytes::<D>(rows, attention) + gradients))
}

fn attention_decode<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let (rows, attention) = (shape.tokens(), shape.config.attention_shape());
    let cache = compute(device, 1, rows * attention.qkv_width(), 1.0)?;
    let out = outputs(device, &[attention.out_width()], &[])?;
    let case = Case::new("attention_decode", out, move |device: &D, out| {
        device.attention_decode(&mut out.compute[0], &cache, rows, attention)
    });
    let cached = 2 * rows * attention.kv_heads * attention.head_size;
    Ok(case.bytes(compute_size::<D>() * (cached + 2 * attention.out_width())))
}

fn swiglu_forward<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let (rows, width) = (shape.tokens(), shape.config.intermediate_size);
    let gate_up = compute(device, 1, 2 * rows * width, 1.0)?;
    let out = outputs(device, &[rows * width], &[])?;
    let case = Case::new("swiglu_forward", out, move |device: &D, out| {
        device.swiglu_forward(&mut out.compute[0], &gate_up, rows, width)
    });
    Ok(case.bytes(3 * compute_size::<D>() * rows * width))
}

fn linear_swiglu_forward<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let (rows, inputs, width) = (shape.tokens(), shape.config.hidden_size, shape.config.intermediate_size);
    let layer = LinearShape { rows, inputs, outputs: 2 * width };
    let x = compute(device, 1, rows * inputs, 1.0)?;
    let weight = compute(device, 2, layer.outputs * inputs, 0.05)?;
    let out = outputs(device, &[rows * width, rows * layer.outputs], &[])?;
    let case = Case::new("linear_swiglu_forward", out, move |device: &D, out| {
        let [out, gate_up] = &mut out.compute[..] else { unreachable!("two outputs, as above") };
        device.linear_swiglu_forward(LinearSwiglu {
            out,
            gate_up,
            x: &x,
            weight: &weight,
            bias: None,
            shape: layer,
        })
    });
    let values = rows * (inputs + width + layer.outputs) + layer.outputs * inputs;
    Ok(case.flops(2 * rows * inputs * layer.outputs).bytes(compute_size::<D>() * values))
}

fn swiglu_backward<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let (rows, width) = (shape.tokens(), shape.config.intermediate_size);
    let gate_up = compute(device, 1, 2 * rows * width, 1.0)?;
    let dout = compute(device, 2, rows * width, 1.0)?;
    let out = outputs(device, &[2 * rows * width], &[])?;
    let case = Case::new("swiglu_backward", out, move |device: &D, out| {
        device.swiglu_backward(&mut out.compute[0], &dout, &gate_up, rows, width)
    });
    Ok(case.bytes(5 * compute_size::<D>() * rows * width))
}
