//! A training step: Llama forward, MMPO loss, backward, AdamW.

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var, bail};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use serde_json::json;

use crate::bench::{self, Arguments, Pair, StepSettings};
use crate::llama::Llama;

pub fn run(arguments: &Arguments) -> Result<()> {
    let baseline_rss_bytes = bench::memory("VmRSS:");
    let sequence = arguments.lengths.prompt + arguments.lengths.longest();
    let model = Llama::new(arguments.shape.clone(), sequence, &arguments.device, arguments.dtype)?;
    let parameters: usize = model.weights().iter().map(|weight| weight.elem_count()).sum();
    let batch = Batch::new(&bench::pairs(arguments), &arguments.device)?;
    let settings = arguments.settings;
    let rewards = rewards(&batch.mean_logps(&model)?.detach(), &settings)?;
    let mut optimizer = AdamW::new(
        model.weights().to_vec(),
        ParamsAdamW {
            lr: settings.learning_rate,
            beta1: settings.beta1,
            beta2: settings.beta2,
            eps: settings.adam_epsilon,
            weight_decay: settings.weight_decay,
        },
    )?;
    let mut losses = Vec::new();
    let seconds = arguments.measure(|| {
        let loss = mmpo_loss(&batch.mean_logps(&model)?, &rewards)?;
        let gradients = loss.backward()?;
        if losses.is_empty() {
            check_gradients(model.weights(), &gradients)?;
        }
        optimizer.step(&gradients)?;
        losses.push(f64::from(loss.to_scalar::<f32>()?));
        Ok(())
    })?;
    if arguments.json {
        print_json(arguments, parameters, batch.ids.elem_count(), baseline_rss_bytes, &seconds, &losses);
    }
    arguments.report("step", &seconds, 0.0)
}

fn print_json(
    arguments: &Arguments,
    parameters: usize,
    computed_tokens: usize,
    baseline_rss_bytes: u64,
    seconds: &[f64],
    losses: &[f64],
) {
    let [low, median, high] = bench::spread(seconds);
    let report = json!({
        "engine": "candle",
        "version": "0.11.1",
        "variant": "differentiable operations, scored rows only in the head",
        "shape": arguments.name,
        "profile": arguments.profile,
        "pairs": arguments.pairs,
        "prompt": arguments.lengths.prompt,
        "chosen": arguments.lengths.chosen,
        "rejected": arguments.lengths.rejected,
        "warmup": arguments.warmups,
        "steps": arguments.calls,
        "parameters": parameters,
        "seconds": seconds,
        "seconds_median": median,
        "seconds_min": low,
        "seconds_max": high,
        "pair_tokens": arguments.pair_tokens(),
        "computed_tokens": computed_tokens,
        "pair_tokens_per_second": arguments.pair_tokens() as f64 / median,
        "peak_rss_bytes": bench::memory("VmHWM:"),
        "baseline_rss_bytes": baseline_rss_bytes,
        "losses": losses,
    });
    println!("{report}");
}

/// The pairs as rows, all chosen ones, then all rejected ones, zeros behind the shorter.
struct Batch {
    /// `[2 * pairs, prompt + longest response]`
    ids: Tensor,
    /// `[2 * pairs, longest response]`
    targets: Tensor,
    /// `[2 * pairs, longest response]`: one over the response's tokens, 0 behind them.
    weights: Tensor,
}

impl Batch {
    fn new(pairs: &[Pair], device: &Device) -> Result<Batch> {
        let chosen = pairs.iter().map(|pair| (&pair.prompt, &pair.chosen));
        let rejected = pairs.iter().map(|pair| (&pair.prompt, &pair.rejected));
        let rows: Vec<_> = chosen.chain(rejected).collect();
        let longest = rows.iter().map(|(_, response)| response.len()).max().unwrap_or(0);
        let (mut ids, mut targets, mut weights) = (Vec::new(), Vec::new(), Vec::new());
        for (prompt, response) in &rows {
            let padded = |mut values: Vec<u32>| {
                values.resize(longest, 0);
                values
            };
            ids.extend(prompt.iter().copied().chain(padded(response.to_vec())));
            targets.extend(padded(response.to_vec()));
            let share = 1.0 / response.len() as f32;
            weights.extend((0..longest).map(|at| if at < response.len() { share } else { 0.0 }));
        }
        let (count, width) = (rows.len(), ids.len() / rows.len());
        Ok(Batch {
            ids: Tensor::from_vec(ids, (count, width), device)?,
            targets: Tensor::from_vec(targets, (count, longest), device)?,
            weights: Tensor::from_vec(weights, (count, longest), device)?,
        })
    }

    /// Mean log-prob of each response under `model`, `[2 * pairs]`.
    fn mean_logps(&self, model: &Llama) -> Result<Tensor> {
        let response = self.targets.dim(1)?;
        let logits = model.response_logits(&self.ids, response)?.to_dtype(DType::F32)?;
        let logps = candle_nn::ops::log_softmax(&logits, 2)?;
        (logps.gather(&self.targets.unsqueeze(2)?, 2)?.squeeze(2)? * &self.weights)?.sum(1)
    }
}

/// MMPO's rewards `[2 * pairs]` from the reference's mean log-probs, normalised over all of them.
fn rewards(reference: &Tensor, settings: &StepSettings) -> Result<Tensor> {
    const OFFSET: f64 = 1e-6;
    let device = reference.device().clone();
    let reference: Vec<f32> = reference.to_vec1()?;
    let half = reference.len() / 2;
    let raw: Vec<f64> = reference
        .iter()
        .enumerate()
        .map(|(row, &logp)| {
            let base = if row < half { settings.epsilon } else { 1.0 - settings.epsilon };
            base + settings.beta * f64::from(logp)
        })
        .collect();
    let min = raw.iter().copied().fold(f64::INFINITY, f64::min);
    let max = raw.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let normalised = raw.iter().map(|reward| ((reward + OFFSET - min) / (max - min + OFFSET)) as f32);
    Tensor::from_iter(normalised, &device)
}

/// `-logsumexp(s_w, s_l)`, mean over pairs.
fn mmpo_loss(logps: &Tensor, rewards: &Tensor) -> Result<Tensor> {
    let scores = (logps + rewards)?.reshape((2, ()))?;
    scores.log_sum_exp(0)?.mean_all()?.neg()
}

fn check_gradients(weights: &[Var], gradients: &GradStore) -> Result<()> {
    for (index, weight) in weights.iter().enumerate() {
        let Some(gradient) = gradients.get(weight) else {
            bail!("weight {index}, {:?}, got no gradient", weight.shape())
        };
        let norm = f64::from(gradient.to_dtype(DType::F32)?.sqr()?.sum_all()?.to_scalar::<f32>()?).sqrt();
        if !(norm > 0.0 && norm.is_finite()) {
            bail!("weight {index}, {:?}, has a gradient of norm {norm}", weight.shape());
        }
    }
    Ok(())
}
