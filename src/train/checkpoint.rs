//! A trainer's state on disk, to the bit: f32 weights, both moments, and where the run stands.

mod buffers;

use std::path::Path;
use std::sync::Arc;

use half::bf16;

pub use buffers::stored_tensors;
use buffers::{as_kept, dtype, stored_name, stored_parts, unknown, upload};
pub(super) use buffers::{download, held};

use super::cut::Cut;
use super::guard;
use super::trainer::Trainer;
use crate::checkpoint::background::{self, BackgroundSaves, Snapshot};
use crate::checkpoint::run_state::{StoredPiece, save_checkpoint};
use crate::checkpoint::shared_save::{self, Writer};
use crate::checkpoint::{
    Checkpoint, CompanionFiles, RunState, SHARD_BYTES, StoredTensor, run_state, save_model,
};
use crate::device::{Device, GroupPlace, RawValues, StorageType};
use crate::error::{Error, Result};
use crate::model::{FusedTensor, LlamaTensors};
use crate::optimizer::StateBuffer;

/// Options that may differ between the parts of a run: they say where things are and when, not what is computed. Model,
/// reference and pairs are compared by what they hold, so that another spelling of a path is no other run.
pub const FREE_OPTIONS: &[&str] = &[
    "model",
    "data",
    "reference",
    "chat_template",
    "adapter",
    // What the next ones do to the pairs is in the hash of these.
    "columns",
    "template_date",
    "eval_split",
    "on_refused",
    "on_empty",
    "on_long_prompt",
    "on_long_response",
    "on_identical",
    "on_duplicate",
    "on_contradiction",
    "on_boundary",
    "on_lost_text",
    "on_no_end",
    "on_after_end",
    "on_suspicious",
    "output",
    "save_steps",
    "keep_checkpoints",
    "eval_data",
    "eval_steps",
    // These say which checkpoints are kept, and when the run ends.
    "eval_on_start",
    "keep_best",
    "early_stopping",
    "early_stopping_delta",
    "capsule_weights",
    "threads",
    "device",
    // The same bits, from more or less memory.
    "recompute",
    // A limit, not what is computed below it.
    "memory",
    "tflops",
    "offload",
    "shard",
];

/// Assigns the bytes of a tensor from a value on.
type Fill<'a> = dyn FnMut(&StoredTensor, usize, &mut [u8]) -> Result<()> + 'a;

/// Writes `run/checkpoints/step-N` and removes all but the `keep` newest and those of the steps `best`. Where states are sharded
/// among ranks, use [`save_beside`].
///
/// # Errors
/// [`Error::Numerics`] where a weight or a moment is not finite; nothing is written then.
pub fn save<D: Device>(
    run: &Path,
    trainer: &Trainer<D>,
    state: &RunState,
    (keep, best): (usize, &[usize]),
) -> Result<()> {
    if trainer.shard_place().is_some() {
        return Err(Error::bug("one rank cannot save the states of all"));
    }
    let layout = own_tensors(trainer);
    save_checkpoint(run, state, &layout, |tensor, offset, bytes| {
        download(trainer, &tensor.name, offset, bytes)
    })?;
    run_state::prune(run, keep, best)
}

/// As [`save_beside`], where each rank writes its part.
fn save_parts<D: Device>(
    saves: &mut BackgroundSaves,
    run: &Path,
    (trainer, place): (&mut Trainer<D>, GroupPlace),
    state: &RunState,
    (keep, best): (usize, &[usize]),
) -> Result<()> {
    let layout = own_tensors(trainer);
    let in_memory = background::fits_in_memory(&layout, saves.processes());
    let own = |tensor: &StoredTensor, offset: usize, bytes: &mut [u8]| {
        download(trainer, &tensor.name, offset, bytes)
    };
    let prepared = match in_memory {
        true => Snapshot::take(&layout, own).map(Some),
        false => Ok(None),
    };
    let prepared = prepared.and_then(|snapshot| match place.rank {
        0 => shared_save::begin(run, state).map(|begun| (snapshot, Some(begun))),
        _ => Ok((snapshot, None)),
    });
    // All ranks go on, or none: a word of 0 says that this one cannot, and the first one's other words are its process.
    let words = trainer.exchange(if prepared.is_ok() { std::process::id() } else { 0 });
    let (snapshot, begun) = prepared?;
    let words = words?;
    if let Some(rank) = words.iter().position(|&word| word == 0) {
        return Err(Error::device(
            format!("rank {rank} could not prepare its part of the checkpoint"),
            "see its own message",
        ));
    }
    let (count, first_id) = (place.ranks, words[0]);
    let (run, state, best) = (run.to_path_buf(), state.clone(), best.to_vec());
    let write = move |layout: &[StoredTensor], fill: &mut Fill<'_>| {
        let Some(begun) = begun else {
            let writer = Writer { number: place.rank, count };
            return shared_save::write_part(&run, &state, (writer, first_id), layout, fill);
        };
        begun.finish(&state, count, layout, fill)?;
        run_state::prune(&run, keep, &best)
    };
    match snapshot {
        Some(snapshot) => saves
            .start(move || write(&layout, &mut |tensor, offset, bytes| snapshot.fill(tensor, offset, bytes))),
        None => {
            tracing::info!(
                "training waits for this checkpoint: a copy of it would take more than half of the free memory"
            );
            write(&layout, &mut |tensor, offset, bytes| download(trainer, &tensor.name, offset, bytes))
        }
    }
}

/// What this process writes of a checkpoint: all of it, or its own part.
fn own_tensors<D: Device>(trainer: &Trainer<D>) -> Vec<StoredTensor> {
    stored_parts(&trainer.model.layout, trainer.state_options(), |len| trainer.own(len))
}

/// As `save`, beside what comes after: what is saved is copied to the host's memory first, while the caller waits. Where that
/// is too small for a copy, the caller waits for all of it, and is told so. Among ranks every one must call it: the first one
/// writes, or where states are sharded, each its own part.
///
/// # Errors
/// As `save`, and those of the save before, for which it waits. Errors of this save come from `saves` later.
pub fn save_beside<D: Device>(
    saves: &mut BackgroundSaves,
    run: &Path,
    trainer: &mut Trainer<D>,
    state: &RunState,
    (keep, best): (usize, &[usize]),
) -> Result<()> {
    // One copy at a time.
    saves.wait()?;
    if let Some(place) = trainer.shard_place() {
        return save_parts(saves, run, (trainer, place), state, (keep, best));
    }
    if trainer.place().rank > 0 {
        return Ok(());
    }
    let layout = own_tensors(trainer);
    if !background::fits_in_memory(&layout, 1) {
        tracing::info!(
            "training waits for this checkpoint: a copy of it would take more than half of the free memory"
        );
        return save(run, trainer, state, (keep, best));
    }
    let snapshot =
        Snapshot::take(&layout, |tensor, offset, bytes| download(trainer, &tensor.name, offset, bytes))?;
    let (run, state, best) = (run.to_path_buf(), state.clone(), best.to_vec());
    saves.start(move || {
        save_checkpoint(&run, &state, &layout, |tensor, offset, bytes| snapshot.fill(tensor, offset, bytes))?;
        run_state::prune(&run, keep, &best)
    })
}

/// Puts `checkpoint` into `trainer`. Frozen tensors are not in it: they are still those of the starting model.
pub fn restore<D: Device>(checkpoint: &Checkpoint, trainer: &mut Trainer<D>) -> Result<()> {
    let options = trainer.state_options();
    let place = trainer.shard_place();
    trainer.forget_gathered();
    let Trainer { model, states, offloaded, .. } = trainer;
    let device = model.device.as_ref();
    let tensors = model.layout.iter().zip(model.weights.iter_mut()).zip(states.iter_mut());
    for (number, ((tensor, weight), state)) in tensors.enumerate() {
        if !tensor.trained {
            continue;
        }
        for buffer in StateBuffer::ALL {
            // A master copy that is split lies whole in the file.
            let source = if buffer == StateBuffer::Remainder { StateBuffer::Weight } else { buffer };
            let Some((kind, len)) = source.stored(tensor.values(), options.moments) else { continue };
            let (name, kind) = (stored_name(tensor, source), dtype(kind));
            let pieces = |range| checkpoint.pieces(&name, kind, &[len], range);
            if buffer == StateBuffer::Weight {
                let held = held(device, tensor, weight, place);
                for StoredPiece { first, bytes } in pieces(held.clone())? {
                    let values = RawValues { storage: StorageType::F32, bytes };
                    device.upload_values(weight, first - held.start, values)?;
                }
            }
            if let Some(offloaded) = offloaded
                && offloaded.states.has(number, buffer)
            {
                for StoredPiece { first, bytes } in pieces(0..len)? {
                    offloaded.states.write(device, number, (buffer, first), &as_kept(buffer, bytes))?;
                }
            }
            let own =
                buffer.part(place.map_or(0..tensor.values(), |place| Cut::new(tensor.values(), place).own()));
            if let Some(mut kept) = state.as_mut().and_then(|state| state.get_mut(buffer)) {
                for StoredPiece { first, bytes } in pieces(own.clone())? {
                    upload(device, &mut kept, first - own.start, &as_kept(buffer, bytes), &name)?;
                }
            }
            checkpoint.release(&name);
        }
    }
    Ok(())
}

/// Writes the trained weights as a Hugging Face folder, in bf16. Among ranks every one must call it, and the first one writes: where
/// weights are sharded, it asks the others for one layer after the other.
///
/// # Errors
/// [`Error::Numerics`] where a weight is not finite; `target` stays as it was then.
pub fn save_weights<D: Device>(
    target: &Path,
    trainer: &mut Trainer<D>,
    companions: &CompanionFiles,
) -> Result<()> {
    if trainer.place().rank > 0 {
        return serve_layers(trainer);
    }
    let (device, tensors) = (Arc::clone(&trainer.model.device), trainer.model.config.tensors());
    let (mut staging, mut whole) = (Vec::new(), None);
    let saved = save_model(target, companions, &tensors, SHARD_BYTES, |tensor, offset, values| {
        let (layer, index, start) = find(&trainer.model.layout, &tensor.name)?;
        staging.resize(values.len(), 0.0);
        if layer.is_some() && layer != whole && trainer.has_weight_parts() {
            trainer.exchange(layer.map_or(0, |layer| layer as u32 + 1))?;
            whole = layer;
        }
        let found = match layer {
            Some(layer) => trainer.gather_layer(layer)?.iter().nth(index),
            None => trainer.model.weights.outside_layers().nth(index),
        };
        let weight = found.ok_or_else(|| unknown(&tensor.name))?;
        device.download_compute(&mut staging, weight, start + offset)?;
        for (value, &weight) in values.iter_mut().zip(&staging) {
            *value = bf16::from_f32(weight);
        }
        guard::check_saved(&tensor.name, offset, &staging)
    });
    if trainer.has_weight_parts() {
        trainer.exchange(0)?;
    }
    saved
}

/// Takes part in the gathers that the first rank asks for by the layer's number and 1, until it says 0.
fn serve_layers<D: Device>(trainer: &mut Trainer<D>) -> Result<()> {
    if !trainer.has_weight_parts() {
        return Ok(());
    }
    while let Some(layer) = trainer.exchange(0)?[0].checked_sub(1) {
        trainer.gather_layer(layer as usize)?;
    }
    Ok(())
}

/// Where a tensor lies: in a layer or outside, in which fused tensor there, and at which of its values.
fn find(layout: &LlamaTensors<FusedTensor>, name: &str) -> Result<(Option<usize>, usize, usize)> {
    let within =
        |fused: &FusedTensor| fused.offsets().find(|(_, part)| part.name == name).map(|(start, _)| start);
    let outside = layout.outside_layers().enumerate().map(|(index, fused)| (None, index, fused));
    let layers = layout.layers.iter().enumerate();
    let inside = layers.flat_map(|(layer, tensors)| {
        tensors.iter().enumerate().map(move |(index, fused)| (Some(layer), index, fused))
    });
    let found = outside.chain(inside).find_map(|(layer, index, fused)| Some((layer, index, within(fused)?)));
    found.ok_or_else(|| unknown(name))
}

#[cfg(test)]
mod background_tests;
#[cfg(all(test, mmpo_emulated))]
mod offload_tests;
#[cfg(test)]
mod state_tests;

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use safetensors::tensor::Dtype;

    use super::*;
    use crate::checkpoint::run_state::{self, RngPosition, RunIdentity};
    use crate::config::MemoryConfig;
    use crate::device::cpu::CpuDevice;
    use crate::device::prelude::*;
    use crate::model::{Capacity, HeadOptions, Llama, LlamaConfig, TensorSpec};
    use crate::objective::Objective;
    use crate::optimizer::StateValues;
    use crate::train::Workload;

    const CONFIG: &str = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 12,
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true}"#;

    fn trainer(is_frozen: impl Fn(&FusedTensor) -> bool) -> Trainer<CpuDevice> {
        let device = Arc::new(CpuDevice::new(Some(1)).unwrap());
        let config = LlamaConfig::parse(Path::new("config.json"), CONFIG).unwrap();
        let values = |tensor: &TensorSpec| vec![0.5; tensor.values()];
        let mut model = Llama::from_values(device, config, 16, values).unwrap();
        model.freeze(is_frozen);
        let micro_batch = Capacity { tokens: 16, pairs: 1, longest_part: 8, scored: 8, longest: 8 };
        let head = HeadOptions::default();
        let memory = MemoryConfig::default();
        let workload =
            Workload { micro_batch, pairs_per_step: 1, token_budget: 16, head, memory, rounding_seed: 0 };
        Trainer::new(model, Objective::Sft, workload).unwrap()
    }

    fn state() -> RunState {
        RunState {
            step: 7,
            epoch: 0,
            pairs_seen: 7,
            rng: RngPosition::default(),
            identity: RunIdentity::default(),
        }
    }

    /// A value for each index of a stored tensor, all of them different.
    fn stored(name: &str, index: usize) -> f32 {
        let salt: usize = name.bytes().map(usize::from).sum();
        (salt + index) as f32 / 8192.0
    }

    /// Names as every version so far has written them, spelt out here on purpose.
    const NAMES: [&str; 3] = ["weight", "first_moment", "second_moment"];
    const TENSORS: [(&str, usize); 14] = [
        ("model.embed_tokens.weight", 96),
        ("model.layers.0.input_layernorm.weight", 8),
        ("model.layers.0.self_attn.q_proj.weight", 128),
        ("model.layers.0.self_attn.o_proj.weight", 64),
        ("model.layers.0.post_attention_layernorm.weight", 8),
        ("model.layers.0.mlp.gate_proj.weight", 128),
        ("model.layers.0.mlp.down_proj.weight", 64),
        ("model.layers.1.input_layernorm.weight", 8),
        ("model.layers.1.self_attn.q_proj.weight", 128),
        ("model.layers.1.self_attn.o_proj.weight", 64),
        ("model.layers.1.post_attention_layernorm.weight", 8),
        ("model.layers.1.mlp.gate_proj.weight", 128),
        ("model.layers.1.mlp.down_proj.weight", 64),
        ("model.norm.weight", 8),
    ];

    /// A checkpoint in that layout, made without the optimiser's own names.
    fn write_old(run: &Path, tensors: &[(&str, usize)]) {
        let of = |kind: &str| -> Vec<StoredTensor> {
            let stored = tensors.iter().map(|(tensor, values)| {
                StoredTensor::new(format!("{kind}/{tensor}"), Dtype::F32, &[*values])
            });
            stored.collect()
        };
        let layout: Vec<StoredTensor> = NAMES.into_iter().flat_map(of).collect();
        save_checkpoint(run, &state(), &layout, |tensor, offset, bytes| {
            for (index, value) in bytemuck::cast_slice_mut::<u8, f32>(bytes).iter_mut().enumerate() {
                *value = stored(&tensor.name, offset + index);
            }
            Ok(())
        })
        .unwrap();
    }

    fn open(run: &Path) -> (std::path::PathBuf, Checkpoint) {
        let path = run_state::latest(run).unwrap().unwrap();
        let checkpoint = Checkpoint::open(&path).unwrap();
        (path, checkpoint)
    }

    fn values(trainer: &Trainer<CpuDevice>, buffer: &crate::device::cpu::CpuBuffer<f32>) -> Vec<f32> {
        let mut values = vec![0.0; buffer.len()];
        trainer.device().download(&mut values, buffer, 0).unwrap();
        values
    }

    /// A checkpoint of an earlier version puts its bits into weights and moments, and is written again byte for byte.
    #[test]
    fn an_old_checkpoint_is_restored_and_written_again_to_the_byte() {
        let folder = tempfile::tempdir().unwrap();
        let (old, new) = (folder.path().join("old"), folder.path().join("new"));
        write_old(&old, &TENSORS);
        let mut trainer = trainer(|_| false);
        let (old, checkpoint) = open(&old);
        checkpoint.check_tensors(&stored_tensors(&trainer.model.layout, trainer.state_options())).unwrap();
        restore(&checkpoint, &mut trainer).unwrap();
        let layer = &trainer.model.weights.layers[1].down.weight;
        let wanted = |kind: &str| -> Vec<f32> {
            let name = format!("{kind}/model.layers.1.mlp.down_proj.weight");
            (0..64).map(|index| stored(&name, index)).collect()
        };
        assert_eq!(values(&trainer, layer), wanted("weight"));
        let moments = trainer.states.layers[1].down.weight.as_ref().unwrap();
        let moment = |buffer| match moments.get(buffer) {
            Some(StateValues::F32(moment)) => values(&trainer, moment),
            other => panic!("{buffer:?} is {other:?}"),
        };
        assert_eq!(moment(StateBuffer::FirstMoment), wanted("first_moment"));
        assert_eq!(moment(StateBuffer::SecondMoment), wanted("second_moment"));

        save(&new, &trainer, &state(), (1, &[])).unwrap();
        for file in ["state.safetensors", "state.json", "B3SUMS"] {
            let bytes = |run: &Path| std::fs::read(run.join(file)).unwrap();
            assert!(bytes(&old) == bytes(&open(&new).0), "{file}");
        }
    }

    /// A checkpoint holds the trained tensors alone; one with more, or with less, is of another run.
    #[test]
    fn frozen_tensors_are_not_stored() {
        let folder = tempfile::tempdir().unwrap();
        let is_frozen = |tensor: &FusedTensor| !tensor.name().starts_with("model.layers.1.");
        let trainer = trainer(is_frozen);
        save(folder.path(), &trainer, &state(), (1, &[])).unwrap();
        let (_, checkpoint) = open(folder.path());
        checkpoint.check_tensors(&stored_tensors(&trainer.model.layout, trainer.state_options())).unwrap();
        let name = "weight/model.layers.1.mlp.down_proj.weight";
        assert_eq!(checkpoint.values::<f32>(name, &[64]).unwrap(), [0.5; 64]);
        assert!(checkpoint.values::<f32>("weight/model.norm.weight", &[8]).is_err());
        let all = self::trainer(|_| false);
        let error =
            checkpoint.check_tensors(&stored_tensors(&all.model.layout, all.state_options())).unwrap_err();
        assert_eq!(error.exit_code(), 4, "{error}");
    }
}
