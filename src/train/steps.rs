//! The loop over the steps of a run: updates, with evaluations and checkpoints between them.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use super::chooser::Chooser;
use super::inputs::Inputs;
use super::output::Output;
use super::plan::Plan;
use super::record::{BestRecord, EndRecord, Lengthened, RunRecord};
use super::recorder::Recorder;
use super::reference::References;
use super::resume::Start;
use super::shares::{self, RankShares};
use super::trainer::{Trainer, TrainingPair, Workload};
use super::{capsule, checkpoint};
use crate::checkpoint::run_state::{self, RunIdentity};
use crate::checkpoint::{BackgroundSaves, Checkpoint, atomic};
use crate::config::RunConfig;
use crate::data::{PairDataset, StepBatch};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::interrupt;
use crate::model::Llama;
use crate::objective::ReferencePair;
use crate::plan::{Trained, Volume};
use crate::ranks::progress::{self, Stage};
use crate::ranks::{self, RankGroup, Requests, Team};
use crate::report::{EvalMetrics, History, PairMetrics, StepMetrics};

/// A run under way.
pub struct Run<'a, D: Device> {
    pub config: &'a RunConfig,
    pub team: &'a Team,
    pub inputs: &'a Inputs,
    pub references: &'a References,
    pub plan: Plan,
    pub identity: RunIdentity,
    pub trainer: Trainer<D>,
    pub chooser: Chooser,
    record: RunRecord,
    /// How this part of the run made the whole longer, if it did.
    lengthened: Option<Lengthened>,
    /// What the number of a step's operations follows from, and the device's peak rate in 10^12 operations per second; `None`
    /// where the rate is not known.
    peak: Option<(Trained, f64)>,
    /// What each rank did so far.
    pub shares: RankShares,
    /// Whether any rank asked for something in the last step.
    is_asked: bool,
}

impl<'a, D: Device> Run<'a, D> {
    /// A trainer for `model` with buffers for all pairs of the run, before its first step.
    pub fn new(
        (config, team): (&'a RunConfig, &'a Team),
        inputs: &'a Inputs,
        references: &'a References,
        (plan, identity): (Plan, RunIdentity),
        (model, group): (Llama<D>, Option<Arc<RankGroup<D>>>),
    ) -> Result<Self> {
        let evaluation = inputs.evaluation.iter().flat_map(|dataset| &dataset.pairs);
        let workload = Workload::plan(
            inputs.training.pairs.iter().chain(evaluation),
            &config.objective,
            plan.pairs_per_step,
            config.batch.tokens_per_micro_batch,
        );
        let workload =
            Workload { head: config.head, memory: config.memory, rounding_seed: config.seed, ..workload };
        let mut trainer = Trainer::with_group(model, config.objective, workload, group)?;
        trainer.dropout_seed = config.seed;
        if let Some(adapter) = &inputs.adapter {
            adapter.set_masters(&mut trainer)?;
        }
        tracing::info!("log-prob head: {}", trainer.head_plan());
        let (chooser, record) = (Chooser::new(&config.evaluation), RunRecord::default());
        let known = || crate::plan::find(&trainer.device().describe()).map(|kind| kind.rates.tflops);
        let lora = inputs.adapter.as_ref().map(|adapter| adapter.settings());
        let trained = |tflops| (Trained::new(inputs.folder.config(), lora.as_ref()), tflops);
        let peak = config.tflops.or_else(known).map(trained);
        Ok(Run {
            config,
            team,
            inputs,
            references,
            plan,
            identity,
            trainer,
            chooser,
            record,
            lengthened: None,
            peak,
            shares: RankShares::default(),
            is_asked: false,
        })
    }

    /// Puts the checkpoint that the run starts from into the trainer; returns the steps already done.
    pub fn restore(&mut self, start: Start) -> Result<Option<usize>> {
        let Start::After(checkpoint, lengthened) = start else { return Ok(None) };
        checkpoint::restore(&checkpoint, &mut self.trainer)?;
        self.lengthened = lengthened;
        Ok(Some(checkpoint.state().step as usize))
    }

    /// Takes up what the run decided before the `resumed` step, from its metrics and its record.
    pub fn recall(&mut self, output: &Path, resumed: Option<usize>) -> Result<()> {
        self.record.planned_steps = self.plan.total_steps;
        let Some(step) = resumed else { return self.write_record(output) };
        let is_kept = |step| run_state::folder_of(output, step).is_dir();
        self.chooser = Chooser::after(&self.config.evaluation, &History::read(output)?, step, is_kept);
        self.record.lengthened = RunRecord::read(output).lengthened;
        self.lengthened.take().into_iter().for_each(|lengthened| self.record.add(lengthened));
        self.write_record(output)
    }

    /// Writes what was decided so far. A checkpoint is named once it is on the disk.
    fn write_record(&mut self, output: &Path) -> Result<()> {
        if !self.team.is_first() {
            return Ok(());
        }
        let metric = self.chooser.metric();
        let is_saved = |(step, _): &(usize, f64)| run_state::folder_of(output, *step).is_dir();
        if let Some((step, value)) = self.chooser.best().filter(is_saved) {
            self.record.best = Some(BestRecord { metric, step, value });
        }
        self.record.write(output)
    }

    /// Takes the steps from `first` on; returns the number of the last one, and the evaluation after it. However they end, the
    /// record names the best checkpoint that was saved.
    pub fn train(
        &mut self,
        output: &Output,
        recorder: &mut Recorder,
        first: usize,
    ) -> Result<(usize, Option<EvalMetrics>)> {
        let mut saves = BackgroundSaves::of_ranks(self.team.ranks().local_ranks);
        let trained = self.take_steps(output, recorder, &mut saves, first);
        // A file that cannot be written may mean that the folder is gone or another run's: leave no record in it.
        if matches!(trained, Err(Error::Io { .. })) {
            return trained;
        }
        let recorded = saves.wait().and_then(|()| self.write_record(output.path()));
        match (trained, recorded) {
            (Ok(_), Err(error)) => Err(error),
            (trained, recorded) => {
                // The error that ended the run is the one to return.
                recorded.unwrap_or_else(|error| tracing::error!("{error}"));
                trained
            }
        }
    }

    /// Takes the steps; see [`Run::train`]. A checkpoint is saved where one is due, where a signal asks for it, and where an evaluation
    /// was the best so far.
    fn take_steps(
        &mut self,
        output: &Output,
        recorder: &mut Recorder,
        saves: &mut BackgroundSaves,
        first: usize,
    ) -> Result<(usize, Option<EvalMetrics>)> {
        let total = self.plan.total_steps;
        let mut last = first;
        let mut last_evaluation = None;
        for batch in self.plan.order.from_step(first).take_while(|batch| batch.step < total) {
            if self.chooser.is_over() {
                break;
            }
            let metrics = self.step(&batch).map_err(|error| self.leave_capsule(output, &batch, error))?;
            if saves.check()? {
                self.write_record(output.path())?;
            }
            recorder.step(&metrics)?;
            let done = metrics.step;
            last = done;
            let mut is_best = false;
            last_evaluation = None;
            if self.is_evaluation_due(done) {
                last_evaluation = self.evaluate(done)?;
                if let Some(metrics) = &last_evaluation {
                    recorder.evaluation(metrics)?;
                    is_best = self.chooser.record(metrics)?;
                }
            }
            let is_last = done == total || self.chooser.is_over();
            let Requests { stop, save: asked } = self.requests()?;
            let interrupted = stop.filter(|_| !is_last);
            let due = self.config.save_steps.is_some_and(|every| done.is_multiple_of(every)) || is_last;
            if due || asked || is_best || interrupted.is_some() {
                self.save(output, (&mut *recorder, &mut *saves), &batch, done)?;
                if asked || interrupted.is_some() {
                    saves.wait()?;
                }
                if asked {
                    self.write_record(output.path())?;
                    tracing::info!("SIGUSR1: saved after step {done} of {total}; the run goes on");
                }
            }
            if let Some(signal) = interrupted {
                self.team.stop_together()?;
                let output = output.path().display();
                let kept = format!("the run was saved in {output} and `--resume` continues it");
                return Err(interrupt::stopped(signal, kept));
            }
        }
        let evaluation = match last_evaluation {
            None => self.evaluate(last)?,
            evaluation => evaluation,
        };
        Ok((last, evaluation))
    }

    /// What signals ask of the run after this step. Several ranks tell each other their requests only if the step's result said
    /// that one of them has any.
    fn requests(&self) -> Result<Requests> {
        match self.team.is_alone() || self.is_asked {
            true => self.team.requests(Requests::take()),
            false => Ok(Requests::default()),
        }
    }

    /// Saves the checkpoint after `done` steps, the last of which had `batch`, and says which one is the best.
    fn save(
        &mut self,
        output: &Output,
        (recorder, saves): (&mut Recorder, &mut BackgroundSaves),
        batch: &StepBatch,
        done: usize,
    ) -> Result<()> {
        progress::enter(Stage::Saving, done);
        self.probe(output, batch)?;
        recorder.sync()?;
        let state = self.plan.state(done, &self.identity);
        // The checkpoint that `run.json` names is kept until `run.json` names another one.
        let named = self.record.best.as_ref().map(|best| best.step);
        let best: Vec<usize> = self.chooser.best().map(|(step, _)| step).into_iter().chain(named).collect();
        let kept = (self.config.keep_checkpoints, best.as_slice());
        checkpoint::save_beside(saves, output.path(), &mut self.trainer, &state, kept)?;
        // The save before this one is done, so that its checkpoint can be named.
        self.write_record(output.path())
    }

    /// Leaves a capsule of the step of `batch`, which failed with `error`; returns the error with where it is.
    fn leave_capsule(&self, output: &Output, batch: &StepBatch, error: Error) -> Error {
        match self.team.is_first() {
            true => capsule::leave(output.path(), self, batch, error),
            false => error,
        }
    }

    /// Writes the best model where it is not the last one, and the record of the run, which ended after `last` steps. Returns
    /// sentences for the report. The trainer may hold another step's weights after that.
    pub fn finish(&mut self, output: &Output, last: usize) -> Result<Vec<String>> {
        let total = self.plan.total_steps;
        let mut notes: Vec<String> = self.chooser.describe(last).into_iter().collect();
        let reason = match last == total {
            true => format!("all {total} steps are done"),
            false => format!("early stopping: {}", self.chooser.why_over()),
        };
        if last != total {
            let why = self.chooser.why_over();
            notes.push(format!("Early stopping ended the run after step {last} of {total}: {why}."));
        }
        self.record.ended = Some(EndRecord { step: last, reason });
        self.write_record(output.path())?;
        if let Some((step, _)) = self.chooser.best() {
            if self.team.is_first() {
                run_state::prune(output.path(), self.config.keep_checkpoints, &[step])?;
            }
            notes.extend(self.save_best(output, step, last)?);
        }
        Ok(notes)
    }

    /// Writes the model of the best step, if that is not the last one; a sentence where it cannot be.
    fn save_best(&mut self, output: &Output, step: usize, last: usize) -> Result<Option<String>> {
        let target = output.best();
        if step == last {
            if output.is_ours() && target.exists() {
                atomic::remove_folder(&target)?;
            }
            return Ok(None);
        }
        let checkpoint = match Checkpoint::open(&run_state::folder_of(output.path(), step)) {
            Ok(checkpoint) => checkpoint,
            Err(error) => return Ok(Some(format!("Its model cannot be written: {error}"))),
        };
        checkpoint::restore(&checkpoint, &mut self.trainer)?;
        save_result(&target, &mut self.trainer, self.inputs)?;
        Ok(None)
    }

    /// One optimiser step over the pairs of `batch`, with its metrics.
    pub fn step(&mut self, batch: &StepBatch) -> Result<StepMetrics> {
        progress::enter(Stage::Step, batch.step + 1);
        let started = Instant::now();
        self.trainer.request_stop(interrupt::is_anything_asked());
        let pairs =
            training_pairs(&self.inputs.training, &self.references.training, batch.pairs.iter().copied());
        let adamw = self.plan.adamw(batch.step);
        let result = self.trainer.step(&pairs, adamw, self.config.optimizer.max_grad_norm);
        let result = result.map_err(|error| self.with_rank(error))?;
        let seconds = started.elapsed().as_secs_f64();
        self.is_asked = result.stop_requested;
        self.shares.add(&result.ranks);
        Ok(StepMetrics {
            step: batch.step + 1,
            epoch: self.plan.order.epochs_after(batch.step + 1),
            pairs: PairMetrics::new(
                &self.config.objective,
                result.loss,
                &result.outcomes,
                pairs.iter().map(|pair| pair.reference),
            ),
            grad_norm: result.gradient_norm as f64,
            learning_rate: adamw.learning_rate,
            tokens_per_second: result.tokens as f64 / seconds,
            pairs_per_second: pairs.len() as f64 / seconds,
            mfu: self.peak.as_ref().map(|(trained, tflops)| {
                let sides = self.config.objective.sides();
                let volume = Volume::of(pairs.iter().map(|pair| pair.pair), sides);
                trained.model_flops(&volume) / (seconds * tflops * 1e12)
            }),
            ranks: shares::metrics(&result.ranks),
            memory_peak_gib: Some(self.trainer.device().memory().peak as f64 / (1u64 << 30) as f64),
        })
    }

    /// Adds to a numerical error which rank had the first number that is not finite, and where the run was.
    fn with_rank(&self, error: Error) -> Error {
        let Error::Numerics { message, help } = error else { return error };
        let Some(rank) = self.trainer.broken_rank() else { return Error::Numerics { message, help } };
        let host = match rank == self.team.ranks().place.rank {
            true => Some(ranks::host()),
            // Rank 0 alone knows the machines of others, and tells the error.
            false => self.team.host_of(rank).map(str::to_string),
        };
        let host = host.map_or_else(String::new, |host| format!(" on {host}"));
        let position = progress::now().position;
        Error::Numerics { message: format!("{message}; it came from rank {rank}{host}, {position}"), help }
    }

    /// Fails unless the new weights give a finite loss and gradient for the shortest of the pairs that they were just
    /// trained on: an update may be finite and break the model all the same.
    fn probe(&mut self, output: &Output, batch: &StepBatch) -> Result<()> {
        let tokens = |&index: &usize| self.inputs.training.pairs[index].tokens();
        let shortest: Vec<usize> = batch.pairs.iter().copied().min_by_key(tokens).into_iter().collect();
        let pairs =
            training_pairs(&self.inputs.training, &self.references.training, shortest.iter().copied());
        // The capsule is that of the next step, with this pair alone: a replay drops what that step drops.
        self.trainer.begin_step(batch.step as u32 + 2);
        self.trainer.accumulate_gradients(&pairs, None).map(|_| ()).map_err(|error| {
            let error = self.with_rank(error);
            self.leave_capsule(output, &StepBatch { step: batch.step + 1, pairs: shortest, ..*batch }, error)
        })
    }

    /// Whether an evaluation follows: once per epoch unless the configuration says how often, and after the last step.
    fn is_evaluation_due(&self, done: usize) -> bool {
        let every = self.config.evaluation.steps.unwrap_or_else(|| self.plan.order.steps_per_epoch());
        done.is_multiple_of(every.max(1)) || done == self.plan.total_steps
    }

    /// Metrics of the evaluation pairs after `done` steps; `None` where there are none.
    pub fn evaluate(&mut self, done: usize) -> Result<Option<EvalMetrics>> {
        let Some(dataset) = &self.inputs.evaluation else { return Ok(None) };
        if done > 0 {
            progress::enter(Stage::Evaluation, done);
        }
        let pairs = training_pairs(dataset, &self.references.evaluation, 0..dataset.pairs.len());
        let evaluated = self.trainer.evaluate(&pairs);
        let (outcomes, loss) = evaluated.map_err(|error| self.with_rank(error))?;
        Ok(Some(EvalMetrics {
            step: done,
            epoch: self.plan.order.epochs_after(done),
            pairs: PairMetrics::new(
                &self.config.objective,
                loss,
                &outcomes,
                pairs.iter().map(|pair| pair.reference),
            ),
        }))
    }
}

/// Writes the trained model, or the trained adapter. Among ranks every one must call it, and the first one writes.
pub fn save_result<D: Device>(target: &Path, trainer: &mut Trainer<D>, inputs: &Inputs) -> Result<()> {
    match &inputs.adapter {
        None => checkpoint::save_weights(target, trainer, &inputs.companions),
        Some(adapter) => adapter.save(target, trainer, inputs),
    }
}

/// The pairs at `indices` with what the reference says of them.
pub fn training_pairs<'a>(
    dataset: &'a PairDataset,
    references: &[ReferencePair],
    indices: impl Iterator<Item = usize>,
) -> Vec<TrainingPair<'a>> {
    indices.map(|index| TrainingPair { pair: &dataset.pairs[index], reference: references[index] }).collect()
}
