//! Attention and cross entropy, one by one, of candle's differentiable operations.

use candle_core::{D, Result, Tensor, Var};

use crate::bench::{Arguments, normal, pairs};
use crate::llama::{causal_mask, repeat_heads, scaled_attention};

pub fn run(arguments: &Arguments) -> Result<()> {
    attention(arguments)?;
    head(arguments)
}

/// Query-key pairs that the packed pairs' mask lets through: the work asked for, whatever is computed.
fn visible(arguments: &Arguments) -> usize {
    let triangle = |rows: usize| rows * (rows + 1) / 2;
    let lengths = arguments.lengths;
    let response = |rows: usize| rows * lengths.prompt + triangle(rows);
    arguments.pairs * (triangle(lengths.prompt) + response(lengths.chosen) + response(lengths.rejected))
}

/// Causal, on chosen and rejected rows with the prompt in each, padded to the longer one.
fn attention(arguments: &Arguments) -> Result<()> {
    let shape = &arguments.shape;
    let (rows, sequence) = (2 * arguments.pairs, arguments.lengths.prompt + arguments.lengths.longest());
    let operand = |heads: usize| {
        let values = normal(arguments, &[rows, heads, sequence, shape.head_dim], 1.0)?;
        Var::from_tensor(&values)
    };
    let (q, k, v) = (operand(shape.heads)?, operand(shape.kv_heads)?, operand(shape.kv_heads)?);
    let mask = causal_mask(sequence, &arguments.device)?.to_dtype(arguments.dtype)?;
    let forward = || {
        let times = shape.heads / shape.kv_heads;
        scaled_attention(&q, &repeat_heads(&k, times)?, &repeat_heads(&v, times)?, &mask)
    };
    let products = (visible(arguments) * shape.heads * shape.head_dim) as f64;
    let seconds = arguments.measure(|| forward().map(drop))?;
    arguments.report("attention_forward", &seconds, 4.0 * products)?;

    let out = forward()?;
    let loss = (&out * normal(arguments, out.dims(), 1.0)?)?.sum_all()?;
    let seconds = arguments.measure(|| loss.backward().map(drop))?;
    arguments.report("attention_backward", &seconds, 10.0 * products)
}

/// Hidden rows times the vocabulary, log-probs of the targets, and back.
fn head(arguments: &Arguments) -> Result<()> {
    let shape = &arguments.shape;
    let targets: Vec<u32> =
        pairs(arguments).into_iter().flat_map(|pair| [pair.chosen, pair.rejected].concat()).collect();
    let scored = targets.len();
    let targets = Tensor::from_vec(targets, (scored, 1), &arguments.device)?;
    let hidden = Var::from_tensor(&normal(arguments, &[scored, shape.hidden], 1.0)?)?;
    let weight = Var::from_tensor(&normal(arguments, &[shape.vocabulary, shape.hidden], 0.05)?)?;
    let coefficients = normal(arguments, &[scored, 1], 1.0)?.to_dtype(candle_core::DType::F32)?;
    let run = || {
        let logits = hidden.matmul(&weight.t()?)?.to_dtype(candle_core::DType::F32)?;
        let logps = candle_nn::ops::log_softmax(&logits, D::Minus1)?.gather(&targets, 1)?;
        (logps * &coefficients)?.sum_all()?.backward().map(drop)
    };
    let flops = 6.0 * (scored * shape.vocabulary * shape.hidden) as f64;
    arguments.report("logp_head forward and backward", &arguments.measure(run)?, flops)
}
