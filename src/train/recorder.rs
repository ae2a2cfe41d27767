//! Everything a run tells while it goes: metrics file, TensorBoard events, progress.

use std::path::Path;

use crate::error::Result;
use crate::report::{EvalMetrics, EventWriter, MetricsWriter, Progress, StepMetrics};

#[derive(Debug)]
pub struct Recorder {
    metrics: MetricsWriter,
    events: EventWriter,
    progress: Progress,
}

impl Recorder {
    /// `resumed`: steps done by an earlier part of the run, whose later lines are taken off.
    pub fn start(output: &Path, total_steps: usize, resumed: Option<usize>) -> Result<Self> {
        let metrics = match resumed {
            Some(step) => MetricsWriter::resume(output, step)?,
            None => MetricsWriter::create(output)?,
        };
        Ok(Recorder {
            metrics,
            events: EventWriter::create(output, resumed)?,
            progress: Progress::start("training", "steps", total_steps, resumed.unwrap_or(0)),
        })
    }

    pub fn step(&mut self, metrics: &StepMetrics) -> Result<()> {
        self.metrics.step(metrics)?;
        self.events.step(metrics)?;
        self.progress.advance(1, || metrics.brief());
        Ok(())
    }

    pub fn evaluation(&mut self, metrics: &EvalMetrics) -> Result<()> {
        self.metrics.evaluation(metrics)?;
        self.events.evaluation(metrics)
    }

    /// Before a checkpoint of the same step: what it counts on is on the disk.
    pub fn sync(&self) -> Result<()> {
        self.metrics.sync()
    }
}
