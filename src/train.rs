//! The training loop, top to bottom.
//!
//! Inputs are read and checked before anything is written. Then: reference log-probs, an evaluation, optimiser steps
//! with evaluations and checkpoints between them, a last evaluation, the model folder and the report. A run that is cut
//! in two by `--resume` gives the same bits as one in one piece.

mod checkpoint;
mod guard;
mod inputs;
mod lock;
mod output;
mod recorder;
mod reference;
mod samples;
mod trainer;

use std::sync::Arc;
use std::time::Instant;

pub use inputs::Inputs;
pub use reference::References;
pub use trainer::{StepResult, Trainer, TrainingPair, Workload};

use crate::checkpoint::run_state::RunIdentity;
use crate::config::{RunConfig, Warmup};
use crate::data::{BatchOrder, PairDataset, StepBatch};
use crate::device::{AdamWStep, Device, DeviceTask, run_on};
use crate::error::{Error, Result};
use crate::interrupt;
use crate::model::Llama;
use crate::objective::ReferencePair;
use crate::report::{EvalMetrics, PairMetrics, StepMetrics};
use output::Output;
use recorder::Recorder;
use samples::Samples;

/// Runs `config` from its first line to its report.
pub fn run(config: &RunConfig) -> Result<()> {
    interrupt::install()?;
    let started = Instant::now();
    let output = Output::check(config)?;
    let inputs = Inputs::load(config)?;
    interrupt::check()?;
    let output = output.claim(config)?;
    run_on(config.device, config.threads, Training { config, inputs, output, started })
}

struct Training<'a> {
    config: &'a RunConfig,
    inputs: Inputs,
    output: Output,
    started: Instant,
}

impl DeviceTask for Training<'_> {
    type Output = ();

    fn run<D: Device>(self, device: Arc<D>) -> Result<()> {
        let Training { config, inputs, output, started } = self;
        let model = Llama::load(device, &inputs.folder, inputs.positions() + samples::MAX_NEW_TOKENS)?;
        interrupt::check()?;
        let references = References::compute(config, &inputs, &model)?;
        let samples = Samples::choose(&inputs)?;
        let answers_before = samples.answers(&model, &inputs)?;

        let mut run = Run::new(config, &inputs, &references, model)?;
        let before = run.evaluate(0)?;
        let resumed = run.resume(&output)?;
        let steps = interrupt::steps()?;
        output.begin(config)?;
        let mut recorder = Recorder::start(output.path(), run.plan.total_steps, resumed)?;
        if let (None, Some(before)) = (resumed, &before) {
            recorder.evaluation(before)?;
        }

        let after = run.train(&output, &mut recorder, resumed.unwrap_or(0))?;

        checkpoint::save_weights(&output.model(), &run.trainer, &inputs.companions)?;
        let saved =
            format!("the trained model is in {}; only the report is missing", output.model().display());
        let keeper = interrupt::keep_before_end(|| Some(saved));
        drop(steps);
        let answers_after = samples.answers(&run.trainer.model, &inputs)?;
        output.report(output::Finished {
            config,
            inputs: &inputs,
            device: run.trainer.device().describe(),
            comparison: before.zip(after),
            samples: samples.compared(answers_before, answers_after),
            seconds: started.elapsed().as_secs_f64(),
        })?;
        drop(keeper);
        Ok(())
    }
}

/// Which steps a run consists of.
#[derive(Clone, Copy, Debug)]
struct Plan {
    order: BatchOrder,
    total_steps: usize,
    warmup_steps: usize,
}

impl Plan {
    fn new(config: &RunConfig, pairs: usize) -> Self {
        let order = BatchOrder::new(pairs, config.batch.pairs_per_step, config.seed);
        let total_steps = config.schedule.max_steps.unwrap_or_else(|| order.steps_of(config.schedule.epochs));
        let warmup_steps = match config.schedule.warmup {
            Warmup::Ratio(ratio) => (ratio * total_steps as f64).ceil() as usize,
            Warmup::Steps(steps) => steps,
        };
        Plan { order, total_steps, warmup_steps }
    }

    /// AdamW counts its steps in 32 bits.
    fn check(&self) -> Result<()> {
        match u32::try_from(self.total_steps) {
            Ok(_) => Ok(()),
            Err(_) => Err(Error::config(
                format!("the run would take {} optimiser steps", self.total_steps),
                "lower --epochs, or raise --pairs-per-step",
            )),
        }
    }
}

/// A run under way.
struct Run<'a, D: Device> {
    config: &'a RunConfig,
    inputs: &'a Inputs,
    references: &'a References,
    plan: Plan,
    identity: RunIdentity,
    trainer: Trainer<D>,
}

impl<'a, D: Device> Run<'a, D> {
    fn new(
        config: &'a RunConfig,
        inputs: &'a Inputs,
        references: &'a References,
        model: Llama<D>,
    ) -> Result<Self> {
        let evaluation = inputs.evaluation.iter().flat_map(|dataset| &dataset.pairs);
        let workload = Workload::plan(
            inputs.training.pairs.iter().chain(evaluation),
            &config.objective,
            config.batch.pairs_per_step,
            config.batch.tokens_per_micro_batch,
        );
        let workload = Workload { head: config.head, ..workload };
        let identity = RunIdentity {
            config: config.to_toml(),
            model: hex(&inputs.folder.fingerprint()),
            data: hex(&inputs.training.fingerprint),
        };
        let plan = Plan::new(config, inputs.training.pairs.len());
        plan.check()?;
        let trainer = Trainer::new(model, config.objective, workload)?;
        tracing::info!("log-prob head: {}", trainer.head_plan());
        Ok(Run { config, inputs, references, plan, identity, trainer })
    }

    /// With `--resume`: the steps already done.
    fn resume(&mut self, output: &Output) -> Result<Option<usize>> {
        if !self.config.resume {
            return Ok(None);
        }
        match checkpoint::resume(output.path(), &mut self.trainer, &self.identity)? {
            Some(step) => {
                tracing::info!("resuming behind step {step} of {}", self.plan.total_steps);
                Ok(Some(step))
            }
            None if output.holds_false_start() => {
                tracing::warn!("{} has no checkpoint yet: the run begins again", output.path().display());
                Ok(None)
            }
            None => Err(Error::config(
                format!("{} has no checkpoint to resume from", output.path().display()),
                "leave --resume out to start the run",
            )),
        }
    }

    /// The steps from `first` on; returns the last evaluation.
    fn train(
        &mut self,
        output: &Output,
        recorder: &mut Recorder,
        first: usize,
    ) -> Result<Option<EvalMetrics>> {
        let total = self.plan.total_steps;
        let mut last_evaluation = None;
        let mut batches = self.plan.order.from_step(first).peekable();
        while let Some(batch) = batches.next_if(|batch| batch.step < total) {
            let metrics = self.step(&batch)?;
            recorder.step(&metrics)?;
            let done = metrics.step;
            if self.is_evaluation_due(done) {
                last_evaluation = self.evaluate(done)?;
                last_evaluation.iter().try_for_each(|metrics| recorder.evaluation(metrics))?;
            }
            let interrupted = interrupt::requested().filter(|_| done < total);
            let due = self.config.save_steps.is_some_and(|every| done.is_multiple_of(every)) || done == total;
            if let (true, Some(next)) = (due || interrupted.is_some(), batches.peek()) {
                recorder.sync()?;
                self.save(output, next)?;
            }
            if let Some(signal) = interrupted {
                let output = output.path().display();
                let kept = format!("the run was saved in {output} and `--resume` continues it");
                return Err(interrupt::stopped(signal, kept));
            }
        }
        match last_evaluation {
            None => self.evaluate(total),
            last => Ok(last),
        }
    }

    fn step(&mut self, batch: &StepBatch) -> Result<StepMetrics> {
        let started = Instant::now();
        let pairs =
            training_pairs(&self.inputs.training, &self.references.training, batch.pairs.iter().copied());
        let adamw = self.adamw(batch.step);
        let result = self.trainer.step(&pairs, adamw, self.config.optimizer.max_grad_norm)?;
        let seconds = started.elapsed().as_secs_f64();
        Ok(StepMetrics {
            step: batch.step + 1,
            epoch: self.plan.order.epochs_after(batch.step + 1),
            pairs: PairMetrics::new(&self.config.objective, result.loss, &result.outcomes),
            grad_norm: result.gradient_norm as f64,
            learning_rate: adamw.learning_rate as f64,
            tokens_per_second: result.tokens as f64 / seconds,
            pairs_per_second: pairs.len() as f64 / seconds,
            mfu: None,
            memory_peak_gib: Some(self.trainer.device().memory().peak as f64 / (1u64 << 30) as f64),
        })
    }

    fn adamw(&self, step: usize) -> AdamWStep {
        let optimizer = &self.config.optimizer;
        let factor = self.config.schedule.kind.factor(step, self.plan.warmup_steps, self.plan.total_steps);
        AdamWStep {
            learning_rate: (optimizer.learning_rate * factor) as f32,
            beta1: optimizer.beta1 as f32,
            beta2: optimizer.beta2 as f32,
            epsilon: optimizer.epsilon as f32,
            weight_decay: optimizer.weight_decay as f32,
            step: step as u32 + 1,
        }
    }

    /// Once an epoch unless the configuration says how often, and behind the last step.
    fn is_evaluation_due(&self, done: usize) -> bool {
        let every = self.config.evaluation.steps.unwrap_or_else(|| self.plan.order.steps_per_epoch());
        done.is_multiple_of(every.max(1)) || done == self.plan.total_steps
    }

    /// Metrics of the evaluation pairs after `done` steps; `None` where there are none.
    fn evaluate(&mut self, done: usize) -> Result<Option<EvalMetrics>> {
        let Some(dataset) = &self.inputs.evaluation else { return Ok(None) };
        let pairs = training_pairs(dataset, &self.references.evaluation, 0..dataset.pairs.len());
        let (outcomes, loss) = self.trainer.evaluate(&pairs)?;
        Ok(Some(EvalMetrics {
            step: done,
            epoch: self.plan.order.epochs_after(done),
            pairs: PairMetrics::new(&self.config.objective, loss, &outcomes),
        }))
    }

    fn save(&self, output: &Output, next: &StepBatch) -> Result<()> {
        let epochs = self.plan.order.epochs_after(next.step);
        let pairs_seen = (epochs * self.inputs.training.pairs.len() as f64).round() as usize;
        let (seed, keep) = (self.config.seed, self.config.keep_checkpoints);
        checkpoint::save(output.path(), &self.trainer, next, pairs_seen, seed, &self.identity, keep)
    }
}

fn training_pairs<'a>(
    dataset: &'a PairDataset,
    references: &[ReferencePair],
    indices: impl Iterator<Item = usize>,
) -> Vec<TrainingPair<'a>> {
    indices.map(|index| TrainingPair { pair: &dataset.pairs[index], reference: references[index] }).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
