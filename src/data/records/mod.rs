//! Records: what a pairs file says, before any tokenizer has seen it.
//!
//! A file is JSON Lines, a JSON array, or one JSON object, plain or gzip ([`source`]); the columns of its first
//! record decide its [`Format`], and every later record is held to that format. Columns that no format knows are
//! left alone; a known column of a wrong type is an error with its file and line.

mod format;
mod implicit;
mod message;
mod source;

use std::path::Path;

use serde_json::{Map, Value};

use crate::{Error, Result};

pub use format::Format;
pub(crate) use implicit::common_prefix;
pub use message::Message;
pub(crate) use source::{RawRecord, for_each_chunk};

/// One preference pair in the words of its file.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// 0-based position in the file.
    pub index: usize,
    /// 1-based line of a JSON Lines file, 1-based record of any other: what errors and reports name.
    pub place: usize,
    pub body: Body,
    /// A `prompt` string stood beside conversations that already hold a different one; the conversations win.
    pub prompt_column_differs: bool,
}

/// A pair as plain text, or as a conversation that a chat template turns into text.
#[derive(Clone, Debug, PartialEq)]
pub enum Body {
    Text {
        prompt: String,
        chosen: String,
        rejected: String,
    },
    Conversation {
        prompt: Vec<Message>,
        chosen: Vec<Message>,
        rejected: Vec<Message>,
        /// Extra template variables: the columns `tools` and `chat_template_kwargs`.
        variables: Map<String, Value>,
    },
}

/// Reads a whole pairs file. Training goes through [`crate::data::load_pairs`], which holds a chunk at a time.
pub fn read_records(path: &Path) -> Result<Vec<Record>> {
    let mut records = Vec::new();
    let mut format = None;
    for_each_chunk(path, &mut |chunk| {
        for raw in chunk {
            let columns = raw.parse(path)?;
            let format = match format {
                Some(format) => format,
                None => *format.insert(Format::detect(&columns)?),
            };
            records.push(format.read(columns)?);
        }
        Ok(())
    })?;
    if records.is_empty() {
        return Err(no_record(path));
    }
    Ok(records)
}

/// The error of a file that parses and holds nothing.
pub(crate) fn no_record(path: &Path) -> Error {
    Error::data(path, None, "the file holds no record", FORMATS_HELP)
}

pub(crate) const FORMATS_HELP: &str = "a record has `chosen` and `rejected`, and its prompt in `prompt`, \
     `question` (with `system`), `conversations` (ShareGPT), or as the beginning that both responses share";
