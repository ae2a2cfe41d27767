//! The buffers of a trainer's state as the tensors of a checkpoint: names, types and parts, and the way of their values between
//! device and file.

use std::borrow::Cow;
use std::ops::Range;

use half::bf16;
use safetensors::tensor::Dtype;

use crate::checkpoint::StoredTensor;
use crate::device::{ComputeBuffer, Device, GroupPlace};
use crate::error::{Error, Result};
use crate::model::{FusedTensor, LlamaTensors};
use crate::optimizer::{StateBuffer, StateMut, StateOptions, StateType, StateValues, join, remainder};
use crate::train::cut::Cut;
use crate::train::guard;
use crate::train::trainer::Trainer;

/// The bytes of a buffer from those of the file.
pub(super) fn as_kept(buffer: StateBuffer, bytes: &[u8]) -> Cow<'_, [u8]> {
    if buffer != StateBuffer::Remainder {
        return Cow::Borrowed(bytes);
    }
    let values = bytes.as_chunks().0.iter().map(|&value| f32::from_le_bytes(value));
    Cow::Owned(values.flat_map(|value| remainder(value).to_ne_bytes()).collect())
}

/// The values of a tensor that `weight` holds: all, or this rank's where weights are sharded.
pub(in crate::train) fn held<D: Device>(
    device: &D,
    tensor: &FusedTensor,
    weight: &ComputeBuffer<D>,
    place: Option<GroupPlace>,
) -> Range<usize> {
    match place {
        Some(place) if device.len(weight) != tensor.values() => Cut::new(tensor.values(), place).own(),
        _ => 0..tensor.values(),
    }
}

/// Assigns the values of a buffer from `offset` on.
pub(super) fn upload<D: Device>(
    device: &D,
    kept: &mut StateMut<'_, D>,
    offset: usize,
    bytes: &[u8],
    name: &str,
) -> Result<()> {
    let not_aligned = |error| Error::bug(format!("tensor `{name}` is not aligned ({error})"));
    match kept {
        StateValues::F32(kept) => {
            device.upload::<f32>(kept, offset, bytemuck::try_cast_slice(bytes).map_err(not_aligned)?)
        }
        StateValues::Bf16(kept) => {
            device.upload::<bf16>(kept, offset, bytemuck::try_cast_slice(bytes).map_err(not_aligned)?)
        }
        StateValues::U16(kept) => {
            let values = bytes.as_chunks().0.iter().map(|&value| u16::from_ne_bytes(value));
            device.upload::<u16>(kept, offset, &values.collect::<Vec<_>>())
        }
        StateValues::U8(kept) => device.upload(kept, offset, bytes),
    }
}

/// What a checkpoint of a model of this layout holds: every buffer of each trained tensor's state, in the type that keeps its
/// bits.
pub fn stored_tensors(layout: &LlamaTensors<FusedTensor>, options: StateOptions) -> Vec<StoredTensor> {
    stored_parts(layout, options, |len| 0..len)
}

/// The part of [`stored_tensors`] that a process writes which has the values `own` of each tensor of a length; tensors of which it has
/// none are left out.
pub(super) fn stored_parts(
    layout: &LlamaTensors<FusedTensor>,
    options: StateOptions,
    own: impl Fn(usize) -> Range<usize>,
) -> Vec<StoredTensor> {
    let mut stored = Vec::new();
    for tensor in layout.iter().filter(|tensor| tensor.trained) {
        for buffer in StateBuffer::ALL {
            let Some((kind, _)) = buffer.stored(tensor.values(), options.moments) else { continue };
            let part = buffer.part(own(tensor.values()));
            if !part.is_empty() {
                stored.push(StoredTensor::new(stored_name(tensor, buffer), dtype(kind), &[part.len()]));
            }
        }
    }
    stored
}

pub(super) fn dtype(kind: StateType) -> Dtype {
    match kind {
        StateType::F32 => Dtype::F32,
        StateType::Bf16 => Dtype::BF16,
        StateType::U16 => Dtype::U16,
        StateType::U8 => Dtype::U8,
    }
}

pub(super) fn stored_name(tensor: &FusedTensor, buffer: StateBuffer) -> String {
    format!("{}/{}", buffer.name(), tensor.name())
}

/// Assigns the values of the stored tensor `name` from index `offset` on, as bytes. Where states are sharded, index 0 is the first value
/// of this rank's part.
///
/// # Errors
/// [`Error::Numerics`] where one is not finite.
pub(in crate::train) fn download<D: Device>(
    trainer: &Trainer<D>,
    name: &str,
    offset: usize,
    bytes: &mut [u8],
) -> Result<()> {
    let (model, device) = (&trainer.model, trainer.device());
    let weights = model.layout.iter().zip(model.weights.iter());
    for (number, ((tensor, weight), state)) in weights.zip(trainer.states.iter()).enumerate() {
        let stored_here = |buffer: &StateBuffer| stored_name(tensor, *buffer) == name;
        let Some(buffer) = StateBuffer::ALL.into_iter().find(stored_here).filter(|_| tensor.trained) else {
            continue;
        };
        let kind = buffer.stored(tensor.values(), trainer.state_options().moments).map(|(kind, _)| kind);
        match (state.as_ref().and_then(|state| state.get(buffer)), &trainer.offloaded) {
            (Some(StateValues::F32(kept)), _) => {
                device.download::<f32>(bytemuck::cast_slice_mut(bytes), kept, offset)?;
            }
            (Some(StateValues::Bf16(kept)), _) => {
                device.download::<bf16>(bytemuck::cast_slice_mut(bytes), kept, offset)?;
            }
            (Some(StateValues::U16(kept)), _) => {
                device.download::<u16>(bytemuck::cast_slice_mut(bytes), kept, offset)?;
            }
            (Some(StateValues::U8(kept)), _) => device.download(bytes, kept, offset)?,
            (None, Some(offloaded)) if offloaded.states.has(number, buffer) => {
                offloaded.states.read(device, number, (buffer, offset), bytes)?;
            }
            (None, _) => {
                let held = held(device, tensor, weight, trainer.shard_place());
                let first = trainer.own(tensor.values()).start + offset - held.start;
                let values: &mut [f32] = bytemuck::cast_slice_mut(bytes);
                device.download_compute(values, weight, first)?;
                if let Some(remainders) = remainders(trainer, number, offset, values.len())? {
                    join(values, &remainders);
                }
            }
        }
        return check_finite(name, offset, kind, bytes);
    }
    Err(unknown(name))
}

/// What `len` weights of a tensor lack of their master copies, from value `offset` of its state on; `None` where master copies are
/// whole, or there are none.
fn remainders<D: Device>(
    trainer: &Trainer<D>,
    number: usize,
    offset: usize,
    len: usize,
) -> Result<Option<Vec<u16>>> {
    let (device, buffer) = (trainer.device(), StateBuffer::Remainder);
    let mut found = vec![0; len];
    let state = trainer.states.iter().nth(number).and_then(|state| state.as_ref()?.get(buffer));
    match (state, &trainer.offloaded) {
        (Some(StateValues::U16(kept)), _) => device.download::<u16>(&mut found, kept, offset)?,
        (None, Some(offloaded)) if offloaded.states.has(number, buffer) => {
            let bytes = bytemuck::cast_slice_mut(&mut found);
            offloaded.states.read(device, number, (buffer, offset), bytes)?;
        }
        _ => return Ok(None),
    }
    Ok(Some(found))
}

/// Fails where `bytes`, values of this type from index `offset` of `name` on, are not all finite.
fn check_finite(name: &str, offset: usize, kind: Option<StateType>, bytes: &[u8]) -> Result<()> {
    match kind {
        Some(StateType::F32) => guard::check_saved(name, offset, bytemuck::cast_slice(bytes)),
        Some(StateType::Bf16) => {
            let values: &[bf16] = bytemuck::cast_slice(bytes);
            let wide: Vec<f32> = values.iter().map(|value| value.to_f32()).collect();
            guard::check_saved(name, offset, &wide)
        }
        // Every code is a number; what is not finite shows in a scale, or in a weight.
        Some(StateType::U8 | StateType::U16) | None => Ok(()),
    }
}

pub(super) fn unknown(name: &str) -> Error {
    Error::bug(format!("no tensor `{name}` in this model"))
}
