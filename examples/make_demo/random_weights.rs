//! Weights as transformers starts them: normal with deviation 0.02, norms 1, stored in bf16.

use std::error::Error;
use std::fs;
use std::path::Path;

use half::bf16;
use mmpo_fast::model::LlamaConfig;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Normal};
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};

/// Writes `model.safetensors` beside the `config.json` of `folder`.
pub fn write_random_weights(folder: &Path, rng: &mut ChaCha8Rng) -> Result<(), Box<dyn Error>> {
    let path = folder.join("config.json");
    let config = LlamaConfig::parse(&path, &fs::read_to_string(&path)?)?;
    let normal = Normal::new(0.0f32, 0.02)?;
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = config
        .tensors()
        .into_iter()
        .map(|tensor| {
            let values = (0..tensor.values()).map(|_| match tensor.shape.len() {
                1 => bf16::ONE,
                _ => bf16::from_f32(normal.sample(rng)),
            });
            let bytes = values.flat_map(bf16::to_le_bytes).collect();
            (tensor.name, tensor.shape, bytes)
        })
        .collect();
    let views = tensors
        .iter()
        .map(|(name, shape, bytes)| Ok((name, TensorView::new(Dtype::BF16, shape.clone(), bytes)?)))
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()?;
    Ok(serialize_to_file(views, None, &folder.join("model.safetensors"))?)
}
