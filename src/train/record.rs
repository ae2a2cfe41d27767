//! `run.json`: what a run decided, for people and scripts: its best checkpoint, why it ended, and how it was made longer.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::checkpoint::atomic;
use crate::error::{Error, Result};

/// Name of the file in a run's output folder.
pub const RECORD_FILE: &str = "run.json";

/// What a run decided so far.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunRecord {
    /// Steps that the run is to have.
    pub planned_steps: usize,
    /// The best checkpoint, with `--keep-best`.
    pub best: Option<BestRecord>,
    /// Where and why the run ended; `None` as long as it has not.
    pub ended: Option<EndRecord>,
    /// How it was made longer, oldest first.
    #[serde(default)]
    pub lengthened: Vec<Lengthened>,
}

/// The best checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BestRecord {
    /// The metric's name in `metrics.jsonl`.
    pub metric: String,
    /// The step.
    pub step: usize,
    /// The metric after it.
    pub value: f64,
}

/// The end of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EndRecord {
    /// The last step.
    pub step: usize,
    /// Whether all steps are done, or early stopping ended the run before.
    pub reason: String,
}

/// A run that was resumed with more steps than it began with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Lengthened {
    /// Steps that were done.
    pub after_step: usize,
    /// Steps that the run had before.
    pub from_steps: usize,
    /// Steps that it has since.
    pub to_steps: usize,
    /// What that does to the learning rate, in words.
    pub consequence: String,
}

impl RunRecord {
    /// The record of a run's output folder; an empty one where there is none. One that cannot be read is a warning: nothing
    /// that the run computes depends on it.
    pub fn read(run: &Path) -> Self {
        let path = run.join(RECORD_FILE);
        match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).unwrap_or_else(|error| {
                tracing::warn!("{}: {error}; what it said is lost, and it is written anew", path.display());
                RunRecord::default()
            }),
            Err(_) => RunRecord::default(),
        }
    }

    /// Replaces the record of a run's output folder.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written.
    pub fn write(&self, run: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)
            .map_err(|error| Error::bug(format!("the record of the run cannot be encoded: {error}")))?;
        atomic::write_file(&run.join(RECORD_FILE), format!("{text}\n").as_bytes())
    }

    /// Adds a change of length, unless it is there already: a run that is killed is resumed with the same command.
    pub fn add(&mut self, lengthened: Lengthened) {
        if !self.lengthened.contains(&lengthened) {
            self.lengthened.push(lengthened);
        }
    }
}
