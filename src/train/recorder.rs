//! Everything a run tells while it goes: metrics file, TensorBoard events, progress.

use std::path::{Path, PathBuf};

use super::output::Output;
use crate::error::{Error, Result};
use crate::report::{
    EvalMetrics, EventWriter, History, LivePage, METRICS_FILE, MetricsWriter, Progress, StepMetrics,
};

/// The metrics of a run under way: its files, the progress shown, and the live page.
#[derive(Debug)]
pub struct Recorder {
    /// `None` on a rank that is not the first.
    files: Option<Files>,
    progress: Progress,
    /// With `--live`, the page that is written as the steps are done.
    pub live: Option<LivePage>,
}

#[derive(Debug)]
struct Files {
    output: PathBuf,
    /// What the output folder and the metrics file were when the run began.
    place: [Option<FileId>; 2],
    metrics: MetricsWriter,
    events: EventWriter,
}

impl Recorder {
    /// Opens the files of an output folder that is ours. `resumed` is the number of steps done by an earlier part of the run,
    /// whose lines for later steps are removed.
    pub fn start(output: &Output, total_steps: usize, resumed: Option<usize>) -> Result<Self> {
        let files = output.is_ours().then(|| Files::open(output.path(), resumed)).transpose()?;
        let progress = Progress::start("training", "steps", total_steps, resumed.unwrap_or(0));
        Ok(Recorder { files, progress, live: None })
    }

    /// Writes a step's metrics and shows them.
    pub fn step(&mut self, metrics: &StepMetrics) -> Result<()> {
        self.check_place()?;
        if let Some(files) = &mut self.files {
            files.metrics.step(metrics)?;
            files.events.step(metrics)?;
        }
        self.progress.advance(1, || metrics.brief());
        self.live.iter_mut().for_each(LivePage::tick);
        Ok(())
    }

    /// Writes an evaluation's metrics.
    pub fn evaluation(&mut self, metrics: &EvalMetrics) -> Result<()> {
        self.check_place()?;
        let Some(files) = &mut self.files else { return Ok(()) };
        files.metrics.evaluation(metrics)?;
        files.events.evaluation(metrics)
    }

    /// Makes sure that everything recorded so far is on the disk: called before the checkpoint of the same step, which
    /// counts on it.
    pub fn sync(&self) -> Result<()> {
        self.check_place()?;
        self.files.as_ref().map_or(Ok(()), |files| files.metrics.sync())
    }

    /// Fails where the output folder or its metrics file is no longer the one that the run writes to: lines would go to
    /// a file that nobody can find, and checkpoints to a folder that is not the run's.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn check_place(&self) -> Result<()> {
        let Some(files) = &self.files else { return Ok(()) };
        if files.place == place(&files.output) {
            return Ok(());
        }
        Err(Error::Io {
            path: files.output.clone(),
            action: "go on in",
            cause: std::io::Error::other(
                "the folder, or metrics.jsonl in it, was removed, renamed or replaced while the run went on",
            ),
            help: "where the folder was renamed, resume the run there with --output and --resume; what was removed is \
                   lost, and the run must be started again"
                .to_string(),
        })
    }
}

impl Files {
    fn open(output: &Path, resumed: Option<usize>) -> Result<Self> {
        let metrics = match resumed {
            Some(step) => MetricsWriter::resume(output, step)?,
            None => MetricsWriter::create(output)?,
        };
        if let Some(step) = resumed {
            warn_of_missing_lines(output, step)?;
        }
        let events = EventWriter::create(output, resumed)?;
        Ok(Files { output: output.to_path_buf(), place: place(output), metrics, events })
    }
}

/// Names a file whatever its path: device and inode, where the system has them.
type FileId = (u64, u64);

fn place(output: &Path) -> [Option<FileId>; 2] {
    [output.to_path_buf(), output.join(METRICS_FILE)]
        .map(|path| std::fs::metadata(path).ok().map(|found| id(&found)))
}

#[cfg(unix)]
fn id(metadata: &std::fs::Metadata) -> FileId {
    use std::os::unix::fs::MetadataExt;
    (metadata.dev(), metadata.ino())
}

#[cfg(not(unix))]
fn id(_: &std::fs::Metadata) -> FileId {
    (0, 0)
}

/// Warns of lines that the metrics file lacks for steps before the checkpoint.
fn warn_of_missing_lines(output: &Path, step: usize) -> Result<()> {
    let mut is_there = vec![false; step + 1];
    for (at, _) in History::read(output)?.series("loss") {
        if let Some(entry) = is_there.get_mut(at as usize) {
            *entry = true;
        }
    }
    let missing: Vec<usize> = (1..=step).filter(|&at| !is_there[at]).collect();
    if let (Some(first), Some(last)) = (missing.first(), missing.last()) {
        tracing::warn!(
            "{} has no lines of {} of the {step} steps before the checkpoint (steps {first} to {last}): its weights are \
             whole, and the curves of the report are not",
            output.join(METRICS_FILE).display(),
            missing.len()
        );
    }
    Ok(())
}
