//! From pairs files to token ids, against what Hugging Face's own code makes of the same records
//! (`tests/reference/data_goldens.py`).

mod bad_input;
mod disguises;
mod formats;
mod imports;
mod layouts;
mod limits;
mod messages;
mod packing;
mod pair_cache;
mod plausible;
mod policies;
mod record_properties;
mod reference_cache;
mod tables;
mod template;
mod tokenizer;
mod tokens;
mod words;

use std::path::{Path, PathBuf};

use mmpo_fast::config::LengthLimits;
use mmpo_fast::data::{PairDataset, TextEncoder, TokenizedPair};
use serde_json::Value;

/// A committed file of this test.
fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn json(path: &Path) -> Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn encoder(name: &str) -> TextEncoder {
    TextEncoder::load(&file(name), None).expect("a committed tokenizer loads")
}

fn ids(value: &Value) -> Vec<u32> {
    let ids = value.as_array().expect("a list of ids").iter();
    ids.map(|id| u32::try_from(id.as_u64().expect("an id")).expect("a small id")).collect()
}

/// The token ids that Hugging Face gives the committed pairs: `kind` is `conversations` or `texts`.
fn golden(tokenizer: &str, kind: &str) -> Vec<[Vec<u32>; 3]> {
    let goldens = json(&file("goldens.json"));
    let pairs = goldens[tokenizer][kind].as_array().expect("golden pairs").iter();
    pairs.map(|pair| ["prompt", "chosen", "rejected"].map(|part| ids(&pair[part]))).collect()
}

fn golden_limits() -> LengthLimits {
    serde_json::from_value(json(&file("goldens.json"))["limits"].clone()).expect("limits")
}

fn parts(pair: &TokenizedPair) -> [Vec<u32>; 3] {
    [&pair.prompt, &pair.chosen, &pair.rejected].map(|ids| ids.to_vec())
}

fn all_parts(dataset: &PairDataset) -> Vec<[Vec<u32>; 3]> {
    dataset.pairs.iter().map(parts).collect()
}

/// The records of a JSON Lines file with these values.
fn read_values(values: &[Value]) -> mmpo_fast::Result<Vec<mmpo_fast::data::Record>> {
    let lines: Vec<String> = values.iter().map(Value::to_string).collect();
    let (_folder, path) = temporary("pairs.jsonl", lines.join("\n"));
    mmpo_fast::data::read_records(&path)
}

/// The one record of such a file.
#[track_caller]
fn read_value(value: Value) -> mmpo_fast::data::Record {
    match read_values(std::slice::from_ref(&value)) {
        Ok(records) => records.into_iter().next().expect("a record"),
        Err(error) => panic!("{value}: {error}"),
    }
}

/// The error of reading it: its message, which names line 1, and its help.
#[track_caller]
fn refusal(value: Value) -> String {
    match read_values(std::slice::from_ref(&value)) {
        Err(mmpo_fast::Error::Data { line: Some(1), message, help, .. }) => format!("{message}; {help}"),
        other => panic!("{value}: no data error: {other:?}"),
    }
}

/// A conversation with each message as `role: content`, messages separated by `|`: prompt, chosen, rejected. A plain
/// text stands in quotes.
fn shown(record: &mmpo_fast::data::Record) -> [String; 3] {
    match &record.body {
        mmpo_fast::data::Body::Text { prompt, chosen, rejected } => {
            [prompt, chosen, rejected].map(|text| format!("{text:?}"))
        }
        mmpo_fast::data::Body::Conversation { prompt, chosen, rejected, .. } => [prompt, chosen, rejected]
            .map(|messages| {
                let turns = messages.iter().map(|message| format!("{}: {}", message.role, message.content));
                turns.collect::<Vec<_>>().join(" | ")
            }),
    }
}

/// A pairs file of the given text in a temporary folder, which lives as long as the first value.
fn temporary(name: &str, bytes: impl AsRef<[u8]>) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).expect("a temporary file");
    (folder, path)
}
