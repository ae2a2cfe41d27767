//! What a model says of every token of every response: log-probs, and the logits after the last token, as JSON.
//!
//!     cargo run --release --example token_scores -- MODEL PAIRS.jsonl > scores.json
//!
//! A small user of the library, and one side of `tests/reference/check.sh`; transformers is the other. Each sequence
//! goes through the key/value cache token by token, and the log-prob is taken here, in f64: nothing is shared with the
//! packed batches and the log-prob head of training.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use mmpo_fast::checkpoint::ModelFolder;
use mmpo_fast::config::LengthLimits;
use mmpo_fast::data::{PairDataset, TextEncoder, load_pairs};
use mmpo_fast::device::{Device, DeviceChoice, DeviceTask, run_on};
use mmpo_fast::model::{Generation, Llama};
use mmpo_fast::{Error, Result};
use serde_json::{Value, json};

const LIMITS: LengthLimits = LengthLimits { max_length: 160, max_prompt_length: 64 };

fn main() -> ExitCode {
    match run() {
        Ok(scores) => {
            println!("{scores}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{:?}", miette::Report::new(error));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<Value> {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [model, data] = arguments.as_slice() else {
        return Err(Error::config("two arguments are needed", "token_scores MODEL PAIRS.jsonl"));
    };
    let folder = ModelFolder::open(model)?;
    let dataset = load_pairs(data, &TextEncoder::load(model, None)?, LIMITS)?;
    run_on(DeviceChoice::Cpu, None, None, TokenScores { folder, dataset })
}

struct TokenScores {
    folder: ModelFolder,
    dataset: PairDataset,
}

impl DeviceTask for TokenScores {
    type Output = Value;

    fn run<D: Device>(self, device: Arc<D>) -> Result<Value> {
        let model = Llama::load(device, &self.folder, LIMITS.max_length)?;
        let mut sequences = Vec::new();
        for pair in &self.dataset.pairs {
            for response in [&pair.chosen, &pair.rejected] {
                let tokens = [pair.prompt.as_slice(), response].concat();
                sequences.push(sequence(&model, &tokens)?);
            }
        }
        Ok(json!({ "sequences": sequences }))
    }
}

fn sequence<D: Device>(model: &Llama<D>, tokens: &[u32]) -> Result<Value> {
    let mut generation = Generation::start(model, &tokens[..1], tokens.len())?;
    let mut logps = Vec::with_capacity(tokens.len() - 1);
    for &token in &tokens[1..] {
        logps.push(log_prob(generation.logits(), token));
        generation.push(token)?;
    }
    Ok(json!({ "token_ids": tokens, "logps": logps, "logits": generation.logits() }))
}

fn log_prob(logits: &[f32], token: u32) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
    let sum: f64 = logits.iter().map(|&logit| (logit as f64 - largest).exp()).sum();
    logits[token as usize] as f64 - largest - sum.ln()
}
