//! The shapes that are measured: models, lengths of pairs, and a training step's settings, as `benches/shapes.json`
//! lists them. The peers in `benches/peers/` read the same file.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::config::suggest;
use crate::data::PairSpan;
use crate::error::{Error, Result};
use crate::model::LlamaConfig;
use crate::objective::{Mmpo, Objective};
use crate::optimizer::AdamWStep;

const TEXT: &str = include_str!("../../benches/shapes.json");

#[derive(Deserialize)]
struct File {
    models: Map<String, Value>,
    common: Map<String, Value>,
    profiles: Map<String, Value>,
    step: StepSettings,
}

/// Settings of MMPO and AdamW in the measured step; see `docs/objectives.md`.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct StepSettings {
    beta: f64,
    epsilon: f64,
    length_normalize: bool,
    learning_rate: f64,
    beta1: f64,
    beta2: f64,
    adam_epsilon: f64,
    weight_decay: f64,
}

impl StepSettings {
    /// MMPO that normalises the rewards of all `pairs` of a step together.
    pub fn objective(&self, pairs: usize) -> Objective {
        Objective::Mmpo(Mmpo {
            beta: self.beta,
            epsilon: self.epsilon,
            reward_group: pairs,
            reward_normalize: true,
            length_normalize: self.length_normalize,
            preference_weight: 0.0,
            entropy_weight: 0.0,
        })
    }

    /// The settings of update `step`, counted from 1.
    pub fn adamw(&self, step: u32) -> AdamWStep {
        AdamWStep {
            learning_rate: self.learning_rate,
            beta1: self.beta1,
            beta2: self.beta2,
            epsilon: self.adam_epsilon,
            weight_decay: self.weight_decay,
            step,
        }
    }
}

/// Tokens of the parts of a pair: `P`, `C`, `R`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct Lengths {
    /// `P`, tokens of the prompt.
    pub prompt: usize,
    /// `C`, tokens of the chosen response.
    pub chosen: usize,
    /// `R`, tokens of the rejected response.
    pub rejected: usize,
}

impl Lengths {
    /// Tokens of a pair, its prompt once.
    pub fn tokens(&self) -> usize {
        self.prompt + self.chosen + self.rejected
    }

    /// Query-key pairs that the shared-prefix mask lets through.
    pub fn visible(&self) -> usize {
        let [prompt, chosen, rejected] = [self.prompt, self.chosen, self.rejected].map(|rows| rows as u32);
        PairSpan { start: 0, prompt, chosen, rejected }.visible()
    }
}

/// A model, the lengths of its pairs, and how many of them are packed into a batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    /// A name such as `llama-3.2-1b`, or the folder's name.
    pub model: String,
    /// The model's sizes.
    pub config: LlamaConfig,
    /// A name such as `hh-rlhf`, or `P/C/R`.
    pub profile: String,
    /// Tokens of each pair's parts.
    pub lengths: Lengths,
    /// Pairs of the batch.
    pub pairs: usize,
}

impl Shape {
    /// The key under which results of all engines are compared.
    pub fn name(&self) -> String {
        format!("{} {} x{}", self.model, self.profile, self.pairs)
    }

    /// `T`
    pub fn tokens(&self) -> usize {
        self.pairs * self.lengths.tokens()
    }

    /// `N`
    pub fn scored(&self) -> usize {
        self.pairs * (self.lengths.chosen + self.lengths.rejected)
    }

    /// Whether the pairs are plain causal sequences, on which only attention has something to do.
    pub fn is_plain(&self) -> bool {
        self.scored() == 0
    }

    /// Query-key pairs of the batch that the mask lets through.
    pub fn visible(&self) -> usize {
        self.pairs * self.lengths.visible()
    }

    /// Where each pair lies in the packed batch.
    pub fn spans(&self) -> Vec<PairSpan> {
        let Lengths { prompt, chosen, rejected } = self.lengths;
        (0..self.pairs)
            .map(|pair| PairSpan {
                start: (pair * self.lengths.tokens()) as u32,
                prompt: prompt as u32,
                chosen: chosen as u32,
                rejected: rejected as u32,
            })
            .collect()
    }
}

fn file() -> Result<File> {
    serde_json::from_str(TEXT).map_err(|error| Error::bug(format!("benches/shapes.json: {error}")))
}

/// Names of the models, for people.
///
/// # Errors
/// [`Error::Config`] if `benches/shapes.json` does not parse, which is a bug.
pub fn model_names() -> Result<Vec<String>> {
    Ok(file()?.models.keys().cloned().collect())
}

/// Settings of the measured training step.
///
/// # Errors
/// [`Error::Config`] if `benches/shapes.json` does not parse, which is a bug.
pub fn settings() -> Result<StepSettings> {
    Ok(file()?.step)
}

/// The built-in model of this name, with `layers` of its layers (`None`: all).
///
/// # Errors
/// [`Error::Config`] naming the nearest one for an unknown name.
pub fn model(name: &str, layers: Option<usize>) -> Result<LlamaConfig> {
    let file = file()?;
    let Some(Value::Object(sizes)) = file.models.get(name) else {
        return Err(unknown("--shape", name, file.models.keys()));
    };
    let mut config =
        json!({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"});
    if let Value::Object(config) = &mut config {
        config.extend(file.common);
        config.extend(sizes.clone());
        if let Some(layers) = layers {
            config.insert("num_hidden_layers".into(), layers.into());
        }
    }
    LlamaConfig::parse(Path::new("benches/shapes.json"), &config.to_string())
}

/// Reads lengths: `hh-rlhf`, or `P/C/R`; `P/0/0` are plain causal sequences.
///
/// # Errors
/// [`Error::Config`] for text that is neither.
pub fn lengths(text: &str) -> Result<Lengths> {
    let numbers: Vec<Option<usize>> = text.split('/').map(|part| part.parse().ok()).collect();
    match numbers[..] {
        [Some(prompt), Some(chosen @ 1..), Some(rejected @ 1..)] => {
            return Ok(Lengths { prompt: prompt.max(1), chosen, rejected });
        }
        [Some(prompt @ 1..), Some(0), Some(0)] => {
            return Ok(Lengths { prompt, chosen: 0, rejected: 0 });
        }
        _ => {}
    }
    let file = file()?;
    match file.profiles.get(text).map(Lengths::deserialize) {
        Some(Ok(lengths)) => Ok(lengths),
        _ => Err(unknown("--profile", text, file.profiles.keys())),
    }
}

fn unknown<'a>(flag: &str, text: &str, known: impl Iterator<Item = &'a String> + Clone) -> Error {
    let nearest = suggest::nearest(text, known.clone().map(String::as_str)).unwrap_or_default();
    let names: Vec<&str> = known.map(String::as_str).collect();
    Error::config(
        format!("`{flag}` = {text} is not known; did you mean `{nearest}`?"),
        format!("known are {}; lengths can also be given as P/C/R", names.join(", ")),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_listed_model_and_profile_is_one() {
        for name in model_names().unwrap() {
            let config = model(&name, None).unwrap();
            assert!(config.heads.is_multiple_of(config.kv_heads), "{name}");
            assert_eq!(model(&name, Some(1)).unwrap().layers, 1);
        }
        for name in file().unwrap().profiles.keys() {
            assert!(lengths(name).unwrap().prompt > 0, "{name}");
        }
        assert!(model("llama-3.2-1b", None).unwrap().parameters() > 1_200_000_000);
        assert!(settings().unwrap().objective(2).needs_reference());
    }

    #[test]
    fn lengths_are_names_or_numbers() {
        assert_eq!(lengths("64/32/16").unwrap(), Lengths { prompt: 64, chosen: 32, rejected: 16 });
        let error = lengths("hh-rhlf").unwrap_err().to_string();
        assert!(error.contains("did you mean `hh-rlhf`"), "{error}");
        assert_eq!(lengths("64/0/0").unwrap(), Lengths { prompt: 64, chosen: 0, rejected: 0 });
        for neither in ["1/2", "1/0/1", "0/0/0"] {
            assert!(lengths(neither).is_err(), "{neither}");
        }
    }

    #[test]
    fn the_mask_lets_through_what_counting_finds() {
        let lengths = Lengths { prompt: 3, chosen: 2, rejected: 4 };
        let row = |at: usize| match at {
            0..3 => at + 1,
            3..5 => at + 1,
            _ => 3 + at - 4,
        };
        assert_eq!(lengths.visible(), (0..9).map(row).sum::<usize>());
    }
}
