//! Weights from a checkpoint onto a device, and back.

use std::sync::Arc;

use super::{FusedTensor, Llama, LlamaTensors};
use crate::checkpoint::ModelFolder;
use crate::device::{Compute, Device, Floats};
use crate::error::Result;

impl<D: Device> Llama<D> {
    /// Uploads a checkpoint's weights straight from its memory map. `positions` is the longest sequence that will be
    /// run.
    pub fn load(device: Arc<D>, folder: &ModelFolder, positions: usize) -> Result<Self> {
        let config = folder.config().clone();
        let layout = LlamaTensors::layout(&config);
        let weights = layout.try_map(|fused| upload(device.as_ref(), folder, fused))?;
        let table = config.rope_table(positions);
        let mut rope_table = device.alloc(table.len())?;
        device.upload(&mut rope_table, 0, &table)?;
        Ok(Llama { device, config, layout, weights, rope_table })
    }

    /// Trainable values.
    pub fn parameters(&self) -> usize {
        self.layout.iter().map(FusedTensor::values).sum()
    }

    /// Zeroed f32 gradients of all weights.
    pub fn zero_gradients(&self) -> Result<LlamaTensors<Floats<D>>> {
        self.layout.try_map(|fused| self.device.alloc(fused.values()))
    }
}

fn upload<D: Device>(device: &D, folder: &ModelFolder, fused: &FusedTensor) -> Result<Compute<D>> {
    let mut weight = device.alloc(fused.values())?;
    for (offset, part) in fused.offsets() {
        device.upload_values(&mut weight, offset, folder.tensor(&part.name, &part.shape)?)?;
    }
    Ok(weight)
}
