//! A capsule: what a step with a number that is not finite leaves, so that `train --replay` can repeat it.
//!
//! `capsules/step-000123/` holds `capsule.json` (the step, its pairs and their tokens, where the random numbers stand, what was
//! found) and `resolved.toml` (the options). The weights are those of the newest checkpoint before the step, or of the starting
//! model, and the steps since then, which give the same bits when they are taken again; or with `--capsule-weights` a
//! checkpoint in the capsule.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::checkpoint;
use super::steps::Run;
use crate::checkpoint::atomic;
use crate::checkpoint::run_state::{self, RngPosition, RunIdentity};
use crate::config::{GradientConfig, RESOLVED_FILE};
use crate::data::StepBatch;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::objective::{PairOutcome, ReferencePair};

/// The folder of a run that holds its capsules.
pub const FOLDER: &str = "capsules";
const FILE: &str = "capsule.json";
/// Raised when the meaning of the file changes.
const FORMAT: u32 = 1;

/// A step that failed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Capsule {
    format: u32,
    /// 1-based number of the step.
    pub step: usize,
    /// Steps of the run.
    pub of: usize,
    /// What was found, as the run said it.
    pub found: String,
    /// The step's pairs, in order.
    pub pairs: Vec<CapsulePair>,
    /// Where the random numbers stand: the order of the pairs, and the dropout and rounding that the step's number determines.
    pub rng: RngPosition,
    /// The run.
    pub identity: RunIdentity,
    /// The folder of the run.
    pub run: PathBuf,
    /// The newest checkpoint before the step, within the run's folder; `None`: the starting model.
    pub checkpoint: Option<PathBuf>,
    /// Whether the capsule has a copy of weights and states.
    pub has_weights: bool,
}

/// A pair of the step. Numbers are text, for JSON has no NaN.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CapsulePair {
    /// Its index among the pairs that the run trains on.
    pub index: usize,
    /// 1-based record of the data.
    pub record: usize,
    /// Token ids of prompt, chosen and rejected response.
    pub tokens: [Vec<u32>; 3],
    /// What the frozen reference says of it.
    pub reference: ReferencePair,
    /// Log-probs of the chosen and the rejected response.
    pub logps: [String; 2],
    /// Its loss.
    pub loss: String,
}

/// Leaves a capsule in folder `output` where `error` is about a number; returns the error with where the capsule is.
pub fn leave<D: Device>(output: &Path, run: &Run<'_, D>, batch: &StepBatch, error: Error) -> Error {
    let Error::Numerics { message, help } = error else { return error };
    let help = match write(output, run, batch, &message) {
        Ok(path) => {
            format!("{help}; `mmpo-fast train --replay {}` repeats the step and shows where", path.display())
        }
        Err(failed) => format!("{help}; the step left no capsule: {failed}"),
    };
    Error::Numerics { message, help }
}

fn write<D: Device>(output: &Path, run: &Run<'_, D>, batch: &StepBatch, found: &str) -> Result<PathBuf> {
    let folder = output.join(FOLDER).join(format!("step-{:06}", batch.step + 1));
    if folder.exists() {
        atomic::remove_folder(&folder)?;
    }
    std::fs::create_dir_all(&folder).map_err(|error| Error::io(&folder, "create", error))?;
    let has_weights = run.config.capsule_weights && copy_weights(&folder, run, batch.step);
    let outcomes = run.trainer.download_outcomes(batch.pairs.len())?;
    let state = run.plan.state(batch.step, &run.identity);
    let within = |path: PathBuf| path.strip_prefix(output).map(Path::to_path_buf).unwrap_or(path);
    let capsule = Capsule {
        format: FORMAT,
        step: batch.step + 1,
        of: run.plan.total_steps,
        found: found.to_string(),
        pairs: batch.pairs.iter().zip(&outcomes).map(|(&index, outcome)| pair(run, index, outcome)).collect(),
        rng: state.rng,
        identity: state.identity,
        run: std::path::absolute(output).unwrap_or_else(|_| output.to_path_buf()),
        checkpoint: run_state::latest(output)?.map(within),
        has_weights,
    };
    let text = serde_json::to_string_pretty(&capsule)
        .map_err(|error| Error::bug(format!("the capsule cannot be encoded: {error}")))?;
    atomic::write_file(&folder.join(RESOLVED_FILE), run.identity.config.as_bytes())?;
    atomic::write_file(&folder.join(FILE), format!("{text}\n").as_bytes())?;
    Ok(folder)
}

fn pair<D: Device>(run: &Run<'_, D>, index: usize, outcome: &PairOutcome) -> CapsulePair {
    let pair = &run.inputs.training.pairs[index];
    CapsulePair {
        index,
        record: pair.record + 1,
        tokens: [&pair.prompt, &pair.chosen, &pair.rejected].map(|ids| ids.to_vec()),
        reference: run.references.training[index],
        logps: [outcome.logp_chosen, outcome.logp_rejected].map(|logp| logp.to_string()),
        loss: outcome.loss.to_string(),
    }
}

/// Copies weights and states, which are still those before the step; returns whether that could be done.
fn copy_weights<D: Device>(folder: &Path, run: &Run<'_, D>, done: usize) -> bool {
    if run.config.memory.gradients == GradientConfig::Layer {
        tracing::warn!(
            "the capsule has no copy of the weights: with --gradients layer some layers are updated already"
        );
        return false;
    }
    if run.trainer.shard_place().is_some() {
        tracing::warn!("the capsule has no copy of the weights: with --shard no rank has all states");
        return false;
    }
    let state = run.plan.state(done, &run.identity);
    match checkpoint::save(folder, &run.trainer, &state, (1, &[])) {
        Ok(()) => true,
        Err(error) => {
            tracing::warn!("the capsule has no copy of the weights: {error}");
            false
        }
    }
}

impl Capsule {
    /// Reads the capsule in `folder`.
    ///
    /// # Errors
    /// [`Error::Io`] where there is none; [`Error::Config`] where it is damaged or of another version.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(FILE);
        let text = std::fs::read(&path).map_err(|error| Error::io(&path, "read", error))?;
        let capsule: Capsule = serde_json::from_slice(&text).map_err(|error| {
            Error::config(
                format!("{}: not a capsule: {error}", path.display()),
                "give a folder capsules/step-N of a run",
            )
        })?;
        match capsule.format {
            FORMAT => Ok(capsule),
            other => Err(Error::config(
                format!("{}: has format {other}; this version reads format {FORMAT}", path.display()),
                "replay it with the version that wrote it",
            )),
        }
    }
}
