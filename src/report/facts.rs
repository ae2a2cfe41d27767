//! `report.json`: what a report shows beside `metrics.jsonl` and `resolved.toml`, so that it can be written again.

use std::io::ErrorKind;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::summary::Sample;
use crate::checkpoint::atomic;
use crate::error::{Error, Result};

/// Name of the file in a run's output folder.
pub const FACTS_FILE: &str = "report.json";

/// What a run says of itself, but for its metrics and options.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RunFacts {
    /// The model for people: a folder's name, or `the built-in demo`.
    pub model: String,
    /// The objective's name.
    pub objective: String,
    /// What computed, and why: the device's own words.
    pub device: String,
    /// Optimiser steps of the whole run.
    pub total_steps: usize,
    /// Whether the run goes on.
    pub state: RunState,
    /// Wall-clock time of all the processes that the run took, up to the writing of the facts.
    pub seconds: f64,
    /// The training pairs, and those of the evaluation where there are some.
    pub data: Vec<DataSummary>,
    /// Prompts with the answers before and after.
    pub samples: Vec<Sample>,
    /// What a user should know of this run: saturated weights, many cut prompts.
    pub warnings: Vec<String>,
    /// What each rank did in the last part of the run; empty for a run of one process.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ranks: Vec<RankFacts>,
}

/// What a rank of a run on several GPUs did.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RankFacts {
    /// Its machine.
    pub host: String,
    /// Tokens that it took through the model in training.
    pub tokens: usize,
    /// Seconds of steps in which it worked.
    pub busy_seconds: f64,
    /// Seconds of steps in which it waited for other ranks or for the network.
    pub waited_seconds: f64,
}

/// Whether a run goes on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// A run from before there were facts.
    #[default]
    Unknown,
    /// Steps are being done, or the process ended without a word.
    Running,
    /// It ended before its last step, for this reason.
    Stopped(String),
    /// All steps were done.
    Finished,
}

/// How the records of one file were used.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataSummary {
    /// The file, or `the built-in demo`.
    pub name: String,
    /// Records read.
    pub read: usize,
    /// Pairs used.
    pub used: usize,
    /// Reasons for dropping a pair, and how often.
    pub dropped: Vec<(String, usize)>,
    /// What was shortened, and how often.
    pub cut: Vec<(String, usize)>,
}

impl RunFacts {
    /// Reads the facts of the run in `folder`; `None` where there are none, as of a run by an earlier version.
    ///
    /// # Errors
    /// [`Error::Io`] if they cannot be read; [`Error::Data`] if they are not what was written.
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(FACTS_FILE);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io(&path, "read", error)),
        };
        let damaged = |error: serde_json::Error| {
            let help =
                "was the file edited? Without it, the report shows what metrics.jsonl and resolved.toml say";
            Error::data(&path, Some(error.line()), format!("not the facts of a run: {error}"), help)
        };
        serde_json::from_str(&text).map(Some).map_err(damaged)
    }

    /// As [`RunFacts::read`], for a run that needs no more of them than there is: facts that cannot be read are warned about.
    pub fn read_or_warn(folder: &Path) -> Option<Self> {
        Self::read(folder).unwrap_or_else(|error| {
            tracing::warn!("{error}; the report will lack what it said");
            None
        })
    }

    /// Writes the facts of the run in `folder`; the file is whole at any time.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let path = folder.join(FACTS_FILE);
        let text =
            serde_json::to_string_pretty(self).map_err(|error| Error::io(&path, "write", error.into()))?;
        atomic::write_file(&path, text.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_come_back_and_damaged_ones_are_named() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(RunFacts::read(folder.path()).unwrap(), None);
        let facts = RunFacts {
            model: "m".into(),
            total_steps: 7,
            state: RunState::Stopped("Ctrl-C".into()),
            samples: vec![Sample { prompt: "p".into(), before: "b\"".into(), after: "a\n".into() }],
            data: vec![DataSummary {
                name: "d".into(),
                dropped: vec![("empty".into(), 2)],
                ..Default::default()
            }],
            ..RunFacts::default()
        };
        facts.write(folder.path()).unwrap();
        assert_eq!(RunFacts::read(folder.path()).unwrap(), Some(facts));
        std::fs::write(folder.path().join(FACTS_FILE), "{\n\"model\": 3}").unwrap();
        let error = RunFacts::read(folder.path()).unwrap_err();
        assert!(
            matches!(error, Error::Data { .. }) && error.to_string().contains("report.json:2"),
            "{error}"
        );
    }
}
