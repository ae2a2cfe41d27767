//! `mmpo-fast merge`: a model folder with an adapter's products added to its weights.

use std::path::Path;

use half::bf16;
use rayon::prelude::*;

use crate::checkpoint::{AdapterFolder, CompanionFiles, ModelFolder, SHARD_BYTES, save_model};
use crate::config::MergeConfig;
use crate::device::{RawValues, StorageType};
use crate::error::{Error, Result};
use crate::foreign::hub;
use crate::interrupt;
use crate::model::{LoraSettings, PEFT_PREFIX, TensorSpec};
use crate::report::print_result;

/// Writes `config.output`, which appears whole or not at all: `W + scale * B A` of each adapted module, summed in f32 and
/// rounded to bf16 once, and every other tensor as it was, in bf16.
pub fn run(config: &MergeConfig) -> Result<()> {
    interrupt::install()?;
    let config = &MergeConfig { model: hub::model(&config.model)?, ..config.clone() };
    refuse_inputs(config)?;
    let folder = ModelFolder::open(&config.model)?;
    folder.check_finite()?;
    let adapter = AdapterFolder::open(&config.adapter, folder.config())?;
    let mut companions = CompanionFiles::read(&config.model, folder.config())?;
    companions.overlay(&config.adapter)?;
    let mut product = None;
    save_model(
        &config.output,
        &companions,
        &folder.config().tensors(),
        SHARD_BYTES,
        |tensor, offset, values| {
            interrupt::check()?;
            let weight = folder.tensor(&tensor.name, &tensor.shape)?;
            if product.as_ref().is_none_or(|product: &Product| product.name != tensor.name) {
                product = Some(Product::of(&adapter, tensor)?);
            }
            fill(values, weight, offset, product.as_ref());
            check_finite(values, tensor, offset)
        },
    )?;
    print_result(&format!("model   {}\n", config.output.display()))?;
    Ok(())
}

/// The matrices of an adapted module; for a tensor without an adapter they have no rows.
struct Product {
    /// The tensor that it is added to.
    name: String,
    scale: f32,
    /// `[r, inputs]`
    a: Vec<f32>,
    /// `[outputs, r]`
    b: Vec<f32>,
    inputs: usize,
    rank: usize,
}

impl Product {
    fn of(adapter: &AdapterFolder, tensor: &TensorSpec) -> Result<Self> {
        let settings: LoraSettings = adapter.settings();
        let rank = settings.rank;
        let mut product = Product {
            name: tensor.name.clone(),
            scale: adapter.scale(tensor.name.trim_end_matches(".weight")) as f32,
            a: Vec::new(),
            b: Vec::new(),
            inputs: 0,
            rank,
        };
        let module = tensor.name.strip_suffix(".weight");
        let is_adapted =
            |module: &&str| settings.modules.iter().any(|adapted| module.ends_with(adapted.path()));
        if let (Some(module), &[outputs, inputs]) = (module.filter(is_adapted), &tensor.shape[..]) {
            let matrix = |name: &str, shape: &[usize]| {
                adapter.values(&TensorSpec::new(format!("{PEFT_PREFIX}{module}.{name}.weight"), shape))
            };
            product.a = matrix("lora_A", &[rank, inputs])?;
            product.b = matrix("lora_B", &[outputs, rank])?;
            product.inputs = inputs;
        }
        Ok(product)
    }

    /// Adds columns `first ..` of row `row` of `scale * B A` to `sums`.
    fn add(&self, sums: &mut [f32], row: usize, first: usize) {
        for (index, &b) in self.b[row * self.rank..][..self.rank].iter().enumerate() {
            let factor = self.scale * b;
            let a = &self.a[index * self.inputs + first..][..sums.len()];
            sums.iter_mut().zip(a).for_each(|(sum, a)| *sum += factor * a);
        }
    }
}

/// Assigns the values of a tensor from row-major index `offset` on.
fn fill(values: &mut [bf16], weight: RawValues<'_>, offset: usize, product: Option<&Product>) {
    let product = product.filter(|product| product.inputs > 0);
    let size = weight.storage.size();
    // Pieces end where rows do, so that a piece is a part of one row.
    let width = product.map_or(1 << 12, |product| product.inputs);
    let head = (width - offset % width) % width;
    let (first, rest) = values.split_at_mut(head.min(values.len()));
    let pieces = std::iter::once((offset, first)).par_bridge().chain(
        rest.par_chunks_mut(width).enumerate().map(|(number, piece)| (offset + head + number * width, piece)),
    );
    pieces.for_each(|(start, piece)| {
        let bytes = &weight.bytes[start * size..][..piece.len() * size];
        let mut sums: Vec<f32> =
            bytes.chunks_exact(size).map(|bytes| widened(weight.storage, bytes)).collect();
        if let Some(product) = product {
            product.add(&mut sums, start / width, start % width);
        }
        for (value, sum) in piece.iter_mut().zip(sums) {
            *value = bf16::from_f32(sum);
        }
    });
}

fn widened(storage: StorageType, bytes: &[u8]) -> f32 {
    let two = || bytes.first_chunk().map_or(0, |&two| u16::from_le_bytes(two));
    match storage {
        StorageType::F32 => bytes.first_chunk().map_or(0.0, |&four| f32::from_le_bytes(four)),
        StorageType::F16 => half::f16::from_bits(two()).to_f32(),
        StorageType::Bf16 => bf16::from_bits(two()).to_f32(),
    }
}

fn check_finite(values: &[bf16], tensor: &TensorSpec, offset: usize) -> Result<()> {
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(index) => Err(Error::numerics(
            format!(
                "tensor `{}` with the adapter added is not finite at index {}",
                tensor.name,
                offset + index
            ),
            "the adapter's training diverged, or its scale is not its own: use an earlier one",
        )),
    }
}

/// Refuses an output that would take the place of what the merged model is made from.
fn refuse_inputs(config: &MergeConfig) -> Result<()> {
    let Ok(output) = std::fs::canonicalize(&config.output) else { return Ok(()) };
    let is_output = |path: &Path| std::fs::canonicalize(path).is_ok_and(|path| path == output);
    for (flag, path) in [("--model", &config.model), ("--adapter", &config.adapter)] {
        if is_output(path) {
            return Err(Error::config(
                format!("`--output` = {} is the folder that `{flag}` names", config.output.display()),
                "choose another --output; nothing was changed",
            ));
        }
    }
    Ok(())
}
