//! A training step in candle on the CPU: Llama forward, MMPO loss, backward, AdamW; to be compared with `benches/step.rs`.
//!
//! candle's fused softmax, RMSNorm and RoPE have no backward: gradients stop there without a word. So its
//! differentiable operations are used (`ops::softmax`, `ops::rms_norm_slow`, `rotary_emb::rope_slow`), which is what
//! training in candle means today, and the first step checks that every weight gets a gradient.

mod llama;
mod step_bench;

use std::env;
use std::process::Command;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var, bail};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};

use llama::Llama;
use step_bench::{Arguments, Engine, Pair, Timings};

fn main() -> Result<()> {
    let arguments = Arguments::from_process();
    // candle reads its thread count from the environment alone, so this process starts itself again with it set.
    let threads = arguments.threads.to_string();
    if env::var("RAYON_NUM_THREADS").as_ref() != Ok(&threads) {
        let mut again = Command::new(env::current_exe()?);
        let status = again.args(env::args_os().skip(1)).env("RAYON_NUM_THREADS", &threads).status()?;
        std::process::exit(status.code().unwrap_or(1));
    }

    let baseline_rss_bytes = step_bench::resident_bytes();
    let device = Device::Cpu;
    let shape = arguments.shape.model();
    let model = Llama::new(shape, arguments.prompt + arguments.response, &device)?;
    let parameters = model.weights().iter().map(|weight| weight.elem_count()).sum();
    let batch = Batch::new(&step_bench::pairs(&arguments, shape.vocabulary), &device)?;
    let rewards = rewards(&batch.mean_logps(&model)?.detach())?;
    let settings = ParamsAdamW {
        lr: step_bench::LEARNING_RATE,
        beta1: step_bench::ADAM_BETAS[0],
        beta2: step_bench::ADAM_BETAS[1],
        eps: step_bench::ADAM_EPSILON,
        weight_decay: step_bench::WEIGHT_DECAY,
    };
    let mut optimizer = AdamW::new(model.weights().to_vec(), settings)?;
    let mut checked = false;
    let timings = Timings::measure(&arguments, || -> Result<f64> {
        let loss = mmpo_loss(&batch.mean_logps(&model)?, &rewards)?;
        let gradients = loss.backward()?;
        if !checked {
            check_gradients(model.weights(), &gradients)?;
            checked = true;
        }
        optimizer.step(&gradients)?;
        Ok(loss.to_scalar::<f32>()? as f64)
    })?;
    let engine = Engine {
        name: "candle",
        version: "0.11.1".to_owned(),
        variant: "differentiable operations, scored rows only in the head",
        parameters,
        computed_tokens: batch.ids.elem_count(),
        baseline_rss_bytes,
    };
    step_bench::print_report(&arguments, engine, timings);
    Ok(())
}

/// The pairs as rows of equal length, all chosen ones, then all rejected ones.
struct Batch {
    /// `[2 * pairs, prompt + response]`
    ids: Tensor,
    /// `[2 * pairs, response]`
    targets: Tensor,
}

impl Batch {
    fn new(pairs: &[Pair], device: &Device) -> Result<Batch> {
        let chosen = pairs.iter().map(|pair| (&pair.prompt, &pair.chosen));
        let rejected = pairs.iter().map(|pair| (&pair.prompt, &pair.rejected));
        let mut ids: Vec<u32> = Vec::new();
        let mut targets: Vec<u32> = Vec::new();
        for (prompt, response) in chosen.chain(rejected) {
            ids.extend(prompt.iter().chain(response));
            targets.extend(response);
        }
        let rows = 2 * pairs.len();
        Ok(Batch {
            ids: Tensor::from_vec(ids.clone(), (rows, ids.len() / rows), device)?,
            targets: Tensor::from_vec(targets.clone(), (rows, targets.len() / rows), device)?,
        })
    }

    /// Mean log-prob of each response under `model`, `[2 * pairs]`.
    fn mean_logps(&self, model: &Llama) -> Result<Tensor> {
        let response = self.targets.dim(1)?;
        let logits = model.response_logits(&self.ids, response)?;
        let logps = candle_nn::ops::log_softmax(&logits, 2)?;
        logps.gather(&self.targets.unsqueeze(2)?, 2)?.squeeze(2)?.mean(1)
    }
}

/// MMPO's rewards `[2 * pairs]` from the reference's mean log-probs, normalised over all of them.
fn rewards(reference: &Tensor) -> Result<Tensor> {
    const OFFSET: f64 = 1e-6;
    let reference: Vec<f32> = reference.to_vec1()?;
    let half = reference.len() / 2;
    let raw: Vec<f64> = reference
        .iter()
        .enumerate()
        .map(|(row, &logp)| {
            let base = if row < half { step_bench::EPSILON } else { 1.0 - step_bench::EPSILON };
            base + step_bench::BETA * logp as f64
        })
        .collect();
    let min = raw.iter().copied().fold(f64::INFINITY, f64::min);
    let max = raw.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let normalised = raw.iter().map(|reward| ((reward + OFFSET - min) / (max - min + OFFSET)) as f32);
    Tensor::from_iter(normalised, &Device::Cpu)
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
        let norm = gradient.sqr()?.sum_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()?.sqrt();
        if !(norm > 0.0 && norm.is_finite()) {
            bail!("weight {index}, {:?}, has a gradient of norm {norm}", weight.shape());
        }
    }
    Ok(())
}
