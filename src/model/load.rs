//! Weights from a checkpoint onto a device, and back.

use std::ops::Range;
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
        let copy = |fused: &FusedTensor| copied(&*device, folder, fused, 0..fused.values());
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
            device
                .borrow_mapped(&parts)
                .map_or_else(|| copied(&*device, folder, fused, 0..fused.values()), Ok)
        };
        Self::assemble(&device, folder.config().clone(), positions, borrow)
    }

    /// As [`Llama::load`], for one of several ranks that each keep a part of every layer: of a layer's tensor of `len` values, those
    /// in `own(len)`. The others are not read. Tensors outside the layers are whole. A layer computes only where a
    /// [`WeightSource`](super::WeightSource) brings its parts together.
    ///
    /// # Errors
    /// As [`Llama::load`].
    pub fn load_sharded(
        device: Arc<D>,
        folder: &ModelFolder,
        positions: usize,
        own: impl Fn(usize) -> Range<usize>,
    ) -> Result<Self> {
        let held = held(folder.config(), own);
        let copy = |fused: &FusedTensor| copied(&*device, folder, fused, held(fused));
        Self::assemble(&device, folder.config().clone(), positions, copy)
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
        Self::assemble(device, config, positions, |fused| {
            planned_copy(&**device, fused, storage, 0..fused.values())
        })
    }

    /// As [`Llama::planned`], of one that [`Llama::load_sharded`] loads.
    ///
    /// # Errors
    /// Those of the device.
    pub fn planned_sharded(
        device: &Arc<D>,
        config: LlamaConfig,
        positions: usize,
        storage: StorageType,
        own: impl Fn(usize) -> Range<usize>,
    ) -> Result<Self> {
        let held = held(&config, own);
        Self::assemble(device, config, positions, |fused| {
            planned_copy(&**device, fused, storage, held(fused))
        })
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
            borrowed.map_or_else(|| planned_copy(&**device, fused, storage, 0..fused.values()), Ok)
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

/// The values of a model's tensors that a rank keeps which has `own(len)` of a layer's tensor of `len` values.
fn held<F: Fn(usize) -> Range<usize>>(
    config: &LlamaConfig,
    own: F,
) -> impl Fn(&FusedTensor) -> Range<usize> + use<F> {
    let layout = LlamaTensors::layout(config);
    let whole: Vec<String> = layout.outside_layers().map(|tensor| tensor.name().to_string()).collect();
    move |fused| match whole.iter().any(|name| name == fused.name()) {
        true => 0..fused.values(),
        false => own(fused.values()),
    }
}

/// The tensors that lie in `fused`: the values of each that are among those of `held`, and where they begin there.
fn parts_of<'a>(
    fused: &'a FusedTensor,
    held: &Range<usize>,
) -> impl Iterator<Item = (&'a TensorSpec, Range<usize>, usize)> {
    let held = held.clone();
    fused.offsets().map(move |(offset, tensor)| {
        let within = |place: usize| place.clamp(offset, offset + tensor.values()) - offset;
        let part = within(held.start)..within(held.end);
        let place = (offset + part.start).saturating_sub(held.start);
        (tensor, part, place)
    })
}

/// A buffer with a copy of the `held` ones of a fused tensor's values, whose pages are given back to the system.
fn copied<D: Device>(
    device: &D,
    folder: &ModelFolder,
    fused: &FusedTensor,
    held: Range<usize>,
) -> Result<ComputeBuffer<D>> {
    // A buffer of no values would be none on some devices.
    let mut weight = device.alloc(held.len().max(1))?;
    for (tensor, part, place) in parts_of(fused, &held) {
        let RawValues { storage, bytes: all } = folder.tensor(&tensor.name, &tensor.shape)?;
        let first = part.start * storage.size();
        for (piece, bytes) in all[first..part.end * storage.size()].chunks(PIECE_BYTES).enumerate() {
            let start = piece * PIECE_BYTES;
            let values = RawValues { storage, bytes };
            device.upload_values(&mut weight, place + start / storage.size(), values)?;
            folder.release(&tensor.name, first + start..first + start + bytes.len());
        }
    }
    Ok(weight)
}

/// As [`copied`], on a device that is planned for.
fn planned_copy<D: Device>(
    device: &D,
    fused: &FusedTensor,
    storage: StorageType,
    held: Range<usize>,
) -> Result<ComputeBuffer<D>> {
    // One value says as much as all of them: the device sets aside what a conversion takes.
    let value = [0; 4];
    let one = RawValues { storage, bytes: &value[..storage.size()] };
    let mut weight = device.alloc(held.len().max(1))?;
    for (_, _, place) in parts_of(fused, &held).filter(|(_, part, _)| !part.is_empty()) {
        device.upload_values(&mut weight, place, one)?;
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
    use crate::device::prelude::*;

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

    /// A folder with a model of this configuration, whose values tell their tensors and their places apart.
    fn save(target: &Path, config: &str) -> ModelFolder {
        let parsed = LlamaConfig::parse(Path::new("config.json"), config).unwrap();
        let mut companions = CompanionFiles::default();
        companions.set("config.json", config);
        let value = |name: &str, index: usize| bf16::from_f32(((name.len() * 31 + index) % 251) as f32);
        save_model(target, &companions, &parsed.tensors(), u64::MAX, |tensor, offset, values| {
            values.iter_mut().zip(offset..).for_each(|(out, index)| *out = value(&tensor.name, index));
            Ok(())
        })
        .unwrap();
        ModelFolder::open(target).unwrap()
    }

    /// Four ranks of eight layers, each with its quarter of them: no rank ever has the whole, and all of them together have.
    #[test]
    fn a_rank_holds_its_part_and_never_the_whole() {
        const CONFIG: &str = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64,
            "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8,
            "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true}"#;
        const RANKS: usize = 4;
        let folder = tempfile::tempdir().unwrap();
        let model = save(&folder.path().join("model"), CONFIG);
        let device = || Arc::new(CpuDevice::new(Some(1)).unwrap());
        let whole = Llama::load(device(), &model, 8).unwrap();
        let outside: usize = whole.layout.outside_layers().map(FusedTensor::values).sum();
        let in_layers = whole.parameters() - outside;
        let own = |rank: usize| move |len: usize| len * rank / RANKS..len * (rank + 1) / RANKS;
        for rank in 0..RANKS {
            let (here, planned) = (device(), device());
            let part = Llama::load_sharded(Arc::clone(&here), &model, 8, own(rank)).unwrap();
            let peak = here.memory().peak;
            let most = 4 * (outside + in_layers / RANKS) + 4096;
            assert!(peak <= most, "rank {rank} had {peak} bytes, and at most {most} are its own");
            assert!(peak < whole.device.memory().peak / 3, "{peak}");
            let planned = Arc::new(planned.planned(None).unwrap());
            let config = model.config().clone();
            Llama::planned_sharded(&planned, config, 8, StorageType::Bf16, own(rank)).unwrap();
            assert_eq!(planned.memory().peak, peak, "planned");
            let layers = whole.weights.layers.iter().zip(&part.weights.layers);
            for (whole, part) in layers.flat_map(|(whole, part)| whole.iter().zip(part.iter())) {
                assert!(part[..] == whole[own(rank)(whole.len())], "rank {rank}");
            }
            let outside = whole.weights.outside_layers().zip(part.weights.outside_layers());
            outside.for_each(|(whole, part)| assert!(whole[..] == part[..], "rank {rank}"));
        }
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
