//! Tokenised pairs kept on disk between runs, and read from there instead of being held in memory.
//!
//! What a file of pairs becomes depends on its bytes, the tokenizer, the chat template, the lengths and policies, and on
//! this program's way of reading; the cache's file is named after a hash of all of these ([`Key`]). Where one of them
//! changes, no file is found and the pairs are tokenised anew. The pairs of a data set are read through a memory map of
//! that file ([`file`]), so that a million of them take little memory.
//!
//! The cache only saves time and memory. Whatever is wrong with it is a warning, never the end of a run: damage, another
//! kind of file under its name, a folder that cannot be written, a full disk. A file is written under a temporary name
//! and renamed, so that several processes may do so at once: each sees whole files alone. As with the cache of reference
//! log-probs, files are private, and one that another user owns or could have written is not believed. Above a size, the
//! files that were not used for the longest are removed ([`limit`]).

mod file;
mod key;
mod limit;

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::reference_cache::create_private_folder;
use crate::config::DataCache;
use crate::{Error, Result};
pub(super) use file::{PairWriter, StoredPairs, Summary};
pub(super) use key::Key;
pub use limit::CACHE_LIMIT;

/// Names of files that are being written begin with this.
const PARTIAL: &str = ".partial-";
/// A file that is being written and was not written to for so long belongs to a process that was killed.
const ABANDONED: Duration = Duration::from_secs(24 * 60 * 60);

/// A folder of tokenised pairs.
#[derive(Clone, Debug)]
pub struct PairCache {
    folder: PathBuf,
    /// Bytes that it may hold; `None` for any number.
    limit: Option<u64>,
}

/// The folder of this program's caches: `MMPO_FAST_CACHE`, else `mmpo-fast` in the user's cache folder
/// (`XDG_CACHE_HOME`, else `~/.cache`). `None` where no variable says where that is.
pub fn cache_folder() -> Option<PathBuf> {
    let folder =
        |variable: &str| std::env::var_os(variable).filter(|path| !path.is_empty()).map(PathBuf::from);
    folder("MMPO_FAST_CACHE")
        .or_else(|| folder("XDG_CACHE_HOME").map(|cache| cache.join("mmpo-fast")))
        .or_else(|| folder("HOME").map(|home| home.join(".cache/mmpo-fast")))
}

impl PairCache {
    /// The cache in `folder`, which need not exist yet, without a limit of its size.
    pub fn new(folder: &Path) -> Self {
        PairCache { folder: folder.to_path_buf(), limit: None }
    }

    /// This cache, which holds at most `limit` bytes after each file that it takes up, but for files in use.
    pub fn with_limit(self, limit: Option<u64>) -> Self {
        PairCache { limit, ..self }
    }

    /// The cache that an option asks for; without one, `pairs` in [`cache_folder`]. `None` where it is off, or where
    /// there is no such folder. Its limit is that of [`CACHE_LIMIT`].
    ///
    /// # Errors
    /// [`Error::Config`] where that variable is no size.
    pub fn of(choice: Option<&DataCache>) -> Result<Option<Self>> {
        let folder = match choice {
            Some(DataCache::Off) => None,
            Some(DataCache::Folder(folder)) => Some(folder.clone()),
            None => cache_folder().map(|folder| folder.join("pairs")),
        };
        let Some(folder) = folder else { return Ok(None) };
        Ok(Some(PairCache::new(&folder).with_limit(limit::from_environment()?)))
    }

    /// The file of one key.
    pub(super) fn path(&self, key: &Key) -> PathBuf {
        self.folder.join(format!("{}.{}", &key.hex()[..limit::DIGITS], limit::EXTENSION))
    }

    /// Removes files that were not used for long where the cache holds more than its limit, after that of `key` came.
    pub(super) fn keep_within_limit(&self, key: &Key) {
        if let Some(limit) = self.limit {
            limit::enforce(&self.folder, limit, &self.path(key));
        }
    }

    /// The pairs kept under `key`; `None` if there are none, or if the file is damaged or of something else: then a
    /// warning says why, and they must be tokenised again.
    pub(super) fn open(&self, key: &Key) -> Option<StoredPairs> {
        let path = self.path(key);
        StoredPairs::open(&path, key).unwrap_or_else(|fault| {
            tracing::warn!("{}: {fault}; the pairs are tokenised again", path.display());
            None
        })
    }

    /// Begins a new file in the cache's folder.
    pub(super) fn create(&self) -> Result<PairWriter> {
        create_private_folder(&self.folder).map_err(|error| Error::io(&self.folder, "create", error))?;
        remove_abandoned(&self.folder);
        let file = tempfile::Builder::new().prefix(PARTIAL).tempfile_in(&self.folder);
        PairWriter::new(file.map_err(|error| Error::io(&self.folder, "write in", error))?)
    }
}

/// Removes what killed processes left. What cannot be removed stays: it does no harm but to the disk.
fn remove_abandoned(folder: &Path) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    let now = SystemTime::now();
    for entry in entries.flatten() {
        let is_partial = entry.file_name().to_string_lossy().starts_with(PARTIAL);
        let written = entry.metadata().and_then(|metadata| metadata.modified());
        let is_old = written.is_ok_and(|time| now.duration_since(time).is_ok_and(|age| age > ABANDONED));
        if is_partial && is_old {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}
