//! The output folder of a run: `model/`, `checkpoints/`, `metrics.jsonl`, `tensorboard/`, `resolved.toml`, `report.json`,
//! `report.html`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::inputs::Inputs;
use super::lock::RunLock;
use crate::checkpoint::atomic::{self, kind_of};
use crate::checkpoint::run_state;
use crate::config::value::Source;
use crate::config::{RESOLVED_FILE, RunConfig, recipe};
use crate::error::{Error, Result};
use crate::report::{
    EVENTS_FOLDER, EvalMetrics, FACTS_FILE, METRICS_FILE, REPORT_FILE, RunFacts, RunReport, RunState, Sample,
    advice, print_result, summary,
};

const MODEL_FOLDER: &str = "model";
const ADAPTER_FOLDER: &str = "adapter";

#[derive(Debug)]
pub struct Output {
    path: PathBuf,
    /// What the run writes at its end: a model, or an adapter.
    result: &'static str,
    /// Held while this process writes there.
    _lock: Option<RunLock>,
}

/// What the report is made from.
pub struct Finished<'a> {
    pub config: &'a RunConfig,
    pub facts: RunFacts,
    pub comparison: Option<(EvalMetrics, EvalMetrics)>,
    pub samples: Vec<Sample>,
    /// Time that this process took.
    pub elapsed: Duration,
}

impl Output {
    /// Refuses what cannot be a run's output folder, before any time is spent: a folder that holds a run or that
    /// another process writes in, a file, a folder that the run reads. The demo may be run again over itself.
    ///
    /// # Errors
    /// [`Error::Io`] for what is no folder, [`Error::Config`] for the rest.
    pub fn check(config: &RunConfig) -> Result<Self> {
        let path = config.output.clone();
        if let Ok(metadata) = std::fs::metadata(&path)
            && !metadata.is_dir()
        {
            return Err(Error::Io {
                cause: std::io::Error::other(format!("it is {}, not a folder", kind_of(&metadata))),
                path,
                action: "write in",
                help: "choose another --output: a folder that is new or empty".into(),
            });
        }
        refuse_inputs(config)?;
        RunLock::check(&path)?;
        refuse_taken(config)?;
        let result = match config.lora.is_some() || config.adapter.is_some() {
            true => ADAPTER_FOLDER,
            false => MODEL_FOLDER,
        };
        Ok(Output { path, result, _lock: None })
    }

    /// Makes the folder and locks it, after the inputs were found good and before anything is computed.
    ///
    /// # Errors
    /// [`Error::Io`] where nothing can be written; [`Error::Config`] where another run has begun since the check.
    pub fn claim(self, config: &RunConfig) -> Result<Self> {
        atomic::check_writable(&self.path)?;
        let lock = RunLock::take(&self.path)?;
        refuse_taken(config)?;
        Ok(Output { _lock: Some(lock), ..self })
    }

    /// Writes the resolved configuration.
    pub fn begin(&self, config: &RunConfig) -> Result<()> {
        atomic::write_file(&self.path.join(RESOLVED_FILE), config.to_toml().as_bytes())
    }

    /// Writes what the run says of itself, but for its metrics and options; `resumed` is the number of steps done by an
    /// earlier part of it.
    pub fn facts(
        &self,
        config: &RunConfig,
        inputs: &Inputs,
        device: String,
        total_steps: usize,
        resumed: Option<usize>,
    ) -> Result<RunFacts> {
        let earlier = match resumed {
            Some(_) => RunFacts::read_or_warn(&self.path).unwrap_or_default(),
            None => RunFacts::default(),
        };
        let facts = RunFacts {
            model: name(config),
            objective: config.objective.name().to_string(),
            device,
            total_steps,
            state: RunState::Running,
            seconds: earlier.seconds,
            data: inputs.data_summaries(),
            ..RunFacts::default()
        };
        facts.write(&self.path)?;
        Ok(facts)
    }

    /// Writes the report of a run that ends before its last step because of `why`. Where that fails there is a warning:
    /// `why` is what counts.
    pub fn stopped(&self, facts: &RunFacts, elapsed: Duration, why: &Error) {
        // The folder is another run's, or gone.
        if matches!(why, Error::Io { .. }) {
            return;
        }
        let facts = RunFacts {
            state: RunState::Stopped(why.to_string()),
            seconds: facts.seconds + elapsed.as_secs_f64(),
            ..facts.clone()
        };
        let written = facts.write(&self.path).and_then(|()| RunReport::read(&self.path)?.write(&self.path));
        if let Err(error) = written {
            tracing::warn!("the report of the steps so far is not written: {error}");
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder of the trained model or adapter.
    pub fn model(&self) -> PathBuf {
        self.path.join(self.result)
    }

    /// A line that says where that is.
    pub fn model_line(&self) -> String {
        format!("{:<8}{}", self.result, self.model().display())
    }

    /// Writes `report.html`, then tells the terminal how the run ended: in this order, so that a standard output that
    /// cannot be written costs no file.
    pub fn report(&self, finished: Finished<'_>) -> Result<()> {
        let Finished { config, facts, comparison, samples, elapsed } = finished;
        let text = match &comparison {
            Some((before, after)) => format!("\n{}", summary(before, after, &samples)),
            None => String::new(),
        };
        let mut report = RunReport::read(&self.path)?;
        let warnings = advice(&report.history, config.optimizer.learning_rate);
        // The demo's page has them too, but its terminal shows what a newcomer came for.
        if config.model.is_some() {
            warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
        }
        let seconds = facts.seconds + elapsed.as_secs_f64();
        report.facts = RunFacts { state: RunState::Finished, samples, warnings, seconds, ..facts };
        // In this order: facts of a finished run say that its page is there.
        report.write(&self.path)?;
        report.facts.write(&self.path)?;
        let page = self.path.join(REPORT_FILE);
        print_result(&format!("{text}\n{}\nreport  {}\n", self.model_line(), page.display()))?;
        Ok(())
    }
}

/// Refuses a folder that holds a run. The demo may be run again over itself.
fn refuse_taken(config: &RunConfig) -> Result<()> {
    let path = &config.output;
    let is_taken = [METRICS_FILE, MODEL_FOLDER, ADAPTER_FOLDER, run_state::FOLDER, REPORT_FILE]
        .iter()
        .any(|name| path.join(name).exists());
    if is_taken && !config.resume && !(config.model.is_none() && holds_demo(path)) {
        return Err(Error::config(
            format!("{} holds a run already", path.display()),
            "continue it with --resume, or choose another --output; nothing was changed",
        ));
    }
    Ok(())
}

/// Refuses a folder that holds an input: a run must not write over what it reads, nor fill a model folder with files
/// that are no part of the model.
fn refuse_inputs(config: &RunConfig) -> Result<()> {
    // Where the folder is new, no input is in it.
    let Ok(output) = std::fs::canonicalize(&config.output) else { return Ok(()) };
    let written = [
        MODEL_FOLDER,
        ADAPTER_FOLDER,
        run_state::FOLDER,
        EVENTS_FOLDER,
        METRICS_FILE,
        RESOLVED_FILE,
        FACTS_FILE,
        REPORT_FILE,
    ];
    let one = [
        ("--model", config.model.as_ref()),
        ("--adapter", config.adapter.as_ref()),
        ("--reference", config.reference.as_ref()),
        ("--chat-template", config.chat_template.as_ref()),
    ];
    let pairs = [("--data", &config.data), ("--eval-data", &config.evaluation.data)];
    let pairs = pairs.into_iter().flat_map(|(flag, files)| {
        let files = files.iter().flat_map(|files| &files.0);
        files.map(move |file| (flag, Some(&file.path)))
    });
    for (flag, path) in one.into_iter().chain(pairs) {
        let Some(path) = path else { continue };
        let Ok(real) = std::fs::canonicalize(path) else { continue };
        if real == output || written.iter().any(|name| real.starts_with(output.join(name))) {
            return Err(Error::config(
                format!(
                    "`--output` = {} would write where `{flag}` = {} is read",
                    config.output.display(),
                    path.display()
                ),
                "choose another --output; nothing was changed",
            ));
        }
    }
    Ok(())
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
