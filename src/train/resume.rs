//! Where a run begins: at its first step, after a checkpoint, or nowhere, because it is finished.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::chooser::Chooser;
use super::plan::Plan;
use super::record::{Lengthened, RECORD_FILE};
use super::{capsule, checkpoint};
use crate::checkpoint::run_state::{self, RunIdentity};
use crate::checkpoint::{Checkpoint, StoredTensor, atomic};
use crate::config::{RESOLVED_FILE, RunConfig};
use crate::error::{Error, Result};
use crate::ranks::Team;
use crate::report::{EVENTS_FOLDER, FACTS_FILE, History, METRICS_FILE, REPORT_FILE, RunFacts, RunState};

/// What a run without a checkpoint may have left. Such a run can begin again and loses nothing.
const LEFT_BY_A_START: [&str; 8] = [
    RESOLVED_FILE,
    METRICS_FILE,
    EVENTS_FOLDER,
    run_state::FOLDER,
    "reference-cache",
    RECORD_FILE,
    FACTS_FILE,
    capsule::FOLDER,
];

/// Options that say how long the run is. A run may be made longer, and what that does is said.
const LENGTH_OPTIONS: [&str; 2] = ["epochs", "max_steps"];

/// The beginning of a run.
#[derive(Debug)]
pub enum Start {
    Fresh,
    /// After a checkpoint; with what was changed, where the run was made longer.
    After(Box<Checkpoint>, Option<Lengthened>),
    /// The run ended, and model and report are written.
    Finished(usize),
}

/// Finds the beginning of `config`'s run in its output folder. `tensors` are those of [`checkpoint::stored_tensors`].
///
/// A checkpoint that is damaged or contradicts itself is passed over for the one before, with a warning, and set aside.
///
/// # Errors
/// [`Error::Config`] where the folder holds another run or something else; [`Error::Model`] where it holds checkpoints
/// and none is sound.
pub fn find(
    config: &RunConfig,
    model: &Path,
    plan: &Plan,
    identity: &RunIdentity,
    tensors: &[StoredTensor],
) -> Result<Start> {
    if !config.resume {
        return Ok(Start::Fresh);
    }
    let run = &config.output;
    let mut damaged = Vec::new();
    for path in run_state::newest_first(run)? {
        match examine(&path, config, plan, identity, tensors) {
            Ok((checkpoint, lengthened)) => {
                let step = checkpoint.state().step as usize;
                set_aside(damaged, step)?;
                let is_over = step == plan.total_steps || is_stopped_early(config, step);
                if is_over && model.exists() && has_its_report(run) {
                    return Ok(Start::Finished(step));
                }
                tracing::info!("resuming after step {step} of {}", plan.total_steps);
                if let Some(lengthened) = &lengthened {
                    tracing::warn!("{}", lengthened.consequence);
                }
                return Ok(Start::After(Box::new(checkpoint), lengthened));
            }
            Err(error @ Error::Config { .. }) => return Err(error),
            Err(error) => damaged.push((path, error)),
        }
    }
    match damaged.len() {
        0 => fresh(run),
        1 => Err(damaged.remove(0).1),
        _ => Err(none_is_sound(run, &damaged)),
    }
}

/// What rank 0 tells the others of the beginning that it found.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
enum Told {
    Fresh,
    After(usize),
    Finished(usize),
}

/// As [`find`], the same on all ranks: rank 0 looks and mends, and the others open what it found.
///
/// # Errors
/// As [`find`]; [`Error::Rank`] where another rank is lost.
pub fn find_together(
    team: &Team,
    config: &RunConfig,
    model: &Path,
    plan: &Plan,
    (identity, tensors): (&RunIdentity, &[StoredTensor]),
) -> Result<Start> {
    let mut found = None;
    let told = team.from_first("start", || {
        let start = find(config, model, plan, identity, tensors)?;
        let told = match &start {
            Start::Fresh => Told::Fresh,
            Start::After(checkpoint, _) => Told::After(checkpoint.state().step as usize),
            Start::Finished(step) => Told::Finished(*step),
        };
        found = Some(start);
        Ok(told)
    })?;
    if let Some(start) = found {
        return Ok(start);
    }
    Ok(match told {
        Told::Fresh => Start::Fresh,
        Told::Finished(step) => Start::Finished(step),
        Told::After(step) => {
            let folder = run_state::folder_of(&config.output, step);
            let (checkpoint, lengthened) = examine(&folder, config, plan, identity, tensors)?;
            Start::After(Box::new(checkpoint), lengthened)
        }
    })
}

/// Whether early stopping ended the run after `step`. A line of metrics that a kill cut short is read as none: the loop looks
/// again, once the file is mended.
fn is_stopped_early(config: &RunConfig, step: usize) -> bool {
    let history = History::read(&config.output).unwrap_or_default();
    Chooser::after(&config.evaluation, &history, step, |_| true).is_over()
}

/// What is said of a run that goes on after `step` with more steps than before.
pub fn lengthened(step: usize, before: &Plan, now: &Plan) -> Lengthened {
    let (from, to) = (before.total_steps, now.total_steps);
    let rate = |plan: &Plan| plan.adamw(step).learning_rate;
    let other = match step < from {
        true => format!("the shorter run had {:.3e} for it", rate(before)),
        false => {
            format!("the shorter run ended with {:.3e}", before.adamw(from.saturating_sub(1)).learning_rate)
        }
    };
    Lengthened {
        after_step: step,
        from_steps: from,
        to_steps: to,
        consequence: format!(
            "the run is made longer, from {from} steps to {to}. The steps that are done keep the learning rates they had; \
             each step from here has that of a run of {to} steps from its start, with {} steps of warm-up: step {} has {:.3e}, \
             and {other}. The result is not that of a run that was {to} steps long from the start",
            now.warmup_steps,
            step + 1,
            rate(now)
        ),
    }
}

/// What is changed where the run of `checkpoint` had fewer steps than `plan`; `None` where it had as many or more.
fn longer(checkpoint: &Checkpoint, config: &RunConfig, plan: &Plan) -> Option<Lengthened> {
    let saved: toml::Table = checkpoint.state().identity.config.parse().ok()?;
    let number = |name: &str| saved.get(name);
    let max_steps = number("max_steps").and_then(toml::Value::as_integer).map(|steps| steps as usize);
    let epochs = number("epochs").and_then(toml::Value::as_float).unwrap_or(config.schedule.epochs);
    let before = Plan::of_length(config, plan.pairs(), epochs, max_steps);
    let step = checkpoint.state().step as usize;
    (before.total_steps < plan.total_steps).then(|| lengthened(step, &before, plan))
}

/// Whether the report of the run's end is written. A run without facts, by an earlier version, has no other report.
fn has_its_report(run: &Path) -> bool {
    let is_of_the_end = RunFacts::read_or_warn(run).is_none_or(|facts| facts.state == RunState::Finished);
    is_of_the_end && run.join(REPORT_FILE).exists()
}

/// Opens a checkpoint and makes sure that it is one of this run.
fn examine(
    path: &Path,
    config: &RunConfig,
    plan: &Plan,
    identity: &RunIdentity,
    tensors: &[StoredTensor],
) -> Result<(Checkpoint, Option<Lengthened>)> {
    let checkpoint = Checkpoint::open(path)?;
    let lengthened = longer(&checkpoint, config, plan);
    let mut free = checkpoint::FREE_OPTIONS.to_vec();
    free.extend(lengthened.iter().flat_map(|_| LENGTH_OPTIONS));
    checkpoint.check_identity(identity, &free)?;
    let state = checkpoint.state();
    let contradicts = |what: String| {
        Err(Error::model(path, what, "state.json was changed after it was written: use another checkpoint"))
    };
    let step = state.step as usize;
    if step > plan.total_steps {
        return contradicts(format!("is of step {step}, beyond the {} steps of the run", plan.total_steps));
    }
    let expected = plan.state(step, &state.identity);
    if *state != expected {
        return contradicts(format!(
            "contradicts its run: after step {step} the epoch is {}, {} pairs were seen and the seed is {}; it says {}, \
             {} and {}",
            expected.epoch,
            expected.pairs_seen,
            expected.rng.seed,
            state.epoch,
            state.pairs_seen,
            state.rng.seed
        ));
    }
    checkpoint.check_tensors(tensors)?;
    Ok((checkpoint, lengthened))
}

/// Warns of the checkpoints after `step` that are not used, and gives them other names.
fn set_aside(damaged: Vec<(PathBuf, Error)>, step: usize) -> Result<()> {
    for (path, error) in damaged {
        let aside = run_state::set_aside(&path)?;
        tracing::warn!(
            "{error}; it is kept as {}, and the run goes on from step {step}: the steps after that are done again",
            aside.display()
        );
    }
    Ok(())
}

fn none_is_sound(run: &Path, damaged: &[(PathBuf, Error)]) -> Error {
    let reasons: Vec<String> = damaged.iter().map(|(_, error)| error.to_string()).collect();
    Error::model(
        &run.join(run_state::FOLDER),
        format!("none of the {} checkpoints can be resumed: {}", damaged.len(), reasons.join("; ")),
        "use a copy of them, or start the run again with another --output",
    )
}

/// Without a checkpoint a run begins, unless the folder holds something that is not its own.
fn fresh(run: &Path) -> Result<Start> {
    let mut entries = Vec::new();
    for path in atomic::list(run)? {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_string();
        if !name.starts_with('.') {
            entries.push(name);
        }
    }
    // The page of a run that stopped stands beside its facts; a page alone is somebody's.
    let has_facts = entries.iter().any(|name| name == FACTS_FILE);
    let is_left = |name: &String| {
        LEFT_BY_A_START.contains(&name.as_str())
            || (has_facts && name == REPORT_FILE)
            || name.split_once(".partial-").is_some_and(|(stem, _)| LEFT_BY_A_START.contains(&stem))
    };
    if let Some(other) = entries.iter().find(|name| !is_left(name)) {
        return Err(Error::config(
            format!("{} has no checkpoint to resume from, and is not empty: it holds {other}", run.display()),
            "give the folder of the run to go on with, or an empty one; nothing was changed",
        ));
    }
    match entries.is_empty() {
        true => tracing::info!("{} is empty: the run starts at its first step", run.display()),
        false => tracing::warn!("{} has no checkpoint yet: the run begins again", run.display()),
    }
    Ok(Start::Fresh)
}
