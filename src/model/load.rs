//! Weights from a checkpoint onto a device, and back.

use std::sync::Arc;
use std::time::Instant;

use super::{FusedTensor, Gradients, Llama, LlamaConfig, LlamaTensors, TensorSpec};
use crate::checkpoint::ModelFolder;
use crate::device::{ComputeBuffer, Device, MappedValues, MemoryPart, RawValues, StorageType};
use crate::error::Result;

/// Bytes of weights that are read from the map before their pages are given back: few enough that a model of any size takes
/// little of the host's memory, many enough that the pages are read ahead.
const PIECE_BYTES: usize = 64 << 20;

impl<D: Device> Llama<D> {
    /// Uploads a checkpoint's weights straight from its memory map, and gives each piece's pages back to the system. `positions` is the length of the longest sequence
    /// that will be run.
    ///
    /// # Errors
    /// [`Error::Model`](crate::Error::Model) for a tensor of another shape; [`Error::Device`](crate::Error::Device) where the device has no
    /// memory for them.
    pub fn load(device: Arc<D>, folder: &ModelFolder, positions: usize) -> Result<Self> {
        let started = Instant::now();
        let copy = |fused: &FusedTensor| copied(&*device, folder, fused);
        let model = Self::assemble(&device, folder.config().clone(), positions, copy)?;
        let (seconds, gigabytes) = (started.elapsed().as_secs_f64(), folder.total_bytes() as f64 * 1e-9);
        tracing::debug!("weights: {gigabytes:.2} GB in {seconds:.2} s, {:.2} GB/s", gigabytes / seconds);
        Ok(model)
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
        Self::assemble(device, config, positions, |fused| planned_copy(&**device, fused, storage))
    }

    /// As [`Llama::planned`], of one that [`Llama::load_frozen`] loads.
    ///
    /// # Errors
    /// Those of the device.
    pub fn planned_frozen(
        device: &Arc<D>,
        config: LlamaConfig,
        positions: usize,
        storage: StorageType,
    ) -> Result<Self> {
        Self::assemble(device, config, positions, |fused| {
            let borrowed = device.borrow_planned(storage, fused.parts.len(), fused.values());
            borrowed.map_or_else(|| planned_copy(&**device, fused, storage), Ok)
        })
    }

    fn assemble(
        device: &Arc<D>,
        config: LlamaConfig,
        positions: usize,
        make: impl FnMut(&FusedTensor) -> Result<ComputeBuffer<D>>,
    ) -> Result<Self> {
        let layout = LlamaTensors::layout(&config);
        let weights = device.as_part(MemoryPart::Weights, || layout.try_map(make))?;
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
    /// [`Error::Device`](crate::Error::Device) where the device has no memory for them.
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

/// A buffer with a copy of a fused tensor's values, whose pages are given back to the system.
fn copied<D: Device>(device: &D, folder: &ModelFolder, fused: &FusedTensor) -> Result<ComputeBuffer<D>> {
    let mut weight = device.alloc(fused.values())?;
    for (offset, tensor) in fused.offsets() {
        let RawValues { storage, bytes: all } = folder.tensor(&tensor.name, &tensor.shape)?;
        for (piece, bytes) in all.chunks(PIECE_BYTES).enumerate() {
            let start = piece * PIECE_BYTES;
            let values = RawValues { storage, bytes };
            device.upload_values(&mut weight, offset + start / storage.size(), values)?;
            folder.release(&tensor.name, start..start + bytes.len());
        }
    }
    Ok(weight)
}

/// As [`copied`], on a device that is planned for.
fn planned_copy<D: Device>(
    device: &D,
    fused: &FusedTensor,
    storage: StorageType,
) -> Result<ComputeBuffer<D>> {
    // One value says as much as all of them: the device sets aside what a conversion takes.
    let value = [0; 4];
    let one = RawValues { storage, bytes: &value[..storage.size()] };
    let mut weight = device.alloc(fused.values())?;
    for (offset, _) in fused.offsets() {
        device.upload_values(&mut weight, offset, one)?;
    }
    Ok(weight)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::path::Path;

    use half::bf16;

    use super::*;
    use crate::checkpoint::{CompanionFiles, save_model};
    use crate::device::cpu::CpuDevice;

    const CONFIG: &str = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 40000,
        "hidden_size": 512, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 8,
        "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": false}"#;

    /// KiB of a mapped file that are in this process's memory.
    fn resident(path: &Path) -> usize {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut is_of_file = false;
        let mut total = 0;
        for line in maps.lines() {
            match line.strip_prefix("Rss:") {
                Some(rss) if is_of_file => {
                    total += rss.trim().trim_end_matches("kB").trim().parse::<usize>().unwrap();
                }
                Some(_) => {}
                None if line.contains('-') && line.split(' ').count() > 4 => {
                    is_of_file = line.ends_with(path.to_str().unwrap());
                }
                None => {}
            }
        }
        total
    }

    /// Two matrices of 40 MB: after each of the passes over a model's weights its file takes no memory.
    #[test]
    fn weights_that_were_read_are_given_back() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("model");
        let config = LlamaConfig::parse(Path::new("config.json"), CONFIG).unwrap();
        let mut companions = CompanionFiles::default();
        companions.set("config.json", CONFIG);
        save_model(&target, &companions, &config.tensors(), u64::MAX, |_, offset, values| {
            values.iter_mut().zip(offset..).for_each(|(value, index)| *value = bf16::from_f32(index as f32));
            Ok(())
        })
        .unwrap();
        let model = ModelFolder::open(&target).unwrap();
        let file = std::fs::canonicalize(target.join("model.safetensors")).unwrap();
        let limit = 8 << 10;
        model.fingerprint();
        assert!(resident(&file) <= limit, "{} KiB after the fingerprint", resident(&file));
        model.check_finite().unwrap();
        assert!(resident(&file) <= limit, "{} KiB after the check", resident(&file));
        let device = Arc::new(CpuDevice::new(Some(2)).unwrap());
        let llama = Llama::load(device, &model, 8).unwrap();
        assert!(resident(&file) <= limit, "{} KiB after the upload", resident(&file));
        let last = llama.weights.lm_head.as_ref().map(|head| head[40_000 * 512 - 1]);
        assert_eq!(last, Some(bf16::from_f32((40_000 * 512 - 1) as f32).to_f32()));
        // The test can see what is there.
        assert!(model.tensor("lm_head.weight", &[40_000, 512]).unwrap().bytes.contains(&1));
        let sum: u64 = model
            .tensor("lm_head.weight", &[40_000, 512])
            .unwrap()
            .bytes
            .iter()
            .map(|&byte| u64::from(byte))
            .sum();
        assert!(sum > 0 && resident(&file) > 30 << 10, "{} KiB", resident(&file));
    }
}
