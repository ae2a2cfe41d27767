//! The output folder of a run: `model/`, `checkpoints/`, `metrics.jsonl`, `tensorboard/`, `resolved.toml`, `report.html`.

use std::path::{Path, PathBuf};

use super::inputs::Inputs;
use crate::checkpoint::{atomic, run_state};
use crate::config::value::Source;
use crate::config::{RESOLVED_FILE, RunConfig, recipe};
use crate::error::{Error, Result};
use crate::report::{
    EvalMetrics, History, METRICS_FILE, REPORT_FILE, RunReport, Sample, print_result, summary,
};

const MODEL_FOLDER: &str = "model";

#[derive(Debug)]
pub struct Output {
    path: PathBuf,
}

/// What the report is made from.
pub struct Finished<'a> {
    pub config: &'a RunConfig,
    pub inputs: &'a Inputs,
    pub device: String,
    pub comparison: Option<(EvalMetrics, EvalMetrics)>,
    pub samples: Vec<Sample>,
    pub seconds: f64,
}

impl Output {
    /// Refuses an output folder that holds a run, before any time is spent; the demo may be run again over itself.
    pub fn check(config: &RunConfig) -> Result<Self> {
        let path = config.output.clone();
        let is_taken =
            [METRICS_FILE, MODEL_FOLDER, run_state::FOLDER].iter().any(|name| path.join(name).exists());
        if is_taken && !config.resume && !(config.model.is_none() && holds_demo(&path)) {
            return Err(Error::config(
                format!("{} holds a run already", path.display()),
                "continue it with --resume, or choose another --output; nothing was changed",
            ));
        }
        Ok(Output { path })
    }

    /// Writes the resolved configuration.
    pub fn begin(&self, config: &RunConfig) -> Result<()> {
        atomic::write_file(&self.path.join(RESOLVED_FILE), config.to_toml().as_bytes())
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn model(&self) -> PathBuf {
        self.path.join(MODEL_FOLDER)
    }

    /// Writes `report.html`, and tells the terminal how it ended.
    pub fn report(&self, finished: Finished<'_>) -> Result<()> {
        let Finished { config, inputs, device, comparison, samples, seconds } = finished;
        if let Some((before, after)) = &comparison {
            print_result(&format!("\n{}", summary(before, after, &samples)))?;
        }
        let report = RunReport {
            model: name(config),
            objective: config.objective.name().to_string(),
            device,
            recipe: config.to_toml(),
            history: History::read(&self.path)?,
            data: inputs.data_summaries(config),
            warnings: warnings(&comparison),
            comparison,
            samples,
            seconds,
        };
        let page = self.path.join(REPORT_FILE);
        atomic::write_file(&page, report.to_html().as_bytes())?;
        print_result(&format!("\nmodel   {}\nreport  {}\n", self.model().display(), page.display()))
    }
}

fn holds_demo(folder: &Path) -> bool {
    let saved = recipe::read(&folder.join(RESOLVED_FILE)).ok().and_then(|options| options.model);
    saved.is_some_and(|model| model.value == Source::Builtin)
}

fn name(config: &RunConfig) -> String {
    match &config.model {
        Some(path) => path.display().to_string(),
        None => "the built-in demo".to_string(),
    }
}

/// What a user should know of this run beyond its numbers.
fn warnings(comparison: &Option<(EvalMetrics, EvalMetrics)>) -> Vec<String> {
    let saturated =
        comparison.iter().filter_map(|(_, after)| after.pairs.weights).map(|weights| weights.saturated);
    saturated
        .filter(|&share| share > 0.5)
        .map(|share| {
            format!(
                "{:.0} % of the pairs train on one response alone: their softmax weights are above 0.99. Log-probs of \
                 long responses differ by tens of nats; `length_normalize = true` compares means instead.",
                100.0 * share
            )
        })
        .collect()
}
