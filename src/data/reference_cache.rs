//! Reference log-probs kept on disk between runs.
//!
//! They depend on the reference's weights, on the token ids, and on the arithmetic of the device that computed them,
//! and are stored under a hash of all of these: where one of them changes, no file is found, and they are computed
//! anew.
//!
//! A file is one line of JSON that says what it is, then `pairs` records of 16 bytes (little-endian f32
//! `logp_chosen`, f32 `logp_rejected`, u32 `tokens_chosen`, u32 `tokens_rejected`), then the 32-byte BLAKE3 hash of
//! everything before it. A file named `.partial` is the same with the records of the first pairs alone: a run that was
//! stopped left it, and the next run goes on from it.
//!
//! The cache only saves time. Whatever is wrong with it is a warning, never the end of a run: damage, another kind of
//! file under its name, a folder that cannot be written. It is private (mode 0600 in a folder of mode 0700), and a file
//! that another user owns or could have written is not believed.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::checkpoint::atomic::kind_of;
use crate::config::LengthLimits;
use crate::objective::ReferencePair;
use crate::{Error, Result};

const FORMAT: &str = "mmpo-fast reference log-probs";
const VERSION: u32 = 1;
const RECORD_BYTES: usize = 16;
const HASH_BYTES: usize = blake3::OUT_LEN;
/// More bytes than any header of ours takes.
const HEADER_BYTES: usize = 4096;

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
    /// Lengths to which pairs were cut.
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

    /// The cache file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The stored log-probs of `pairs` pairs. `None` if there is no file, or if it is damaged or of something else:
    /// then a warning says why, and they must be computed again.
    pub fn load(&self, pairs: usize) -> Option<Vec<ReferencePair>> {
        self.read(&self.path, pairs, |stored| stored == pairs)
    }

    /// The log-probs of the first pairs that a stopped run left; none if there is no such file.
    pub fn load_partial(&self, pairs: usize) -> Vec<ReferencePair> {
        self.read(&self.partial_path(), pairs, |stored| stored <= pairs).unwrap_or_default()
    }

    /// As [`ReferenceCache::load_partial`], of one of several ranks that score `share` of `pairs` pairs: the first of its share.
    pub fn load_share(&self, rank: (usize, usize), share: usize, pairs: usize) -> Vec<ReferencePair> {
        self.read(&self.share_path(rank), pairs, |stored| stored <= share).unwrap_or_default()
    }

    /// Writes the log-probs of the first pairs of a rank's share, for [`ReferenceCache::load_share`].
    ///
    /// # Errors
    /// As [`ReferenceCache::store`].
    pub fn store_share(
        &self,
        rank: (usize, usize),
        references: &[ReferencePair],
        pairs: usize,
    ) -> Result<()> {
        self.write(&self.share_path(rank), references, pairs)
    }

    /// Removes what [`ReferenceCache::store_share`] wrote, once all shares are known.
    pub fn remove_share(&self, rank: (usize, usize)) {
        // A file that is left there is never wrong: it is looked at again by a rank with the same share alone.
        let _ = fs::remove_file(self.share_path(rank));
    }

    /// Another number of ranks has other shares.
    fn share_path(&self, (rank, ranks): (usize, usize)) -> PathBuf {
        self.path.with_extension(format!("partial-{rank}-of-{ranks}"))
    }

    fn read(&self, path: &Path, pairs: usize, accepts: impl Fn(usize) -> bool) -> Option<Vec<ReferencePair>> {
        let warn = |fault: &str| {
            tracing::warn!("{}: {fault}; the reference log-probs are computed again", path.display());
        };
        match read_own_file(path, HEADER_BYTES + pairs * RECORD_BYTES + HASH_BYTES) {
            Ok(None) => None,
            Err(fault) => {
                warn(&fault);
                None
            }
            Ok(Some(bytes)) => self.parse(&bytes, pairs, accepts).inspect_err(|fault| warn(fault)).ok(),
        }
    }

    /// Writes the log-probs under a temporary name, syncs, and renames: a reader sees all of them or none.
    ///
    /// # Errors
    /// [`Error::Io`] where the system refuses.
    pub fn store(&self, references: &[ReferencePair]) -> Result<()> {
        self.write(&self.path, references, references.len())?;
        match fs::remove_file(self.partial_path()) {
            // A partial file that is left there is never looked at again.
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Writes the log-probs of the first of `pairs` pairs, for [`ReferenceCache::load_partial`].
    ///
    /// # Errors
    /// As [`ReferenceCache::store`].
    pub fn store_partial(&self, references: &[ReferencePair], pairs: usize) -> Result<()> {
        self.write(&self.partial_path(), references, pairs)
    }

    fn partial_path(&self) -> PathBuf {
        self.path.with_extension("partial")
    }

    fn write(&self, path: &Path, references: &[ReferencePair], pairs: usize) -> Result<()> {
        let header = Header {
            format: FORMAT.to_string(),
            version: VERSION,
            key: self.key.clone(),
            pairs,
            compute: self.compute.clone(),
        };
        let mut bytes =
            serde_json::to_vec(&header).map_err(|error| Error::io(path, "write", error.into()))?;
        bytes.push(b'\n');
        for reference in references {
            bytes.extend_from_slice(&reference.logp_chosen.to_le_bytes());
            bytes.extend_from_slice(&reference.logp_rejected.to_le_bytes());
            bytes.extend_from_slice(&reference.tokens_chosen.to_le_bytes());
            bytes.extend_from_slice(&reference.tokens_rejected.to_le_bytes());
        }
        let hash = blake3::hash(&bytes);
        bytes.extend_from_slice(hash.as_bytes());
        replace(path, &bytes)
    }

    /// The stored log-probs if there are any, else those of `compute`, which are stored.
    ///
    /// # Errors
    /// Those of `compute`, and [`Error::Io`] where they cannot be stored.
    pub fn load_or_compute(
        &self,
        pairs: usize,
        compute: impl FnOnce() -> Result<Vec<ReferencePair>>,
    ) -> Result<Vec<ReferencePair>> {
        if let Some(references) = self.load(pairs) {
            return Ok(references);
        }
        let references = compute()?;
        self.store(&references)?;
        Ok(references)
    }

    /// The log-probs that `bytes` hold, or what is wrong with them.
    fn parse(
        &self,
        bytes: &[u8],
        pairs: usize,
        accepts: impl Fn(usize) -> bool,
    ) -> std::result::Result<Vec<ReferencePair>, String> {
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
        let fits = records.len().is_multiple_of(RECORD_BYTES) && accepts(records.len() / RECORD_BYTES);
        if header.key != self.key || header.pairs != pairs || !fits {
            return Err(format!("the file is for other data ({} pairs, here {pairs})", header.pairs));
        }
        Ok(records.chunks_exact(RECORD_BYTES).map(reference_of).collect())
    }
}

/// The bytes of a regular file of this user's own; `None` where there is no file. The error says what is wrong with it,
/// before anything is read that could block or never end.
fn read_own_file(path: &Path, most: usize) -> std::result::Result<Option<Vec<u8>>, String> {
    let failed = |error: std::io::Error| format!("the file cannot be read ({error})");
    let Some(file) = open_own_file(path)? else { return Ok(None) };
    let metadata = file.metadata().map_err(failed)?;
    if metadata.len() > most as u64 {
        return Err(format!("the file has {} bytes, and no more than {most} are expected", metadata.len()));
    }
    let mut bytes = Vec::new();
    file.take(most as u64 + 1).read_to_end(&mut bytes).map_err(failed)?;
    Ok(Some(bytes))
}

/// Opens a regular file of this user's own; `None` where there is no file. The error says what is wrong with it.
pub(super) fn open_own_file(path: &Path) -> std::result::Result<Option<File>, String> {
    let failed = |error: std::io::Error| format!("the file cannot be read ({error})");
    let file = match open_without_waiting(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(format!("it is {}, not a file of this cache", kind_of(&metadata)));
    }
    check_owner(&metadata)?;
    Ok(Some(file))
}

/// Opens a file for reading; a FIFO without a writer does not hold the program up.
fn open_without_waiting(path: &Path) -> std::io::Result<File> {
    let mut options = File::options();
    options.read(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(
        &mut options,
        rustix::fs::OFlags::NONBLOCK.bits().cast_signed(),
    );
    options.open(path)
}

#[cfg(unix)]
fn check_owner(metadata: &fs::Metadata) -> std::result::Result<(), String> {
    use std::os::unix::fs::MetadataExt;
    let own = rustix::process::geteuid().as_raw();
    if metadata.uid() != own {
        return Err(format!("the file belongs to user {} and not to you ({own})", metadata.uid()));
    }
    if metadata.mode() & 0o022 != 0 {
        return Err(format!("other users can write the file (mode {:o})", metadata.mode() & 0o777));
    }
    Ok(())
}

#[cfg(not(unix))]
fn check_owner(_: &fs::Metadata) -> std::result::Result<(), String> {
    Ok(())
}

/// Replaces file `path` by `bytes`, or leaves it as it was.
fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    create_private_folder(folder).map_err(|error| Error::io(folder, "create", error))?;
    let mut file =
        tempfile::NamedTempFile::new_in(folder).map_err(|error| Error::io(folder, "write in", error))?;
    file.write_all(bytes).map_err(|error| Error::io(path, "write", error))?;
    file.as_file().sync_all().map_err(|error| Error::io(path, "sync", error))?;
    file.persist(path).map_err(|error| Error::io(path, "replace", error.error))?;
    // The rename itself is durable only once the folder is.
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(|error| Error::io(folder, "sync", error))
}

/// Makes a folder and its parents for this user alone; one that exists keeps its mode.
pub(super) fn create_private_folder(folder: &Path) -> std::io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(folder)
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
