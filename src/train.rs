//! The training loop, top to bottom.
//!
//! Inputs are read and checked before anything is written, and with `--resume` the newest sound checkpoint is found.
//! Then: reference log-probs, an evaluation, optimiser steps with evaluations and checkpoints between them, a last
//! evaluation, the model folder and the report. A run that is cut in two by `--resume` gives the same bits as one in one
//! piece.

mod adapter;
mod bf16_gradients;
mod capsule;
mod checkpoint;
mod chooser;
mod cut;
mod deal;
mod guard;
mod inputs;
mod layer_updates;
mod lock;
mod offload;
mod output;
mod plan;
mod record;
mod recorder;
mod reference;
mod replay;
mod resume;
mod samples;
mod self_test;
mod shared_references;
mod shares;
mod trainer;

pub(crate) use lock::RunLock;

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

pub use checkpoint::{restore, save_beside, save_weights};
pub use cut::Cut;
pub use deal::{Deal, deal};
pub use inputs::Inputs;
pub(crate) use inputs::pair_sources;
pub use offload::plan as offload_plan;
pub(crate) use plan::Plan;
pub use reference::References;
pub use samples::MAX_NEW_TOKENS;
pub(crate) use samples::sample_prompts;
pub use trainer::{RankStep, StepResult, Trainer, TrainingPair, Workload};

use crate::checkpoint::run_state::{self, RunIdentity};
use crate::checkpoint::{BackgroundSaves, Checkpoint, atomic};
use crate::config::{MemoryLimit, OffloadConfig, RunConfig};
use crate::data::{PairDataset, StepBatch};
use crate::device::{Device, DeviceChoice, DeviceTask, GroupId, GroupPlace, ask_on, run_on};
use crate::error::{Error, Result};
use crate::foreign::hub;
use crate::interrupt;
use crate::model::Llama;
use crate::objective::ReferencePair;
use crate::plan::{Account, Choice, Models, Trained, Volume};
use crate::ranks::progress::{self, Stage};
use crate::ranks::{self, Fingerprints, LauncherKind, RankGroup, Ranks, Requests, Team};
use crate::report::{
    EvalMetrics, History, LivePage, PairMetrics, REPORT_FILE, RunFacts, StepMetrics, print_result,
};
use chooser::Chooser;
use output::Output;
use record::{BestRecord, EndRecord, Lengthened, RunRecord};
use recorder::Recorder;
use resume::Start;
use samples::Samples;
use shares::RankShares;

/// Trains as `config` says, up to the report; `ranks` says which process of the run this is.
///
/// # Errors
/// Those of its stages; see [`crate::Error`] for the classes.
pub fn run(config: &RunConfig, ranks: &Ranks) -> Result<()> {
    #[cfg(unix)]
    if ranks.launcher == Some(LauncherKind::Own) {
        ranks::launcher::end_with_launcher()?;
    }
    interrupt::install()?;
    if let Some(path) = &config.replay {
        return replay::run(config, path);
    }
    let team = Team::join(ranks)?;
    let result = run_in(&team, config);
    team.end(result)
}

fn run_in(team: &Team, config: &RunConfig) -> Result<()> {
    let started = Instant::now();
    progress::enter(Stage::Inputs, 0);
    let device = ranks::device_of(team.ranks(), config.device)?;
    let config = &located(config)?;
    let output = Output::check(config, team.is_first())?;
    let inputs = load_inputs(team, config)?;
    // The lengths are those that the run really has: they are saved, and a resumed run must agree with them.
    let config = &RunConfig { limits: inputs.limits, ..config.clone() };
    let plan = Plan::new(config, inputs.training.pairs.len());
    plan.check_numbers()?;
    let config = &with_chosen_memory((config, device, team.ranks().place), &inputs, &plan)?;
    plan.check_micro_batches(config, &inputs.training.pairs)?;
    interrupt::check()?;
    let recorded = config.recorded(inputs.training.pairs.len())?;
    let identity = identity(&recorded, &inputs);
    team.check_fingerprints(fingerprints(&identity, &inputs))?;
    let output = output.claim(config)?;
    team.check_shared(&config.output)?;
    let tensors = checkpoint::stored_tensors(&adapter::layout(&inputs), config.memory.states);
    let start = resume::find_together(team, config, &output.model(), &plan, (&identity, &tensors))?;
    if let Start::Finished(step) = start {
        return say_finished(&output, &plan, step);
    }
    plan.log(config.batch.pairs_per_step.is_some());
    if team.is_first() {
        guard::warn_of_numbers(config, &plan);
    }
    let (precision, threads) = (config.precision, team.ranks().threads(config.threads));
    let training = Training { team, config, recorded, inputs, output, plan, identity, start, started };
    run_on(device, precision, threads, training)
}

/// Reads what the run needs. Rank 0 does so first, and leaves token ids in the cache for the others.
fn load_inputs(team: &Team, config: &RunConfig) -> Result<Inputs> {
    let mut inputs = None;
    team.from_first("inputs", || {
        inputs = Some(Inputs::load(config)?);
        Ok(())
    })?;
    inputs.map_or_else(|| Inputs::load_silently(config), Ok)
}

/// What all ranks must have in common.
fn fingerprints(identity: &RunIdentity, inputs: &Inputs) -> Fingerprints {
    Fingerprints {
        model: identity.model.clone(),
        data: identity.data.clone(),
        evaluation: inputs.evaluation.as_ref().map_or_else(String::new, |pairs| hex(&pairs.fingerprint)),
        reference: identity.reference.clone(),
        config: identity.config.clone(),
    }
}

/// The collectives of the ranks on `device`; `None` for a run of one process.
fn join_group<D: Device>(team: &Team, device: &Arc<D>) -> Result<Option<RankGroup<D>>> {
    if team.is_alone() {
        return Ok(None);
    }
    team.agree("arithmetic", (ranks::host(), device.arithmetic()), |all| {
        let differs = all.iter().enumerate().find(|(_, (_, arithmetic))| *arithmetic != all[0].1);
        let Some((rank, (host, arithmetic))) = differs else { return Ok(()) };
        let (first, ours) = &all[0];
        Err(Error::config(
            format!("rank 0 on {first} computes on {ours}, and rank {rank} on {host} on {arithmetic}"),
            "say which device all ranks take, for instance --device cuda",
        ))
    })?;
    let id = team.from_first("group", || Ok(device.new_group()?.0.to_vec()))?;
    let id = <[u8; 128]>::try_from(id).map_err(|_| Error::bug("the name of a group has another length"))?;
    let communicator = {
        let _waiting = progress::wait();
        device.join_group(&GroupId(id), team.ranks().place)?
    };
    team.on_loss(device.abort(&communicator));
    Ok(Some(RankGroup { device: Arc::clone(device), communicator }))
}

/// The configuration with names of the Hub replaced by folders of its cache, so that the run's record says which
/// revision was read.
fn located(config: &RunConfig) -> Result<RunConfig> {
    let mut located = config.clone();
    for path in [&mut located.model, &mut located.reference].into_iter().flatten() {
        *path = hub::model(path)?;
    }
    for files in [&mut located.data, &mut located.evaluation.data].into_iter().flatten() {
        *files = hub::pairs(files)?;
    }
    Ok(located)
}

/// The configuration with what `--memory auto` chooses, or chose in an earlier part of the run.
fn with_chosen_memory(
    (config, device, place): (&RunConfig, DeviceChoice, GroupPlace),
    inputs: &Inputs,
    plan: &Plan,
) -> Result<RunConfig> {
    if config.memory_limit != Some(MemoryLimit::Auto) {
        return Ok(config.clone());
    }
    let account = account(config, inputs, plan).among(place);
    let choice = match crate::plan::chosen_before(config)? {
        Some(choice) => choice,
        None => ask_on(device, config.precision, config.threads, ChooseMemory(&account))?,
    };
    Ok(RunConfig { memory_limit: None, ..account.with(&choice) })
}

struct ChooseMemory<'a>(&'a Account<'a>);

impl DeviceTask for ChooseMemory<'_> {
    type Output = Choice;

    fn run<D: Device>(self, device: Arc<D>) -> Result<Choice> {
        crate::plan::choose(device.as_ref(), self.0)
    }
}

/// What the run will take.
fn account<'a>(config: &'a RunConfig, inputs: &'a Inputs, plan: &'a Plan) -> Account<'a> {
    let models = Models {
        model: inputs.folder.config().clone(),
        reference: inputs.reference.as_ref().map(|folder| folder.config().clone()),
        lora: inputs.adapter.as_ref().map(|adapter| adapter.settings()),
    };
    let evaluation = inputs.evaluation.as_ref().map_or(&[][..], |dataset| &dataset.pairs);
    Account::new(config, plan, models, &inputs.training.pairs, evaluation)
}

/// What must not change between the parts of a run.
fn identity(recorded: &RunConfig, inputs: &Inputs) -> RunIdentity {
    RunIdentity {
        config: recorded.to_toml(),
        model: match &inputs.adapter {
            None => hex(&inputs.folder.fingerprint()),
            Some(adapter) => format!("{}{}", hex(&inputs.folder.fingerprint()), adapter.identity()),
        },
        data: hex(&inputs.training.fingerprint),
        reference: inputs.reference.as_ref().map_or_else(String::new, |folder| hex(&folder.fingerprint())),
    }
}

fn say_finished(output: &Output, plan: &Plan, step: usize) -> Result<()> {
    let run = output.path().display();
    match step == plan.total_steps {
        true => tracing::info!(
            "the run in {run} is finished, all {step} steps of it: nothing is left to do (--epochs or --max-steps makes it \
             longer)"
        ),
        false => tracing::info!(
            "the run in {run} is finished: early stopping ended it after step {step} of {}. A larger --early-stopping, or 0, \
             lets it go on",
            plan.total_steps
        ),
    }
    if !output.is_ours() {
        return Ok(());
    }
    let report = output.path().join(REPORT_FILE);
    print_result(&format!("\n{}\nreport  {}\n", output.model_line(), report.display()))?;
    Ok(())
}

struct Training<'a> {
    team: &'a Team,
    config: &'a RunConfig,
    /// What [`RunConfig::recorded`] gives.
    recorded: RunConfig,
    inputs: Inputs,
    output: Output,
    plan: Plan,
    identity: RunIdentity,
    start: Start,
    started: Instant,
}

impl DeviceTask for Training<'_> {
    type Output = ();

    fn run<D: Device>(self, device: Arc<D>) -> Result<()> {
        let Training { team, config, recorded, inputs, output, plan, identity, start, started } = self;
        if config.memory.offload == OffloadConfig::States {
            device.check_offload()?;
        }
        let account = account(config, &inputs, &plan).among(team.ranks().place);
        let planned = crate::plan::check(device.as_ref(), &account)?;
        progress::enter(Stage::Model, 0);
        let group = join_group(team, &device)?;
        let positions = inputs.positions() + samples::MAX_NEW_TOKENS;
        let mut model = match inputs.adapter {
            None => Llama::load(device, &inputs.folder, positions)?,
            Some(_) => Llama::load_frozen(device, &inputs.folder, positions)?,
        };
        interrupt::check()?;
        // Before the adapters are there: the reference is the model without them.
        progress::enter(Stage::References, 0);
        let references = References::compute(config, &inputs, &model, (team, group.as_ref()))?;
        progress::enter(Stage::Before, 0);
        if let Some(adapter) = &inputs.adapter {
            adapter.attach(&mut model)?;
        }
        let samples = Samples::choose(&inputs)?;
        let answers_before = samples.answers(&model, &inputs)?;

        let mut run = Run::new((config, team), &inputs, &references, (plan, identity), (model, group))?;
        self_test::check_policy(&mut run.trainer, config, &inputs, &references)?;
        let before = match config.evaluation.on_start {
            true => run.evaluate(0)?,
            false => None,
        };
        let resumed = run.restore(start)?;
        let steps = interrupt::steps()?;
        output.begin(&recorded)?;
        let device = run.trainer.device().describe();
        let facts = output.facts(config, &inputs, device, run.plan.total_steps, resumed)?;
        let mut recorder = Recorder::start(&output, run.plan.total_steps, resumed)?;
        // The metrics that the others read are those that rank 0 has mended.
        team.barrier("metrics")?;
        run.recall(output.path(), resumed)?;
        let is_live = config.live && team.is_first();
        recorder.live = is_live.then(|| LivePage::start(output.path().to_path_buf(), facts.clone()));
        if let (None, Some(before)) = (resumed, &before) {
            recorder.evaluation(before)?;
            run.chooser.record(before)?;
        }

        let (last, after) = run
            .train(&output, &mut recorder, resumed.unwrap_or(0))
            .map_err(|error| guard::with_last_checkpoint(error, output.path()))
            .inspect_err(|error| output.stopped(&facts, started.elapsed(), error))?;

        progress::enter(Stage::End, last);
        recorder.check_place()?;
        // The checkpoints are written, and the metrics whole, on rank 0.
        team.barrier("trained")?;
        if team.is_first() {
            guard::check_trained(output.path(), &run.trainer, &inputs)?;
        }
        save_result(&output.model(), &mut run.trainer, &inputs)
            .map_err(|error| guard::with_last_checkpoint(error, output.path()))?;
        let saved =
            format!("what was trained is in {}; only the report is missing", output.model().display());
        let keeper = interrupt::keep_before_end(|| Some(saved));
        drop(steps);
        // Where weights are sharded no rank has a model that could answer: the report shows none.
        let answers_after = match run.trainer.has_weight_parts() {
            true => Vec::new(),
            false => samples.answers(&run.trainer.model, &inputs)?,
        };
        let notes = run.finish(&output, last)?;
        let peak = run.trainer.device().memory().peak;
        tracing::debug!("memory: {peak} bytes of device memory at the peak, {} planned", planned.peak);
        let hosts = team.gather("hosts", ranks::host())?;
        let facts = RunFacts { ranks: run.shares.facts(&hosts), ..facts };
        output.report(output::Finished {
            config,
            facts,
            comparison: before.zip(after),
            samples: samples.compared(answers_before, answers_after),
            elapsed: started.elapsed(),
            notes,
        })?;
        drop(keeper);
        // Nobody ends before rank 0 has written everything: who watches the processes would end it too.
        team.barrier("end")
    }
}

/// A run under way.
struct Run<'a, D: Device> {
    config: &'a RunConfig,
    team: &'a Team,
    inputs: &'a Inputs,
    references: &'a References,
    plan: Plan,
    identity: RunIdentity,
    trainer: Trainer<D>,
    chooser: Chooser,
    record: RunRecord,
    /// How the run was made longer, where this part of it does that.
    lengthened: Option<Lengthened>,
    /// What a step's operations follow from, and the device's peak rate in 10^12 per second, where that is known.
    peak: Option<(Trained, f64)>,
    /// What each rank did so far.
    shares: RankShares,
    /// Whether any rank asked for something in the last step.
    is_asked: bool,
}

impl<'a, D: Device> Run<'a, D> {
    fn new(
        (config, team): (&'a RunConfig, &'a Team),
        inputs: &'a Inputs,
        references: &'a References,
        (plan, identity): (Plan, RunIdentity),
        (model, group): (Llama<D>, Option<RankGroup<D>>),
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
    fn restore(&mut self, start: Start) -> Result<Option<usize>> {
        let Start::After(checkpoint, lengthened) = start else { return Ok(None) };
        checkpoint::restore(&checkpoint, &mut self.trainer)?;
        self.lengthened = lengthened;
        Ok(Some(checkpoint.state().step as usize))
    }

    /// Takes up what the run decided before the `resumed` step, from its metrics and its record.
    fn recall(&mut self, output: &Path, resumed: Option<usize>) -> Result<()> {
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
    fn train(
        &mut self,
        output: &Output,
        recorder: &mut Recorder,
        first: usize,
    ) -> Result<(usize, Option<EvalMetrics>)> {
        let mut saves = BackgroundSaves::default();
        let trained = self.take_steps(output, recorder, &mut saves, first);
        // The folder is another run's then, or gone.
        if matches!(trained, Err(Error::Io { .. })) {
            return trained;
        }
        let recorded = saves.wait().and_then(|()| self.write_record(output.path()));
        match (trained, recorded) {
            (Ok(_), Err(error)) => Err(error),
            (trained, recorded) => {
                // What ended the run is what is returned.
                recorded.unwrap_or_else(|error| tracing::error!("{error}"));
                trained
            }
        }
    }

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

    /// What signals ask of the run after this step. That of several ranks asks them all only where one said so in the step.
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
        // The one that `run.json` names stays until another one is named.
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
    fn finish(&mut self, output: &Output, last: usize) -> Result<Vec<String>> {
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

    fn step(&mut self, batch: &StepBatch) -> Result<StepMetrics> {
        progress::enter(Stage::Step, batch.step + 1);
        let started = Instant::now();
        self.trainer.request_stop(interrupt::is_anything_asked());
        let pairs =
            training_pairs(&self.inputs.training, &self.references.training, batch.pairs.iter().copied());
        let adamw = self.plan.adamw(batch.step);
        let result = self.trainer.step(&pairs, adamw, self.config.optimizer.max_grad_norm);
        let result = result.map_err(|error| self.with_rank(error, pairs.len()))?;
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

    /// Adds to a numerical error of a step with so many pairs which rank computed the first of those that are not finite.
    fn with_rank(&self, error: Error, pairs: usize) -> Error {
        let Error::Numerics { message, help } = error else { return error };
        let outcomes = self.trainer.download_outcomes(pairs).unwrap_or_default();
        let message = match outcomes.iter().position(|outcome| !outcome.loss.is_finite()) {
            Some(pair) if !self.team.is_alone() => {
                let rank = self.trainer.rank_of(pair);
                let host = self.team.host_of(rank).map_or_else(ranks::host, str::to_string);
                format!("{message}; rank {rank} on {host} computed it")
            }
            _ => message,
        };
        Error::Numerics { message, help }
    }

    /// Fails unless the new weights give a finite loss and gradient for the shortest of the pairs that they were just
    /// trained on: an update may be finite and break the model all the same.
    fn probe(&mut self, output: &Output, batch: &StepBatch) -> Result<()> {
        let tokens = |&index: &usize| self.inputs.training.pairs[index].tokens();
        let shortest: Vec<usize> = batch.pairs.iter().copied().min_by_key(tokens).into_iter().collect();
        let pairs =
            training_pairs(&self.inputs.training, &self.references.training, shortest.iter().copied());
        self.trainer.accumulate_gradients(&pairs, None).map(|_| ()).map_err(|error| {
            // The capsule is that of the next step, with this pair alone.
            self.leave_capsule(output, &StepBatch { step: batch.step + 1, pairs: shortest, ..*batch }, error)
        })
    }

    /// Whether an evaluation follows: once per epoch unless the configuration says how often, and after the last step.
    fn is_evaluation_due(&self, done: usize) -> bool {
        let every = self.config.evaluation.steps.unwrap_or_else(|| self.plan.order.steps_per_epoch());
        done.is_multiple_of(every.max(1)) || done == self.plan.total_steps
    }

    /// Metrics of the evaluation pairs after `done` steps; `None` where there are none.
    fn evaluate(&mut self, done: usize) -> Result<Option<EvalMetrics>> {
        let Some(dataset) = &self.inputs.evaluation else { return Ok(None) };
        if done > 0 {
            progress::enter(Stage::Evaluation, done);
        }
        let pairs = training_pairs(dataset, &self.references.evaluation, 0..dataset.pairs.len());
        let (outcomes, loss) = self.trainer.evaluate(&pairs)?;
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
fn save_result<D: Device>(target: &Path, trainer: &mut Trainer<D>, inputs: &Inputs) -> Result<()> {
    match &inputs.adapter {
        None => checkpoint::save_weights(target, trainer, &inputs.companions),
        Some(adapter) => adapter.save(target, trainer, inputs),
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
