//! Walks a folder and compares each file with its checksum, or with itself where it has none.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use blake3::Hash;

use super::structure::{self, INDEX_END};
use super::{Account, Finding, Kind, Status};
use crate::checkpoint::atomic::{self, kind_of};
use crate::checkpoint::checksums::{self, CHECKSUMS_FILE};
use crate::checkpoint::run_state;
use crate::error::{Error, Result};
use crate::interrupt;

/// Folders within folders that are looked into: `run/checkpoints/step-000123`, and one more for foreign folders.
const DEEPEST: usize = 3;

/// Looks at every file of `folder`.
///
/// # Errors
/// [`Error::Io`] where something cannot be read; [`Error::Interrupted`].
pub fn examine(folder: &Path, kind: Kind) -> Result<Account> {
    let mut walk = Walk { root: folder, sums: BTreeMap::new(), found: BTreeMap::new(), notes: Vec::new() };
    walk.add_sums_of_run(folder)?;
    walk.folder(folder, "", 0)?;
    walk.add_missing();
    walk.add_what_a_whole_folder_has(kind);
    let files: Vec<Finding> = walk.found.into_values().collect();
    let is_damaged = files.iter().any(|finding| finding.status.is_bad());
    Ok(Account { folder: folder.to_path_buf(), kind, is_damaged, files, notes: walk.notes })
}

struct Walk<'a> {
    root: &'a Path,
    /// The recorded checksums, by the path within `root`.
    sums: BTreeMap<String, Hash>,
    found: BTreeMap<String, Finding>,
    notes: Vec<String>,
}

impl Walk<'_> {
    fn add(&mut self, path: &str, status: Status, reason: Option<String>) {
        let finding = Finding { path: path.to_string(), status, reason };
        match self.found.get(path) {
            // What is worse stays.
            Some(earlier) if earlier.status <= status => {}
            _ => _ = self.found.insert(path.to_string(), finding),
        }
    }

    /// A model or an adapter that lies in its run has its checksums there.
    fn add_sums_of_run(&mut self, folder: &Path) -> Result<()> {
        let Ok(real) = std::fs::canonicalize(folder) else { return Ok(()) };
        let (Some(run), Some(name)) = (real.parent(), real.file_name().and_then(|name| name.to_str())) else {
            return Ok(());
        };
        let file = run.join(CHECKSUMS_FILE);
        if folder.join(CHECKSUMS_FILE).exists() || !file.is_file() {
            return Ok(());
        }
        let Ok(sums) = checksums::parse(&read_text(&file)?) else { return Ok(()) };
        let prefix = format!("{name}/");
        self.sums.extend(
            sums.into_iter().filter_map(|(path, hash)| Some((path.strip_prefix(&prefix)?.to_string(), hash))),
        );
        if !self.sums.is_empty() {
            self.notes.push(format!("the checksums are those of the run, in {}", file.display()));
        }
        Ok(())
    }

    /// `prefix` is the path of `folder` within the root, with a slash at its end unless it is the root.
    fn folder(&mut self, folder: &Path, prefix: &str, depth: usize) -> Result<()> {
        self.read_sums(folder, prefix)?;
        for path in atomic::list(folder)? {
            interrupt::check()?;
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
                self.notes.push(format!("{} is left out: its name is not UTF-8", path.display()));
                continue;
            };
            let shown = format!("{prefix}{name}");
            // Locks, and what other programs keep in a folder.
            if name.starts_with('.') || (name == CHECKSUMS_FILE && !self.sums.contains_key(&shown)) {
                continue;
            }
            if name.contains(".partial-") || (name.starts_with("step-") && name.ends_with(".damaged")) {
                let why = match name.ends_with(".damaged") {
                    true => "--resume set it aside as damaged",
                    false => "a process that was killed left it half written, or one is writing it now",
                };
                self.notes.push(format!("{shown} is left out: {why}"));
                continue;
            }
            self.entry(&path, &shown, depth)?;
        }
        Ok(())
    }

    fn entry(&mut self, path: &Path, shown: &str, depth: usize) -> Result<()> {
        let metadata = match std::fs::metadata(path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let reason = "a link to a file that is not there".to_string();
                self.add(shown, Status::Missing, Some(reason));
                return Ok(());
            }
            Err(error) => return Err(Error::io(path, "read", error)),
        };
        if metadata.is_dir() {
            let is_link = std::fs::symlink_metadata(path).is_ok_and(|link| link.is_symlink());
            if is_link || depth == DEEPEST {
                self.notes.push(format!("folder {shown} is left out"));
                return Ok(());
            }
            return self.folder(path, &format!("{shown}/"), depth + 1);
        }
        if !metadata.is_file() {
            self.notes.push(format!("{shown} is left out: it is {}", kind_of(&metadata)));
            return Ok(());
        }
        self.file(path, shown)
    }

    fn file(&mut self, path: &Path, shown: &str) -> Result<()> {
        let Some(recorded) = self.sums.get(shown) else {
            let (status, reason) = structure::look(path, shown)?;
            self.add(shown, status, reason);
            if shown.ends_with(INDEX_END) {
                self.shards(path, shown)?;
            }
            return Ok(());
        };
        let status = match checksums::hash_file(path)? == *recorded {
            true => Status::Matches,
            false => Status::Altered,
        };
        let reason = (status == Status::Altered).then(|| why_altered(path, shown));
        self.add(shown, status, reason);
        Ok(())
    }

    fn shards(&mut self, index: &Path, shown: &str) -> Result<()> {
        let prefix = shown.rsplit_once('/').map_or(String::new(), |(folder, _)| format!("{folder}/"));
        for (shard, status, reason) in structure::compare_shards(index)? {
            self.add(&format!("{prefix}{shard}"), status, Some(reason));
        }
        Ok(())
    }

    /// Reads the checksums of a folder's own files, and says where they must be and are not.
    fn read_sums(&mut self, folder: &Path, prefix: &str) -> Result<()> {
        let file = folder.join(CHECKSUMS_FILE);
        let shown = format!("{prefix}{CHECKSUMS_FILE}");
        if !file.is_file() {
            let name = folder.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if run_state::step_of(name).is_some() {
                let reason = "every checkpoint has one".to_string();
                self.add(&shown, Status::Missing, Some(reason));
            }
            return Ok(());
        }
        match checksums::parse(&read_text(&file)?) {
            Ok(sums) => {
                self.sums.extend(sums.into_iter().map(|(name, hash)| (format!("{prefix}{name}"), hash)))
            }
            Err(reason) => self.add(&shown, Status::Damaged, Some(reason)),
        }
        Ok(())
    }

    /// What a folder of this kind has when it is whole: a download that broke off has no weights, and nothing else tells.
    fn add_what_a_whole_folder_has(&mut self, kind: Kind) {
        const WEIGHTS: [&str; 8] =
            [".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", INDEX_END];
        let has_weights = self.found.keys().any(|path| WEIGHTS.iter().any(|end| path.ends_with(end)));
        if kind == Kind::Model && !has_weights {
            let reason = "no weights are in the folder".to_string();
            self.add("model.safetensors", Status::Missing, Some(reason));
        }
        let is_run_with_results = kind == Kind::Run
            && self.found.keys().any(|path| path.starts_with("model/") || path.starts_with("adapter/"));
        if is_run_with_results && !self.root.join(CHECKSUMS_FILE).exists() {
            self.notes.push(format!(
                "there is no {CHECKSUMS_FILE}, which a run writes at its end: flipped values in its model cannot be found"
            ));
        }
    }

    /// The files that have a checksum and are not there.
    fn add_missing(&mut self) {
        let missing: Vec<String> =
            self.sums.keys().filter(|path| !self.found.contains_key(*path)).cloned().collect();
        for path in missing {
            let is_there = self.root.join(PathBuf::from(&path)).exists();
            let reason = match is_there {
                true => "it is there, and is no ordinary file",
                false => "its checksum was recorded",
            };
            self.add(&path, Status::Missing, Some(reason.to_string()));
        }
    }
}

/// What an altered file shows of itself beside its checksum.
fn why_altered(path: &Path, shown: &str) -> String {
    match structure::look(path, shown) {
        Ok((Status::Damaged, Some(reason))) => format!("its checksum differs, and it is {reason}"),
        _ => "its bytes do not have the recorded checksum".to_string(),
    }
}

fn read_text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(|error| Error::io(path, "read", error))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
