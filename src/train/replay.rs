//! `train --replay CAPSULE`: a step that failed, taken once more and looked at closely. Nothing of the run is changed.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::capsule::Capsule;
use super::inputs::Inputs;
use super::plan::Plan;
use super::reference::References;
use super::steps::{Run, training_pairs};
use super::trainer::{Trace, TrainingPair};
use super::{adapter, checkpoint, identity, located, samples};
use crate::checkpoint::run_state::{self, RunIdentity};
use crate::checkpoint::{Checkpoint, StoredTensor};
use crate::config::RunConfig;
use crate::device::{Device, DeviceTask, run_on};
use crate::error::{Error, Result};
use crate::model::Llama;
use crate::ranks::Team;
use crate::report::{Progress, print_result};

/// Repeats the step of the capsule in folder `path`; `config` are the capsule's own options, but for the device and threads.
///
/// # Errors
/// [`Error::Config`] where model or pairs are no longer those of the run; those of the stages of a run.
pub fn run(config: &RunConfig, path: &Path) -> Result<()> {
    let capsule = Capsule::read(path)?;
    let config = &located(config)?;
    let inputs = Inputs::load(config)?;
    let config = &RunConfig { limits: inputs.limits, ..config.clone() };
    let plan = Plan::new(config, inputs.training.pairs.len());
    let recorded = config.recorded(inputs.training.pairs.len())?;
    let identity = identity(&recorded, &inputs);
    check_same(path, &capsule, &identity, &inputs)?;
    let tensors = checkpoint::stored_tensors(&adapter::layout(&inputs), config.memory.states);
    let start = find_start(path, &capsule, &tensors)?;
    let (device, precision, threads) = (config.device, config.precision, config.threads);
    let capsule_path = path.to_path_buf();
    run_on(
        device,
        precision,
        threads,
        Replay { config, inputs, plan, identity, capsule, capsule_path, start },
    )
}

struct Replay<'a> {
    config: &'a RunConfig,
    inputs: Inputs,
    plan: Plan,
    identity: RunIdentity,
    capsule: Capsule,
    capsule_path: PathBuf,
    /// `None`: the starting model.
    start: Option<Checkpoint>,
}

impl DeviceTask for Replay<'_> {
    type Output = ();

    fn run<D: Device>(self, device: Arc<D>) -> Result<()> {
        let Replay { config, inputs, plan, identity, capsule, capsule_path, start } = self;
        let mut model = Llama::load(device, &inputs.folder, inputs.positions() + samples::MAX_NEW_TOKENS)?;
        let team = &Team::alone();
        let references = References::compute(config, &inputs, &model, (team, None))?;
        if let Some(adapter) = &inputs.adapter {
            adapter.attach(&mut model)?;
        }
        let mut run = Run::new((config, team), &inputs, &references, (plan, identity), (model, None))?;
        let mut done = 0;
        let mut from = "the starting model".to_string();
        if let Some(checkpoint) = &start {
            checkpoint::restore(checkpoint, &mut run.trainer)?;
            done = checkpoint.state().step as usize;
            from = checkpoint.path().display().to_string();
        }
        let again = capsule.step - 1 - done;
        let mut progress = Progress::start("steps before it", "steps", again, 0);
        for batch in run.plan.order.from_step(done).take(again) {
            let metrics = run.step(&batch)?;
            progress.advance(1, || metrics.brief());
        }
        drop(progress);
        let indices = capsule.pairs.iter().map(|pair| pair.index);
        let pairs = training_pairs(&inputs.training, &references.training, indices);
        let trace = run.trainer.trace(&pairs, capsule.step as u32)?;
        print_result(&describe(&capsule, &capsule_path, (&from, again), (&pairs, &trace)))?;
        Ok(())
    }
}

/// Fails where the model or the pairs are no longer what they were.
fn check_same(path: &Path, capsule: &Capsule, now: &RunIdentity, inputs: &Inputs) -> Result<()> {
    let then = &capsule.identity;
    let mut differing = Vec::new();
    for (what, then, now) in [
        ("the starting model's weights", &then.model, &now.model),
        ("the pairs", &then.data, &now.data),
        ("the reference model's weights", &then.reference, &now.reference),
    ] {
        if then != now {
            differing.push(what);
        }
    }
    let holds = capsule.pairs.iter().all(|pair| {
        let found = inputs.training.pairs.get(pair.index);
        found.is_some_and(|found| {
            let now = [&found.prompt, &found.chosen, &found.rejected];
            pair.tokens.iter().zip(now).all(|(then, now)| **then == **now)
        })
    });
    if differing.is_empty() && !holds {
        differing.push("the tokens of the step's pairs");
    }
    if differing.is_empty() {
        return Ok(());
    }
    Err(Error::config(
        format!("{} cannot be repeated: {} changed since", path.display(), differing.join(" and ")),
        "restore the files that the run read; the capsule's resolved.toml names them",
    ))
}

/// The newest sound checkpoint before the capsule's step: its own copy, or one of its run.
fn find_start(path: &Path, capsule: &Capsule, tensors: &[StoredTensor]) -> Result<Option<Checkpoint>> {
    // The run's folder may have been moved, with its capsules.
    let beside = path.parent().and_then(Path::parent);
    let folders = [Some(path), beside, Some(&capsule.run)];
    for folder in folders.into_iter().flatten() {
        for path in run_state::newest_first(folder)? {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if run_state::step_of(name).is_none_or(|step| step as usize >= capsule.step) {
                continue;
            }
            let opened = Checkpoint::open(&path).and_then(|checkpoint| {
                checkpoint.check_tensors(tensors)?;
                Ok(checkpoint)
            });
            match opened {
                Ok(checkpoint) if is_of_run(&checkpoint, capsule) => return Ok(Some(checkpoint)),
                Ok(_) => {}
                Err(error) => tracing::warn!("{error}; an earlier checkpoint is used"),
            }
        }
    }
    Ok(None)
}

fn is_of_run(checkpoint: &Checkpoint, capsule: &Capsule) -> bool {
    let (then, now) = (&checkpoint.state().identity, &capsule.identity);
    (&then.model, &then.data, &then.reference) == (&now.model, &now.data, &now.reference)
}

fn describe(
    capsule: &Capsule,
    path: &Path,
    (from, again): (&str, usize),
    (pairs, trace): (&[TrainingPair<'_>], &Trace),
) -> String {
    let mut text = format!(
        "capsule  {}: step {} of {}\nfound    {}\nfrom     {from}, {again} steps taken again\n\n",
        path.display(),
        capsule.step,
        capsule.of,
        capsule.found
    );
    text.push_str(&table(pairs, trace));
    let first = match &trace.first {
        None => "every number of the step is finite".to_string(),
        Some(broken) => {
            let record = broken.pair.and_then(|pair| pairs.get(pair));
            let record = record
                .map_or(String::new(), |pair| format!(", in record {} of the data", pair.pair.record + 1));
            format!("{} is {}{record}", broken.place, broken.value)
        }
    };
    let same = capsule.pairs.iter().zip(&trace.outcomes).all(|(then, now)| {
        then.loss == now.loss.to_string()
            && then.logps == [now.logp_chosen, now.logp_rejected].map(|logp| logp.to_string())
    });
    let repeated = match (trace.first.is_some(), same) {
        (true, true) => "the step failed again, with the same log-probs and losses",
        (true, false) => {
            "the step failed again, with other log-probs or losses than recorded (another device?)"
        }
        (false, _) => {
            "the step did not fail again: another device, another version, or a fault of the machine that ran it"
        }
    };
    text.push_str(&format!(
        "\nloss     {}\ngradient {} (norm before clipping)\nfirst    {first}\nrepeated {repeated}\n",
        trace.loss, trace.gradient_norm
    ));
    text
}

/// The step's pairs with their tokens, log-probs and losses, a line each.
fn table(pairs: &[TrainingPair<'_>], trace: &Trace) -> String {
    let mut text = format!(
        "{:>8} {:>7} {:>7} {:>8} {:>14} {:>14} {:>14} {:>14} {:>14}\n",
        "record",
        "prompt",
        "chosen",
        "rejected",
        "logp chosen",
        "logp rejected",
        "ref. chosen",
        "ref. rejected",
        "loss"
    );
    for (pair, outcome) in pairs.iter().zip(&trace.outcomes) {
        let tokens = [&pair.pair.prompt, &pair.pair.chosen, &pair.pair.rejected].map(|ids| ids.len());
        text.push_str(&format!(
            "{:>8} {:>7} {:>7} {:>8} {:>14} {:>14} {:>14} {:>14} {:>14}\n",
            pair.pair.record + 1,
            tokens[0],
            tokens[1],
            tokens[2],
            outcome.logp_chosen,
            outcome.logp_rejected,
            pair.reference.logp_chosen,
            pair.reference.logp_rejected,
            outcome.loss
        ));
    }
    text
}
