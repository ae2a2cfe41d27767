//! One validated configuration of a training run, whatever it came from (defaults, recipe file, flags).

use std::path::PathBuf;

use crate::device::DeviceChoice;
use crate::objective::Objective;
use crate::optimizer::Schedule;

/// Everything `train` needs to know. Made by [`crate::config`] alone, so that every value in it is valid.
#[derive(Clone, Debug, PartialEq)]
pub struct RunConfig {
    /// Hugging Face model folder; `None` is the built-in demo model.
    pub model: Option<PathBuf>,
    /// Pairs file; `None` is the built-in demo pairs.
    pub data: Option<PathBuf>,
    pub output: PathBuf,
    /// Frozen reference folder; `None` is the starting model.
    pub reference: Option<PathBuf>,
    pub objective: Objective,
    pub optimizer: OptimizerConfig,
    pub schedule: ScheduleConfig,
    pub batch: BatchConfig,
    pub limits: LengthLimits,
    pub evaluation: EvaluationConfig,
    /// Optimiser steps between checkpoints; `None`: only at the end and on Ctrl-C.
    pub save_steps: Option<usize>,
    /// Checkpoints kept, the newest.
    pub keep_checkpoints: usize,
    pub seed: u64,
    pub device: DeviceChoice,
    /// CPU threads; `None` is all cores.
    pub threads: Option<usize>,
    pub resume: bool,
}

/// AdamW.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OptimizerConfig {
    pub learning_rate: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    pub weight_decay: f64,
    /// Global l2 norm the gradient is clipped to; `None` does not clip.
    pub max_grad_norm: Option<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScheduleConfig {
    pub kind: Schedule,
    pub warmup: Warmup,
    pub epochs: f64,
    /// Overrides `epochs`.
    pub max_steps: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Warmup {
    /// Share of all steps, `0..=1`.
    Ratio(f64),
    Steps(usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchConfig {
    /// Pairs of one optimiser step.
    pub pairs_per_step: usize,
    /// Tokens of one micro-batch; the result does not depend on it.
    pub tokens_per_micro_batch: usize,
}

/// Token limits of a pair; prompts are cut from the left, responses from the right.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct LengthLimits {
    /// Prompt plus one response.
    pub max_length: usize,
    pub max_prompt_length: usize,
}

#[derive(Clone, Debug, PartialEq)]
pub struct EvaluationConfig {
    pub data: Option<PathBuf>,
    /// Optimiser steps between evaluations; `None`: once an epoch.
    pub steps: Option<usize>,
}
