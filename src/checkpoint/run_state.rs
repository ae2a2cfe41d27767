//! What `--resume` needs, to the bit: `checkpoints/step-000123/` holds `state.json` ([`RunState`]) and
//! `state.safetensors` (weights and optimiser states under whatever names the training loop gives them).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::bf16;
use safetensors::tensor::Dtype;
use serde::{Deserialize, Serialize};

use crate::checkpoint::atomic::{self, AtomicFolder};
use crate::checkpoint::tensor_file::TensorFile;
use crate::checkpoint::tensor_writer::{StoredTensor, write_tensors};
use crate::error::{Error, Result};

/// The folder of a run that holds its checkpoints.
pub const FOLDER: &str = "checkpoints";
const STATE: &str = "state.json";
const TENSORS: &str = "state.safetensors";
/// Raised when the meaning of a file here changes.
const FORMAT: u32 = 1;

/// Where a run stands. Integers and text alone: each comes back exactly.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunState {
    /// Optimiser steps done.
    pub step: u64,
    /// The epoch of the next step, from 0.
    pub epoch: u64,
    /// Pairs trained on since the start of the run.
    pub pairs_seen: u64,
    pub rng: RngPosition,
    pub identity: RunIdentity,
}

/// Position of a ChaCha generator: its seed, stream and word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RngPosition {
    pub seed: u64,
    pub stream: u64,
    pub word: u64,
}

/// What must not change between a run's parts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunIdentity {
    /// The resolved configuration as TOML.
    pub config: String,
    /// Fingerprint of the starting weights, in hexadecimal.
    pub model: String,
    /// Fingerprint of the tokenised pairs, in hexadecimal.
    pub data: String,
}

/// A number that training state consists of.
pub trait StateElement: bytemuck::Pod {
    const DTYPE: Dtype;
}
impl StateElement for f32 {
    const DTYPE: Dtype = Dtype::F32;
}
impl StateElement for u32 {
    const DTYPE: Dtype = Dtype::U32;
}
impl StateElement for u8 {
    const DTYPE: Dtype = Dtype::U8;
}
impl StateElement for bf16 {
    const DTYPE: Dtype = Dtype::BF16;
}

/// Writes `run/checkpoints/step-N` for `state.step = N` and returns its path. `fill` is that of [`write_tensors`].
///
/// # Errors
/// Those of `fill` and of the disk; earlier checkpoints are untouched.
pub fn save_checkpoint(
    run: &Path,
    state: &RunState,
    tensors: &[StoredTensor],
    fill: impl FnMut(&StoredTensor, usize, &mut [u8]) -> Result<()>,
) -> Result<PathBuf> {
    let checkpoints = run.join(FOLDER);
    remove_leftovers(&checkpoints)?;
    let target = checkpoints.join(format!("step-{:06}", state.step));
    let folder = AtomicFolder::create(&target, |name| name == STATE || name == TENSORS)?;
    write_tensors(folder.file(TENSORS)?, tensors, &[], fill)?;
    folder.write_file(STATE, encode(&target, state)?.as_bytes())?;
    folder.commit()?;
    Ok(target)
}

/// The newest complete checkpoint of a run, if there is one.
pub fn latest(run: &Path) -> Result<Option<PathBuf>> {
    Ok(all(&run.join(FOLDER))?.pop().map(|(_, path)| path))
}

/// Removes all checkpoints but the `keep` newest; the newest one stays in any case.
pub fn prune(run: &Path, keep: usize) -> Result<()> {
    let mut checkpoints = all(&run.join(FOLDER))?;
    checkpoints.truncate(checkpoints.len().saturating_sub(keep.max(1)));
    for (_, path) in checkpoints {
        atomic::remove_folder(&path)?;
    }
    Ok(())
}

/// A checkpoint opened for resuming; tensors are read through a memory map.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    state: RunState,
    tensors: TensorFile,
}

impl Checkpoint {
    /// # Errors
    /// [`Error::Io`] where a file is missing, [`Error::Model`] where one is damaged.
    pub fn open(path: &Path) -> Result<Self> {
        let state = path.join(STATE);
        let text = std::fs::read_to_string(&state).map_err(|error| Error::io(&state, "read", error))?;
        Ok(Checkpoint {
            path: path.to_path_buf(),
            state: decode(&state, &text)?,
            tensors: TensorFile::open(&path.join(TENSORS))?,
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn state(&self) -> &RunState {
        &self.state
    }

    /// Makes sure that the run goes on as it began.
    ///
    /// `free` names keys of the configuration that may change (`output`), or whole tables of it (`evaluation`).
    ///
    /// # Errors
    /// [`Error::Config`] listing every value that differs, with what it was and what it is.
    pub fn check_identity(&self, now: &RunIdentity, free: &[&str]) -> Result<()> {
        let then = &self.state.identity;
        let mut differences = config_differences(&then.config, &now.config, free)?;
        if then.model != now.model {
            differences.push("the starting model's weights are not the same".into());
        }
        if then.data != now.data {
            differences
                .push("the pairs are not the same (data, tokenizer, template or length limits)".into());
        }
        if differences.is_empty() {
            return Ok(());
        }
        Err(Error::config(
            format!("{} cannot be resumed: {}", self.path.display(), differences.join("; ")),
            "resume with the settings the run began with, or start a new run with another --output",
        ))
    }

    /// Makes sure that the checkpoint holds `tensors` and nothing else.
    ///
    /// # Errors
    /// [`Error::Model`] naming the first tensor that is missing, too much, or of another shape or dtype.
    pub fn check_tensors(&self, tensors: &[StoredTensor]) -> Result<()> {
        for StoredTensor { name, dtype, shape } in tensors {
            self.entry(name, *dtype, shape)?;
        }
        let expected = |name: &str| tensors.iter().any(|tensor| tensor.name == name);
        let mut extra: Vec<&str> =
            self.tensors.tensors().map(|(name, _)| name).filter(|name| !expected(name)).collect();
        extra.sort_unstable();
        match extra.first() {
            Some(name) => {
                Err(self.mismatch(format!("tensor `{name}` is not part of the model being trained")))
            }
            None => Ok(()),
        }
    }

    /// The values of a tensor, in place.
    ///
    /// # Errors
    /// [`Error::Model`] where there is none of that name, dtype and shape.
    pub fn values<T: StateElement>(&self, name: &str, shape: &[usize]) -> Result<&[T]> {
        let bytes = self.entry(name, T::DTYPE, shape)?;
        bytemuck::try_cast_slice(bytes)
            .map_err(|error| self.mismatch(format!("tensor `{name}` is not aligned ({error})")))
    }

    fn entry(&self, name: &str, dtype: Dtype, shape: &[usize]) -> Result<&[u8]> {
        match self.tensors.get(name) {
            None => Err(self.mismatch(format!("tensor `{name}` is missing"))),
            Some(entry) if entry.shape != shape || entry.dtype != dtype => Err(self.mismatch(format!(
                "tensor `{name}` is {:?} {:?}; the model being trained has {dtype:?} {shape:?}",
                entry.dtype, entry.shape
            ))),
            Some(entry) => Ok(self.tensors.bytes(entry)),
        }
    }

    fn mismatch(&self, message: String) -> Error {
        Error::model(
            self.tensors.path(),
            message,
            "this checkpoint is of another model or device: resume with the model the run began with",
        )
    }
}

/// Step and path of every checkpoint in a folder, oldest first.
fn all(checkpoints: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut found: Vec<(u64, PathBuf)> = atomic::list(checkpoints)?
        .into_iter()
        .filter_map(|path| Some((path.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok()?, path)))
        .collect();
    found.sort();
    Ok(found)
}

/// What killed runs left half written, of whatever step.
fn remove_leftovers(checkpoints: &Path) -> Result<()> {
    for path in atomic::list(checkpoints)? {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if let Some((stem, _)) = name.split_once('.')
            && stem.starts_with("step-")
        {
            atomic::remove_leftovers(&checkpoints.join(stem))?;
        }
    }
    Ok(())
}

fn encode(path: &Path, run: &RunState) -> Result<String> {
    #[derive(Serialize)]
    struct StateFile<'a> {
        format: u32,
        run: &'a RunState,
    }
    serde_json::to_string_pretty(&StateFile { format: FORMAT, run }).map_err(|error| {
        Error::model(path, format!("cannot encode the state: {error}"), "report this as a bug")
    })
}

fn decode(path: &Path, text: &str) -> Result<RunState> {
    // The format is looked at alone, before fields that another format may not have.
    #[derive(Deserialize)]
    struct Format {
        format: u32,
    }
    #[derive(Deserialize)]
    struct StateFile {
        run: RunState,
    }
    let damaged = |error: serde_json::Error| {
        Error::model(
            path,
            format!("damaged: {error}"),
            "remove this checkpoint's folder to resume from the one before",
        )
    };
    let Format { format } = serde_json::from_str(text).map_err(damaged)?;
    if format != FORMAT {
        return Err(Error::model(
            path,
            format!("has format {format}; this version reads format {FORMAT}"),
            "resume with the version that began the run",
        ));
    }
    let StateFile { run } = serde_json::from_str(text).map_err(damaged)?;
    Ok(run)
}

/// One sentence for every key whose value differs.
fn config_differences(then: &str, now: &str, free: &[&str]) -> Result<Vec<String>> {
    let (then, now) = (flat(then)?, flat(now)?);
    let is_free = |key: &str| {
        free.iter()
            .any(|free| key.strip_prefix(free).is_some_and(|rest| rest.is_empty() || rest.starts_with('.')))
    };
    let show = |value: Option<&String>| value.map_or("absent".to_string(), String::clone);
    let keys: std::collections::BTreeSet<&String> = then.keys().chain(now.keys()).collect();
    Ok(keys
        .into_iter()
        .filter(|key| then.get(*key) != now.get(*key) && !is_free(key))
        .map(|key| format!("`{key}` was {} and is {}", show(then.get(key)), show(now.get(key))))
        .collect())
}

/// Dotted keys and the text of their values.
fn flat(config: &str) -> Result<BTreeMap<String, String>> {
    fn add(flat: &mut BTreeMap<String, String>, prefix: &str, table: &toml::Table) {
        for (key, value) in table {
            match value {
                toml::Value::Table(table) => add(flat, &format!("{prefix}{key}."), table),
                value => _ = flat.insert(format!("{prefix}{key}"), value.to_string()),
            }
        }
    }
    let table: toml::Table = config.parse().map_err(|error| {
        Error::config(
            format!("the configuration saved with a checkpoint is damaged: {error}"),
            "use another checkpoint",
        )
    })?;
    let mut flat = BTreeMap::new();
    add(&mut flat, "", &table);
    Ok(flat)
}
