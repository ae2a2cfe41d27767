//! What the model answers to a few prompts, before and after: the difference that a person sees.

use super::inputs::Inputs;
use crate::data::{Body, Record, TokenizedPair, read_chosen_records};
use crate::device::Device;
use crate::error::Result;
use crate::generate::{Sampling, generate};
use crate::model::Llama;
use crate::report::Sample;

/// Prompts that are answered.
const COUNT: usize = 3;
/// Most tokens of an answer.
pub const MAX_NEW_TOKENS: usize = 64;

/// Prompts of the first evaluation pairs (of the first training pairs where there are none).
#[derive(Debug)]
pub struct Samples {
    pub prompts: Vec<String>,
    tokens: Vec<Vec<u32>>,
}

impl Samples {
    /// The first few prompts, with their text for the report.
    pub fn choose(inputs: &Inputs) -> Result<Self> {
        let (source, pairs) = match (&inputs.evaluation_source, &inputs.evaluation) {
            (Some(source), Some(dataset)) => (source, &dataset.pairs),
            _ => (&inputs.training_source, &inputs.training.pairs),
        };
        let chosen = sample_prompts(pairs);
        let places: Vec<usize> = chosen.iter().map(|pair| pair.record).collect();
        let records = read_chosen_records(source, &places)?;
        Ok(Samples {
            prompts: (0..chosen.len()).map(|place| prompt_text(records.get(place))).collect(),
            tokens: chosen.iter().map(|pair| pair.prompt.to_vec()).collect(),
        })
    }

    /// The prompts with the answers before and after.
    pub fn compared(self, before: Vec<String>, after: Vec<String>) -> Vec<Sample> {
        let answers = before.into_iter().zip(after);
        self.prompts
            .into_iter()
            .zip(answers)
            .map(|(prompt, (before, after))| Sample { prompt, before, after })
            .collect()
    }

    /// Greedy answers of `model`.
    pub fn answers<D: Device>(&self, model: &Llama<D>, inputs: &Inputs) -> Result<Vec<String>> {
        self.tokens
            .iter()
            .map(|prompt| {
                let (tokens, _) = generate(model, prompt, MAX_NEW_TOKENS, Sampling::GREEDY, |_| Ok(()))?;
                inputs.encoder.tokenizer.decode(&tokens, true)
            })
            .collect()
    }
}

/// The pairs whose prompts are answered before and after training.
pub fn sample_prompts(pairs: &[TokenizedPair]) -> Vec<&TokenizedPair> {
    let mut chosen: Vec<&TokenizedPair> = pairs.iter().filter(|pair| !pair.prompt.is_empty()).collect();
    // A file with a weight above 1 has each pair several times.
    chosen.dedup_by_key(|pair| pair.record);
    chosen.truncate(COUNT);
    chosen
}

/// The last message of a prompt, or all of a plain one.
fn prompt_text(record: Option<&Record>) -> String {
    match record.map(|record| &record.body) {
        Some(Body::Text { prompt, .. }) => prompt.clone(),
        Some(Body::Conversation { prompt, .. }) => {
            prompt.last().map_or_else(String::new, |message| message.content.clone())
        }
        None => String::new(),
    }
}
