//! A Hugging Face Llama folder, opened for reading: every tensor is found and checked before the first is used.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde_json::Value;

use crate::checkpoint::tensor_file::{TensorEntry, TensorFile};
use crate::device::{RawValues, StorageType};
use crate::error::{Error, Result};
use crate::model::{LlamaConfig, TensorSpec};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const HEAD: &str = "lm_head.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";

/// Bytes hashed or scanned by one thread at a time.
const PIECE: usize = 16 << 20;

/// A model folder: its config and its memory-mapped weights.
#[derive(Debug)]
pub struct ModelFolder {
    path: PathBuf,
    config: LlamaConfig,
    shards: Vec<TensorFile>,
    /// Where each tensor of [`LlamaConfig::tensors`] lies.
    tensors: BTreeMap<String, (usize, TensorEntry)>,
}

impl ModelFolder {
    /// Opens a folder with `model.safetensors` or shards under `model.safetensors.index.json`.
    ///
    /// Every tensor the config asks for must be there with its shape in f32, f16 or bf16, and no other may: leftovers
    /// of an adapter or of another architecture mean that the folder is not the model its config describes. Two kinds
    /// of extra tensor are harmless: `rotary_emb.inv_freq` of old checkpoints, which the config determines, and the
    /// `lm_head.weight` of a tied model where it equals the embedding. Where the two differ, transformers leaves
    /// them untied against the config, with a warning; here that contradiction is refused.
    ///
    /// # Errors
    /// [`Error::Model`] or [`Error::Io`] naming the file, and the tensor where it is about one.
    pub fn open(path: &Path) -> Result<Self> {
        let config = LlamaConfig::from_folder(path)?;
        let shards = open_shards(path)?;
        let mut folder = ModelFolder { path: path.to_path_buf(), config, shards, tensors: BTreeMap::new() };
        folder.find_tensors()?;
        Ok(folder)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// Bytes of all weights as they lie in the files.
    pub fn total_bytes(&self) -> usize {
        self.tensors.values().map(|(shard, entry)| self.shards[*shard].bytes(entry).len()).sum()
    }

    /// The values of tensor `name`, straight in the map.
    ///
    /// # Errors
    /// [`Error::Model`] where there is none of that name, or its shape is not `shape`.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<RawValues<'_>> {
        let Some((shard, entry)) = self.tensors.get(name) else {
            return Err(missing(&self.path, name));
        };
        let file = &self.shards[*shard];
        check_shape(file.path(), name, entry, shape)?;
        file.values(entry).ok_or_else(|| wrong_dtype(file.path(), name, entry))
    }

    /// BLAKE3 over names, shapes, dtypes and bytes of all weights, and over what the config makes of them; the same
    /// whatever the shards.
    pub fn fingerprint(&self) -> [u8; 32] {
        let mut whole = blake3::Hasher::new();
        whole.update(self.config.arithmetic().as_bytes());
        for (name, (shard, entry)) in &self.tensors {
            let pieces: Vec<blake3::Hash> =
                self.shards[*shard].bytes(entry).par_chunks(PIECE).map(blake3::hash).collect();
            whole.update(format!("{name} {:?} {:?} {}\n", entry.dtype, entry.shape, pieces.len()).as_bytes());
            for piece in pieces {
                whole.update(piece.as_bytes());
            }
        }
        *whole.finalize().as_bytes()
    }

    /// Looks for NaN and infinity in every weight.
    ///
    /// # Errors
    /// [`Error::Model`] naming the file, the tensor and the row-major index of the first such value.
    pub fn check_finite(&self) -> Result<()> {
        for (name, (shard, entry)) in &self.tensors {
            let file = &self.shards[*shard];
            let values = file.values(entry).ok_or_else(|| wrong_dtype(file.path(), name, entry))?;
            if let Some(index) = first_non_finite(values) {
                return Err(Error::model(
                    file.path(),
                    format!(
                        "tensor `{name}` holds NaN or infinity at index {index} of shape {:?}",
                        entry.shape
                    ),
                    "the checkpoint is damaged, or its training diverged: use an earlier one",
                ));
            }
        }
        Ok(())
    }

    /// Fills `tensors` with what the config asks for, and refuses what it does not.
    fn find_tensors(&mut self) -> Result<()> {
        let mut found = BTreeMap::new();
        for (shard, file) in self.shards.iter().enumerate() {
            for (name, entry) in file.tensors() {
                if let Some((other, _)) = found.insert(name.to_string(), (shard, entry.clone())) {
                    let other: &TensorFile = &self.shards[other];
                    return Err(Error::model(
                        file.path(),
                        format!("tensor `{name}` is also in {}", other.path().display()),
                        "remove the file that does not belong to this model",
                    ));
                }
            }
        }
        for TensorSpec { name, shape } in self.config.tensors() {
            let Some((shard, entry)) = found.remove(&name) else {
                return Err(missing(&self.path, &name));
            };
            let file = &self.shards[shard];
            check_shape(file.path(), &name, &entry, &shape)?;
            if file.values(&entry).is_none() {
                return Err(wrong_dtype(file.path(), &name, &entry));
            }
            self.tensors.insert(name, (shard, entry));
        }
        for (name, (shard, entry)) in found {
            self.check_extra(&name, &self.shards[shard], &entry)?;
        }
        Ok(())
    }

    fn check_extra(&self, name: &str, file: &TensorFile, entry: &TensorEntry) -> Result<()> {
        if name.ends_with(".rotary_emb.inv_freq") {
            return Ok(());
        }
        if name == HEAD && self.config.tie_word_embeddings {
            let (shard, embedding) = &self.tensors[EMBEDDING];
            let same = entry.dtype == embedding.dtype
                && entry.shape == embedding.shape
                && file.bytes(entry) == self.shards[*shard].bytes(embedding);
            return match same {
                true => Ok(()),
                false => Err(Error::model(
                    file.path(),
                    format!("config.json ties the embeddings, but `{HEAD}` differs from `{EMBEDDING}`"),
                    "set tie_word_embeddings to false to use both, or remove lm_head.weight",
                )),
            };
        }
        let help = if name.contains("lora_") || name.starts_with("base_model.") {
            "this looks like an adapter: merge it into its base model first"
        } else if name.ends_with(".bias") {
            "if the model has biases, set attention_bias or mlp_bias in config.json to true"
        } else {
            "the weights are not those of the model that config.json describes: correct config.json, or remove the tensor"
        };
        Err(Error::model(file.path(), format!("unexpected tensor `{name}` of shape {:?}", entry.shape), help))
    }
}

/// Index of the first NaN or infinity: a value whose exponent bits are all ones.
pub fn first_non_finite(values: RawValues<'_>) -> Option<usize> {
    let (size, mask) = match values.storage {
        StorageType::F32 => (4, 0x7f80_0000u32),
        StorageType::F16 => (2, 0x7c00),
        StorageType::Bf16 => (2, 0x7f80),
    };
    // Folded without a branch, so that the compiler vectorises it; an early exit would hinder that.
    let bad = |piece: &[u8]| match size {
        4 => piece.as_chunks().0.iter().fold(false, |bad, &v| bad | (u32::from_le_bytes(v) & mask == mask)),
        _ => {
            let mask = mask as u16;
            piece.as_chunks().0.iter().fold(false, |bad, &v| bad | (u16::from_le_bytes(v) & mask == mask))
        }
    };
    let piece = values.bytes.par_chunks(PIECE).position_first(bad)? * PIECE;
    let within = values.bytes[piece..].chunks_exact(size).position(bad)?;
    Some(piece / size + within)
}

fn open_shards(folder: &Path) -> Result<Vec<TensorFile>> {
    let single = folder.join(SINGLE);
    let index = folder.join(INDEX);
    if single.is_file() {
        return Ok(vec![TensorFile::open(&single)?]);
    }
    if index.is_file() {
        return open_indexed(folder, &index);
    }
    let pickled =
        ["pytorch_model.bin", "pytorch_model.bin.index.json"].iter().any(|name| folder.join(name).exists());
    Err(match pickled {
        true => Error::model(
            folder,
            "the weights are in pytorch_model.bin; only safetensors is read, because pickle files can run code",
            "convert it: load the model with transformers and call save_pretrained",
        ),
        false => Error::model(
            folder,
            format!("neither {SINGLE} nor {INDEX} is there"),
            "download the model's weights into this folder",
        ),
    })
}

fn open_indexed(folder: &Path, index: &Path) -> Result<Vec<TensorFile>> {
    let again = "download or copy the file again";
    let text = std::fs::read_to_string(index).map_err(|error| Error::io(index, "read", error))?;
    let json: Value = serde_json::from_str(&text)
        .map_err(|error| Error::model(index, format!("is not valid JSON: {error}"), again))?;
    let Some(weight_map) = json["weight_map"].as_object() else {
        return Err(Error::model(index, "has no object `weight_map`", again));
    };
    // File name to the tensors it must hold, in the order of names.
    let mut files: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (tensor, file) in weight_map {
        match file.as_str() {
            // A name that leaves the folder could map any file of the machine.
            Some(file) if Path::new(file).file_name() == Some(file.as_ref()) => {
                files.entry(file).or_default().push(tensor);
            }
            _ => {
                return Err(Error::model(
                    index,
                    format!("`{tensor}` lies in {file}, not a file name"),
                    again,
                ));
            }
        }
    }
    let mut shards = Vec::new();
    for (name, tensors) in files {
        let path = folder.join(name);
        if !path.is_file() {
            return Err(Error::model(
                &path,
                format!("this shard is missing; {INDEX} places {} tensors in it", tensors.len()),
                "download the missing file",
            ));
        }
        let shard = TensorFile::open(&path)?;
        if let Some(absent) = tensors.iter().find(|tensor| shard.get(tensor).is_none()) {
            return Err(Error::model(&path, format!("{INDEX} places `{absent}` here, but it is not"), again));
        }
        shards.push(shard);
    }
    Ok(shards)
}

fn missing(path: &Path, name: &str) -> Error {
    let help = match name {
        HEAD => "if the head is the embedding table, set tie_word_embeddings in config.json to true",
        _ => "the weights are not those of the model that config.json describes, or a file of it is missing",
    };
    Error::model(path, format!("tensor `{name}` is missing"), help)
}

fn check_shape(path: &Path, name: &str, entry: &TensorEntry, shape: &[usize]) -> Result<()> {
    if entry.shape == shape {
        return Ok(());
    }
    Err(Error::model(
        path,
        format!("tensor `{name}` has shape {:?}; config.json asks for {shape:?}", entry.shape),
        "config.json and the weights are of different models, or the vocabulary was resized: correct config.json",
    ))
}

fn wrong_dtype(path: &Path, name: &str, entry: &TensorEntry) -> Error {
    Error::model(
        path,
        format!("tensor `{name}` is stored as {:?}; f32, f16 and bf16 are supported", entry.dtype),
        "convert the model to bfloat16 with transformers; quantised weights cannot be trained",
    )
}
