//! Names of models and of pairs, as the recipe has them.

use std::path::PathBuf;

use super::draft::Draft;
use super::yaml::Node;
use crate::config::value::{OptionValue, Source};
use crate::config::{PairData, PairFiles};

/// A data set that a file lists.
#[derive(Clone, Debug)]
pub(super) struct Listed {
    /// File, folder or name on the Hub.
    pub path: String,
    pub split: Option<String>,
    pub weight: f64,
}

impl Listed {
    /// Whether the name is that of one file, which has no splits.
    pub fn is_file(&self) -> bool {
        is_file(&self.path)
    }
}

/// Whether a name has the ending of a file of pairs.
pub(super) fn is_file(name: &str) -> bool {
    const ENDINGS: [&str; 6] = [".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet"];
    let name = name.to_ascii_lowercase();
    let name = name.strip_suffix(".gz").unwrap_or(&name);
    ENDINGS.iter().any(|ending| name.ends_with(ending))
}

/// Writes the recipe's `data` or `eval_data`.
pub(super) fn put(draft: &mut Draft, key: &str, node: &Node, name: &'static str, listed: Vec<Listed>) {
    if draft.lines.iter().any(|(other, _)| *other == name) {
        draft.say(key, node, format!("--{} goes before it", name.replace('_', "-")));
        return;
    }
    if listed.iter().any(|entry| entry.path.is_empty()) || listed.is_empty() {
        draft.refuse(key, node, "an entry has no name");
        return;
    }
    if listed.iter().any(|entry| entry.split.as_ref().is_some_and(|split| split.contains('['))) {
        draft.refuse(
            key,
            node,
            "a slice of a split is not read: a weight takes a share, --data NAME:SPLIT=0.1",
        );
        return;
    }
    let is_other_split =
        |entry: &&Listed| entry.is_file() && entry.split.as_ref().is_some_and(|split| split != "train");
    if let Some(entry) = listed.iter().find(is_other_split) {
        let why =
            format!("{} is one file, which has no splits: name the files of both kinds of pairs", entry.path);
        draft.refuse(key, node, why);
        return;
    }
    let texts: Vec<String> = listed
        .iter()
        .map(|entry| {
            let split = entry.split.as_ref().filter(|_| !entry.is_file());
            let split = split.map_or_else(String::new, |split| format!(":{split}"));
            match entry.weight == 1.0 {
                true => format!("{}{split}", entry.path),
                false => format!("{}{split}={}", entry.path, entry.weight),
            }
        })
        .collect();
    let why = match listed.iter().any(|entry| entry.weight != 1.0) {
        true => "shares are chosen by what the pairs say, not by a shuffle",
        false => "from the Hub's cache on this disk, or files",
    };
    let text = texts.join(",");
    let parsed = match name {
        "data" => PairData::from_text(&text).map(|data| draft.map(key, node, name, &data, why)),
        _ => PairFiles::from_text(&text).map(|files| draft.map(key, node, name, &files, why)),
    };
    if let Err(problem) = parsed {
        draft.refuse(key, node, format!("it {problem}"));
    }
}

/// Writes the recipe's `model`.
pub(super) fn source(draft: &mut Draft, key: &str, node: &Node, name: &'static str) {
    match node.text() {
        Some(text) => draft.keep(key, node, name, &Source::Path(PathBuf::from(text))),
        None => draft.refuse(key, node, "it is no name of a model"),
    }
}
