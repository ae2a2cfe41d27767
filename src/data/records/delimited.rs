//! CSV and TSV: a line of column names, then a record a row.
//!
//! A cell is text. Only a cell that is JSON of messages (a list of objects with a role and a content each) is read as
//! messages, in a column that may hold them: a table has no other way to hold a conversation.

use std::io::{self, BufRead, Read};
use std::path::Path;

use serde_json::Value;

use super::FORMATS_HELP;
use super::columns::{HISTORY, is_known, is_prompt_column};
use super::message::is_message_like;
use super::source::{Chunks, MAX_RECORD_BYTES, Position, Start, not_utf8, read_error, too_long};
use crate::config::ColumnNames;
use crate::{Error, Result};

/// Bytes between columns, in the order in which they are tried.
const SEPARATORS: [u8; 3] = [b',', b'\t', b';'];

/// The byte between the columns of a table whose first line is `line`: the one that gives the most columns with a
/// meaning. `None` for a line that names none, unless the file's name says that it is a table.
pub(super) fn separator(line: &[u8], path: &Path, columns: &ColumnNames) -> Option<u8> {
    let names = |separator: u8| {
        let names = line.split(move |&byte| byte == separator);
        names.map(|name| String::from_utf8_lossy(name.trim_ascii()).trim_matches('"').trim().to_string())
    };
    let known = |separator: u8| {
        let meant = names(separator).filter(|name| {
            columns.read_as(name).is_some_and(is_known) || is_prompt_column(&name.to_lowercase())
        });
        meant.count()
    };
    let most = |count: &dyn Fn(u8) -> usize| {
        let best = SEPARATORS.into_iter().rev().max_by_key(|&separator| count(separator))?;
        (count(best) > 0).then_some(best)
    };
    let by_names = most(&|separator| if names(separator).count() > 1 { known(separator) } else { 0 });
    by_names.or_else(|| {
        let name = path.file_name()?.to_str()?.to_lowercase();
        let name = name.strip_suffix(".gz").unwrap_or(&name);
        let named = [".csv", ".tsv"].iter().any(|ending| name.ends_with(ending));
        named.then(|| most(&|separator| names(separator).count() - 1).unwrap_or(b','))
    })
}

/// Reads a table from its first line on, which is at `position`.
pub(super) fn read(
    path: &Path,
    reader: Box<dyn BufRead>,
    position: Position,
    separator: u8,
    columns: &ColumnNames,
    chunks: &mut Chunks,
) -> Result<()> {
    let bounded =
        Bounded { reader, left: MAX_RECORD_BYTES, read: 0, latest: Vec::new(), before_latest: None };
    let mut table = csv::ReaderBuilder::new().has_headers(false).delimiter(separator).from_reader(bounded);
    let mut names: Option<Vec<Name>> = None;
    let mut row = csv::ByteRecord::new();
    loop {
        table.get_mut().left = MAX_RECORD_BYTES;
        let more = table.read_byte_record(&mut row);
        let line = position.line - 1 + line_of(&row, table.position(), table.get_ref());
        if !more.map_err(|error| failed(path, line, error))? {
            return Ok(());
        }
        let start = Start { line, byte: None, is_line: true };
        let cells = row.iter().map(|cell| match std::str::from_utf8(cell) {
            Ok(cell) => Ok(cell),
            Err(error) => Err(not_utf8(path, start, cell, error.valid_up_to())),
        });
        match &names {
            None => {
                names = Some(cells.map(|name| Ok(Name::new(name?.trim(), columns))).collect::<Result<_>>()?)
            }
            Some(names) => {
                let mut text = Vec::with_capacity(row.as_slice().len() + 16 * names.len());
                for (place, (name, cell)) in names.iter().zip(cells).enumerate() {
                    text.push(if place == 0 { b'{' } else { b',' });
                    text.extend_from_slice(name.json.as_bytes());
                    text.push(b':');
                    name.write(cell?, &mut text);
                }
                text.push(b'}');
                chunks.push(start, text)?;
            }
        }
    }
}

/// The line on which a row that was just read begins. The crate says where it began to look for the row, which may be
/// some empty lines before it.
fn line_of(row: &csv::ByteRecord, after: &csv::Position, reader: &Bounded) -> usize {
    let inside = row.as_slice().iter().filter(|&&byte| byte == b'\n').count();
    let end = usize::from(reader.byte_before(after.byte()) == Some(b'\n'));
    let looked_from = row.position().map_or(1, csv::Position::line) as usize;
    // A quoted text that nothing closes takes the last line end of the file too, which is then counted twice here.
    (after.line() as usize).saturating_sub(inside + end).max(looked_from)
}

/// A column.
struct Name {
    /// Its name as JSON.
    json: String,
    /// Whether a cell may be JSON.
    holds: Holds,
}

enum Holds {
    Text,
    Messages,
    /// JSON of any kind of value.
    Json,
}

impl Name {
    fn new(name: &str, columns: &ColumnNames) -> Self {
        let holds = match columns.read_as(name) {
            Some(HISTORY | "chat_template_kwargs") => Holds::Json,
            Some(known) if is_known(known) => Holds::Messages,
            _ => Holds::Text,
        };
        Name { json: Value::from(name).to_string(), holds }
    }

    /// Writes a cell as JSON.
    fn write(&self, cell: &str, text: &mut Vec<u8>) {
        let may_be_json = !matches!(self.holds, Holds::Text) && cell.trim_start().starts_with(['[', '{']);
        if may_be_json && let Ok(value) = serde_json::from_str::<Value>(cell) {
            let is_meant = match (&self.holds, &value) {
                (Holds::Json, _) => true,
                (_, Value::Array(items)) => !items.is_empty() && items.iter().all(is_message_like),
                (_, value) => is_message_like(value),
            };
            if is_meant {
                text.extend_from_slice(cell.as_bytes());
                return;
            }
        }
        text.extend_from_slice(Value::from(cell).to_string().as_bytes());
    }
}

fn failed(path: &Path, line: usize, error: csv::Error) -> Error {
    match error.into_kind() {
        csv::ErrorKind::Io(error) if error.get_ref().is_some_and(|inner| inner.is::<TooLong>()) => {
            too_long(path, line, Start { line, byte: None, is_line: true })
        }
        csv::ErrorKind::Io(error) => read_error(path, error),
        csv::ErrorKind::UnequalLengths { expected_len, len, .. } => Error::data(
            path,
            Some(line),
            format!("a row of {len} columns, and the first line names {expected_len}"),
            "a text with the separator or a line break in it stands in double quotes, and a double quote in it is \
             written twice; pandas' `to_csv` and `datasets`' do that",
        ),
        other => Error::data(path, Some(line), format!("broken CSV: {other:?}"), FORMATS_HELP),
    }
}

/// A reader that ends with an error where a row is longer than any pair of texts: a double quote that is not closed
/// takes the rest of its file.
struct Bounded {
    reader: Box<dyn BufRead>,
    left: usize,
    /// All bytes that were read.
    read: u64,
    /// The last ones of them, and the one before those.
    latest: Vec<u8>,
    before_latest: Option<u8>,
}

impl Bounded {
    /// The byte before a position that lies among the latest ones.
    fn byte_before(&self, position: u64) -> Option<u8> {
        let start = self.read - self.latest.len() as u64;
        match position.checked_sub(start)? {
            0 => self.before_latest,
            inside => self.latest.get(inside as usize - 1).copied(),
        }
    }
}

#[derive(Debug)]
struct TooLong;

impl std::fmt::Display for TooLong {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("a row is too long")
    }
}

impl std::error::Error for TooLong {}

impl Read for Bounded {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 {
            return Err(io::Error::other(TooLong));
        }
        let most = buffer.len().min(self.left);
        let read = self.reader.read(&mut buffer[..most])?;
        self.left -= read;
        if read > 0 {
            self.before_latest = self.latest.last().copied().or(self.before_latest);
            self.latest.clear();
            self.latest.extend_from_slice(&buffer[..read]);
            self.read += read as u64;
        }
        Ok(read)
    }
}
