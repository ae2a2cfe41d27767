//! What a file without a checksum shows of itself: whether its header fits its length, and whether an index fits its shards.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};

use serde_json::{Map, Value};

use super::Status;
use crate::checkpoint::{TensorFile, atomic};
use crate::error::{Error, Result};

/// The end of the name of a file that says which shard a tensor is in.
pub const INDEX_END: &str = ".safetensors.index.json";

/// Looks at a file by the kind that its name says. The reason says what is wrong, or what was looked at.
///
/// # Errors
/// [`Error::Io`] where it cannot be read.
pub fn look(path: &Path, name: &str) -> Result<(Status, Option<String>)> {
    if name.ends_with(".safetensors") {
        return match TensorFile::open(path) {
            Ok(file) => {
                let tensors = file.tensors().count();
                Ok((Status::Sound, Some(format!("the header's {tensors} tensors fill the file"))))
            }
            Err(Error::Model { message, .. }) => Ok((Status::Damaged, Some(message))),
            Err(error) => Err(error),
        };
    }
    if name.ends_with(".json") {
        let text = std::fs::read(path).map_err(|error| Error::io(path, "read", error))?;
        return Ok(match serde_json::from_slice::<serde::de::IgnoredAny>(&text) {
            Ok(_) => (Status::Sound, None),
            Err(error) => (Status::Damaged, Some(format!("not JSON: {error}"))),
        });
    }
    Ok((Status::Unchecked, None))
}

/// Compares an index with the shards beside it: each shard and what is wrong with it.
///
/// # Errors
/// [`Error::Io`] where the index cannot be read. An index that is no JSON is found by [`look`].
pub fn compare_shards(index: &Path) -> Result<Vec<(String, Status, String)>> {
    let text = std::fs::read(index).map_err(|error| Error::io(index, "read", error))?;
    let Ok(parsed) = serde_json::from_slice::<Map<String, Value>>(&text) else { return Ok(Vec::new()) };
    let Some(places) = parsed.get("weight_map").and_then(Value::as_object) else { return Ok(Vec::new()) };
    let mut shards: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (tensor, shard) in places {
        shards.entry(shard.as_str().unwrap_or_default()).or_default().insert(tensor);
    }
    let folder = atomic::parent(index);
    let mut wrong = Vec::new();
    for (shard, listed) in shards {
        if let Some((status, reason)) = compare_shard(folder, shard, &listed)? {
            wrong.push((shard.to_string(), status, reason));
        }
    }
    Ok(wrong)
}

fn compare_shard(folder: &Path, shard: &str, listed: &BTreeSet<&str>) -> Result<Option<(Status, String)>> {
    let mut parts = Path::new(shard).components();
    let is_name = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
    if !is_name {
        return Ok(Some((Status::Damaged, "the index names a shard outside the folder".to_string())));
    }
    let path = folder.join(shard);
    if !path.exists() {
        return Ok(Some((Status::Missing, format!("the index has {} tensors in this shard", listed.len()))));
    }
    // A shard with a broken header is found when it is looked at itself.
    let Ok(file) = TensorFile::open(&path) else { return Ok(None) };
    let stored: BTreeSet<&str> = file.tensors().map(|(name, _)| name).collect();
    let reason = match (listed.difference(&stored).next(), stored.difference(listed).next()) {
        (Some(tensor), _) => format!("the index has tensor `{tensor}` in this shard, and it is not there"),
        (None, Some(tensor)) => format!("holds tensor `{tensor}`, which the index has not in this shard"),
        (None, None) => return Ok(None),
    };
    Ok(Some((Status::Damaged, reason)))
}
