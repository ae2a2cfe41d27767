//! Refuses to train on a NaN, and says which pair brought it.

use super::trainer::TrainingPair;
use crate::error::{Error, Result};
use crate::objective::PairOutcome;

/// Fails unless loss and gradient norm are finite. Called before the update, so the weights are still sound.
pub fn check_finite(
    loss: f64,
    gradient_norm: f32,
    pairs: &[TrainingPair<'_>],
    outcomes: &[PairOutcome],
) -> Result<()> {
    if loss.is_finite() && gradient_norm.is_finite() {
        return Ok(());
    }
    let culprit = pairs.iter().zip(outcomes).find(|(_, outcome)| !outcome.loss.is_finite());
    let place = match culprit {
        Some((pair, _)) => format!("first in record {} of the data", pair.pair.record + 1),
        None => "in no single pair's loss".to_string(),
    };
    Err(Error::numerics(
        format!("loss {loss}, gradient norm {gradient_norm}: not a number to train on ({place})"),
        "lower --learning-rate, set --max-grad-norm, or look at that record; the weights were not updated, and the \
         last checkpoint is sound",
    ))
}
