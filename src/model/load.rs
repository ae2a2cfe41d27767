//! Weights from a checkpoint onto a device, and back.

use std::sync::Arc;

use super::{FusedTensor, Gradients, Llama, LlamaConfig, LlamaTensors, TensorSpec};
use crate::checkpoint::ModelFolder;
use crate::device::{ComputeBuffer, Device, MemoryPart, RawValues, StorageType};
use crate::error::{Error, Result};

impl<D: Device> Llama<D> {
    /// Uploads a checkpoint's weights straight from its memory map. `positions` is the length of the longest sequence
    /// that will be run.
    ///
    /// # Errors
    /// [`Error::Model`] for a tensor of another shape; [`Error::Device`] where the device has no
    /// memory for them.
    pub fn load(device: Arc<D>, folder: &ModelFolder, positions: usize) -> Result<Self> {
        let upload = |weight: &mut ComputeBuffer<D>, offset: usize, tensor: &TensorSpec| {
            device.upload_values(weight, offset, folder.tensor(&tensor.name, &tensor.shape)?)
        };
        Self::assemble(&device, folder.config().clone(), positions, upload)
    }

    /// A model with the weights that `values` gives for each checkpoint tensor, for benchmarks and tests.
    ///
    /// # Errors
    /// Those of `values`, and [`Error::Device`] where the device has no memory for them.
    pub fn from_values(
        device: Arc<D>,
        config: LlamaConfig,
        positions: usize,
        mut values: impl FnMut(&TensorSpec) -> Vec<f32>,
    ) -> Result<Self> {
        let upload = |weight: &mut ComputeBuffer<D>, offset: usize, tensor: &TensorSpec| {
            device.upload_values(weight, offset, RawValues::from_f32(&values(tensor)))
        };
        Self::assemble(&device, config, positions, upload)
    }

    /// A model on a device that is planned for ([`Memory::planned`](crate::device::Memory::planned)): it takes the memory of one that
    /// is loaded from a checkpoint of this storage type.
    ///
    /// # Errors
    /// Those of the device.
    pub fn planned(
        device: &Arc<D>,
        config: LlamaConfig,
        positions: usize,
        storage: StorageType,
    ) -> Result<Self> {
        // One value says as much as all of them: the device sets aside what a conversion takes.
        let value = [0; 4];
        let one = RawValues { storage, bytes: &value[..storage.size()] };
        Self::assemble(device, config, positions, |weight, offset, _| {
            device.upload_values(weight, offset, one)
        })
    }

    fn assemble(
        device: &Arc<D>,
        config: LlamaConfig,
        positions: usize,
        mut upload: impl FnMut(&mut ComputeBuffer<D>, usize, &TensorSpec) -> Result<()>,
    ) -> Result<Self> {
        let layout = LlamaTensors::layout(&config);
        let alloc = |len| device.as_part(MemoryPart::Weights, || device.alloc(len));
        let weights = layout.try_map(|fused| {
            let mut weight = alloc(fused.values())?;
            for (offset, tensor) in fused.offsets() {
                upload(&mut weight, offset, tensor)?;
            }
            Ok::<_, Error>(weight)
        })?;
        let table = config.rope_table(positions);
        let mut rope_table = device.as_part(MemoryPart::Weights, || device.alloc(table.len()))?;
        device.upload(&mut rope_table, 0, &table)?;
        Ok(Llama { device: Arc::clone(device), config, layout, weights, adapters: None, rope_table })
    }

    /// Values of all tensors, frozen ones included.
    pub fn parameters(&self) -> usize {
        self.layout.iter().map(FusedTensor::values).sum()
    }

    /// Freezes the tensors for which `is_frozen` is true, and trains the others. Gradients and optimiser states are made
    /// for the trained ones alone: call it before [`Llama::zero_gradients`] and before a
    /// [`Trainer`](crate::train::Trainer) takes the model.
    pub fn freeze(&mut self, is_frozen: impl Fn(&FusedTensor) -> bool) {
        for tensor in self.layout.iter_mut() {
            tensor.trained = !is_frozen(tensor);
        }
    }

    /// Zeroed f32 gradients of the trained tensors.
    ///
    /// # Errors
    /// [`Error::Device`] where the device has no memory for them.
    pub fn zero_gradients(&self) -> Result<Gradients<D>> {
        self.gradients_of(&self.layout)
    }

    fn gradients_of(&self, layout: &LlamaTensors<FusedTensor>) -> Result<Gradients<D>> {
        self.device.as_part(MemoryPart::Gradients, || {
            layout.try_map(|tensor| match tensor.trained {
                true => Ok(Some(self.device.alloc(tensor.values())?)),
                false => Ok(None),
            })
        })
    }

    /// As [`Llama::zero_gradients`], with one layer that all layers share: for a backward whose sink applies the gradients of
    /// each layer and sets them to zero.
    ///
    /// # Errors
    /// As [`Llama::zero_gradients`].
    pub fn zero_gradients_of_one_layer(&self) -> Result<Gradients<D>> {
        let mut layout = self.layout.clone();
        let mut layers = layout.layers.drain(..);
        let shared = layers.next().map(|mut shared| {
            // Room for whatever is trained in any layer.
            for layer in layers {
                shared
                    .iter_mut()
                    .zip(layer.iter())
                    .for_each(|(tensor, other)| tensor.trained |= other.trained);
            }
            shared
        });
        layout.layers = shared.into_iter().collect();
        self.gradients_of(&layout)
    }
}
