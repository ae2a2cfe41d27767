//! A Hugging Face Llama folder, opened for reading: every tensor is found and checked before the first is used.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

use rayon::prelude::*;
use safetensors::tensor::Dtype;
use serde_json::Value;

use crate::checkpoint::tensor_file::{TensorEntry, TensorFile};
use crate::checkpoint::tensor_names::{self, EMBEDDING, HEAD};
use crate::device::{RawValues, StorageType};
use crate::error::{Error, Result};
use crate::foreign;
use crate::model::LlamaConfig;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

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
    /// Names are taken as transformers' `from_pretrained` takes them: with or without the prefix `model.`, and one
    /// tensor for both uses where the embeddings are tied. Every tensor the config asks for must be there with its
    /// shape in f32, f16 or bf16, and no other may: leftovers of an adapter or of another architecture mean that the
    /// folder is not the model its config describes. Three kinds of extra tensor are harmless: rotary tables of old
    /// checkpoints, which the config determines; heads of other tasks, with a warning; and the `lm_head.weight` of a
    /// tied model where it equals the embedding. Where the two differ, the weights count and not the config: the model
    /// is not tied, with a warning, as in transformers 5.
    ///
    /// # Errors
    /// [`Error::Model`] or [`Error::Io`] naming the file, and the tensor where it is about one.
    pub fn open(path: &Path) -> Result<Self> {
        let config = LlamaConfig::from_folder(path)?;
        let shards = open_shards(path, &config)?;
        let mut folder = ModelFolder { path: path.to_path_buf(), config, shards, tensors: BTreeMap::new() };
        folder.find_tensors()?;
        if let Some(warning) = foreign::folder::leftover_adapter(path) {
            tracing::warn!("{warning}");
        }
        Ok(folder)
    }

    /// The folder, as it was named.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What its `config.json` says.
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
    /// [`Error::Bug`] where there is none of that name: the names were compared when the folder was opened; [`Error::Model`]
    /// where its shape is not `shape`.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<RawValues<'_>> {
        let Some((shard, entry)) = self.tensors.get(name) else {
            return Err(Error::bug(format!("{}: there is no tensor `{name}`", self.path.display())));
        };
        let file = &self.shards[*shard];
        check_shape(file.path(), name, entry, shape)?;
        file.values(entry).ok_or_else(|| wrong_dtype(file.path(), name, entry))
    }

    /// Gives the memory of some of a tensor's bytes back to the system until they are used again. All of a model's weights would
    /// otherwise count as this process's memory once they were read.
    pub fn release(&self, name: &str, bytes: Range<usize>) {
        if let Some((shard, entry)) = self.tensors.get(name) {
            self.shards[*shard].release(entry, bytes);
        }
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
            self.shards[*shard].release_all(entry);
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
            file.release_all(entry);
        }
        Ok(())
    }

    /// Fills `tensors` with what the config asks for, and refuses what it does not.
    fn find_tensors(&mut self) -> Result<()> {
        let mut found = self.read_names()?;
        if self.config.tie_word_embeddings && self.has_another_head(&found) {
            tracing::warn!(
                "{}: `tie_word_embeddings` is true, but the weights hold an `{HEAD}` that differs from \
                 `{EMBEDDING}`; both are used and trained, as in transformers, and the saved config says false",
                self.path.join("config.json").display()
            );
            self.config.untie();
        }
        let specs = self.config.tensors();
        if self.config.tie_word_embeddings
            && !found.contains_key(EMBEDDING)
            && let Some(head) = found.remove(HEAD)
        {
            found.insert(EMBEDDING.to_string(), head);
        }
        let mut missing = Vec::new();
        for spec in &specs {
            match found.remove(&spec.name) {
                Some((shard, entry)) => _ = self.tensors.insert(spec.name.clone(), (shard, entry)),
                None => missing.push(spec.name.as_str()),
            }
        }
        if self.config.tie_word_embeddings {
            found.remove(HEAD);
        }
        let extra: Vec<&str> = found.keys().map(String::as_str).collect();
        let file = match &self.shards[..] {
            [single] => single.path(),
            _ => &self.path,
        };
        let ignored = tensor_names::check(file, &specs, &missing, &extra)?;
        if let Some(warning) = ignored {
            tracing::warn!("{}: {warning}", file.display());
        }
        for spec in &specs {
            let (shard, entry) = &self.tensors[&spec.name];
            let file = &self.shards[*shard];
            check_shape(file.path(), &spec.name, entry, &spec.shape)?;
            if file.values(entry).is_none() {
                return Err(wrong_dtype(file.path(), &spec.name, entry));
            }
        }
        Ok(())
    }

    /// Every tensor of the shards under the name that the config has for it.
    fn read_names(&self) -> Result<BTreeMap<String, (usize, TensorEntry)>> {
        let expected = tensor_names::expected(&self.config);
        let mut found: BTreeMap<String, (usize, TensorEntry)> = BTreeMap::new();
        for (shard, file) in self.shards.iter().enumerate() {
            for (stored, entry) in file.tensors() {
                let name = tensor_names::loaded(stored, &expected);
                let Some((other, _)) = found.insert(name.clone(), (shard, entry.clone())) else { continue };
                return Err(match self.shards[other].path() == file.path() {
                    false => Error::model(
                        file.path(),
                        format!("tensor `{stored}` is also in {}", self.shards[other].path().display()),
                        "remove the file that does not belong to this model",
                    ),
                    true => Error::model(
                        file.path(),
                        format!("tensor `{name}` is there twice, with and without the prefix `model.`"),
                        "remove the one that does not belong to this model",
                    ),
                });
            }
        }
        Ok(found)
    }

    /// Whether the weights hold a head beside the embedding, in whatever dtype, that is not the same.
    fn has_another_head(&self, found: &BTreeMap<String, (usize, TensorEntry)>) -> bool {
        let (Some((head_shard, head)), Some((shard, embedding))) = (found.get(HEAD), found.get(EMBEDDING))
        else {
            return false;
        };
        let values = (self.shards[*head_shard].values(head), self.shards[*shard].values(embedding));
        let same_values = || matches!(values, (Some(head), Some(embedding)) if equal_values(head, embedding));
        let is_same = head.shape == embedding.shape && same_values();
        self.shards[*head_shard].release_all(head);
        self.shards[*shard].release_all(embedding);
        !is_same
    }
}

/// Whether two tensors of one shape hold the same numbers, each in its own dtype.
fn equal_values(left: RawValues<'_>, right: RawValues<'_>) -> bool {
    if left.storage == right.storage {
        return left.bytes == right.bytes;
    }
    (0..left.len()).into_par_iter().with_min_len(1 << 16).all(|i| value(left, i) == value(right, i))
}

fn value(values: RawValues<'_>, index: usize) -> f32 {
    let two = || u16::from_le_bytes([values.bytes[2 * index], values.bytes[2 * index + 1]]);
    match values.storage {
        StorageType::F32 => {
            values.bytes[4 * index..].first_chunk().map_or(f32::NAN, |&bytes| f32::from_le_bytes(bytes))
        }
        StorageType::F16 => half::f16::from_bits(two()).to_f32(),
        StorageType::Bf16 => half::bf16::from_bits(two()).to_f32(),
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

fn open_shards(folder: &Path, config: &LlamaConfig) -> Result<Vec<TensorFile>> {
    match config.weights_file() {
        Ok(None) => {}
        Ok(Some(name)) => return open_named(folder, name),
        Err(other) => return Err(wrong_weights_file(folder, other.to_string())),
    }
    let single = folder.join(SINGLE);
    let index = folder.join(INDEX);
    if single.is_file() {
        return Ok(vec![TensorFile::open(&single)?]);
    }
    if index.is_file() {
        return open_indexed(folder, &index);
    }
    Err(foreign::folder::without_weights(folder))
}

/// The weights that `transformers_weights` of the config names, as transformers takes them.
fn open_named(folder: &Path, name: &str) -> Result<Vec<TensorFile>> {
    let stays_inside = Path::new(name).components().all(|part| matches!(part, Component::Normal(_)));
    let path = folder.join(name);
    match (stays_inside, name.ends_with(".safetensors.index.json"), name.ends_with(".safetensors")) {
        (true, true, _) if path.is_file() => open_indexed(folder, &path),
        (true, _, true) if path.is_file() => Ok(vec![TensorFile::open(&path)?]),
        _ => Err(wrong_weights_file(folder, format!("{name:?}"))),
    }
}

fn wrong_weights_file(folder: &Path, found: String) -> Error {
    Error::model(
        &folder.join("config.json"),
        format!(
            "`transformers_weights` is {found}, which is no file of the folder that ends in `.safetensors` or \
             `.safetensors.index.json`"
        ),
        "name a file that is there, or remove the key if the weights are in model.safetensors",
    )
}

fn open_indexed(folder: &Path, index: &Path) -> Result<Vec<TensorFile>> {
    let again = "download or copy the file again";
    let text = foreign::read_text(index, "the index of the shards")?;
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
                    format!("`{tensor}` lies in {file}, not a file name of this folder"),
                    "an index that leads out of its folder is not to be trusted: download the model again",
                ));
            }
        }
    }
    let mut shards = Vec::new();
    for (name, tensors) in files {
        let path = folder.join(name);
        if !path.is_file() {
            if path.is_symlink() {
                return Err(foreign::folder::broken_link(&path));
            }
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
        match entry.dtype {
            Dtype::F64 => "convert the model to float32 with transformers",
            _ => {
                "use the unquantised (bf16, f16 or f32) version of this model: quantised weights cannot be trained"
            }
        },
    )
}
