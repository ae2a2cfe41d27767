//! Where a run begins: at its first step, after a checkpoint, or nowhere, because it is finished.

use std::path::{Path, PathBuf};

use super::checkpoint;
use super::plan::Plan;
use crate::checkpoint::run_state::{self, RunIdentity};
use crate::checkpoint::{Checkpoint, StoredTensor, atomic};
use crate::config::{RESOLVED_FILE, RunConfig};
use crate::error::{Error, Result};
use crate::report::{EVENTS_FOLDER, FACTS_FILE, METRICS_FILE, REPORT_FILE, RunFacts, RunState};

/// What a run without a checkpoint may have left. Such a run can begin again and loses nothing.
const LEFT_BY_A_START: [&str; 6] =
    [RESOLVED_FILE, METRICS_FILE, EVENTS_FOLDER, run_state::FOLDER, "reference-cache", FACTS_FILE];

/// The beginning of a run.
#[derive(Debug)]
pub enum Start {
    Fresh,
    After(Box<Checkpoint>),
    /// All steps are done, and model and report are written.
    Finished,
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
        match examine(&path, plan, identity, tensors) {
            Ok(checkpoint) => {
                let step = checkpoint.state().step as usize;
                set_aside(damaged, step)?;
                let is_finished = step == plan.total_steps && model.exists() && has_its_report(run);
                if is_finished {
                    return Ok(Start::Finished);
                }
                tracing::info!("resuming after step {step} of {}", plan.total_steps);
                return Ok(Start::After(Box::new(checkpoint)));
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

/// Whether the report of the run's end is written. A run without facts, by an earlier version, has no other report.
fn has_its_report(run: &Path) -> bool {
    let is_of_the_end = RunFacts::read_or_warn(run).is_none_or(|facts| facts.state == RunState::Finished);
    is_of_the_end && run.join(REPORT_FILE).exists()
}

/// Opens a checkpoint and makes sure that it is one of this run.
fn examine(path: &Path, plan: &Plan, identity: &RunIdentity, tensors: &[StoredTensor]) -> Result<Checkpoint> {
    let checkpoint = Checkpoint::open(path)?;
    checkpoint.check_identity(identity, checkpoint::FREE_OPTIONS)?;
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
    Ok(checkpoint)
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
