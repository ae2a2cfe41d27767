//! A trainer's state on disk, to the bit: f32 weights, both moments, and where the run stands.

use std::path::Path;

use safetensors::tensor::Dtype;

use super::guard;
use super::trainer::Trainer;
use crate::checkpoint::run_state::save_checkpoint;
use crate::checkpoint::{
    Checkpoint, CompanionFiles, RunState, SHARD_BYTES, StoredTensor, run_state, save_model,
};
use crate::device::{AdamWState, ComputeBuffer, Device, RawValues};
use crate::error::{Error, Result};
use crate::model::{FusedTensor, LlamaTensors};

/// Options that may differ between the parts of a run: they say where things are and when, not what is computed. Model,
/// reference and pairs are compared by what they hold, so that another spelling of a path is no other run.
pub const FREE_OPTIONS: &[&str] = &[
    "model",
    "data",
    "reference",
    "chat_template",
    "output",
    "save_steps",
    "keep_checkpoints",
    "eval_data",
    "eval_steps",
    "threads",
    "device",
];

/// The three f32 tensors of every weight.
const KINDS: [&str; 3] = ["weight", "first_moment", "second_moment"];

/// Writes `run/checkpoints/step-N` and removes all but the `keep` newest.
///
/// # Errors
/// [`Error::Numerics`] where a weight or a moment is not finite; nothing is written then.
pub fn save<D: Device>(run: &Path, trainer: &Trainer<D>, state: &RunState, keep: usize) -> Result<()> {
    let layout = stored_tensors(&trainer.model.layout);
    save_checkpoint(run, state, &layout, |tensor, offset, bytes| {
        let values: &mut [f32] = bytemuck::cast_slice_mut(bytes);
        download(trainer, &tensor.name, offset, values)?;
        guard::check_saved(&tensor.name, offset, values)
    })?;
    run_state::prune(run, keep)
}

/// Puts `checkpoint` into `trainer`.
pub fn restore<D: Device>(checkpoint: &Checkpoint, trainer: &mut Trainer<D>) -> Result<()> {
    let device = trainer.model.device.clone();
    let layout: Vec<FusedTensor> = trainer.model.layout.iter().cloned().collect();
    let states = trainer.states.iter_mut();
    for ((fused, weight), state) in layout.iter().zip(trainer.model.weights.iter_mut()).zip(states) {
        let stored = |kind: &str| checkpoint.values::<f32>(&stored_name(fused, kind), &[fused.values()]);
        restore_weight(device.as_ref(), weight, state, stored(KINDS[0])?)?;
        device.upload(&mut state.first_moment, 0, stored(KINDS[1])?)?;
        device.upload(&mut state.second_moment, 0, stored(KINDS[2])?)?;
    }
    Ok(())
}

/// Writes the trained weights as a Hugging Face folder, in bf16.
///
/// # Errors
/// [`Error::Numerics`] where a weight is not finite; `target` stays as it was then.
pub fn save_weights<D: Device>(
    target: &Path,
    trainer: &Trainer<D>,
    companions: &CompanionFiles,
) -> Result<()> {
    let model = &trainer.model;
    let mut staging = Vec::new();
    save_model(target, companions, &model.config.tensors(), SHARD_BYTES, |tensor, offset, values| {
        let found = model.layout.iter().zip(model.weights.iter()).find_map(|(fused, weight)| {
            let start = fused.offsets().find(|(_, part)| part.name == tensor.name)?.0;
            Some((start, weight))
        });
        let (start, weight) = found.ok_or_else(|| unknown(&tensor.name))?;
        staging.resize(values.len(), 0.0);
        model.device.download_compute(&mut staging, weight, start + offset)?;
        for (value, &weight) in values.iter_mut().zip(&staging) {
            *value = half::bf16::from_f32(weight);
        }
        guard::check_saved(&tensor.name, offset, &staging)
    })
}

fn restore_weight<D: Device>(
    device: &D,
    weight: &mut ComputeBuffer<D>,
    state: &mut AdamWState<D>,
    values: &[f32],
) -> Result<()> {
    if let Some(master) = &mut state.master {
        device.upload(master, 0, values)?;
    }
    device.upload_values(weight, 0, RawValues::from_f32(values))
}

/// What a checkpoint of a model of this layout holds.
pub fn stored_tensors(layout: &LlamaTensors<FusedTensor>) -> Vec<StoredTensor> {
    let of = |kind: &'static str| {
        layout
            .iter()
            .map(move |fused| StoredTensor::new(stored_name(fused, kind), Dtype::F32, &[fused.values()]))
    };
    KINDS.into_iter().flat_map(of).collect()
}

/// A fused tensor goes by the name of its first part.
fn stored_name(fused: &FusedTensor, kind: &str) -> String {
    let part = fused.parts.first().map_or("", |part| part.name.as_str());
    format!("{kind}/{part}")
}

fn download<D: Device>(trainer: &Trainer<D>, name: &str, offset: usize, values: &mut [f32]) -> Result<()> {
    let (model, device) = (&trainer.model, trainer.device());
    for ((fused, weight), state) in model.layout.iter().zip(model.weights.iter()).zip(trainer.states.iter()) {
        let is = |kind: &str| stored_name(fused, kind) == name;
        if is(KINDS[0]) {
            return match &state.master {
                Some(master) => device.download(values, master, offset),
                None => device.download_compute(values, weight, offset),
            };
        } else if is(KINDS[1]) {
            return device.download(values, &state.first_moment, offset);
        } else if is(KINDS[2]) {
            return device.download(values, &state.second_moment, offset);
        }
    }
    Err(unknown(name))
}

fn unknown(name: &str) -> Error {
    Error::device(
        format!("no tensor `{name}` in this model"),
        "this is a mistake in the program; please report it",
    )
}
