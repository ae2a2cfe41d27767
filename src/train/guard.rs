//! Refuses to train on a NaN, to save one, and to call a run trained that changed nothing.

use std::path::Path;

use half::bf16;

use super::checkpoint;
use super::inputs::Inputs;
use super::plan::Plan;
use super::trainer::{Trainer, TrainingPair};
use crate::checkpoint::run_state;
use crate::config::RunConfig;
use crate::device::{Device, RawValues, StorageType};
use crate::error::{Error, Result};
use crate::objective::PairOutcome;
use crate::report::History;

/// Values compared at a time.
const PIECE: usize = 1 << 20;

/// Fails unless loss and gradient norm (`None` where no gradient was asked for) are finite. Called before an update and
/// before a checkpoint, so that the disk holds only what was saved before the failure.
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
        None => format!("loss {loss} of the weights as they are now"),
    };
    let culprit = pairs.iter().zip(outcomes).find(|(_, outcome)| !outcome.loss.is_finite());
    let place = match culprit {
        Some((pair, _)) => format!("first in record {} of the data", pair.pair.record + 1),
        None => "in no single pair's loss".to_string(),
    };
    Err(Error::numerics(
        format!("{numbers}: not a number to train on ({place})"),
        "lower --learning-rate, set --max-grad-norm, or look at that record",
    ))
}

/// Fails where `values`, to be saved from index `offset` of tensor `name` on, are not all finite.
pub fn check_saved(name: &str, offset: usize, values: &[f32]) -> Result<()> {
    // Folded without a branch, so that the compiler vectorises it.
    if values.iter().fold(true, |finite, value| finite & value.is_finite()) {
        return Ok(());
    }
    let index = offset + values.iter().position(|value| !value.is_finite()).unwrap_or(0);
    Err(Error::numerics(
        format!("tensor `{name}` is not finite from index {index} on after the last update: it is not saved"),
        "lower --learning-rate, --weight-decay or --max-grad-norm",
    ))
}

/// A learning rate is far from the recipe's where it is less than this share of it.
const FAR_BELOW: f64 = 1.0 / 20.0;
/// And where it is more than this many times as large: full training of small models takes some 50 times as much as the defaults.
const FAR_ABOVE: f64 = 100.0;

/// Warns of numbers that can be meant and rarely are, with what to try.
pub fn warn_of_numbers(config: &RunConfig, plan: &Plan) {
    let objective = config.objective.descriptor();
    let (rate, usual) = (config.optimizer.learning_rate, objective.learning_rate);
    let name = objective.name;
    if rate > FAR_ABOVE * usual {
        tracing::warn!(
            "the learning rate {rate:.1e} is far above the {usual:.1e} that is usual for {name}. AdamW moves each weight by about \
             that much in a step; where the loss jumps or the answers fall apart, try --learning-rate {:.0e}",
            10.0 * usual
        );
    }
    if rate < FAR_BELOW * usual {
        tracing::warn!(
            "the learning rate {rate:.1e} is far below the {usual:.1e} that is usual for {name}: {} steps may train next to \
             nothing. Try --learning-rate {usual:.0e}",
            plan.total_steps
        );
    }
    let (warmup, total) = (plan.warmup_steps, plan.total_steps);
    if warmup < total && 2 * warmup > total {
        tracing::warn!(
            "{warmup} of the {total} steps are warm-up, and train with a part of the learning rate only. Try --warmup-steps {}, \
             more --epochs, or a smaller --pairs-per-step",
            total / 10
        );
    }
}

/// Adds the newest checkpoint of `run` to the advice of a numerical error: a checkpoint is only written if its weights
/// pass.
pub fn with_last_checkpoint(error: Error, run: &Path) -> Error {
    let Error::Numerics { message, help } = error else { return error };
    let kept = match run_state::latest(run) {
        Ok(Some(path)) => format!("the newest checkpoint, {}, is from before that", path.display()),
        _ => "no checkpoint was saved before that (--save-steps saves some)".to_string(),
    };
    Error::Numerics { message, help: format!("{help}; {kept}") }
}

/// Fails where the run in folder `run` trained nothing: every gradient was zero, or no trained weight differs from what it
/// was in `start`, with which the run began, once both are rounded to the bf16 of a saved model.
pub fn check_trained<D: Device>(run: &Path, trainer: &Trainer<D>, start: &Inputs) -> Result<()> {
    let history = History::read(run)?;
    let largest = |name: &str| history.series(name).into_iter().map(|(_, value)| value).fold(0.0, f64::max);
    let steps = history.last_step();
    if !history.series("grad_norm").is_empty() && largest("grad_norm") == 0.0 {
        return Err(Error::numerics(
            format!(
                "the gradient was 0 in each of the {steps} steps: nothing was trained, and no model is saved"
            ),
            "look at the pairs (is every chosen response the same as the rejected one?) and at the objective's numbers",
        ));
    }
    if any_weight_changed(trainer, start)? {
        return Ok(());
    }
    Err(Error::numerics(
        format!(
            "after {steps} steps with learning rates of up to {:.3e} no weight differs from the starting model's in \
             bf16: nothing was trained, and no model is saved",
            largest("learning_rate")
        ),
        "raise --learning-rate, or train for more steps",
    ))
}

fn any_weight_changed<D: Device>(trainer: &Trainer<D>, start: &Inputs) -> Result<bool> {
    let model = &trainer.model;
    let mut now = Vec::new();
    for (fused, weight) in model.layout.iter().zip(model.weights.iter()).filter(|(fused, _)| fused.trained) {
        for (at, part) in fused.offsets() {
            let adapter = start.adapter.as_ref().map(|adapter| adapter.values(part)).transpose()?;
            let before = match &adapter {
                Some(values) => RawValues::from_f32(values),
                None => start.folder.tensor(&part.name, &part.shape)?,
            };
            // Where weights are sharded, those of this rank.
            let held = checkpoint::held(&*model.device, fused, weight, trainer.shard_place());
            let own = held.start.saturating_sub(at)..held.end.saturating_sub(at).min(part.values());
            for first in own.clone().step_by(PIECE) {
                now.resize(PIECE.min(own.end - first), 0.0);
                model.device.download_compute(&mut now, weight, at + first - held.start)?;
                let differs =
                    |(index, &now): (usize, &f32)| bf16::from_f32(now) != rounded(before, first + index);
                if now.iter().enumerate().any(differs) {
                    return Ok(true);
                }
            }
        }
    }
    Ok(false)
}

/// A stored value, in the dtype of a saved model.
fn rounded(values: RawValues<'_>, index: usize) -> bf16 {
    let bytes = &values.bytes[index * values.storage.size()..];
    let two = || bytes.first_chunk().map_or(0, |&two| u16::from_le_bytes(two));
    match values.storage {
        StorageType::F32 => bf16::from_f32(bytes.first_chunk().map_or(0.0, |&four| f32::from_le_bytes(four))),
        StorageType::F16 => bf16::from_f32(half::f16::from_bits(two()).to_f32()),
        StorageType::Bf16 => bf16::from_bits(two()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_that_is_not_finite_is_not_saved() {
        assert!(check_saved("w", 0, &[]).is_ok() && check_saved("w", 0, &[0.0, -1e38]).is_ok());
        for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let error = check_saved("w", 100, &[0.0, broken, 1.0, broken]).unwrap_err();
            assert!(matches!(error, Error::Numerics { .. }), "{error:?}");
            assert!(error.to_string().contains("`w` is not finite from index 101"), "{error}");
        }
    }
}
