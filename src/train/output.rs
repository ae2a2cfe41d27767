//! The output folder of a run: `model/`, `checkpoints/`, `metrics.jsonl`, `tensorboard/`, `resolved.toml`, `report.json`,
//! `report.html`, and `B3SUMS`, the checksums of what is not in a checkpoint.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::capsule;
use super::inputs::Inputs;
use super::lock::RunLock;
use super::record::RECORD_FILE;
use crate::checkpoint::atomic::{self, kind_of};
use crate::checkpoint::checksums::{self, CHECKSUMS_FILE};
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
/// The model or adapter of the best checkpoint, where that is not the last one.
const BEST_FOLDER: &str = "best";

/// The output folder of a run.
#[derive(Debug)]
pub struct Output {
    path: PathBuf,
    /// What the run writes at its end: a model, or an adapter.
    result: &'static str,
    /// Whether this process writes there: of several ranks, the first one does.
    is_ours: bool,
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
    /// Sentences about the best checkpoint and about how the run ended.
    pub notes: Vec<String>,
}

impl Output {
    /// Refuses what cannot be a run's output folder, before any time is spent: a folder that holds a run or that another process
    /// writes in, a file, a folder that the run reads. The demo may be run again over itself. `is_ours` says that this process
    /// writes there; the other ranks of a run refuse nothing.
    ///
    /// # Errors
    /// [`Error::Io`] for what is no folder, [`Error::Config`] for the rest.
    pub fn check(config: &RunConfig, is_ours: bool) -> Result<Self> {
        let path = config.output.clone();
        let result = match config.lora.is_some() || config.adapter.is_some() {
            true => ADAPTER_FOLDER,
            false => MODEL_FOLDER,
        };
        let output = Output { path: path.clone(), result, is_ours, _lock: None };
        if !is_ours {
            return Ok(output);
        }
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
        Ok(output)
    }

    /// Makes the folder and locks it, after the inputs were found good and before anything is computed.
    ///
    /// # Errors
    /// [`Error::Io`] where nothing can be written; [`Error::Config`] where another run has begun since the check.
    pub fn claim(self, config: &RunConfig) -> Result<Self> {
        if !self.is_ours {
            return Ok(self);
        }
        atomic::check_writable(&self.path)?;
        let lock = RunLock::take(&self.path)?;
        refuse_taken(config)?;
        Ok(Output { _lock: Some(lock), ..self })
    }

    /// Writes the resolved configuration. The checksums that an earlier part of the run left are removed: their files are
    /// about to change.
    pub fn begin(&self, config: &RunConfig) -> Result<()> {
        if !self.is_ours {
            return Ok(());
        }
        let sums = self.path.join(CHECKSUMS_FILE);
        match std::fs::remove_file(&sums) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io(&sums, "remove", error));
            }
            _ => {}
        }
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
        if self.is_ours {
            facts.write(&self.path)?;
        }
        Ok(facts)
    }

    /// Writes the report of a run that ends before its last step because of `why`. Where that fails there is a warning:
    /// `why` is what counts.
    pub fn stopped(&self, facts: &RunFacts, elapsed: Duration, why: &Error) {
        // The folder is another run's, another rank's, or gone.
        if !self.is_ours || matches!(why, Error::Io { .. }) {
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

    /// The folder's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether this process writes there.
    pub fn is_ours(&self) -> bool {
        self.is_ours
    }

    /// The folder of the trained model or adapter.
    pub fn model(&self) -> PathBuf {
        self.path.join(self.result)
    }

    /// The folder of the best checkpoint's model or adapter.
    pub fn best(&self) -> PathBuf {
        self.path.join(BEST_FOLDER)
    }

    /// A line that says where that is.
    pub fn model_line(&self) -> String {
        format!("{:<8}{}", self.result, self.model().display())
    }

    /// Writes the checksums of the trained model or adapter and of the run's records, for `verify`. They stand outside the
    /// model's folder, which is meant to be published as it is. The report is not among them: it can be made again.
    fn record_checksums(&self) -> Result<()> {
        let mut files = [METRICS_FILE, RESOLVED_FILE, RECORD_FILE].map(str::to_string).to_vec();
        let entries = atomic::list(&self.model())?.into_iter().chain(atomic::list(&self.best())?);
        for entry in entries {
            let inner = if entry.is_dir() { atomic::list(&entry)? } else { vec![entry] };
            let within = inner.iter().filter_map(|path| path.strip_prefix(&self.path).ok()?.to_str());
            files.extend(within.map(str::to_string));
        }
        let hash = |name: &String| Ok((name.clone(), checksums::hash_file(&self.path.join(name))?));
        let sums: Vec<(String, blake3::Hash)> = files.iter().map(hash).collect::<Result<_>>()?;
        let sums: Vec<(&str, blake3::Hash)> =
            sums.iter().map(|(name, hash)| (name.as_str(), *hash)).collect();
        atomic::write_file(&self.path.join(CHECKSUMS_FILE), checksums::text(&sums).as_bytes())
    }

    /// Writes `report.html`, then tells the terminal how the run ended: in this order, so that a standard output that
    /// cannot be written costs no file.
    pub fn report(&self, finished: Finished<'_>) -> Result<()> {
        let Finished { config, facts, comparison, samples, elapsed, notes } = finished;
        if !self.is_ours {
            return Ok(());
        }
        self.record_checksums()?;
        let text = match &comparison {
            Some((before, after)) => format!("\n{}", summary(before, after, &samples)),
            None => String::new(),
        };
        let mut report = RunReport::read(&self.path)?;
        let mut warnings = advice(&report.history, config.optimizer.learning_rate);
        // The demo's page has them too, but its terminal shows what a newcomer came for.
        if config.model.is_some() {
            warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
        }
        let said: String = notes.iter().map(|note| format!("{note}\n")).collect();
        warnings.splice(0..0, notes);
        let seconds = facts.seconds + elapsed.as_secs_f64();
        report.facts = RunFacts { state: RunState::Finished, samples, warnings, seconds, ..facts };
        // In this order: facts of a finished run say that its page is there.
        report.write(&self.path)?;
        report.facts.write(&self.path)?;
        let page = self.path.join(REPORT_FILE);
        let best = match self.best().exists() {
            true => format!("{:<8}{}\n", BEST_FOLDER, self.best().display()),
            false => String::new(),
        };
        let model = self.model_line();
        print_result(&format!("{text}\n{said}{model}\n{best}report  {}\n", page.display()))?;
        Ok(())
    }
}

/// Refuses a folder that holds a run. The demo may be run again over itself.
fn refuse_taken(config: &RunConfig) -> Result<()> {
    let path = &config.output;
    let taken = [
        METRICS_FILE,
        MODEL_FOLDER,
        ADAPTER_FOLDER,
        BEST_FOLDER,
        run_state::FOLDER,
        REPORT_FILE,
        RECORD_FILE,
        CHECKSUMS_FILE,
    ];
    let is_taken = taken.iter().any(|name| path.join(name).exists());
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
        BEST_FOLDER,
        capsule::FOLDER,
        RECORD_FILE,
        CHECKSUMS_FILE,
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
