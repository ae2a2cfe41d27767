//! One process per output folder: two runs in one folder would mix their metrics, checkpoints and models.

use std::fs::{File, Metadata, TryLockError};
use std::io::{ErrorKind, Read, Seek, Write};
use std::path::{Path, PathBuf};

use crate::checkpoint::atomic::kind_of;
use crate::error::{Error, Result};

/// The file that is locked, and that says who locked it.
pub const FILE: &str = ".run.lock";

/// More than what [`holder`] writes; a longer file is not ours.
const NOTE_BYTES: u64 = 1024;

/// The right to write in an output folder, until it is dropped or the process ends, however it ends: the operating
/// system holds the lock, and the file that a killed process leaves stops nobody.
#[derive(Debug)]
pub struct RunLock {
    path: PathBuf,
    /// `None` where the file system has no locks.
    file: Option<File>,
}

impl RunLock {
    /// Takes the lock of `folder`, which must exist.
    ///
    /// # Errors
    /// [`Error::Config`] naming the process that has it. On a file system without locks there is only a warning.
    pub fn take(folder: &Path) -> Result<Self> {
        let path = folder.join(FILE);
        loop {
            let mut file = match open(&path, true) {
                Ok(file) => file,
                Err(why) => return Ok(Self::without(path, &why)),
            };
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Err(taken(folder, &mut file)),
                Err(TryLockError::Error(error)) => return Ok(Self::without(path, &error.to_string())),
            }
            // Another process may have removed the file between our opening and locking it: then it guards nothing.
            if !is_at(&file, &path) {
                continue;
            }
            // The note is for people; the lock holds without it.
            let _ = file.set_len(0).and_then(|()| file.write_all(holder().as_bytes()));
            return Ok(RunLock { path, file: Some(file) });
        }
    }

    /// Whether another process has the lock of `folder`; nothing is created or kept.
    ///
    /// # Errors
    /// As [`RunLock::take`].
    pub fn check(folder: &Path) -> Result<()> {
        let Ok(mut file) = open(&folder.join(FILE), false) else { return Ok(()) };
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => Err(taken(folder, &mut file)),
            Ok(()) | Err(TryLockError::Error(_)) => Ok(()),
        }
    }

    fn without(path: PathBuf, why: &str) -> Self {
        tracing::warn!(
            "{} cannot be locked ({why}): nothing stops a second run from writing in the same folder",
            path.display()
        );
        RunLock { path, file: None }
    }
}

impl Drop for RunLock {
    /// Removed while it is still locked, so that nobody else's file is removed.
    fn drop(&mut self) {
        if let Some(file) = &self.file
            && is_at(file, &self.path)
        {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn taken(folder: &Path, file: &mut File) -> Error {
    let mut note = String::new();
    let read = file.rewind().and_then(|()| file.take(NOTE_BYTES).read_to_string(&mut note));
    let who = match (read, note.lines().next()) {
        (Ok(_), Some(who)) if !who.is_empty() => who.to_string(),
        _ => "another process".to_string(),
    };
    Error::config(
        format!("{} is being written by another run: {who}", folder.display()),
        "wait for that run to end, stop it, or choose another --output; nothing was changed",
    )
}

/// `process 1234 on host "node7" since 2026-11-28T18:00:00+01:00`
fn holder() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host = match host.trim() {
        "" => String::new(),
        host => format!(" on host {host}"),
    };
    let since = jiff::Zoned::now().strftime("%Y-%m-%d %H:%M:%S %:z");
    format!("process {}{host} since {since}\n", std::process::id())
}

/// Opens the file without waiting, even where a FIFO of that name has no reader.
fn open(path: &Path, create: bool) -> std::result::Result<File, String> {
    let mut options = File::options();
    options.read(true).write(true).create(create).truncate(false);
    #[cfg(unix)]
    {
        use rustix::fs::OFlags;
        let flags = (OFlags::NONBLOCK | OFlags::NOFOLLOW).bits().cast_signed();
        std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, flags);
    }
    let file = options.open(path).map_err(|error| error.to_string())?;
    let metadata = file.metadata().map_err(|error| error.to_string())?;
    match metadata.is_file() {
        true => Ok(file),
        false => Err(format!("it is {}", kind_of(&metadata))),
    }
}

/// Whether `path` still names `file`.
fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), std::fs::symlink_metadata(path)) {
        (Ok(file), Ok(named)) => is_same_file(&file, &named),
        (_, Err(error)) => error.kind() != ErrorKind::NotFound,
        _ => false,
    }
}

#[cfg(unix)]
fn is_same_file(one: &Metadata, other: &Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

#[cfg(not(unix))]
fn is_same_file(_: &Metadata, _: &Metadata) -> bool {
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_is_told_who_the_first_is_and_comes_after_it() {
        let folder = tempfile::tempdir().unwrap();
        RunLock::check(folder.path()).unwrap();
        let first = RunLock::take(folder.path()).unwrap();
        let us = format!("process {}", std::process::id());
        for error in [RunLock::check(folder.path()).unwrap_err(), RunLock::take(folder.path()).unwrap_err()] {
            assert!(error.to_string().contains(&us), "{error}");
            assert_eq!(error.exit_code(), 2);
        }
        drop(first);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "the file is gone");
        // What a killed process leaves stops nobody.
        std::fs::write(folder.path().join(FILE), "process 1\n").unwrap();
        RunLock::check(folder.path()).unwrap();
        drop(RunLock::take(folder.path()).unwrap());
    }

    #[test]
    fn a_place_that_cannot_be_locked_is_no_obstacle() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join(FILE)).unwrap();
        drop(RunLock::take(folder.path()).unwrap());
        assert!(folder.path().join(FILE).is_dir());
    }
}
