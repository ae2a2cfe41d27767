//! How far this process is in its run, for the signs of life that it gives other ranks.
//!
//! The loop and everything that takes long say here where they are. A rank counts as hanging only where it says nothing for
//! long *and* others wait for it, so that a slow step, evaluation or save is never taken for a hang while it goes on.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

static POSITION: AtomicU64 = AtomicU64::new(0);
static TICKS: AtomicU64 = AtomicU64::new(0);
static WAITED: AtomicU64 = AtomicU64::new(0);

/// What a run does, in the order in which it does it; the last three take turns with each step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Ranks find each other.
    Joining,
    /// Model folder and pairs are read.
    Inputs,
    /// The model goes to the device.
    Model,
    /// Pairs are scored under the reference.
    References,
    /// Samples, tests and the evaluation before the first step.
    Before,
    /// An optimiser step.
    Step,
    /// An evaluation between steps.
    Evaluation,
    /// A checkpoint is written.
    Saving,
    /// The result is written.
    End,
}

const STAGES: [Stage; 9] = [
    Stage::Joining,
    Stage::Inputs,
    Stage::Model,
    Stage::References,
    Stage::Before,
    Stage::Step,
    Stage::Evaluation,
    Stage::Saving,
    Stage::End,
];

/// A place in the run, which grows as the run goes on; of two ranks, others wait for the one with the smaller place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Position(u64);

impl Position {
    /// `step` counts from 1 and is 0 outside the steps. Before the steps, and after them, the stage counts more than the step.
    pub(super) fn new(stage: Stage, step: usize) -> Self {
        let part = match stage {
            Stage::Step | Stage::Evaluation | Stage::Saving => 1,
            Stage::End => 2,
            _ => 0,
        };
        let step = (step as u64).min((1 << 40) - 1);
        Position(part << 56 | step << 8 | (stage as u64) << 1)
    }

    pub(super) fn waiting(self) -> Self {
        Position(self.0 | 1)
    }

    /// Whether the rank waits for others there.
    pub fn is_waiting(self) -> bool {
        self.0 & 1 == 1
    }

    /// The optimiser step, from 1; 0 before the first.
    pub fn step(self) -> u64 {
        self.0 >> 8 & ((1 << 40) - 1)
    }

    /// How many times the usual time this place may take. Files of any size are read or written in some stages, without a word
    /// in between; everything else says that it goes on with each micro-batch.
    pub fn patience(self) -> u32 {
        match self.stage() {
            Stage::Joining | Stage::References | Stage::Step | Stage::Evaluation => 1,
            Stage::Inputs | Stage::Model | Stage::Before | Stage::Saving | Stage::End => 6,
        }
    }

    fn stage(self) -> Stage {
        STAGES.get((self.0 >> 1 & 0x7f) as usize).copied().unwrap_or(Stage::Joining)
    }
}

/// The end of a sentence: `in step 17`.
impl fmt::Display for Position {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let step = self.step();
        match self.stage() {
            Stage::Joining => formatter.write_str("before the ranks had found each other"),
            Stage::Inputs => formatter.write_str("while model and pairs were read"),
            Stage::Model => formatter.write_str("while the model was loaded"),
            Stage::References => formatter.write_str("while pairs were scored under the reference"),
            Stage::Before => formatter.write_str("before the first step"),
            Stage::Step => write!(formatter, "in step {step}"),
            Stage::Evaluation => write!(formatter, "in the evaluation after step {step}"),
            Stage::Saving => write!(formatter, "while the checkpoint of step {step} was saved"),
            Stage::End => write!(formatter, "after the last step, {step}"),
        }
    }
}

/// A rank's word about itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Where it is.
    pub position: Position,
    /// Grows whenever something gets done.
    pub ticks: u64,
}

/// This process begins `stage`, after `step` steps or in that step.
pub fn enter(stage: Stage, step: usize) {
    POSITION.store(Position::new(stage, step).0, Ordering::SeqCst);
    tick();
}

/// Something got done: called from within whatever takes long.
pub fn tick() {
    TICKS.fetch_add(1, Ordering::Relaxed);
}

/// Where this process is now.
pub fn now() -> Progress {
    Progress { position: Position(POSITION.load(Ordering::SeqCst)), ticks: TICKS.load(Ordering::Relaxed) }
}

/// How long this process has waited for others, or for its device, since it began.
pub fn waited() -> Duration {
    Duration::from_nanos(WAITED.load(Ordering::Relaxed))
}

/// As long as this lives, the process waits for other ranks.
#[derive(Debug)]
#[must_use]
pub struct Waiting {
    since: Instant,
    before: Position,
}

/// This process begins to wait for other ranks.
pub fn wait() -> Waiting {
    let before = now().position;
    POSITION.store(before.waiting().0, Ordering::SeqCst);
    Waiting { since: Instant::now(), before }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let nanoseconds = u64::try_from(self.since.elapsed().as_nanos()).unwrap_or(u64::MAX);
        WAITED.fetch_add(nanoseconds, Ordering::Relaxed);
        // Unless another stage has begun.
        let waiting = self.before.waiting().0;
        let _ = POSITION.compare_exchange(waiting, self.before.0, Ordering::SeqCst, Ordering::SeqCst);
        tick();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_grow_as_the_run_goes_on() {
        let run = [
            (Stage::Joining, 0),
            (Stage::Inputs, 0),
            (Stage::Model, 0),
            (Stage::References, 0),
            (Stage::Before, 0),
            (Stage::Step, 1),
            (Stage::Evaluation, 1),
            (Stage::Saving, 1),
            (Stage::Step, 2),
            (Stage::Step, 300),
            (Stage::Saving, 300),
            (Stage::End, 300),
        ];
        let places: Vec<Position> = run
            .iter()
            .flat_map(|&(stage, step)| [Position::new(stage, step), Position::new(stage, step).waiting()])
            .collect();
        assert!(places.is_sorted() && places.windows(2).all(|two| two[0] != two[1]), "{places:?}");
        assert_eq!(Position::new(Stage::Step, 17).waiting().to_string(), "in step 17");
        assert_eq!(Position::new(Stage::Evaluation, 300).step(), 300);
    }
}
