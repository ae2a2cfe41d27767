//! A file mapped into memory, read-only: weights are read from the page cache, never copied.

use std::fs::File;
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::error::{Error, Result};

/// The bytes of a whole file.
///
/// The file must not be shortened while it is mapped: reading past its new end would kill the process (SIGBUS).
/// This program never does so itself; it writes new files and renames them into place.
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    map: Mmap,
}

impl MappedFile {
    /// Maps the file at `path` for reading.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io) if it cannot be opened or mapped.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|error| Error::io(path, "read", error))?;
        Self::of(&file, path)
    }

    /// Maps an open file; `path` is where it was opened, or where it is meant for.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io) if it cannot be mapped.
    pub fn of(file: &File, path: &Path) -> Result<Self> {
        // SAFETY: the map is private and read-only, and lives as long as every borrow of its bytes. Bytes are only
        // read as integers and floats of any bit pattern, so that another process writing to the file could change
        // numbers but not break a type's validity; shortening it is excluded by the contract above.
        let map = unsafe { Mmap::map(file) }.map_err(|error| Error::io(path, "map", error))?;
        Ok(MappedFile { path: path.to_path_buf(), map })
    }

    /// Gives the pages of these bytes back to the system, which reads them again when they are used again: what was copied to a
    /// device need not stay in this process's memory.
    pub fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        {
            let advice = memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: the map is read-only and backed by its file, so that dropped pages come back with the same bytes.
            let released = unsafe { self.map.unchecked_advise_range(advice, range.start, range.len()) };
            if let Err(error) = released {
                tracing::debug!("{}: {error}", self.path.display());
            }
        }
        #[cfg(not(unix))]
        let _ = range;
    }

    /// Where the file was when it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}
