//! `mmpo-fast verify`: are the files of a run, a model or an adapter those that were written?

mod examine;
mod structure;

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::checkpoint::checksums::CHECKSUMS_FILE;
use crate::checkpoint::{ADAPTER_CONFIG, atomic, run_state};
use crate::config::RESOLVED_FILE;
use crate::error::{Error, Result};
use crate::foreign::hub;
use crate::interrupt;
use crate::report::{METRICS_FILE, print_result};

/// Everything `verify` needs to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifyConfig {
    /// The folder, or a model's name in the Hub's cache.
    pub folder: PathBuf,
    /// Whether the account goes to standard output as JSON.
    pub json: bool,
}

/// What a folder holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Run,
    Checkpoint,
    Adapter,
    Model,
    /// Some other folder, which has checksums.
    Folder,
}

/// What is known of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    /// There is a checksum, and the bytes do not have it.
    Altered,
    /// There is a checksum or an index entry, and no such file.
    Missing,
    /// There is no checksum, and the file contradicts itself.
    Damaged,
    /// The bytes have the checksum.
    Matches,
    /// There is no checksum; the file's structure is sound.
    Sound,
    /// There is no checksum, and nothing is known of the file's structure.
    Unchecked,
}

impl Status {
    const ALL: [Status; 6] = [
        Status::Altered,
        Status::Missing,
        Status::Damaged,
        Status::Matches,
        Status::Sound,
        Status::Unchecked,
    ];

    fn is_bad(self) -> bool {
        matches!(self, Status::Altered | Status::Missing | Status::Damaged)
    }

    /// The word before a file's name.
    fn word(self) -> &'static str {
        match self {
            Status::Altered => "ALTERED",
            Status::Missing => "MISSING",
            Status::Damaged => "DAMAGED",
            Status::Matches => "matches",
            Status::Sound => "sound",
            Status::Unchecked => "unchecked",
        }
    }

    /// What `count` files of this status are, for the end of the account.
    fn sum(self, count: usize) -> String {
        let (have, are) = if count == 1 { ("has", "is") } else { ("have", "are") };
        match self {
            Status::Altered => format!("{count} {are} altered"),
            Status::Missing => format!("{count} {are} missing"),
            Status::Damaged => format!("{count} without a checksum {are} damaged"),
            Status::Matches => format!("{count} {have} the recorded checksum"),
            Status::Sound => format!("{count} {have} no checksum and {are} sound in structure"),
            Status::Unchecked => format!("{count} {have} no checksum and {are} not checked"),
        }
    }
}

/// A file, and what was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Finding {
    /// Within the folder.
    path: String,
    status: Status,
    /// Why, where there is more to say.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

/// What was found in a folder.
#[derive(Debug, Serialize)]
struct Account {
    folder: PathBuf,
    kind: Kind,
    is_damaged: bool,
    /// In the order of their paths.
    files: Vec<Finding>,
    /// What was left out, and why.
    notes: Vec<String>,
}

/// Compares the files of a folder with their checksums, and says what was found.
///
/// # Errors
/// [`Error::Damaged`] where a file is altered, missing or damaged; [`Error::Model`] for a folder that is none of those
/// that can be verified; [`Error::Io`] where something cannot be read.
pub fn run(config: &VerifyConfig) -> Result<()> {
    interrupt::install()?;
    let folder = hub::model(&config.folder)?;
    let kind = kind_of(&folder)?;
    let account = examine::examine(&folder, kind)?;
    match config.json {
        true => print_result(&account.to_json()?)?,
        false => print_result(&account.to_text())?,
    };
    account.verdict()
}

fn kind_of(folder: &Path) -> Result<Kind> {
    let metadata = std::fs::metadata(folder).map_err(|error| Error::io(folder, "read", error))?;
    let wanted = "give the folder of a run, a checkpoint, a model or an adapter";
    if !metadata.is_dir() {
        return Err(Error::model(folder, "this is a file; whole folders are verified", wanted));
    }
    let has = |name: &str| folder.join(name).exists();
    if has(run_state::STATE) && has(run_state::TENSORS) || named_as_checkpoint(folder) {
        return Ok(Kind::Checkpoint);
    }
    if [run_state::FOLDER, METRICS_FILE, RESOLVED_FILE].into_iter().any(has) {
        return Ok(Kind::Run);
    }
    if has(ADAPTER_CONFIG) {
        return Ok(Kind::Adapter);
    }
    let is_weights = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "safetensors");
    if has("config.json") || atomic::list(folder)?.iter().any(is_weights) {
        return Ok(Kind::Model);
    }
    match has(CHECKSUMS_FILE) {
        true => Ok(Kind::Folder),
        false => Err(Error::model(
            folder,
            format!("there is no run, model or adapter here, and no {CHECKSUMS_FILE}"),
            wanted,
        )),
    }
}

/// Whether this is a folder of a run's checkpoints, of which both files may be gone.
fn named_as_checkpoint(folder: &Path) -> bool {
    let name = |path: &Path| path.file_name().and_then(|name| name.to_str()).map(str::to_string);
    let is_step = name(folder).is_some_and(|name| run_state::step_of(&name).is_some());
    is_step && folder.parent().and_then(name).is_some_and(|parent| parent == run_state::FOLDER)
}

impl Account {
    fn bad(&self) -> impl Iterator<Item = &Finding> {
        self.files.iter().filter(|finding| finding.status.is_bad())
    }

    fn to_json(&self) -> Result<String> {
        let text = serde_json::to_string_pretty(self)
            .map_err(|error| Error::bug(format!("the account cannot be written as JSON: {error}")))?;
        Ok(text + "\n")
    }

    fn to_text(&self) -> String {
        let mut text = String::new();
        for Finding { path, status, reason } in &self.files {
            let reason = reason.as_ref().map_or_else(String::new, |reason| format!(": {reason}"));
            text.push_str(&format!("{:<11}{path}{reason}\n", status.word()));
        }
        for note in &self.notes {
            text.push_str(&format!("note       {note}\n"));
        }
        let count = |status: Status| self.files.iter().filter(|finding| finding.status == status).count();
        let sums = Status::ALL.into_iter().map(|status| (status, count(status)));
        let sums: Vec<String> =
            sums.filter(|(_, count)| *count > 0).map(|(status, count)| status.sum(count)).collect();
        let files = self.files.len();
        let plural = if files == 1 { "" } else { "s" };
        text.push_str(&format!("\n{files} file{plural}: {}\n", sums.join(", ")));
        text
    }

    /// # Errors
    /// [`Error::Damaged`] naming the first damaged file.
    fn verdict(&self) -> Result<()> {
        let Some(first) = self.bad().next() else { return Ok(()) };
        let others = match self.bad().count() - 1 {
            0 => String::new(),
            1 => ", and so is one other file".to_string(),
            more => format!(", and so are {more} other files"),
        };
        let what = match first.status {
            Status::Missing => "missing",
            Status::Altered => "not what was written",
            _ => "damaged",
        };
        let help = match self.kind {
            Kind::Run | Kind::Checkpoint => {
                "a damaged checkpoint is passed over by --resume; copy a damaged model again, or restore it from a backup. A \
                 file that was changed on purpose differs from its checksum too"
            }
            _ => {
                "copy or download the folder again; a file that was changed on purpose differs from its checksum too"
            }
        };
        Err(Error::damaged(&self.folder, format!("{} is {what}{others}", first.path), help))
    }
}
