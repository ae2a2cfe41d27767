//! Files and folders that appear whole or not at all.
//!
//! Everything is written under `<name>.partial-<process id>` beside its target, synced to the disk, and renamed; then
//! the folder that holds it is synced. Whatever fails on the way, the target is what it was before. A partial left by
//! a killed process is removed when the same target is written next.
//!
//! No crate does this for folders, which are what a checkpoint and a model are. For single files, `tempfile` renames
//! without a sync and leaves files of random names when a process is killed; `atomic-write-file` syncs, but the partial and its
//! removal would stay for the folders.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Bytes gathered before they are written.
const BUFFER: usize = 1 << 20;

/// A new file that is on the disk once [`SyncedFile::finish`] returns. Errors name `shown`, the place it is meant for.
#[derive(Debug)]
pub struct SyncedFile {
    shown: PathBuf,
    file: BufWriter<File>,
}

impl SyncedFile {
    fn create(path: &Path, shown: PathBuf) -> Result<Self> {
        let file = File::create_new(path).map_err(|error| Error::io(&shown, "create", error))?;
        Ok(SyncedFile { shown, file: BufWriter::with_capacity(BUFFER, file) })
    }

    /// Appends `bytes`.
    ///
    /// # Errors
    /// [`Error::Io`] if they cannot be written.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|error| Error::io(&self.shown, "write", error))
    }

    /// Makes sure that the bytes are on the disk.
    ///
    /// # Errors
    /// [`Error::Io`] if they cannot be.
    pub fn finish(mut self) -> Result<()> {
        self.file.flush().map_err(|error| Error::io(&self.shown, "write", error))?;
        self.file.get_ref().sync_all().map_err(|error| Error::io(&self.shown, "sync", error))
    }
}

/// Replaces file `target` by `bytes`, or leaves it as it was.
///
/// # Errors
/// [`Error::Io`] if it cannot be written.
pub fn write_file(target: &Path, bytes: &[u8]) -> Result<()> {
    remove_leftovers(target)?;
    let partial = Partial::new(target);
    let mut file = SyncedFile::create(&partial.path, target.to_path_buf())?;
    file.write(bytes)?;
    file.finish()?;
    std::fs::rename(&partial.path, target).map_err(|error| Error::io(target, "rename", error))?;
    partial.keep();
    sync_folder(parent(target))
}

/// Makes `folder`, and fails now if nothing can be written in it: better before hours of work than after them.
///
/// # Errors
/// [`Error::Io`] naming the folder.
pub fn check_writable(folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(|error| Error::io(folder, "create", error))?;
    tempfile::tempfile_in(folder).map_err(|error| Error::io(folder, "write in", error))?;
    Ok(())
}

/// A folder being written; dropped without [`AtomicFolder::commit`], it leaves nothing behind.
#[derive(Debug)]
pub struct AtomicFolder {
    target: PathBuf,
    partial: Partial,
    replaceable: fn(&str) -> bool,
}

impl AtomicFolder {
    /// Starts folder `target`, making its parents. An existing `target` will be replaced, and only if every entry in
    /// it is a file whose name is `replaceable`, or a folder where `name/` and `name/entry` of each of its files are:
    /// a folder with anything else in it belongs to somebody.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Config`] naming the entry that would have been lost.
    pub fn create(target: &Path, replaceable: fn(&str) -> bool) -> Result<Self> {
        let target = match std::fs::canonicalize(target) {
            // What a symbolic link points at is replaced, not the link.
            Ok(real) => real,
            Err(_) => target.to_path_buf(),
        };
        if target.file_name().is_none() {
            return Err(Error::config(
                format!("{} cannot be an output folder", target.display()),
                "give a folder of its own",
            ));
        }
        let parent = parent(&target);
        std::fs::create_dir_all(parent).map_err(|error| Error::io(parent, "create", error))?;
        remove_leftovers(&target)?;
        check_replaceable(&target, replaceable)?;
        let partial = Partial::new(&target);
        std::fs::create_dir(&partial.path).map_err(|error| Error::io(&target, "create", error))?;
        Ok(AtomicFolder { target, partial, replaceable })
    }

    /// Starts a file in the folder, or in a folder of its own there; the caller finishes it before the commit.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be made.
    pub fn file(&self, name: &str) -> Result<SyncedFile> {
        let (path, shown) = (self.partial.path.join(name), self.target.join(name));
        if Path::new(name).components().count() > 1 {
            std::fs::create_dir_all(parent(&path)).map_err(|error| Error::io(&shown, "create", error))?;
        }
        SyncedFile::create(&path, shown)
    }

    /// Writes a whole file into the folder.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written.
    pub fn write_file(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let mut file = self.file(name)?;
        file.write(bytes)?;
        file.finish()
    }

    /// Where the folder is until [`AtomicFolder::commit`]: other processes may write files of theirs there.
    pub fn unfinished(&self) -> &Path {
        &self.partial.path
    }

    /// Puts the folder in its place.
    ///
    /// # Errors
    /// [`Error::Io`] if the disk or a rename fails; the target is then what it was before.
    pub fn commit(self) -> Result<()> {
        for entry in list(&self.partial.path)?.iter().filter(|entry| entry.is_dir()) {
            sync_folder(entry)?;
        }
        sync_folder(&self.partial.path)?;
        check_replaceable(&self.target, self.replaceable)?;
        replace_folder(&self.partial.path, &self.target)?;
        sync_folder(parent(&self.target))?;
        // After an exchange the partial's name holds the old folder: dropping `self` removes it.
        Ok(())
    }
}

/// Where the folder `target` is while process `id` writes it.
pub fn unfinished_of(target: &Path, id: u32) -> PathBuf {
    with_suffix(target, &format!(".partial-{id}"))
}

/// Starts a file in a folder that another process has begun and will put in its place.
///
/// # Errors
/// [`Error::Io`] if it cannot be made.
pub fn file_in(unfinished: &Path, name: &str) -> Result<SyncedFile> {
    let path = unfinished.join(name);
    SyncedFile::create(&path, path.clone())
}

/// A path under a temporary name, removed on drop whatever it holds then.
#[derive(Debug)]
struct Partial {
    path: PathBuf,
}

impl Partial {
    fn new(target: &Path) -> Self {
        Partial { path: unfinished_of(target, std::process::id()) }
    }

    /// Keeps what is there on drop, because it has been renamed.
    fn keep(mut self) {
        self.path = PathBuf::new();
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if self.path.as_os_str().is_empty() {
            return;
        }
        // The first error, if any, was reported already; what cannot be removed now is removed by the next writer.
        if let Err(error) = remove(&self.path)
            && error.kind() != ErrorKind::NotFound
        {
            tracing::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

/// Gives `partial` the name `target`. A folder already there changes places with it, or is moved aside first where
/// the file system cannot exchange two names.
fn replace_folder(partial: &Path, target: &Path) -> Result<()> {
    let failed = |error| Error::io(target, "rename", error);
    if !target.exists() {
        return std::fs::rename(partial, target).map_err(failed);
    }
    match exchange(partial, target) {
        Err(error) if matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::InvalidInput) => {}
        result => return result.map_err(failed),
    }
    replace_in_two_steps(partial, target)
}

fn replace_in_two_steps(partial: &Path, target: &Path) -> Result<()> {
    let failed = |error| Error::io(target, "rename", error);
    let aside = with_suffix(target, &format!(".old-{}", std::process::id()));
    std::fs::rename(target, &aside).map_err(failed)?;
    if let Err(error) = std::fs::rename(partial, target) {
        std::fs::rename(&aside, target).map_err(failed)?;
        return Err(failed(error));
    }
    drop(Partial { path: aside });
    Ok(())
}

#[cfg(target_os = "linux")]
fn exchange(one: &Path, other: &Path) -> std::io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    Ok(renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE)?)
}

#[cfg(not(target_os = "linux"))]
fn exchange(_: &Path, _: &Path) -> std::io::Result<()> {
    Err(ErrorKind::Unsupported.into())
}

/// Removes what killed processes left of `target`. Where one died between moving the old folder aside and putting the
/// new one in its place, the old one comes back.
///
/// # Errors
/// [`Error::Io`] if a leftover cannot be renamed or removed.
pub fn remove_leftovers(target: &Path) -> Result<()> {
    let Some(name) = target.file_name().and_then(OsStr::to_str) else {
        return Ok(());
    };
    for entry in list(parent(target))? {
        let Some(rest) = entry.file_name().and_then(OsStr::to_str).and_then(|other| other.strip_prefix(name))
        else {
            continue;
        };
        let dead = |kind: &str| rest.strip_prefix(kind).is_some_and(belongs_to_the_dead);
        if dead(".old-") && !target.exists() {
            std::fs::rename(&entry, target).map_err(|error| Error::io(target, "rename", error))?;
        } else if dead(".old-") || dead(".partial-") {
            remove(&entry).map_err(|error| Error::io(&entry, "remove", error))?;
        }
    }
    Ok(())
}

/// Whether no other process has this id. Our own id counts as dead: containers give it out again and again, and one
/// target has one writer.
fn belongs_to_the_dead(process: &str) -> bool {
    match process.parse::<u32>() {
        Ok(process) => process == std::process::id() || !Path::new(&format!("/proc/{process}")).exists(),
        Err(_) => false,
    }
}

/// Removes a folder so that a process killed meanwhile leaves it whole or gone, never half under its name.
///
/// # Errors
/// [`Error::Io`] if it cannot be removed.
pub fn remove_folder(folder: &Path) -> Result<()> {
    let partial = Partial::new(folder);
    std::fs::rename(folder, &partial.path).map_err(|error| Error::io(folder, "remove", error))?;
    remove(&partial.path).map_err(|error| Error::io(folder, "remove", error))
}

fn check_replaceable(target: &Path, replaceable: fn(&str) -> bool) -> Result<()> {
    if target.exists() && !target.is_dir() {
        return Err(Error::config(
            format!("{} is a file, not a folder", target.display()),
            "choose another output folder, or remove the file",
        ));
    }
    for entry in list(target)? {
        let ours = match entry.file_name().and_then(OsStr::to_str) {
            None => false,
            Some(name) if entry.is_dir() => {
                replaceable(&format!("{name}/"))
                    && list(&entry)?.iter().all(|inner| {
                        let inner_name = inner.file_name().and_then(OsStr::to_str);
                        !inner.is_dir()
                            && inner_name
                                .is_some_and(|inner_name| replaceable(&format!("{name}/{inner_name}")))
                    })
            }
            Some(name) => replaceable(name),
        };
        if !ours {
            return Err(Error::config(
                format!("{} is in the way: it would be lost", entry.display()),
                format!("move it elsewhere, or choose another output folder than {}", target.display()),
            ));
        }
    }
    Ok(())
}

/// Paths of a folder's entries, sorted; none where there is no such folder.
///
/// # Errors
/// [`Error::Io`] if the folder cannot be read.
pub fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    let failed = |error| Error::io(folder, "read", error);
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut paths = Vec::new();
    for entry in entries {
        paths.push(entry.map_err(failed)?.path());
    }
    paths.sort();
    Ok(paths)
}

fn remove(path: &Path) -> std::io::Result<()> {
    if std::fs::symlink_metadata(path)?.is_dir() {
        std::fs::remove_dir_all(path)
    } else {
        std::fs::remove_file(path)
    }
}

/// Makes the names in `folder` durable. Systems whose folders cannot be opened keep them durable themselves.
fn sync_folder(folder: &Path) -> Result<()> {
    if cfg!(not(unix)) {
        return Ok(());
    }
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(|error| Error::io(folder, "sync", error))
}

/// What something is for people: `a folder`, `a FIFO`, `a device`.
pub fn kind_of(metadata: &std::fs::Metadata) -> &'static str {
    let kind = metadata.file_type();
    if kind.is_file() {
        return "a file";
    }
    if kind.is_dir() {
        return "a folder";
    }
    if kind.is_symlink() {
        return "a symbolic link";
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        if kind.is_fifo() {
            return "a FIFO";
        }
        if kind.is_socket() {
            return "a socket";
        }
        if kind.is_char_device() || kind.is_block_device() {
            return "a device";
        }
    }
    "no ordinary file"
}

/// The folder that holds `path`; `.` for a name alone.
pub fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => path,
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(suffix);
    path.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Folder `name` with a file that holds `content`.
    fn folder(parent: &Path, name: &str, content: &str) -> PathBuf {
        let folder = parent.join(name);
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("file"), content).unwrap();
        folder
    }

    #[test]
    fn without_an_exchange_the_new_folder_takes_the_place_of_the_old() {
        let parent = tempfile::tempdir().unwrap();
        let target = folder(parent.path(), "model", "old");
        let partial = folder(parent.path(), "model.partial-1", "new");
        replace_in_two_steps(&partial, &target).unwrap();
        assert_eq!(std::fs::read_to_string(target.join("file")).unwrap(), "new");
        assert_eq!(list(parent.path()).unwrap().len(), 1);
        // The new folder cannot be moved: the old one comes back.
        assert!(replace_in_two_steps(&parent.path().join("absent"), &target).is_err());
        assert_eq!(std::fs::read_to_string(target.join("file")).unwrap(), "new");
        assert_eq!(list(parent.path()).unwrap(), [target]);
    }
}
