//! Refuses to train on a NaN, and says which pair brought it.

use super::trainer::TrainingPair;
use crate::error::{Error, Result};
use crate::objective::PairOutcome;

/// Fails unless loss and gradient norm (`None` in an evaluation) are finite. Called before an update and before a
/// checkpoint, so that what is on the disk is from before.
pub fn check_finite(
    loss: f64,
    gradient_norm: Option<f32>,
    pairs: &[TrainingPair<'_>],
    outcomes: &[PairOutcome],
) -> Result<()> {
    if loss.is_finite() && gradient_norm.is_none_or(f32::is_finite) {
        return Ok(());
    }
    let numbers = match gradient_norm {
        Some(norm) => format!("loss {loss}, gradient norm {norm}"),
        None => format!("loss {loss} in the evaluation"),
    };
    let culprit = pairs.iter().zip(outcomes).find(|(_, outcome)| !outcome.loss.is_finite());
    let place = match culprit {
        Some((pair, _)) => format!("first in record {} of the data", pair.pair.record + 1),
        None => "in no single pair's loss".to_string(),
    };
    Err(Error::numerics(
        format!("{numbers}: not a number to train on ({place})"),
        "lower --learning-rate, set --max-grad-norm, or look at that record; checkpoints and models saved earlier are \
         as they were",
    ))
}
