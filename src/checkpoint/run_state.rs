//! What `--resume` needs, to the bit: `checkpoints/step-000123/` holds `state.json` ([`RunState`]),
//! `state.safetensors` (weights and optimiser states under whatever names the training loop gives them), and `B3SUMS`,
//! the checksums of both. Where several processes keep a part of the states each, there is a file for each of them in the place of
//! `state.safetensors`: see [`super::shared_save`].

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use half::bf16;
use safetensors::tensor::Dtype;
use serde::{Deserialize, Serialize};

use crate::checkpoint::atomic::{self, AtomicFolder};
use crate::checkpoint::checksums::{self, CHECKSUMS_FILE};
use crate::checkpoint::tensor_file::{TensorEntry, TensorFile};
use crate::checkpoint::tensor_writer::{StoredTensor, write_tensors};
use crate::error::{Error, Result};

/// The folder of a run that holds its checkpoints.
pub const FOLDER: &str = "checkpoints";
/// The file of a checkpoint that says where the run stands.
pub const STATE: &str = "state.json";
/// The file of a checkpoint that holds weights and optimiser states.
pub const TENSORS: &str = "state.safetensors";
/// More files than any run's processes write.
const MOST_PARTS: usize = 99_999;
/// Raised when the meaning of a file here changes, or what a step computes. Format 2 has checksums, and learning rates
/// that are never 0.
const FORMAT: u32 = 2;

/// Options that are newer than format 2, with the values that say what runs did before: a checkpoint without them goes
/// on with these.
const ADDED_OPTIONS: [(&str, &str); 3] =
    [("optimizer_states", "\"f32\""), ("master_weights", "\"f32\""), ("gradients", "\"f32\"")];

/// Where a run stands, in integers and text alone, because each of these comes back exactly.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunState {
    /// Optimiser steps done.
    pub step: u64,
    /// The epoch of the next step, from 0.
    pub epoch: u64,
    /// Pairs trained on since the start of the run.
    pub pairs_seen: u64,
    /// Where the generator of the next epoch's order stands.
    pub rng: RngPosition,
    /// The run that the checkpoint belongs to.
    pub identity: RunIdentity,
}

/// Position of a ChaCha generator: its seed, stream and word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RngPosition {
    /// The run's seed.
    pub seed: u64,
    /// The epoch, each of which has a stream of its own.
    pub stream: u64,
    /// Words drawn so far.
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
    /// Fingerprint of the frozen reference's weights, in hexadecimal; empty where that is the starting model.
    pub reference: String,
}

/// A number that training state consists of.
pub trait StateElement: bytemuck::Pod {
    /// Its dtype in a safetensors file.
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
    let target = folder_of(run, state.step as usize);
    let folder = begin(run, state)?;
    let tensors_hash = write_tensors(folder.file(TENSORS)?, tensors, &[], fill)?;
    finish(folder, &target, state, None, &[(TENSORS, tensors_hash)])?;
    Ok(target)
}

/// Starts the folder of the checkpoint of `state`.
pub(super) fn begin(run: &Path, state: &RunState) -> Result<AtomicFolder> {
    let is_ours = |name: &str| [STATE, TENSORS, CHECKSUMS_FILE].contains(&name) || is_part_name(name);
    remove_leftovers(&run.join(FOLDER))?;
    AtomicFolder::create(&folder_of(run, state.step as usize), is_ours)
}

/// Adds the state and the checksums of it and of `files`, and puts the folder in its place.
pub(super) fn finish(
    folder: AtomicFolder,
    target: &Path,
    state: &RunState,
    parts: Option<usize>,
    files: &[(&str, blake3::Hash)],
) -> Result<()> {
    let text = encode(target, state, parts)?;
    folder.write_file(STATE, text.as_bytes())?;
    let mut hashes = vec![(STATE, blake3::hash(text.as_bytes()))];
    hashes.extend_from_slice(files);
    folder.write_file(CHECKSUMS_FILE, checksums::text(&hashes).as_bytes())?;
    folder.commit()
}

/// The file of the process `number` (from 0) of `count` that wrote a checkpoint together.
pub fn part_name(number: usize, count: usize) -> String {
    format!("state-{:05}-of-{count:05}.safetensors", number + 1)
}

/// Whether a file is one of several that a checkpoint's tensors lie in.
fn is_part_name(name: &str) -> bool {
    name.strip_prefix("state-").and_then(|rest| rest.strip_suffix(".safetensors")).is_some_and(|rest| {
        rest.split_once("-of-").is_some_and(|(number, count)| {
            [number, count].iter().all(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()))
        })
    })
}

/// The folder of the checkpoint after `step` steps, whether it is there or not.
pub fn folder_of(run: &Path, step: usize) -> PathBuf {
    run.join(FOLDER).join(format!("step-{step:06}"))
}

/// The newest complete checkpoint of a run, if there is one.
///
/// # Errors
/// [`Error::Io`] if the folder of checkpoints cannot be read.
pub fn latest(run: &Path) -> Result<Option<PathBuf>> {
    Ok(newest_first(run)?.into_iter().next())
}

/// The folders of a run's checkpoints, the newest first.
///
/// # Errors
/// [`Error::Io`] if the folder of checkpoints cannot be read.
pub fn newest_first(run: &Path) -> Result<Vec<PathBuf>> {
    Ok(all(&run.join(FOLDER))?.into_iter().rev().map(|(_, path)| path).collect())
}

/// Gives a damaged checkpoint a name that is no checkpoint's, `step-000123.damaged`, so that it neither counts among
/// those that are kept nor stands in the way when its step is saved again. Returns the new path.
///
/// # Errors
/// [`Error::Io`] if it cannot be renamed.
pub fn set_aside(checkpoint: &Path) -> Result<PathBuf> {
    let aside = checkpoint.with_extension("damaged");
    if aside.exists() {
        atomic::remove_folder(&aside)?;
    }
    std::fs::rename(checkpoint, &aside).map_err(|error| Error::io(checkpoint, "rename", error))?;
    Ok(aside)
}

/// Removes all checkpoints but the `keep` newest and those of the steps `best`; the newest one stays in any case.
///
/// # Errors
/// [`Error::Io`] if one cannot be removed.
pub fn prune(run: &Path, keep: usize, best: &[usize]) -> Result<()> {
    let mut checkpoints = all(&run.join(FOLDER))?;
    checkpoints.truncate(checkpoints.len().saturating_sub(keep.max(1)));
    for (_, path) in checkpoints.into_iter().filter(|(step, _)| !best.contains(&(*step as usize))) {
        atomic::remove_folder(&path)?;
    }
    Ok(())
}

/// A checkpoint opened for resuming; tensors are read through a memory map.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    state: RunState,
    /// One file, or one of each process that wrote the checkpoint, in their order.
    files: Vec<TensorFile>,
}

/// Some values of a stored tensor, in place.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredPiece<'a> {
    /// The tensor's value with which they begin.
    pub first: usize,
    /// The values.
    pub bytes: &'a [u8],
}

impl Checkpoint {
    /// Opens a checkpoint and reads all of it, to compare its checksums.
    ///
    /// # Errors
    /// [`Error::Io`] where a file is missing, [`Error::Model`] where one is damaged or of another format.
    pub fn open(path: &Path) -> Result<Self> {
        let file = path.join(STATE);
        let text = std::fs::read(&file).map_err(|error| Error::io(&file, "read", error))?;
        check_format(&file, &text)?;
        let (state, parts) = decode(&file, &text)?;
        let names: Vec<String> = match parts {
            None => vec![TENSORS.to_string()],
            Some(count) => (0..count).map(|number| part_name(number, count)).collect(),
        };
        let verified: Vec<&str> = [STATE].into_iter().chain(names.iter().map(String::as_str)).collect();
        checksums::verify(path, &verified)?;
        let named = path.file_name().and_then(|name| name.to_str()).and_then(step_of);
        if named.is_some_and(|step| step != state.step) {
            return Err(Error::model(
                &file,
                format!(
                    "says that {} steps are done, and its folder is named after another number",
                    state.step
                ),
                "give the folder the name it had, or use another checkpoint",
            ));
        }
        let files = names.iter().map(|name| TensorFile::open(&path.join(name))).collect::<Result<_>>()?;
        Ok(Checkpoint { path: path.to_path_buf(), state, files })
    }

    /// The checkpoint's folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the run stands.
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
        if then.reference != now.reference {
            differences.push("the reference model's weights are not the same".into());
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
            self.find(name, *dtype, shape)?;
        }
        let expected = |name: &str| tensors.iter().any(|tensor| tensor.name == name);
        let mut extra: Vec<&str> =
            self.files.iter().flat_map(TensorFile::tensors).map(|(name, _)| name).collect();
        extra.retain(|name| !expected(name));
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

    /// The bytes of a tensor, in place.
    ///
    /// # Errors
    /// As [`Checkpoint::values`].
    pub fn bytes(&self, name: &str, dtype: Dtype, shape: &[usize]) -> Result<&[u8]> {
        self.entry(name, dtype, shape)
    }

    /// The values `range` of a tensor, in the pieces in which they lie.
    ///
    /// # Errors
    /// As [`Checkpoint::values`].
    pub fn pieces(
        &self,
        name: &str,
        dtype: Dtype,
        shape: &[usize],
        range: Range<usize>,
    ) -> Result<Vec<StoredPiece<'_>>> {
        let size = dtype.bitsize() / 8;
        let (mut pieces, mut start) = (Vec::new(), 0);
        for (file, entry) in self.find(name, dtype, shape)? {
            let end = start + values_of(entry);
            let (first, last) = (range.start.max(start), range.end.min(end));
            if first < last {
                let bytes = &file.bytes(entry)[(first - start) * size..(last - start) * size];
                pieces.push(StoredPiece { first, bytes });
            }
            start = end;
        }
        Ok(pieces)
    }

    /// Gives the memory of a tensor's bytes back to the system until they are used again.
    pub fn release(&self, name: &str) {
        for file in &self.files {
            if let Some(entry) = file.get(name) {
                file.release_all(entry);
            }
        }
    }

    fn entry(&self, name: &str, dtype: Dtype, shape: &[usize]) -> Result<&[u8]> {
        match self.find(name, dtype, shape)?.as_slice() {
            [(file, entry)] => Ok(file.bytes(entry)),
            _ => Err(self.mismatch(format!("tensor `{name}` lies in several files"))),
        }
    }

    /// The files in which a tensor lies, one part after the other.
    fn find(&self, name: &str, dtype: Dtype, shape: &[usize]) -> Result<Vec<(&TensorFile, &TensorEntry)>> {
        let found: Vec<(&TensorFile, &TensorEntry)> =
            self.files.iter().filter_map(|file| Some((file, file.get(name)?))).collect();
        let Some((_, first)) = found.first() else {
            return Err(self.mismatch(format!("tensor `{name}` is missing")));
        };
        let held = match self.files.len() {
            1 => first.shape.clone(),
            // A part has no shape of its own but a length.
            _ => vec![found.iter().map(|(_, entry)| values_of(entry)).sum()],
        };
        let wanted = match self.files.len() {
            1 => shape.to_vec(),
            _ => vec![shape.iter().product()],
        };
        if held != wanted || found.iter().any(|(_, entry)| entry.dtype != dtype) {
            return Err(self.mismatch(format!(
                "tensor `{name}` is {:?} {held:?}; the model being trained has {dtype:?} {shape:?}",
                first.dtype
            )));
        }
        Ok(found)
    }

    fn mismatch(&self, message: String) -> Error {
        Error::model(
            self.files.first().map_or(self.path.as_path(), TensorFile::path),
            message,
            "this checkpoint is of another model or device: resume with the model the run began with",
        )
    }
}

/// Step and path of every checkpoint in a folder, oldest first.
fn all(checkpoints: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut found: Vec<(u64, PathBuf)> = atomic::list(checkpoints)?
        .into_iter()
        .filter_map(|path| Some((step_of(path.file_name()?.to_str()?)?, path)))
        .collect();
    found.sort();
    Ok(found)
}

/// The step of a checkpoint's folder name.
pub fn step_of(name: &str) -> Option<u64> {
    name.strip_prefix("step-")?.parse().ok()
}

/// Removes what killed runs left half written, whatever the step.
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

fn values_of(entry: &TensorEntry) -> usize {
    entry.shape.iter().product()
}

/// `parts` is the number of files in which the tensors lie, where each process wrote one.
fn encode(path: &Path, run: &RunState, parts: Option<usize>) -> Result<String> {
    #[derive(Serialize)]
    struct StateFile<'a> {
        format: u32,
        #[serde(skip_serializing_if = "Option::is_none")]
        parts: Option<usize>,
        run: &'a RunState,
    }
    serde_json::to_string_pretty(&StateFile { format: FORMAT, parts, run })
        .map_err(|error| Error::bug(format!("the state of {} cannot be encoded: {error}", path.display())))
}

/// Refuses another format. It is looked at before the checksums, which format 1 does not have, and before fields that
/// another format may not have.
fn check_format(path: &Path, text: &[u8]) -> Result<()> {
    #[derive(Deserialize)]
    struct Format {
        format: u32,
    }
    let Format { format } = serde_json::from_slice(text).map_err(|error| damaged(path, error))?;
    if format == FORMAT {
        return Ok(());
    }
    let what = match format {
        1 => ", which has no checksums and other learning rates",
        _ => "",
    };
    Err(Error::model(
        path,
        format!("has format {format}{what}; this version reads format {FORMAT}"),
        "resume with the version that began the run, or start a new run with another --output",
    ))
}

fn decode(path: &Path, text: &[u8]) -> Result<(RunState, Option<usize>)> {
    #[derive(Deserialize)]
    struct StateFile {
        parts: Option<usize>,
        run: RunState,
    }
    let StateFile { parts, run } = serde_json::from_slice(text).map_err(|error| damaged(path, error))?;
    if parts.is_some_and(|parts| !(1..=MOST_PARTS).contains(&parts)) {
        let reason = format!("damaged: {parts:?} is no number of files");
        return Err(Error::model(path, reason, "use another checkpoint, or a copy of this one"));
    }
    Ok((run, parts))
}

fn damaged(path: &Path, error: serde_json::Error) -> Error {
    Error::model(
        path,
        format!("damaged: {error}"),
        "remove this checkpoint's folder to resume from the one before",
    )
}

/// One sentence for every key whose value differs.
fn config_differences(then: &str, now: &str, free: &[&str]) -> Result<Vec<String>> {
    let (mut then, now) = (flat(then)?, flat(now)?);
    for (key, value) in ADDED_OPTIONS {
        if now.contains_key(key) {
            then.entry(key.to_string()).or_insert_with(|| value.to_string());
        }
    }
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
