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
mod steps;
mod trainer;

pub(crate) use lock::RunLock;

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
pub use trainer::{LoadedModel, RankStep, StepResult, Trainer, TrainingPair, Workload};

use crate::checkpoint::run_state::RunIdentity;
use crate::config::{MemoryLimit, OffloadConfig, RunConfig};
use crate::device::{Device, DeviceChoice, DeviceTask, GroupId, GroupPlace, ask_on, run_on};
use crate::error::{Error, Result};
use crate::foreign::hub;
use crate::interrupt::{self, Keeper};
use crate::model::Llama;
use crate::plan::{Account, Choice, FreeMemory, Models};
use crate::ranks::progress::{self, Stage};
use crate::ranks::{self, Fingerprints, LauncherKind, RankGroup, Ranks, Team};
use crate::report::{EvalMetrics, LivePage, REPORT_FILE, RunFacts, print_result};
use output::Output;
use recorder::Recorder;
use resume::Start;
use samples::Samples;
use steps::{Run, save_result};

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
    let config = &with_chosen_memory(team, (config, device), &inputs, &plan)?;
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
fn join_group<D: Device>(team: &Team, device: &Arc<D>) -> Result<Option<Arc<RankGroup<D>>>> {
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
    Ok(Some(Arc::new(RankGroup { device: Arc::clone(device), communicator })))
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

/// The configuration with what `--memory auto` chooses, or chose in an earlier part of the run: the same on all ranks.
fn with_chosen_memory(
    team: &Team,
    (config, device): (&RunConfig, DeviceChoice),
    inputs: &Inputs,
    plan: &Plan,
) -> Result<RunConfig> {
    let chooses = config.memory_limit == Some(MemoryLimit::Auto);
    let before = if chooses { crate::plan::chosen_before(config)? } else { None };
    if !chooses || before.is_some() {
        // Ranks whose options differ from these take part too: `check_fingerprints` tells the difference later.
        least_free_memory(team, None)?;
    }
    if !chooses {
        return Ok(config.clone());
    }
    // The last rank holds the most, because it keeps what the cut into equal pieces leaves over.
    let ranks = team.ranks().place.ranks;
    let account = account(config, inputs, plan).among(GroupPlace { rank: ranks - 1, ranks });
    let choice = match before {
        Some(choice) => choice,
        None => ask_on(device, config.precision, config.threads, ChooseMemory { team, account: &account })?,
    };
    Ok(RunConfig { memory_limit: None, ..account.with(&choice) })
}

/// What every rank has that chooses by its free memory.
fn least_free_memory(team: &Team, ours: Option<FreeMemory>) -> Result<FreeMemory> {
    team.agree("free memory", ours, |all| Ok(FreeMemory::least(all.iter().flatten())))
}

struct ChooseMemory<'a> {
    team: &'a Team,
    account: &'a Account<'a>,
}

impl DeviceTask for ChooseMemory<'_> {
    type Output = Choice;

    fn run<D: Device>(self, device: Arc<D>) -> Result<Choice> {
        let ours = FreeMemory::of_rank(device.as_ref(), self.team.ranks().local_ranks)?;
        let free = least_free_memory(self.team, Some(ours))?;
        crate::plan::choose(device.as_ref(), self.account, free)
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
        let (model, references) = load_model(config, &inputs, &device, (team, group.as_ref()))?;
        progress::enter(Stage::Before, 0);
        let has_parts = model.has_parts();
        let mut model = model.into_model();
        if let Some(adapter) = &inputs.adapter {
            adapter.attach(&mut model)?;
        }
        let samples = Samples::choose(&inputs)?;
        let answers_before = answers(&samples, &model, &inputs, has_parts)?;

        let mut run = Run::new((config, team), &inputs, &references, (plan, identity), (model, group))?;
        self_test::check_policy(&mut run.trainer, config, &inputs, &references)?;
        let before = match config.evaluation.on_start {
            true => run.evaluate(0)?,
            false => None,
        };
        let resumed = run.restore(start)?;
        let steps = interrupt::steps()?;
        let (mut recorder, facts) = begin_record(&mut run, (&output, &recorded), resumed, before.as_ref())?;

        let (last, after) = run
            .train(&output, &mut recorder, resumed.unwrap_or(0))
            .map_err(|error| guard::with_last_checkpoint(error, output.path()))
            .inspect_err(|error| output.stopped(&facts, started.elapsed(), error))?;

        progress::enter(Stage::End, last);
        recorder.check_place()?;
        let keeper = save_trained(&mut run, &output)?;
        drop(steps);
        let has_parts = run.trainer.has_weight_parts();
        let answers_after = answers(&samples, &run.trainer.model, &inputs, has_parts)?;
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
        // No rank ends before rank 0 has written everything, because a launcher may end them all when one has ended.
        team.barrier("end")
    }
}

/// Loads the model and scores every pair with the reference, which without a model of its own is this one before any adapter is
/// attached.
fn load_model<D: Device>(
    config: &RunConfig,
    inputs: &Inputs,
    device: &Arc<D>,
    (team, group): (&Team, Option<&Arc<RankGroup<D>>>),
) -> Result<(LoadedModel<D>, References)> {
    let positions = inputs.positions() + samples::MAX_NEW_TOKENS;
    let sharded = LoadedModel::cut_among(group, &config.memory);
    // An adapter's base is only read.
    let is_frozen = inputs.adapter.is_some();
    let mut model = LoadedModel::load(device, &inputs.folder, (positions, is_frozen), sharded)?;
    // The samples end where the answers of the saved model do.
    model.end_with(inputs.encoder.end_tokens()?);
    interrupt::check()?;
    progress::enter(Stage::References, 0);
    let references = References::compute(config, inputs, &mut model, (team, group))?;
    Ok((model, references))
}

/// The model's answers for the report; none where weights are sharded, because then no rank has a whole model.
fn answers<D: Device>(
    samples: &Samples,
    model: &Llama<D>,
    inputs: &Inputs,
    has_parts: bool,
) -> Result<Vec<String>> {
    if has_parts {
        return Ok(Vec::new());
    }
    samples.answers(model, inputs)
}

/// Opens the run's record, after `resumed` steps of an earlier part or with the evaluation `before` the first step.
fn begin_record<D: Device>(
    run: &mut Run<'_, D>,
    (output, recorded): (&Output, &RunConfig),
    resumed: Option<usize>,
    before: Option<&EvalMetrics>,
) -> Result<(Recorder, RunFacts)> {
    output.begin(recorded)?;
    let (device, total_steps) = (run.trainer.device().describe(), run.plan.total_steps);
    let facts = output.facts(run.config, run.inputs, device, total_steps, resumed)?;
    let mut recorder = Recorder::start(output, total_steps, resumed)?;
    // The metrics that the others read are those that rank 0 has mended.
    run.team.barrier("metrics")?;
    run.recall(output.path(), resumed)?;
    let is_live = run.config.live && run.team.is_first();
    recorder.live = is_live.then(|| LivePage::start(output.path().to_path_buf(), facts.clone()));
    if let (None, Some(before)) = (resumed, before) {
        recorder.evaluation(before)?;
        run.chooser.record(before)?;
    }
    Ok((recorder, facts))
}

/// Writes what was trained, after a look at all of its values. Until the returned value is dropped, a signal's message says where
/// that is.
fn save_trained<D: Device>(run: &mut Run<'_, D>, output: &Output) -> Result<Keeper> {
    // The checkpoints are written, and the metrics whole, on rank 0.
    run.team.barrier("trained")?;
    if run.team.is_first() {
        guard::check_trained(output.path(), &run.trainer, run.inputs)?;
    }
    save_result(&output.model(), &mut run.trainer, run.inputs)
        .map_err(|error| guard::with_last_checkpoint(error, output.path()))?;
    let saved = format!("what was trained is in {}; only the report is missing", output.model().display());
    Ok(interrupt::keep_before_end(|| Some(saved)))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
