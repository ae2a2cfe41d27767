//! Records: what a pairs file says, before any tokenizer has seen it.
//!
//! A file is JSON Lines, a JSON array, one JSON object or a CSV table, plain or gzip, or a Parquet table ([`source`]). Each record is read by its own
//! columns ([`mod@format`]): every column that may hold a prompt or a part of one is read, or the record is refused by
//! that column's name. `docs/data.md` lists the formats.

mod columns;
mod delimited;
mod format;
mod gzip;
mod implicit;
mod lines;
mod list;
mod message;
mod parquet;
mod plausible;
mod prompt;
mod renamed;
mod scan;
mod scores;
mod source;
mod table;

use std::path::Path;

use serde_json::{Map, Value};

use super::pair_source::PairSource;
use crate::config::ColumnNames;
use crate::{Error, Result};

pub(crate) use columns::unknown_column;
pub(crate) use implicit::common_prefix;
pub use message::Message;
pub use plausible::Note;
pub(crate) use plausible::{Digests, PairDigests};
pub(crate) use renamed::Renamed;
pub(in crate::data) use scores::{RATINGS, SCORE_COLUMNS};
pub(crate) use source::{RawRecord, for_each_chunk};

/// One preference pair in the words of its file.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// 0-based position in the file.
    pub index: usize,
    /// 1-based line of a JSON Lines file, 1-based record of any other: what errors and reports name.
    pub place: usize,
    /// What it says.
    pub body: Body,
    /// What looks wrong in the record, or was mended in it.
    pub notes: Vec<Note>,
    /// The better response's score less the worse one's, where the file has both.
    pub score_gap: Option<f64>,
}

/// A pair as plain text, or as a conversation that a chat template turns into text.
#[derive(Clone, Debug, PartialEq)]
pub enum Body {
    /// Plain text, used as it is.
    Text {
        /// The text before the responses.
        prompt: String,
        /// The better response.
        chosen: String,
        /// The worse response.
        rejected: String,
    },
    /// Messages, which go through the chat template.
    Conversation {
        /// Messages before the responses.
        prompt: Vec<Message>,
        /// Messages of the better response.
        chosen: Vec<Message>,
        /// Messages of the worse response.
        rejected: Vec<Message>,
        /// Extra template variables: the columns `tools` and `chat_template_kwargs`.
        variables: Map<String, Value>,
    },
}

impl RawRecord {
    /// Reads the record.
    ///
    /// # Errors
    /// [`Error::Data`] with its place: it is broken, lacks a column, or holds something that would be lost.
    pub(crate) fn read(&self, path: &Path, renamed: &Renamed) -> Result<Record> {
        format::read(self.parse(path, renamed)?)
    }
}

impl Record {
    /// Whether the pair is plain text, which no template sees.
    pub fn is_text(&self) -> bool {
        matches!(self.body, Body::Text { .. })
    }
}

/// What a file's report needs from a record once its texts are tokens.
#[derive(Debug)]
pub(crate) struct Read {
    pub is_text: bool,
    pub notes: Vec<Note>,
    pub digests: PairDigests,
    /// The beginning of the response, if both are the same.
    pub same: Option<String>,
}

impl Read {
    pub fn of(record: &Record) -> Self {
        Read {
            is_text: record.is_text(),
            notes: record.notes.clone(),
            digests: plausible::digests(&record.body),
            same: plausible::same_response(&record.body),
        }
    }
}

/// Reads a whole pairs file. Training goes through [`crate::data::load`], which holds a chunk at a time.
///
/// # Errors
/// [`Error::Io`] where it cannot be read, [`Error::Data`] naming its first bad record.
pub fn read_records(path: &Path) -> Result<Vec<Record>> {
    read_records_as(path, &ColumnNames::default())
}

/// As [`read_records`], of a file whose columns have other names.
///
/// # Errors
/// Those of [`read_records`], and [`Error::Data`] for a name that no record has.
pub fn read_records_as(path: &Path, columns: &ColumnNames) -> Result<Vec<Record>> {
    let mut records = Vec::new();
    let mut one_kind = OneKind::default();
    let renamed = Renamed::new(columns);
    for_each_chunk(path, columns, &mut |chunk| {
        for raw in chunk {
            let record = raw.read(path, &renamed)?;
            one_kind.check(path, record.place, record.is_text())?;
            records.push(record);
        }
        Ok(())
    })?;
    if records.is_empty() {
        return Err(no_record(path));
    }
    renamed.check_seen(path)?;
    Ok(records)
}

/// The records of `source` at `places`, 0-based over all its files and rising. Nothing after the last of them is read
/// but the rest of its chunk. Files that have become shorter give fewer.
///
/// # Errors
/// Those of [`read_records`], for what is read.
pub fn read_chosen_records(source: &PairSource, places: &[usize]) -> Result<Vec<Record>> {
    let renamed = Renamed::new(&source.columns);
    let mut records = Vec::with_capacity(places.len());
    let mut before = 0;
    for path in source.files.iter().map(|file| file.path.as_path()) {
        let mut count = 0;
        let mut done = places.last().is_none_or(|last| *last < before);
        if done {
            break;
        }
        let read = for_each_chunk(path, &source.columns, &mut |chunk| {
            for raw in chunk {
                count = raw.index + 1;
                let index = before + raw.index;
                if places.contains(&index) {
                    done |= places.last() == Some(&index);
                    records.push(Record { index, ..raw.read(path, &renamed)? });
                }
            }
            // An error is what stops the reader.
            if done { Err(no_record(path)) } else { Ok(()) }
        });
        if !(done && records.len() == places.len()) {
            read?;
        }
        before += count;
    }
    Ok(records)
}

/// Refuses a file in which some records are plain text and some are conversations. Each would be read the same
/// anywhere, but only conversations go through the chat template, and a model that is trained on both kinds because a
/// column is missing here and there learns to answer without its turns.
#[derive(Debug, Default)]
pub(crate) struct OneKind {
    first: Option<(usize, bool)>,
}

impl OneKind {
    /// Takes the next record in file order.
    pub fn check(&mut self, path: &Path, place: usize, is_text: bool) -> Result<()> {
        let (first, first_is_text) = *self.first.get_or_insert((place, is_text));
        if is_text == first_is_text {
            return Ok(());
        }
        let kind = |is_text| if is_text { "plain text" } else { "a conversation" };
        Err(Error::data(
            path,
            Some(place),
            format!(
                "this record is {} and the one at {first} is {}; a file holds one kind",
                kind(is_text),
                kind(first_is_text)
            ),
            "plain text is used as it is, conversations go through the chat template: give every record the same \
             columns (an empty `system`, `\"system\": \"\"`, makes a `prompt` string a conversation), or write the \
             two kinds to a file each",
        ))
    }
}

/// The error of a file that parses and holds nothing.
pub(crate) fn no_record(path: &Path) -> Error {
    Error::data(path, None, "the file holds no record", FORMATS_HELP)
}

pub(crate) const FORMATS_HELP: &str = "a record has `chosen` and `rejected`, and its prompt in `prompt`, \
     `messages`, `conversations`, `instruction` (with `input`), `question`, or as the beginning that both responses \
     share; docs/data.md shows every format";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chosen_records_are_read_and_nothing_after_them() {
        let line = |n: usize| format!("{{\"prompt\":\"p{n}\",\"chosen\":\"a\",\"rejected\":\"b\"}}\n");
        let mut text: String = (0..3).map(line).collect();
        text += "broken\n";
        text.extend((4..2000).map(line));
        // Longer than any record may be.
        text.push_str(&"x".repeat(33 << 20));
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let prompts = |places: &[usize]| -> Result<Vec<String>> {
            let records = read_chosen_records(&PairSource::file(file.path()), places)?;
            let prompt = |record: &Record| match &record.body {
                Body::Text { prompt, .. } => prompt.clone(),
                _ => unreachable!("plain text"),
            };
            Ok(records.iter().map(prompt).collect())
        };
        assert_eq!(prompts(&[]).unwrap(), [""; 0]);
        assert_eq!(prompts(&[0, 2, 4]).unwrap(), ["p0", "p2", "p4"]);
        assert_eq!(prompts(&[1999]).unwrap(), ["p1999"]);
        assert!(prompts(&[1, 3]).unwrap_err().to_string().contains(":4: broken JSON"), "the record is read");
        assert!(prompts(&[5000]).unwrap_err().to_string().contains("longer than 32 MiB"), "the file is");
    }
}
