//! Reference log-probs kept on disk between runs.
//!
//! They depend on the reference's weights, on the token ids, and on the numbers of the device that computed them,
//! and are stored under a hash of all of it: a change of any finds no file and computes anew.
//!
//! A file is one line of JSON that says what it is, then `pairs` records of 16 bytes (little-endian f32
//! `logp_chosen`, f32 `logp_rejected`, u32 `tokens_chosen`, u32 `tokens_rejected`), then the 32-byte BLAKE3 hash of
//! everything before it.

use std::fs;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::config::LengthLimits;
use crate::objective::ReferencePair;
use crate::{Error, Result};

const FORMAT: &str = "mmpo-fast reference log-probs";
const VERSION: u32 = 1;
const RECORD_BYTES: usize = 16;
const HASH_BYTES: usize = blake3::OUT_LEN;

/// All that reference log-probs depend on.
#[derive(Clone, Debug)]
pub struct CacheKey<'a> {
    /// Hash of the reference's weights, and of its config.
    pub weights: [u8; 32],
    /// [`super::Tokenizer::fingerprint`].
    pub tokenizer: [u8; 32],
    /// [`super::ChatTemplate::fingerprint`], zeros without a template.
    pub template: [u8; 32],
    /// [`super::PairDataset::fingerprint`].
    pub data: [u8; 32],
    pub limits: LengthLimits,
    /// Device kind and dtype, as `cpu f32`: other arithmetic gives other last bits.
    pub compute: &'a str,
}

impl CacheKey<'_> {
    fn hash(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        hasher.update(FORMAT.as_bytes()).update(&VERSION.to_le_bytes());
        for part in [&self.weights, &self.tokenizer, &self.template, &self.data] {
            hasher.update(part);
        }
        for limit in [self.limits.max_length, self.limits.max_prompt_length] {
            hasher.update(&(limit as u64).to_le_bytes());
        }
        hasher.update(self.compute.as_bytes());
        hasher.finalize()
    }
}

/// The cache file of one key in a folder.
#[derive(Clone, Debug)]
pub struct ReferenceCache {
    path: PathBuf,
    key: String,
    compute: String,
}

/// The first line of a cache file.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Header {
    format: String,
    version: u32,
    key: String,
    pairs: usize,
    compute: String,
}

impl ReferenceCache {
    /// The cache for `key` in `folder`, which need not exist yet.
    pub fn new(folder: &Path, key: &CacheKey) -> Self {
        let hash = key.hash().to_hex().to_string();
        let path = folder.join(format!("reference-{}.logps", &hash[..32]));
        ReferenceCache { path, key: hash, compute: key.compute.to_string() }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The stored log-probs of `pairs` pairs. `None` if there is no file, or if it is damaged or of something else:
    /// then a warning says why, and they must be computed again.
    pub fn load(&self, pairs: usize) -> Result<Option<Vec<ReferencePair>>> {
        let bytes = match fs::read(&self.path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io(&self.path, "read", error)),
        };
        match self.parse(&bytes, pairs) {
            Ok(references) => Ok(Some(references)),
            Err(fault) => {
                tracing::warn!(
                    "{}: {fault}; the reference log-probs are computed again and the file is replaced",
                    self.path.display()
                );
                Ok(None)
            }
        }
    }

    /// Writes the log-probs under a temporary name, syncs, and renames: a reader sees all of them or none.
    pub fn store(&self, references: &[ReferencePair]) -> Result<()> {
        let header = Header {
            format: FORMAT.to_string(),
            version: VERSION,
            key: self.key.clone(),
            pairs: references.len(),
            compute: self.compute.clone(),
        };
        let mut bytes =
            serde_json::to_vec(&header).map_err(|error| Error::io(&self.path, "write", error.into()))?;
        bytes.push(b'\n');
        for reference in references {
            bytes.extend_from_slice(&reference.logp_chosen.to_le_bytes());
            bytes.extend_from_slice(&reference.logp_rejected.to_le_bytes());
            bytes.extend_from_slice(&reference.tokens_chosen.to_le_bytes());
            bytes.extend_from_slice(&reference.tokens_rejected.to_le_bytes());
        }
        let hash = blake3::hash(&bytes);
        bytes.extend_from_slice(hash.as_bytes());
        self.replace(&bytes)
    }

    /// The stored log-probs if there are any, else those of `compute`, which are stored.
    pub fn load_or_compute(
        &self,
        pairs: usize,
        compute: impl FnOnce() -> Result<Vec<ReferencePair>>,
    ) -> Result<Vec<ReferencePair>> {
        if let Some(references) = self.load(pairs)? {
            return Ok(references);
        }
        let references = compute()?;
        self.store(&references)?;
        Ok(references)
    }

    fn replace(&self, bytes: &[u8]) -> Result<()> {
        let folder = self.path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder).map_err(|error| Error::io(folder, "create", error))?;
        let mut file =
            tempfile::NamedTempFile::new_in(folder).map_err(|error| Error::io(folder, "write in", error))?;
        file.write_all(bytes).map_err(|error| Error::io(&self.path, "write", error))?;
        file.as_file().sync_all().map_err(|error| Error::io(&self.path, "sync", error))?;
        file.persist(&self.path).map_err(|error| Error::io(&self.path, "rename", error.error))?;
        // The rename itself is durable only once the folder is.
        fs::File::open(folder)
            .and_then(|folder| folder.sync_all())
            .map_err(|error| Error::io(folder, "sync", error))
    }

    /// What `bytes` hold, or what is wrong with them.
    fn parse(&self, bytes: &[u8], pairs: usize) -> std::result::Result<Vec<ReferencePair>, String> {
        let split = bytes.len().checked_sub(HASH_BYTES).ok_or("the file is cut short")?;
        let (content, hash) = bytes.split_at(split);
        if blake3::hash(content).as_bytes() != hash {
            return Err("the file is damaged or cut short (its checksum differs)".to_string());
        }
        let line = content.iter().position(|&byte| byte == b'\n').ok_or("the file has no header")?;
        let header: Header = serde_json::from_slice(&content[..line])
            .map_err(|error| format!("the file has no header of ours ({error})"))?;
        if header.format != FORMAT || header.version != VERSION {
            return Err(format!("the file is `{}` version {}", header.format, header.version));
        }
        let records = &content[line + 1..];
        if header.key != self.key || header.pairs != pairs || records.len() != pairs * RECORD_BYTES {
            return Err(format!("the file is for other data ({} pairs, here {pairs})", header.pairs));
        }
        Ok(records.chunks_exact(RECORD_BYTES).map(reference_of).collect())
    }
}

fn reference_of(record: &[u8]) -> ReferencePair {
    let word = |index: usize| {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&record[4 * index..4 * index + 4]);
        bytes
    };
    ReferencePair {
        logp_chosen: f32::from_le_bytes(word(0)),
        logp_rejected: f32::from_le_bytes(word(1)),
        tokens_chosen: u32::from_le_bytes(word(2)),
        tokens_rejected: u32::from_le_bytes(word(3)),
    }
}
