//! One validated configuration of a run, from flags, a recipe file and defaults, in this order of precedence.
//!
//! [`options`] is the table of a training run's options; [`recipe`] reads them from TOML and writes them back;
//! [`resolve`] checks how they go together and makes the [`RunConfig`].

mod check;
mod memory_limit;
mod metric;
pub mod options;
mod policy;
pub mod recipe;
mod resolve;
mod sources;
pub mod suggest;
pub mod value;

use std::path::PathBuf;

pub use check::is_path;
pub use memory_limit::MemoryLimit;
pub use metric::EvalMetric;
pub use policy::{Policies, Policy};
pub use recipe::RESOLVED_FILE;
pub use resolve::{asked_lengths, memory, resolve, resolve_replay, resolve_text};
pub use sources::{ColumnNames, DataCache, PairData, PairFile, PairFiles, TemplateDate};

use crate::device::{DeviceChoice, Precision};
use crate::error::{Error, Result};
use crate::model::{HeadOptions, LoraSettings, Recompute};
use crate::objective::Objective;
pub use crate::objective::ObjectiveKind;
use crate::optimizer::{AdamWSettings, Schedule, StateOptions};

/// Everything `train` needs to know. Made by [`crate::config`] alone, so that every value in it is valid.
#[derive(Clone, Debug, PartialEq)]
pub struct RunConfig {
    /// Hugging Face model folder; `None` is the built-in demo model.
    pub model: Option<PathBuf>,
    /// Pairs to train on; `None` is the built-in demo pairs.
    pub data: Option<PairFiles>,
    /// Columns that have other names in the files of pairs.
    pub columns: ColumnNames,
    /// Folder of the run; made if it is absent.
    pub output: PathBuf,
    /// Frozen reference folder; `None` is the starting model.
    pub reference: Option<PathBuf>,
    /// Jinja file in place of the model's own chat template.
    pub chat_template: Option<PathBuf>,
    /// New adapters to train in place of the weights.
    pub lora: Option<LoraSettings>,
    /// Folder of adapters to go on training in place of the weights.
    pub adapter: Option<PathBuf>,
    /// What the chat template's functions call now; `None` is the time of the run.
    pub template_date: Option<TemplateDate>,
    /// The objective, with its numbers.
    pub objective: Objective,
    /// Numbers of AdamW but the learning rate of each step.
    pub optimizer: AdamWSettings,
    /// Length of the run, and the learning rate over it.
    pub schedule: ScheduleConfig,
    /// Sizes of batches.
    pub batch: BatchConfig,
    /// Token limits, which do not yet take the model's context into account.
    pub limits: LengthLimits,
    /// The limits that were given, before defaults.
    pub asked_lengths: AskedLengths,
    /// What is done with pairs that have a problem.
    pub policies: Policies,
    /// Pairs whose scores in the file are less far apart than this are left out.
    pub min_score_gap: Option<f64>,
    /// Where tokenised pairs are kept; `None` is the user's cache folder.
    pub data_cache: Option<DataCache>,
    /// When and on what the run is evaluated.
    pub evaluation: EvaluationConfig,
    /// Optimiser steps between checkpoints; `None`: only at the end and on Ctrl-C.
    pub save_steps: Option<usize>,
    /// Checkpoints kept, the newest.
    pub keep_checkpoints: usize,
    /// Seed of the order of pairs.
    pub seed: u64,
    /// Where to compute.
    pub device: DeviceChoice,
    /// Storage of weights and activations; `None` is the device's own.
    pub precision: Option<Precision>,
    /// What is kept on the device, and in which format.
    pub memory: MemoryConfig,
    /// How much device memory the run may take; `None`: what is free.
    pub memory_limit: Option<MemoryLimit>,
    /// Peak rate of the device for `mfu`, in 10^12 bf16 operations per second; `None`: the GPU's, where it is known.
    pub tflops: Option<f64>,
    /// How the log-prob head uses memory.
    pub head: HeadOptions,
    /// CPU threads; `None` is all cores.
    pub threads: Option<usize>,
    /// Whether a run in `output` is continued.
    pub resume: bool,
    /// Whether a step with a number that is not finite leaves a copy of its weights and states.
    pub capsule_weights: bool,
    /// A capsule that is repeated, in place of a run.
    pub replay: Option<PathBuf>,
    /// Whether the report is written again and again while the run goes on.
    pub live: bool,
}

/// Pairs of one optimiser step where none are given and the file is large enough.
const PAIRS_PER_STEP: usize = 128;
/// A small file's pairs are divided into at least this many steps per epoch.
const LEAST_STEPS: usize = 20;

impl RunConfig {
    /// Pairs of one optimiser step of a run over `pairs` pairs: the number that was given, else 128, or for a file of
    /// fewer than 2560 pairs the largest power of two that makes at least 20 steps per epoch. It is never less than 2
    /// or than MMPO's `reward_group`, whose pairs must lie in one step.
    pub fn pairs_per_step(&self, pairs: usize) -> usize {
        let group = self.objective.formula().pairs_together();
        let most = (pairs / LEAST_STEPS).clamp(2, PAIRS_PER_STEP);
        self.batch.pairs_per_step.unwrap_or((1 << most.ilog2()).max(group))
    }

    /// The configuration as a run over `pairs` pairs writes it down: defaults that depend on the data are numbers, and
    /// paths are absolute, so that the run can be resumed from any folder.
    ///
    /// # Errors
    /// [`Error::Io`] where the current folder is needed and cannot be read.
    pub fn recorded(&self, pairs: usize) -> Result<Self> {
        let absolute = |path: &PathBuf| {
            std::path::absolute(path).map_err(|error| Error::io(path, "find the absolute path of", error))
        };
        let mut recorded = self.clone();
        recorded.batch.pairs_per_step = Some(self.pairs_per_step(pairs));
        // What was chosen is written down instead, so that a resumed run has it again.
        recorded.memory_limit = self.memory_limit.filter(|&limit| limit != MemoryLimit::Auto);
        recorded.output = absolute(&self.output)?;
        let optional = [
            &mut recorded.model,
            &mut recorded.reference,
            &mut recorded.chat_template,
            &mut recorded.adapter,
        ];
        let files = [&mut recorded.data, &mut recorded.evaluation.data];
        let files = files.into_iter().flatten().flat_map(|files| &mut files.0);
        for path in optional.into_iter().flatten().chain(files.map(|file| &mut file.path)) {
            *path = absolute(path)?;
        }
        if let Some(DataCache::Folder(folder)) = &mut recorded.data_cache {
            *folder = absolute(folder)?;
        }
        Ok(recorded)
    }
}

/// Length of a run, and its learning rate over the steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScheduleConfig {
    /// Form of the decay.
    pub kind: Schedule,
    /// Steps before the peak.
    pub warmup: Warmup,
    /// Passes over the data; ignored where `max_steps` is given.
    pub epochs: f64,
    /// Length of the run in optimiser steps, in place of `epochs`.
    pub max_steps: Option<usize>,
}

/// How many steps warm up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Warmup {
    /// Share of all steps, `0..=1`.
    Ratio(f64),
    /// A number of optimiser steps.
    Steps(usize),
}

/// Which gradients exist at a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GradientConfig {
    /// Those of all trained tensors, summed over micro-batches in f32: 4 bytes per parameter.
    #[default]
    F32,
    /// Those of all trained tensors, in the layers summed over micro-batches in bf16: 2 bytes per parameter, and the f32 buffers of
    /// one layer in which gradients are formed.
    Bf16,
    /// Those of one layer: the optimiser updates each layer inside the backward. A step is one micro-batch, and the global norm
    /// is not known in time to clip by it.
    Layer,
}

/// What lives in the host's memory and visits the device when it is needed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OffloadConfig {
    /// Nothing.
    #[default]
    None,
    /// Optimiser states and f32 master copies of all but the smallest tensors.
    States,
}

/// What is cut among the ranks of a run, so that each keeps its part alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum ShardConfig {
    /// Nothing: each rank keeps everything.
    #[default]
    None,
    /// Optimiser states and f32 master copies (ZeRO's stage 1).
    States,
    /// Gradients too (stage 2).
    Gradients,
    /// Weights too (stage 3).
    Weights,
}

/// What training keeps on the device beside the weights, and in which format: docs/memory.md compares the choices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryConfig {
    /// What AdamW keeps of each trained tensor.
    pub states: StateOptions,
    /// The part of the forward that is computed again in the backward.
    pub recompute: Recompute,
    /// Which gradients exist at a time.
    pub gradients: GradientConfig,
    /// What lives in the host's memory.
    pub offload: OffloadConfig,
    /// What is cut among the ranks.
    pub shard: ShardConfig,
}

/// Sizes of batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchConfig {
    /// Pairs of one optimiser step; `None`: as many as suit the file, see [`RunConfig::pairs_per_step`].
    pub pairs_per_step: Option<usize>,
    /// Tokens of one micro-batch; the result does not depend on it.
    pub tokens_per_micro_batch: usize,
}

/// Token limits of a pair; prompts are cut from the left, responses from the right.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct LengthLimits {
    /// Prompt plus one response.
    pub max_length: usize,
    /// Prompt alone.
    pub max_prompt_length: usize,
}

/// The lengths that were given; those that were not follow the defaults and the model's context.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AskedLengths {
    /// `--max-length`.
    pub max_length: Option<usize>,
    /// `--max-prompt-length`.
    pub max_prompt_length: Option<usize>,
}

/// When and on what a run is evaluated.
#[derive(Clone, Debug, PartialEq)]
pub struct EvaluationConfig {
    /// Pairs to evaluate on; `None`: no evaluation, or on a share of the training data.
    pub data: Option<PairFiles>,
    /// Share of the training data that is held out and evaluated on.
    pub split: Option<f64>,
    /// Optimiser steps between evaluations; `None`: once per epoch.
    pub steps: Option<usize>,
    /// Whether the model is evaluated before the first step.
    pub on_start: bool,
    /// The metric whose best checkpoint is kept.
    pub keep_best: Option<EvalMetric>,
    /// Evaluations in a row without a better metric after which the run ends; `None`: it never does for that.
    pub patience: Option<usize>,
    /// A metric counts as better for `patience` where it is better by more than this.
    pub delta: f64,
}

/// Everything `score` needs to know.
#[derive(Clone, Debug, PartialEq)]
pub struct ScoreConfig {
    /// Hugging Face model folder.
    pub model: PathBuf,
    /// Folder of an adapter of that model.
    pub adapter: Option<PathBuf>,
    /// Files of pairs.
    pub data: PairFiles,
    /// Columns that have other names in these files.
    pub columns: ColumnNames,
    /// The JSON Lines file that is written, one line per pair; `None` only where pairs are explained.
    pub output: Option<PathBuf>,
    /// The pairs that are explained token by token.
    pub explain: Option<ExplainConfig>,
    /// Reference model. With it, rewards `beta * (lp - lp_ref)` and margins are written too.
    pub reference: Option<PathBuf>,
    /// Factor of the rewards; ignored without a reference.
    pub beta: f64,
    /// What is done with pairs that have a problem.
    pub policies: Policies,
    /// Pairs whose scores in the file are less far apart than this are left out.
    pub min_score_gap: Option<f64>,
    /// Where tokenised pairs are kept; `None` is the user's cache folder.
    pub data_cache: Option<DataCache>,
    /// Jinja file in place of the model's own chat template.
    pub chat_template: Option<PathBuf>,
    /// What the chat template's functions call now; `None` is the time of the command.
    pub template_date: Option<TemplateDate>,
    /// The limits that were given, before defaults.
    pub asked_lengths: AskedLengths,
    /// Tokens of one micro-batch; the result does not depend on it.
    pub tokens_per_micro_batch: usize,
    /// Where to compute.
    pub device: DeviceChoice,
    /// Storage of weights and activations; `None` is the device's own.
    pub precision: Option<Precision>,
    /// CPU threads; `None` is all cores.
    pub threads: Option<usize>,
}

/// How pairs are explained by `score --explain`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExplainConfig {
    /// So many pairs, the first of the data.
    pub pairs: usize,
    /// The page that is written.
    pub html: Option<PathBuf>,
    /// Whether the text on standard output has colours; `None`: where that is a terminal.
    pub color: Option<bool>,
}

/// Everything `report` needs to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReportConfig {
    /// Output folders of runs, at least one.
    pub folders: Vec<PathBuf>,
    /// The page that is written; `None`: `report.html` in the folder of a single run, `comparison.html` in the current folder.
    pub output: Option<PathBuf>,
}

/// Everything `merge` needs to know.
#[derive(Clone, Debug, PartialEq)]
pub struct MergeConfig {
    /// Hugging Face model folder.
    pub model: PathBuf,
    /// Folder of an adapter of that model.
    pub adapter: PathBuf,
    /// Folder that receives the merged model.
    pub output: PathBuf,
}

/// Everything `check` needs to know.
#[derive(Clone, Debug, PartialEq)]
pub struct CheckConfig {
    /// Hugging Face model folder, of which the config and the tokenizer are read.
    pub model: PathBuf,
    /// Files of pairs.
    pub data: PairFiles,
    /// Columns that have other names in these files.
    pub columns: ColumnNames,
    /// Jinja file in place of the model's own chat template.
    pub chat_template: Option<PathBuf>,
    /// What the chat template's functions call now; `None` is the time of the command.
    pub template_date: Option<TemplateDate>,
    /// The limits that were given, before defaults.
    pub asked_lengths: AskedLengths,
    /// What is done with pairs that have a problem.
    pub policies: Policies,
    /// Pairs whose scores in the file are less far apart than this are left out.
    pub min_score_gap: Option<f64>,
    /// Where tokenised pairs are kept; `None` is the user's cache folder.
    pub data_cache: Option<DataCache>,
    /// Tokens of one micro-batch.
    pub tokens_per_micro_batch: usize,
    /// Pairs that are shown whole.
    pub shown: usize,
    /// The page that is written.
    pub html: Option<PathBuf>,
    /// Whether the account goes to standard output as JSON.
    pub json: bool,
    /// Whether the account on standard output has colours; `None`: where that is a terminal.
    pub color: Option<bool>,
    /// CPU threads; `None` is all cores.
    pub threads: Option<usize>,
}

/// Everything `generate` needs to know.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateConfig {
    /// Hugging Face model folder.
    pub model: PathBuf,
    /// Folder of an adapter of that model.
    pub adapter: Option<PathBuf>,
    /// The user's message, or the whole text with `raw`.
    pub prompt: String,
    /// A system message before it.
    pub system: Option<String>,
    /// The prompt as it stands, with no chat template around it.
    pub raw: bool,
    /// Jinja file in place of the model's own chat template.
    pub chat_template: Option<PathBuf>,
    /// What the chat template's functions call now; `None` is the time of the command.
    pub template_date: Option<TemplateDate>,
    /// Tokens after which the text ends in any case.
    pub max_new_tokens: usize,
    /// 0 is greedy: always the likeliest token.
    pub temperature: f64,
    /// Samples from the likeliest tokens whose probabilities add up to this; 1 is all of them.
    pub top_p: f64,
    /// Seed of the draws.
    pub seed: u64,
    /// Where to compute.
    pub device: DeviceChoice,
    /// Storage of weights and activations; `None` is the device's own.
    pub precision: Option<Precision>,
    /// CPU threads; `None` is all cores.
    pub threads: Option<usize>,
}
