//! Where scores go: a file that is replaced whole, or standard output. Nothing else that a path can name.

use std::fs::Metadata;
use std::path::{Path, PathBuf};

use crate::checkpoint::atomic::{self, kind_of};
use crate::config::ScoreConfig;
use crate::data::{PairSource, Part};
use crate::error::{Error, Result};
use crate::report::print_result;

/// What `--output` says for standard output.
const STANDARD_OUTPUT: &str = "-";

/// A place that was found fit to receive scores.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ScoreOutput {
    StandardOutput,
    /// No scores are asked for, only explanations.
    Nowhere,
    /// A file; where a symbolic link was given, the file that it leads to.
    File(PathBuf),
}

impl ScoreOutput {
    /// Looks at `--output` before any time is spent.
    ///
    /// # Errors
    /// [`Error::Config`] for a folder, a device, a FIFO or a socket, a symbolic link that leads nowhere, and for a
    /// file that the command reads.
    pub fn check(config: &ScoreConfig) -> Result<Self> {
        let Some(path) = &config.output else { return Ok(ScoreOutput::Nowhere) };
        if path.as_os_str() == STANDARD_OUTPUT {
            return Ok(ScoreOutput::StandardOutput);
        }
        let text = path.to_string_lossy();
        if text.ends_with('/') {
            return Err(refused(path, "names a folder, not a file"));
        }
        let Ok(named) = std::fs::symlink_metadata(path) else {
            // Nothing is there, or the folder cannot be read: writing there will say which.
            return Ok(ScoreOutput::File(path.clone()));
        };
        let link = if named.is_symlink() { "a symbolic link to " } else { "" };
        let Ok(metadata) = std::fs::metadata(path) else {
            return Err(refused(path, "is a symbolic link that leads nowhere"));
        };
        if !metadata.is_file() {
            return Err(refused(path, &format!("is {link}{}, not a file", kind_of(&metadata))));
        }
        let real = std::fs::canonicalize(path).map_err(|error| Error::io(path, "look up", error))?;
        // Standard output that was sent to a file: replacing the file would leave the shell with the old one.
        if [path, &real].iter().any(|path| path.starts_with("/proc") || path.starts_with("/dev/fd"))
            || text.starts_with("/dev/std")
        {
            return Err(refused(path, "is a file that this process holds open"));
        }
        if let Some(input) = read_files(config).into_iter().find(|input| is_same_file(input, &metadata)) {
            return Err(Error::config(
                format!("`--output` = {} is {}, which this command reads", path.display(), input.display()),
                "choose a new file for the scores; nothing was changed",
            ));
        }
        // What a link points at is replaced, not the link.
        Ok(ScoreOutput::File(if named.is_symlink() { real } else { path.clone() }))
    }

    /// Fails now if nothing can be written there.
    ///
    /// # Errors
    /// [`Error::Io`] naming the folder.
    pub fn check_writable(&self) -> Result<()> {
        match self {
            ScoreOutput::StandardOutput | ScoreOutput::Nowhere => Ok(()),
            ScoreOutput::File(path) => atomic::check_writable(atomic::parent(path)),
        }
    }

    /// Writes all lines at once.
    ///
    /// # Errors
    /// [`Error::Io`] if they cannot be written.
    pub fn write(&self, text: &str) -> Result<()> {
        match self {
            ScoreOutput::StandardOutput => print_result(text).map(|_| ()),
            ScoreOutput::Nowhere => Ok(()),
            ScoreOutput::File(path) => atomic::write_file(path, text.as_bytes()),
        }
    }
}

fn refused(path: &Path, why: &str) -> Error {
    Error::config(
        format!("`--output` = {} {why}", path.display()),
        "name a file that may be written or replaced, or `-` for standard output",
    )
}

/// The data, the chat template, and all files of the model folders.
fn read_files(config: &ScoreConfig) -> Vec<PathBuf> {
    let folders = [Some(&config.model), config.adapter.as_ref(), config.reference.as_ref()];
    let entries = folders.into_iter().flatten().filter_map(|folder| std::fs::read_dir(folder).ok());
    let in_folders = entries.flatten().filter_map(|entry| Some(entry.ok()?.path()));
    let source = PairSource::open(&config.data, &config.columns, Part::All);
    let pairs = source.map(|source| source.files).unwrap_or_default().into_iter().map(|file| file.path);
    config.chat_template.iter().cloned().chain(pairs).chain(in_folders).collect()
}

#[cfg(unix)]
fn is_same_file(input: &Path, output: &Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;
    let same = |input: Metadata| (input.dev(), input.ino()) == (output.dev(), output.ino());
    std::fs::metadata(input).is_ok_and(same)
}

#[cfg(not(unix))]
fn is_same_file(_: &Path, _: &Metadata) -> bool {
    false
}
