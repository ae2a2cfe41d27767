//! The files of pairs in a folder, such as the snapshot of a data set in the Hugging Face cache.
//!
//! A folder of several splits (`train-00000-of-00002.parquet`, `test.jsonl`, `data/train_prefs-...`) gives one of them:
//! the one that is named after a colon (`FOLDER:test`), else the one whose name is `train`. What is not read is said.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// Folders inside one another that are looked into.
const DEPTH: usize = 4;
/// Files of one source at most.
const MOST_FILES: usize = 100_000;

/// Endings of files that pairs are read from.
const ENDINGS: [&str; 6] = ["jsonl", "json", "ndjson", "csv", "tsv", "parquet"];
/// JSON files beside the data that describe it.
const DESCRIPTIONS: [&str; 4] =
    ["dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"];
/// Words of file and folder names that tell a split.
const SPLIT_WORDS: [&str; 9] =
    ["train", "training", "test", "testing", "validation", "valid", "dev", "eval", "evaluation"];

/// The files that `path` stands for: itself, or those of the folder; `FOLDER:SPLIT` names one split.
///
/// # Errors
/// [`Error::Data`] for a folder without a file of pairs, with several splits of which none is named, or without the one
/// that is named; [`Error::Io`] where it cannot be read.
pub(super) fn files(path: &Path) -> Result<Vec<PathBuf>> {
    let text = path.to_string_lossy();
    let (folder, split) = match text.rsplit_once(':') {
        Some((folder, split)) if !path.exists() && Path::new(folder).is_dir() => {
            (Path::new(folder), Some(split))
        }
        _ => (path, None),
    };
    if !folder.is_dir() {
        return Ok(vec![path.to_path_buf()]);
    }
    let mut found = Vec::new();
    collect(folder, DEPTH, &mut found)?;
    found.sort();
    if found.is_empty() {
        return Err(no_file(folder));
    }
    let mut splits: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    for file in found {
        let inside = file.strip_prefix(folder).unwrap_or(&file);
        splits.entry(split_of(inside)).or_default().push(file);
    }
    choose(folder, splits, split)
}

fn choose(
    folder: &Path,
    mut splits: BTreeMap<String, Vec<PathBuf>>,
    wanted: Option<&str>,
) -> Result<Vec<PathBuf>> {
    let names = |splits: &BTreeMap<String, Vec<PathBuf>>| {
        let named = splits.keys().map(|name| if name.is_empty() { "(no split)" } else { name });
        named.collect::<Vec<_>>().join(", ")
    };
    if let Some(wanted) = wanted {
        // `datasets` calls files without a split `train`, so that configurations of other programs ask for it.
        let has_no_splits = splits.len() == 1 && splits.contains_key("");
        if has_no_splits && wanted == "train" {
            return Ok(splits.remove("").unwrap_or_default());
        }
        let help = match has_no_splits {
            true => format!("leave `:{wanted}` out, or name a file: these files belong to no split"),
            false => "name one of these after the colon, or a file".to_string(),
        };
        return splits.remove(wanted).ok_or_else(|| {
            let message = format!("no files of a split `{wanted}`; there are: {}", names(&splits));
            Error::data(folder, None, message, help)
        });
    }
    if splits.len() == 1 {
        return Ok(splits.into_values().next().unwrap_or_default());
    }
    match splits.remove("train") {
        Some(files) => {
            tracing::info!(
                "{}: the split `train` is read ({} files), not: {}",
                folder.display(),
                files.len(),
                names(&splits)
            );
            Ok(files)
        }
        None => Err(Error::data(
            folder,
            None,
            format!("several splits, and none is named `train`: {}", names(&splits)),
            format!("name one after a colon, such as {}:{}", folder.display(), first_named(&splits)),
        )),
    }
}

fn first_named(splits: &BTreeMap<String, Vec<PathBuf>>) -> &str {
    splits.keys().map(String::as_str).find(|name| !name.is_empty()).unwrap_or_default()
}

/// The split that a file belongs to, by its name or by those of its folders; empty where no word tells.
fn split_of(inside: &Path) -> String {
    let stem = inside.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let stem = stem.split('.').next().unwrap_or_default();
    // Shards of one table: `-00000-of-00002`, perhaps with a hash after it.
    let stem = stem.split("-0").next().unwrap_or_default();
    if tells_split(stem) {
        return stem.to_string();
    }
    let folders = inside.parent().into_iter().flat_map(Path::components);
    let mut folders = folders.map(|part| part.as_os_str().to_string_lossy().into_owned());
    folders.find(|name| tells_split(name)).unwrap_or_default()
}

fn tells_split(name: &str) -> bool {
    let lower = name.to_lowercase();
    lower.split(|c: char| !c.is_ascii_alphanumeric()).any(|word| SPLIT_WORDS.contains(&word))
}

fn collect(folder: &Path, depth: usize, found: &mut Vec<PathBuf>) -> Result<()> {
    let failed = |error| Error::io(folder, "read", error);
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with('.') {
            continue;
        }
        if path.is_dir() {
            if depth > 1 {
                collect(&path, depth - 1, found)?;
            }
        } else if is_pairs_file(&name) {
            if found.len() == MOST_FILES {
                return Err(Error::data(
                    folder,
                    None,
                    "too many files",
                    "name the files of pairs one by one",
                ));
            }
            found.push(path);
        }
    }
    Ok(())
}

fn is_pairs_file(name: &str) -> bool {
    let lower = name.to_lowercase();
    let unpacked = lower.strip_suffix(".gz").unwrap_or(&lower);
    let ending = unpacked.rsplit_once('.').map(|(_, ending)| ending);
    ending.is_some_and(|ending| ENDINGS.contains(&ending)) && !DESCRIPTIONS.contains(&lower.as_str())
}

fn no_file(folder: &Path) -> Error {
    let holds_arrow = std::fs::read_dir(folder).is_ok_and(|entries| {
        entries.flatten().any(|entry| entry.path().extension().is_some_and(|ending| ending == "arrow"))
    });
    match holds_arrow {
        true => Error::data(
            folder,
            None,
            "this folder was written by `save_to_disk` (Arrow files), which is not read",
            "write it as Parquet: `datasets.load_from_disk(FOLDER).to_parquet(\"pairs.parquet\")`",
        ),
        false => Error::data(
            folder,
            None,
            "this folder holds no file of pairs",
            format!(
                "pairs are read from files that end in .{}, or any of them under .gz",
                ENDINGS.join(", .")
            ),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(names: &[&str], split: &str) -> std::result::Result<Vec<String>, String> {
        let folder = tempfile::tempdir().unwrap();
        for name in names {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        let files = files(Path::new(&format!("{}{split}", folder.path().display())));
        let inside = |path: PathBuf| path.strip_prefix(folder.path()).unwrap().display().to_string();
        files.map(|files| files.into_iter().map(inside).collect()).map_err(|error| error.to_string())
    }

    #[test]
    fn shards_of_the_training_split_are_found_where_published_sets_have_them() {
        let orca = ["README.md", ".gitattributes", "data/train-00000-of-00001.parquet"];
        assert_eq!(found(&orca, "").unwrap(), ["data/train-00000-of-00001.parquet"]);
        let shards = [
            "data/train-00001-of-00002-ab.parquet",
            "data/train-00000-of-00002-cd.parquet",
            "data/test-00000-of-00001.parquet",
        ];
        assert_eq!(found(&shards, "").unwrap(), [shards[1], shards[0]]);
        assert_eq!(found(&shards, ":test").unwrap(), [shards[2]]);
        assert_eq!(found(&["default/train/0000.parquet", "default/test/0000.parquet"], "").unwrap().len(), 1);
        assert_eq!(found(&["a.jsonl", "b.json.gz", "c.csv", "dataset_infos.json"], "").unwrap().len(), 3);
    }

    #[test]
    fn several_training_splits_must_be_chosen_from() {
        let ultrafeedback = [
            "data/train_prefs-00000-of-00001.parquet",
            "data/train_sft-00000-of-00001.parquet",
            "data/test_prefs-00000-of-00001.parquet",
        ];
        let message = found(&ultrafeedback, "").unwrap_err();
        assert!(
            message.contains("several splits") && message.contains("test_prefs, train_prefs, train_sft"),
            "{message}"
        );
        assert_eq!(found(&ultrafeedback, ":train_prefs").unwrap(), [ultrafeedback[0]]);
        assert!(found(&ultrafeedback, ":train").unwrap_err().contains("no files of a split `train`"));
    }

    /// As `datasets` has it: Intel's Orca pairs are one file, whose split is called `train` there.
    #[test]
    fn files_without_a_split_are_those_of_training() {
        assert_eq!(found(&["README.md", "orca_rlhf.jsonl"], ":train").unwrap(), ["orca_rlhf.jsonl"]);
        assert!(found(&["orca_rlhf.jsonl"], ":test").unwrap_err().contains("no files of a split `test`"));
        let both = ["more.jsonl", "test.jsonl"];
        assert!(found(&both, ":train").unwrap_err().contains("there are: (no split), test"));
    }

    #[test]
    fn folders_without_pairs_are_named() {
        assert!(found(&["README.md"], "").unwrap_err().contains("holds no file of pairs"));
        assert!(
            found(&["data-00000-of-00001.arrow", "state.json"], "").unwrap_err().contains("save_to_disk")
        );
    }
}
