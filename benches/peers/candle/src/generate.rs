//! Greedy text by the Llama of candle-transformers over its key/value cache, one sequence.

use std::path::Path;
use std::time::Instant;

use candle_core::{D, Error, Result, Tensor, bail};
use candle_nn::VarBuilder;
use candle_transformers::models::llama::{Cache, Config, Llama, LlamaConfig};
use serde_json::json;

use crate::bench::Arguments;

/// Prints one JSON object: seconds of a run with few new tokens and of one with all, the prompt's included, and the tokens
/// of the latter.
pub fn run(arguments: &Arguments) -> Result<()> {
    let asked = &arguments.generation;
    let Some(folder) = &asked.model else { bail!("`generate` needs --model") };
    if asked.prompt.is_empty() {
        bail!("`generate` needs --prompt-tokens");
    }
    let config = std::fs::read(folder.join("config.json"))?;
    let config: LlamaConfig = serde_json::from_slice(&config).map_err(Error::wrap)?;
    let config = config.into_config(false);
    let model = Llama::load(weights(arguments, folder)?, &config)?;
    // The first run also brings memory and caches into the state of all later ones.
    generate(arguments, &model, &config, asked.few)?;
    let (few, _) = generate(arguments, &model, &config, asked.few)?;
    let (all, tokens) = generate(arguments, &model, &config, asked.all)?;
    println!(
        "{}",
        json!({ "engine": "candle", "version": "0.11.1", "few": few, "all": all, "tokens": tokens })
    );
    Ok(())
}

/// The folder's weights in the number type of the run. They are read, not mapped: mapping is unsafe code, and changes the
/// time of loading alone.
fn weights<'a>(arguments: &'a Arguments, folder: &Path) -> Result<VarBuilder<'a>> {
    let file = folder.join("model.safetensors");
    let Ok(bytes) = std::fs::read(&file) else { bail!("{} cannot be read", file.display()) };
    VarBuilder::from_buffered_safetensors(bytes, arguments.dtype, &arguments.device)
}

/// Seconds, and the new tokens.
fn generate(arguments: &Arguments, model: &Llama, config: &Config, count: usize) -> Result<(f64, Vec<u32>)> {
    let (device, prompt) = (&arguments.device, &arguments.generation.prompt);
    let mut cache = Cache::new(true, arguments.dtype, config, device)?;
    let mut tokens = Vec::with_capacity(count);
    let started = Instant::now();
    let (mut input, mut position) = (prompt.clone(), 0);
    while tokens.len() < count {
        let ids = Tensor::new(&input[..], device)?.unsqueeze(0)?;
        let logits = model.forward(&ids, position, &mut cache)?;
        position += input.len();
        let token: u32 = logits.argmax(D::Minus1)?.squeeze(0)?.to_scalar()?;
        tokens.push(token);
        input = vec![token];
    }
    Ok((started.elapsed().as_secs_f64(), tokens))
}
