//! Text from a model: greedy or sampled, token by token over a key/value cache.

use std::io::ErrorKind;
use std::sync::Arc;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::checkpoint::{AdapterFolder, ModelFolder};
use crate::config::GenerateConfig;
use crate::context;
use crate::data::{Message, TextEncoder};
use crate::device::{Device, DeviceTask, run_on};
use crate::error::{Error, Result};
use crate::foreign::hub;
use crate::interrupt;
use crate::model::{Generation, Llama};
use crate::report::{Reader, print_result};

/// The longest answer that may be asked for is the model's context, but at least and at most these.
const LEAST_POSITIONS: usize = 1 << 16;
const MOST_POSITIONS: usize = 1 << 20;

/// Writes the answer to `config.prompt` to standard output as it comes.
///
/// # Errors
/// Those of the model folder, of [`TextEncoder::encode_chat_prompt`], of the device and of standard output.
pub fn run(config: &GenerateConfig) -> Result<()> {
    interrupt::install()?;
    let model = hub::model(&config.model)?;
    let folder = ModelFolder::open(&model)?;
    folder.check_finite()?;
    let adapter =
        config.adapter.as_deref().map(|path| AdapterFolder::open(path, folder.config())).transpose()?;
    let text_folder = context::text_folder(&model, config.adapter.as_deref());
    let encoder = TextEncoder::load(text_folder, config.chat_template.as_deref())?.at(config.template_date)?;
    let prompt = match config.raw {
        true => encoder.encode_text_prompt(&config.prompt)?,
        false => {
            let system = config.system.iter().map(|text| Message::new("system", text));
            let messages: Vec<Message> = system.chain([Message::new("user", &config.prompt)]).collect();
            encoder.encode_chat_prompt(&messages)?
        }
    };
    check_vocabulary(&prompt, &folder, &encoder)?;
    interrupt::check()?;
    let max_new_tokens = most_new_tokens(config.max_new_tokens, folder.config().max_position_embeddings);
    check_context(&folder, prompt.len(), max_new_tokens)?;
    // A template may end its turns with a token that the model's files do not list.
    let end_of_turn = match &encoder.template {
        Some(template) if !config.raw => template.end_of_turn(&encoder.tokenizer)?,
        _ => None,
    };
    let task = Generating { config, folder, adapter, encoder, prompt, max_new_tokens, end_of_turn };
    run_on(config.device, config.precision, config.threads, task)
}

/// Refuses a tokenizer that is not the model's: it gives tokens for which the model has no embedding.
fn check_vocabulary(prompt: &[u32], folder: &ModelFolder, encoder: &TextEncoder) -> Result<()> {
    let vocabulary = folder.config().vocab_size;
    match prompt.iter().find(|&&token| token as usize >= vocabulary) {
        None => Ok(()),
        Some(token) => Err(Error::model(
            encoder.tokenizer.path(),
            format!("the prompt holds token {token}, but the model's vocab_size is {vocabulary}"),
            "tokenizer and weights do not belong together: use the tokenizer the model was trained with",
        )),
    }
}

/// The number of new tokens that `--max-new-tokens` allows. It is bounded, because a RoPE table reaches to the last
/// position.
fn most_new_tokens(asked: usize, context: usize) -> usize {
    let most = context.clamp(LEAST_POSITIONS, MOST_POSITIONS);
    if asked > most {
        tracing::warn!("--max-new-tokens is {asked}: the answer ends after {most} tokens at the latest");
    }
    asked.min(most)
}

/// Warns where the answer may pass the model's context, and refuses what its rope does not hold for.
fn check_context(folder: &ModelFolder, prompt: usize, max_new_tokens: usize) -> Result<()> {
    let (context, most) = (folder.config().context(), prompt.saturating_add(max_new_tokens));
    context::check_positions(folder, most, |positions| match positions.saturating_sub(prompt) {
        0 => format!("the prompt has {prompt} tokens: shorten it"),
        room => format!("give --max-new-tokens {room} or less"),
    })?;
    if most > context {
        tracing::warn!(
            "the prompt's {prompt} tokens and --max-new-tokens {max_new_tokens} may pass the {context} positions that the model was trained for"
        );
    }
    Ok(())
}

struct Generating<'a> {
    config: &'a GenerateConfig,
    folder: ModelFolder,
    adapter: Option<AdapterFolder>,
    encoder: TextEncoder,
    prompt: Vec<u32>,
    max_new_tokens: usize,
    /// A token that ends the answer, beside the model's own end tokens.
    end_of_turn: Option<u32>,
}

impl DeviceTask for Generating<'_> {
    type Output = ();

    fn run<D: Device>(self, device: Arc<D>) -> Result<()> {
        let Generating { config, folder, adapter, encoder, prompt, max_new_tokens, end_of_turn } = self;
        let mut model = Llama::load_frozen(device, &folder, prompt.len() + max_new_tokens)?;
        if let Some(adapter) = &adapter {
            adapter.attach(&mut model)?;
        }
        model.config.stop_token_ids.extend(end_of_turn);
        let sampling = Sampling { temperature: config.temperature, top_p: config.top_p, seed: config.seed };
        let mut text = encoder.tokenizer.stream(true);
        let mut is_read = true;
        let generated = generate(&model, &prompt, max_new_tokens, sampling, |token| {
            is_read = print_result(&text.push(token)?)? == Reader::Listening;
            match is_read {
                true => Ok(()),
                false => Err(Error::io("standard output".as_ref(), "write to", ErrorKind::BrokenPipe.into())),
            }
        });
        if !is_read {
            // End without a word, as a program does that SIGPIPE ends.
            return Ok(());
        }
        generated?;
        print_result(&(text.finish()? + "\n"))?;
        Ok(())
    }
}

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f64,
    /// Share of probability that the most likely tokens must cover; 1 keeps all.
    pub top_p: f64,
    /// Seed of the draws.
    pub seed: u64,
}

impl Sampling {
    /// The likeliest token each time.
    pub const GREEDY: Sampling = Sampling { temperature: 0.0, top_p: 1.0, seed: 0 };
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model gave an end token.
    EndToken,
    /// The greatest number of tokens was reached.
    Length,
}

/// Up to `max_new_tokens` tokens after `prompt`, without the end token; `on_token` sees each as it comes, and an error
/// of its ends the generation.
///
/// # Errors
/// Those of the device and of `on_token`.
pub fn generate<D: Device>(
    model: &Llama<D>,
    prompt: &[u32],
    max_new_tokens: usize,
    sampling: Sampling,
    mut on_token: impl FnMut(u32) -> Result<()>,
) -> Result<(Vec<u32>, Finish)> {
    let mut random = ChaCha8Rng::seed_from_u64(sampling.seed);
    let mut generation = Generation::start(model, prompt, max_new_tokens)?;
    let mut tokens = Vec::new();
    while tokens.len() < max_new_tokens {
        interrupt::check()?;
        let token = next_token(generation.logits(), sampling, &mut random);
        if model.config.stop_token_ids.contains(&token) {
            return Ok((tokens, Finish::EndToken));
        }
        on_token(token)?;
        tokens.push(token);
        if tokens.len() < max_new_tokens {
            generation.push(token)?;
        }
    }
    Ok((tokens, Finish::Length))
}

/// Chooses the next token. Where greedy decoding meets a tie, the lowest id wins.
fn next_token(logits: &[f32], sampling: Sampling, random: &mut ChaCha8Rng) -> u32 {
    let mut ranked: Vec<usize> = (0..logits.len()).collect();
    if sampling.temperature == 0.0 {
        let best = ranked.into_iter().reduce(|best, id| if logits[id] > logits[best] { id } else { best });
        return best.unwrap_or(0) as u32;
    }
    ranked.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    let weights: Vec<f64> = ranked
        .iter()
        .map(|&id| ((logits[id] - logits[ranked[0]]) as f64 / sampling.temperature).exp())
        .collect();
    let nucleus = nucleus_size(&weights, sampling.top_p);
    let mut point = random.random::<f64>() * weights[..nucleus].iter().sum::<f64>();
    for (&id, &weight) in ranked.iter().zip(&weights[..nucleus]) {
        point -= weight;
        if point <= 0.0 {
            return id as u32;
        }
    }
    ranked[nucleus - 1] as u32
}

/// The size of the smallest set that covers `top_p` of the sum of `weights`, which are in falling order; at least one.
fn nucleus_size(weights: &[f64], top_p: f64) -> usize {
    let wanted = top_p * weights.iter().sum::<f64>();
    let mut covered = 0.0;
    let enough = weights.iter().position(|&weight| {
        covered += weight;
        covered >= wanted
    });
    enough.map_or(weights.len(), |last| last + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greedy_takes_the_first_of_the_best() {
        let mut random = ChaCha8Rng::seed_from_u64(0);
        assert_eq!(next_token(&[0.0, 3.0, 3.0, -1.0], Sampling::GREEDY, &mut random), 1);
    }

    #[test]
    fn top_p_keeps_the_likeliest_tokens_alone() {
        assert_eq!(nucleus_size(&[0.6, 0.3, 0.1], 0.5), 1);
        assert_eq!(nucleus_size(&[0.6, 0.3, 0.1], 0.7), 2);
        assert_eq!(nucleus_size(&[0.6, 0.3, 0.1], 1.0), 3);
        let sampling = Sampling { temperature: 1.0, top_p: 0.5, seed: 0 };
        let mut random = ChaCha8Rng::seed_from_u64(1);
        for _ in 0..100 {
            assert_eq!(next_token(&[0.0, 1.0, 5.0], sampling, &mut random), 2);
        }
    }

    #[test]
    fn sampling_follows_the_softmax() {
        let sampling = Sampling { temperature: 1.0, top_p: 1.0, seed: 0 };
        let mut random = ChaCha8Rng::seed_from_u64(7);
        let logits = [0.0, (3.0f32).ln()];
        let ones = (0..4000).filter(|_| next_token(&logits, sampling, &mut random) == 1).count();
        assert!((ones as f64 / 4000.0 - 0.75).abs() <= 0.03, "{ones} of 4000");
    }
}
