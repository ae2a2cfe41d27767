//! safetensors files written as a stream: the header from names and shapes, then the data a piece at a time, so that
//! the memory needed does not grow with the model.

use std::collections::{BTreeSet, HashMap};

use safetensors::tensor::{Dtype, Metadata, TensorInfo};

use crate::checkpoint::atomic::SyncedFile;
use crate::error::{Error, Result};

/// Values handed to `fill` at a time.
pub(super) const PIECE_VALUES: usize = 4 << 20;

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredTensor {
    /// Its name in the file.
    pub name: String,
    /// Its storage type.
    pub dtype: Dtype,
    /// Its dimensions, outermost first.
    pub shape: Vec<usize>,
}

impl StoredTensor {
    /// A tensor of `shape`, outermost dimension first.
    pub fn new(name: impl Into<String>, dtype: Dtype, shape: &[usize]) -> Self {
        StoredTensor { name: name.into(), dtype, shape: shape.to_vec() }
    }

    /// Number of values.
    pub fn values(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes of all values.
    pub fn bytes(&self) -> usize {
        self.values() * value_size(self.dtype)
    }
}

/// Writes `tensors`, finishes `file`, and returns the BLAKE3 of its bytes. `fill(tensor, offset, bytes)` assigns the
/// little-endian values of a tensor from row-major index `offset` on; `bytes` starts at an address fit for any of the
/// dtypes.
///
/// The order in the file is that of the safetensors library: wide dtypes first, so that all are aligned, then by name.
///
/// # Errors
/// Those of `fill` and of the disk; [`Error::Bug`] where two tensors have one name.
pub fn write_tensors(
    mut file: SyncedFile,
    tensors: &[StoredTensor],
    metadata: &[(&str, &str)],
    mut fill: impl FnMut(&StoredTensor, usize, &mut [u8]) -> Result<()>,
) -> Result<blake3::Hash> {
    let mut ordered: Vec<&StoredTensor> = tensors.iter().collect();
    ordered.sort_by(|one, other| other.dtype.cmp(&one.dtype).then_with(|| one.name.cmp(&other.name)));
    let header = header(&ordered, metadata)?;
    let mut hasher = blake3::Hasher::new();
    hasher.update(&header);
    file.write(&header)?;
    // u64 storage: aligned for every dtype.
    let mut buffer: Vec<u64> = Vec::new();
    for tensor in ordered {
        let size = value_size(tensor.dtype);
        let mut offset = 0;
        while offset < tensor.values() {
            let bytes = PIECE_VALUES.min(tensor.values() - offset) * size;
            buffer.resize(buffer.len().max(bytes.div_ceil(8)), 0);
            let piece = &mut bytemuck::cast_slice_mut(&mut buffer)[..bytes];
            fill(tensor, offset, piece)?;
            hasher.update_rayon(piece);
            file.write(piece)?;
            offset += bytes / size;
        }
    }
    file.finish()?;
    Ok(hasher.finalize())
}

/// The length of the header, 8 bytes, and the header, padded with blanks to a multiple of 8.
fn header(tensors: &[&StoredTensor], metadata: &[(&str, &str)]) -> Result<Vec<u8>> {
    let names: BTreeSet<&str> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    let mut end = 0;
    let infos = tensors
        .iter()
        .map(|tensor| {
            let start = end;
            end += tensor.bytes();
            let info =
                TensorInfo { dtype: tensor.dtype, shape: tensor.shape.clone(), data_offsets: (start, end) };
            (tensor.name.clone(), info)
        })
        .collect();
    let metadata: HashMap<String, String> =
        metadata.iter().map(|&(key, value)| (key.to_string(), value.to_string())).collect();
    let invalid = |reason: String| Error::bug(format!("these tensors make no safetensors file: {reason}"));
    if names.len() != tensors.len() {
        return Err(invalid("two have one name".into()));
    }
    let header = Metadata::new(Some(metadata), infos).map_err(|error| invalid(error.to_string()))?;
    let mut text = serde_json::to_vec(&header).map_err(|error| invalid(error.to_string()))?;
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut text);
    Ok(bytes)
}

fn value_size(dtype: Dtype) -> usize {
    dtype.bitsize() / 8
}
