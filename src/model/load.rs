//! Weights from a checkpoint onto a device, and back.

use std::sync::Arc;

use super::{FusedTensor, Gradients, Llama, LlamaConfig, LlamaTensors, TensorSpec};
use crate::checkpoint::ModelFolder;
use crate::device::{ComputeBuffer, Device, MappedValues, RawValues};
use crate::error::Result;

impl<D: Device> Llama<D> {
    /// Uploads a checkpoint's weights straight from its memory map. `positions` is the length of the longest sequence
    /// that will be run.
    ///
    /// # Errors
    /// [`Error::Model`](crate::Error::Model) for a tensor of another shape; [`Error::Device`](crate::Error::Device) where the device has no
    /// memory for them.
    pub fn load(device: Arc<D>, folder: &ModelFolder, positions: usize) -> Result<Self> {
        let copy = |fused: &FusedTensor| copied(&*device, folder, fused);
        Self::assemble(&device, folder.config().clone(), positions, copy)
    }

    /// As [`Llama::load`], for a model whose weights are only read: where the device can, they are used where they lie in
    /// the mapped files, and take no memory but the system's page cache. A weight that is written to after all becomes a copy.
    ///
    /// # Errors
    /// As [`Llama::load`].
    pub fn load_frozen(device: Arc<D>, folder: &ModelFolder, positions: usize) -> Result<Self> {
        let borrow = |fused: &FusedTensor| {
            let parts: Vec<MappedValues> = fused
                .parts
                .iter()
                .map(|tensor| folder.mapped(&tensor.name, &tensor.shape))
                .collect::<Result<_>>()?;
            device.borrow_mapped(&parts).map_or_else(|| copied(&*device, folder, fused), Ok)
        };
        Self::assemble(&device, folder.config().clone(), positions, borrow)
    }

    /// A model with the weights that `values` gives for each checkpoint tensor, for benchmarks and tests.
    ///
    /// # Errors
    /// Those of `values`, and [`Error::Device`](crate::Error::Device) where the device has no memory for them.
    pub fn from_values(
        device: Arc<D>,
        config: LlamaConfig,
        positions: usize,
        mut values: impl FnMut(&TensorSpec) -> Vec<f32>,
    ) -> Result<Self> {
        let upload = |fused: &FusedTensor| {
            let mut weight = device.alloc(fused.values())?;
            for (offset, tensor) in fused.offsets() {
                device.upload_values(&mut weight, offset, RawValues::from_f32(&values(tensor)))?;
            }
            Ok(weight)
        };
        Self::assemble(&device, config, positions, upload)
    }

    fn assemble(
        device: &Arc<D>,
        config: LlamaConfig,
        positions: usize,
        make: impl FnMut(&FusedTensor) -> Result<ComputeBuffer<D>>,
    ) -> Result<Self> {
        let layout = LlamaTensors::layout(&config);
        let weights = layout.try_map(make)?;
        let table = config.rope_table(positions);
        let mut rope_table = device.alloc(table.len())?;
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
    /// [`Error::Device`](crate::Error::Device) where the device has no memory for them.
    pub fn zero_gradients(&self) -> Result<Gradients<D>> {
        self.layout.try_map(|tensor| match tensor.trained {
            true => Ok(Some(self.device.alloc(tensor.values())?)),
            false => Ok(None),
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
        layout.try_map(|tensor| match tensor.trained {
            true => Ok(Some(self.device.alloc(tensor.values())?)),
            false => Ok(None),
        })
    }
}

/// A buffer with a copy of a fused tensor's values.
fn copied<D: Device>(device: &D, folder: &ModelFolder, fused: &FusedTensor) -> Result<ComputeBuffer<D>> {
    let mut weight = device.alloc(fused.values())?;
    for (offset, tensor) in fused.offsets() {
        device.upload_values(&mut weight, offset, folder.tensor(&tensor.name, &tensor.shape)?)?;
    }
    Ok(weight)
}
