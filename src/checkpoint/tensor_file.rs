//! One memory-mapped safetensors file: its header checked in full before any tensor is handed out.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, SafeTensorError};

use crate::device::{MappedFile, RawValues, StorageType};
use crate::error::{Error, Result};
use crate::foreign::{self, Foreign};

/// What the header says about one tensor. `bytes` lies inside the file and fits dtype and shape: safetensors' own check
/// makes sure of both, and that tensors neither overlap nor leave gaps.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorEntry {
    /// Its storage type.
    pub dtype: Dtype,
    /// Its dimensions, outermost first.
    pub shape: Vec<usize>,
    bytes: Range<usize>,
}

/// A safetensors file, mapped into memory.
#[derive(Debug)]
pub struct TensorFile {
    map: MappedFile,
    tensors: HashMap<String, TensorEntry>,
}

impl TensorFile {
    /// Maps `path` and reads its header.
    ///
    /// # Errors
    /// [`Error::Model`] where the file is truncated or its header damaged; [`Error::Io`] where it cannot be read.
    pub fn open(path: &Path) -> Result<Self> {
        let map = MappedFile::open(path)?;
        let (header, metadata) =
            SafeTensors::read_metadata(&map).map_err(|error| describe(path, &map, error))?;
        // The data follow the header's length (8 bytes) and the header.
        let data = 8 + header;
        let tensors = metadata
            .tensors()
            .into_iter()
            .map(|(name, info)| {
                let bytes = data + info.data_offsets.0..data + info.data_offsets.1;
                (name, TensorEntry { dtype: info.dtype, shape: info.shape.clone(), bytes })
            })
            .collect();
        Ok(TensorFile { map, tensors })
    }

    /// The file, as it was named.
    pub fn path(&self) -> &Path {
        self.map.path()
    }

    /// Names and entries, in no particular order.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &TensorEntry)> {
        self.tensors.iter().map(|(name, entry)| (name.as_str(), entry))
    }

    /// The tensor of that name.
    pub fn get(&self, name: &str) -> Option<&TensorEntry> {
        self.tensors.get(name)
    }

    /// The tensor's bytes, of whatever dtype.
    pub fn bytes(&self, entry: &TensorEntry) -> &[u8] {
        &self.map[entry.bytes.clone()]
    }

    /// Gives the memory of some of the tensor's bytes back to the system until they are used again.
    pub fn release(&self, entry: &TensorEntry, bytes: Range<usize>) {
        self.map.release(entry.bytes.start + bytes.start..entry.bytes.start + bytes.end);
    }

    /// As [`TensorFile::release`], of the whole tensor.
    pub fn release_all(&self, entry: &TensorEntry) {
        self.map.release(entry.bytes.clone());
    }

    /// The tensor's values in place; `None` where they are of a dtype other than f32, f16 and bf16.
    pub fn values(&self, entry: &TensorEntry) -> Option<RawValues<'_>> {
        let storage = match entry.dtype {
            Dtype::F32 => StorageType::F32,
            Dtype::F16 => StorageType::F16,
            Dtype::BF16 => StorageType::Bf16,
            _ => return None,
        };
        Some(RawValues { storage, bytes: self.bytes(entry) })
    }
}

/// Says in a user's words why a safetensors file was refused.
fn describe(path: &Path, bytes: &[u8], error: SafeTensorError) -> Error {
    match foreign::recognise(&bytes[..bytes.len().min(foreign::START)]) {
        Some(Foreign::Empty | Foreign::Safetensors) | None => {}
        Some(kind) => {
            return Error::model(
                path,
                format!("this is {}, not a safetensors file", kind.name()),
                kind.help(),
            );
        }
    }
    let length = bytes.len();
    let header = bytes.first_chunk().map(|&length| u64::from_le_bytes(length));
    let message = match (error, header) {
        (SafeTensorError::HeaderTooSmall, _) => {
            format!("truncated: {length} bytes are too few for a safetensors header")
        }
        (SafeTensorError::HeaderTooLarge | SafeTensorError::InvalidHeaderLength, Some(header)) => format!(
            "truncated, or not a safetensors file: it claims a header of {header} bytes and has {length} bytes in all"
        ),
        (SafeTensorError::MetadataIncompleteBuffer, _) => {
            format!("truncated or damaged: its {length} bytes are not what its header adds up to")
        }
        (SafeTensorError::InvalidOffset(name), _) => {
            format!("damaged header: the data of tensor `{name}` overlap others or leave a gap")
        }
        (SafeTensorError::TensorInvalidInfo, _) => {
            "damaged header: a tensor's shape and dtype do not fit its bytes".to_string()
        }
        (error, _) => format!("damaged header: {error}"),
    };
    Error::model(path, message, "download or copy the file again")
}
