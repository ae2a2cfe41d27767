//! One error type for the whole program: what went wrong, where, and how to mend it.
//!
//! Every variant has its own exit code, so that a script can tell a broken data row from a full disk.

use std::path::{Path, PathBuf};

use miette::Diagnostic;
use thiserror::Error;

use crate::interrupt::Signal;

/// The result of everything that can fail here.
pub type Result<T> = std::result::Result<T, Error>;

/// Exit code of a mistake in the program itself: `EX_SOFTWARE` of sysexits.h.
pub const BUG_EXIT_CODE: u8 = 70;

/// What can go wrong. `help` says what the user can do about it.
#[derive(Debug, Error, Diagnostic)]
pub enum Error {
    /// A flag, a recipe key, or a combination of them (exit code 2, as clap's own errors).
    #[error("{message}")]
    #[diagnostic(code(config))]
    Config {
        /// What is wrong.
        message: String,
        /// What to do about it.
        #[help]
        help: String,
    },

    /// A record of a pairs file, named by its file and 1-based line (exit code 3).
    #[error("{}: {message}", place(path, *line))]
    #[diagnostic(code(data))]
    Data {
        /// Where.
        path: PathBuf,
        /// 1-based line of a JSON Lines file, or 1-based record of a JSON array.
        line: Option<usize>,
        /// What is wrong.
        message: String,
        /// What to do about it.
        #[help]
        help: String,
    },

    /// A model folder: its config, tokenizer or tensors (exit code 4).
    #[error("{}: {message}", path.display())]
    #[diagnostic(code(model))]
    Model {
        /// Where.
        path: PathBuf,
        /// What is wrong.
        message: String,
        /// What to do about it.
        #[help]
        help: String,
    },

    /// The operating system refused to read or write (exit code 5).
    #[error("cannot {action} {}: {cause}", path.display())]
    #[diagnostic(code(io))]
    Io {
        /// Where.
        path: PathBuf,
        /// A verb phrase: `read`, `write`, `create`, `sync`, `rename`.
        action: &'static str,
        /// Not the `source` of this error: the message holds it already, and would say it twice.
        cause: std::io::Error,
        /// What to do about it.
        #[help]
        help: String,
    },

    /// The device: absent, too old, out of memory, or a failed launch (exit code 6).
    #[error("{message}")]
    #[diagnostic(code(device))]
    Device {
        /// What is wrong.
        message: String,
        /// What to do about it.
        #[help]
        help: String,
    },

    /// A number that cannot be trained on: a NaN loss, an infinite gradient (exit code 7).
    #[error("{message}")]
    #[diagnostic(code(numerics))]
    Numerics {
        /// What is wrong.
        message: String,
        /// What to do about it.
        #[help]
        help: String,
    },

    /// Files that are not what was written, found by `verify` (exit code 8).
    #[error("{}: {message}", path.display())]
    #[diagnostic(code(damaged))]
    Damaged {
        /// The folder.
        path: PathBuf,
        /// How many files are damaged, and the first of them.
        message: String,
        /// What to do about it.
        #[help]
        help: String,
    },

    /// Another rank of a run on several GPUs died, hangs, failed or does not fit (exit code 9).
    #[error("{message}")]
    #[diagnostic(code(rank))]
    Rank {
        /// Which rank, on which machine, in which step, and what happened.
        message: String,
        /// What to do about it.
        #[help]
        help: String,
        /// That rank, where it is one that was there.
        lost: Option<usize>,
    },

    /// A rank that `train --gpus` started ended with an error of its own, and with this exit code.
    #[error("rank {rank} ended with exit code {exit_code}, and the run with it")]
    #[diagnostic(code(rank), help("its own message stands above"))]
    RankEnded {
        /// Which rank.
        rank: usize,
        /// Its exit code.
        exit_code: u8,
    },

    /// A mistake in this program, which no input should be able to cause (exit code 70, as a panic's).
    #[error("{message}")]
    #[diagnostic(code(bug), help("this is a mistake in the program, not in your input; please report it"))]
    Bug {
        /// What is wrong.
        message: String,
    },

    /// A signal asked the program to end (exit code 128 plus its number: 130 after Ctrl-C, 143 after SIGTERM).
    #[error("stopped by {signal}: {kept}")]
    #[diagnostic(code(interrupted))]
    Interrupted {
        /// Which one.
        signal: Signal,
        /// A sentence: what was kept, and how to go on.
        kept: String,
    },
}

impl Error {
    /// The process exit code of this error; distinct per variant (and per signal).
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Config { .. } => 2,
            Error::Data { .. } => 3,
            Error::Model { .. } => 4,
            Error::Io { .. } => 5,
            Error::Device { .. } => 6,
            Error::Numerics { .. } => 7,
            Error::Damaged { .. } => 8,
            Error::Rank { .. } => 9,
            Error::RankEnded { exit_code, .. } => *exit_code,
            Error::Bug { .. } => BUG_EXIT_CODE,
            Error::Interrupted { signal, .. } => signal.exit_code(),
        }
    }

    /// An [`Error::Config`]: a flag, a recipe key, or a combination of them.
    pub fn config(message: impl Into<String>, help: impl Into<String>) -> Self {
        Error::Config { message: message.into(), help: help.into() }
    }

    /// An [`Error::Data`]: a record of a data file.
    pub fn data(
        path: &Path,
        line: Option<usize>,
        message: impl Into<String>,
        help: impl Into<String>,
    ) -> Self {
        Error::Data { path: path.to_path_buf(), line, message: message.into(), help: help.into() }
    }

    /// An [`Error::Model`]: a model folder or a file in it.
    pub fn model(path: &Path, message: impl Into<String>, help: impl Into<String>) -> Self {
        Error::Model { path: path.to_path_buf(), message: message.into(), help: help.into() }
    }

    /// An I/O error with the advice that fits its kind (missing, read-only, full disk).
    pub fn io(path: &Path, action: &'static str, cause: std::io::Error) -> Self {
        use std::io::ErrorKind;
        let help = match cause.kind() {
            ErrorKind::NotFound => "check the path; nothing of that name exists",
            ErrorKind::PermissionDenied => "check the permissions of the file and its folder",
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
                "the disk is full: free some space or choose another --output; what was there before is untouched"
            }
            ErrorKind::ReadOnlyFilesystem => "the file system is read-only: choose another --output",
            ErrorKind::IsADirectory => "this is a folder, and a file is wanted: check the path",
            ErrorKind::NotADirectory => {
                "a part of the path is a file, and a folder is wanted: check the path"
            }
            _ => "what was there before is untouched",
        };
        Error::Io { path: path.to_path_buf(), action, cause, help: help.into() }
    }

    /// An [`Error::Device`]: a device that cannot be used.
    pub fn device(message: impl Into<String>, help: impl Into<String>) -> Self {
        Error::Device { message: message.into(), help: help.into() }
    }

    /// An [`Error::Damaged`]: files of a folder that are not what was written.
    pub fn damaged(path: &Path, message: impl Into<String>, help: impl Into<String>) -> Self {
        Error::Damaged { path: path.to_path_buf(), message: message.into(), help: help.into() }
    }

    /// An [`Error::Rank`]: another rank of the run ended it.
    pub fn rank(message: impl Into<String>, help: impl Into<String>) -> Self {
        Error::Rank { message: message.into(), help: help.into(), lost: None }
    }

    /// An [`Error::Bug`]: a mistake in this program.
    pub fn bug(message: impl Into<String>) -> Self {
        Error::Bug { message: message.into() }
    }

    /// An [`Error::Numerics`]: a number that cannot be trained on.
    pub fn numerics(message: impl Into<String>, help: impl Into<String>) -> Self {
        Error::Numerics { message: message.into(), help: help.into() }
    }
}

fn place(path: &Path, line: Option<usize>) -> String {
    match line {
        Some(line) => format!("{}:{line}", path.display()),
        None => path.display().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_data_error_names_file_and_line() {
        let error = Error::data(Path::new("pairs.jsonl"), Some(7), "no `chosen`", "add it");
        assert_eq!(error.to_string(), "pairs.jsonl:7: no `chosen`");
        assert_eq!(error.exit_code(), 3);
    }
}
