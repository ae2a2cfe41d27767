//! From a file to raw JSON records, a chunk at a time, each with its place.
//!
//! What a file is follows from its bytes: gzip by its magic number, a JSON array by `[`; a `{` begins JSON Lines,
//! or (only in a file not named `.jsonl` or `.ndjson`) one JSON object over the whole file, as Hugging Face datasets read it:
//! an object of columns, an object with one list of records, or a single record.

use std::ffi::OsStr;
use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::Path;

use flate2::bufread::MultiGzDecoder;
use serde::de::{Deserializer, Error as _, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::format::{Columns, type_name};
use super::{FORMATS_HELP, no_record};
use crate::{Error, Result};

/// Records that are read, parsed and tokenised together; bounds the memory that file text takes.
const CHUNK_RECORDS: usize = 1024;
const BUFFER_BYTES: usize = 1 << 20;

/// A record as it came from the file. A line is parsed later, by whichever thread gets to it.
pub(crate) struct RawRecord {
    pub index: usize,
    pub place: usize,
    json: RawJson,
}

enum RawJson {
    Line(String),
    Value(Value),
}

impl RawRecord {
    /// The record's columns.
    pub(crate) fn parse(self, path: &Path) -> Result<Columns<'_>> {
        let value = match self.json {
            RawJson::Value(value) => value,
            RawJson::Line(line) => serde_json::from_str(&line).map_err(|error| {
                Error::data(
                    path,
                    Some(self.place),
                    format!("broken JSON: {}", without_line(&error)),
                    "every line of a JSON Lines file is one whole JSON object",
                )
            })?,
        };
        match value {
            Value::Object(members) => Ok(Columns { path, index: self.index, place: self.place, members }),
            other => Err(Error::data(
                path,
                Some(self.place),
                format!("the record is {}, not an object", type_name(&other)),
                FORMATS_HELP,
            )),
        }
    }
}

/// What receives the records, in file order.
type Sink<'a> = dyn FnMut(Vec<RawRecord>) -> Result<()> + 'a;

/// Hands the records of `path` to `sink` in file order, in chunks. An empty file is an error; a file of no record
/// hands over none.
pub(crate) fn for_each_chunk(path: &Path, sink: &mut Sink) -> Result<()> {
    let mut reader = open(path)?;
    let (first, lines_before) = skip_blank(&mut *reader).map_err(|error| read_error(path, error))?;
    let mut chunks = Chunks { sink, chunk: Vec::new(), index: 0 };
    match first {
        None => return Err(Error::data(path, None, "the file is empty", FORMATS_HELP)),
        Some(b'[') => read_array(path, reader, &mut chunks)?,
        Some(b'{') if is_json_lines(path) => read_lines(path, reader, lines_before, &mut chunks)?,
        Some(b'{') => read_lines_or_object(path, reader, lines_before, &mut chunks)?,
        Some(_) => {
            return Err(Error::data(
                path,
                Some(lines_before + 1),
                "broken JSON: neither `{` nor `[` begins the file",
                "pairs are read from JSON Lines, JSON, and either of them under gzip",
            ));
        }
    }
    chunks.flush()
}

/// Gathers records into chunks for the sink.
struct Chunks<'a, 'b> {
    sink: &'a mut Sink<'b>,
    chunk: Vec<RawRecord>,
    index: usize,
}

impl Chunks<'_, '_> {
    fn push(&mut self, place: usize, json: RawJson) -> Result<()> {
        self.chunk.push(RawRecord { index: self.index, place, json });
        self.index += 1;
        if self.chunk.len() == CHUNK_RECORDS { self.flush() } else { Ok(()) }
    }

    /// A record of an array or an object: its place is its number.
    fn push_value(&mut self, value: Value) -> Result<()> {
        self.push(self.index + 1, RawJson::Value(value))
    }

    fn flush(&mut self) -> Result<()> {
        if self.chunk.is_empty() {
            return Ok(());
        }
        (self.sink)(std::mem::take(&mut self.chunk))
    }
}

fn open(path: &Path) -> Result<Box<dyn BufRead>> {
    let file = File::open(path).map_err(|error| Error::io(path, "read", error))?;
    let folder = file.metadata().map_err(|error| Error::io(path, "read", error))?.is_dir();
    if folder {
        return Err(Error::data(path, None, "this is a folder", "name the pairs file inside it"));
    }
    let mut reader = BufReader::with_capacity(BUFFER_BYTES, file);
    let head = reader.fill_buf().map_err(|error| read_error(path, error))?;
    if head.starts_with(b"PAR1") {
        return Err(Error::data(
            path,
            None,
            "this is a Parquet file",
            "write it as JSON Lines first: `datasets.load_dataset(\"parquet\", data_files=FILE)[\"train\"].to_json(...)`",
        ));
    }
    if head.starts_with(&[0x1f, 0x8b]) {
        return Ok(Box::new(BufReader::with_capacity(BUFFER_BYTES, MultiGzDecoder::new(reader))));
    }
    Ok(Box::new(reader))
}

fn is_json_lines(path: &Path) -> bool {
    let mut name = Path::new(path.file_name().unwrap_or_default());
    if name.extension() == Some(OsStr::new("gz")) {
        name = Path::new(name.file_stem().unwrap_or_default());
    }
    matches!(name.extension().and_then(OsStr::to_str), Some("jsonl" | "ndjson"))
}

/// Skips a byte order mark and white space; the byte behind them, and how many line ends were skipped.
fn skip_blank(reader: &mut dyn BufRead) -> io::Result<(Option<u8>, usize)> {
    let mut lines = 0;
    if reader.fill_buf()?.starts_with(b"\xEF\xBB\xBF") {
        reader.consume(3);
    }
    loop {
        let buffer = reader.fill_buf()?;
        if buffer.is_empty() {
            return Ok((None, lines));
        }
        let blank = buffer.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
        lines += buffer[..blank].iter().filter(|&&byte| byte == b'\n').count();
        let first = buffer.get(blank).copied();
        reader.consume(blank);
        if first.is_some() {
            return Ok((first, lines));
        }
    }
}

/// The next line that is not blank, with its 1-based number; `lines_read` counts all lines.
fn next_line(
    path: &Path,
    reader: &mut dyn BufRead,
    lines_read: &mut usize,
) -> Result<Option<(usize, String)>> {
    loop {
        let mut bytes = Vec::new();
        if reader.read_until(b'\n', &mut bytes).map_err(|error| read_error(path, error))? == 0 {
            return Ok(None);
        }
        *lines_read += 1;
        if bytes.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let line = String::from_utf8(bytes).map_err(|error| not_utf8(path, *lines_read, &error))?;
        return Ok(Some((*lines_read, line)));
    }
}

fn read_lines(
    path: &Path,
    mut reader: Box<dyn BufRead>,
    lines_before: usize,
    chunks: &mut Chunks,
) -> Result<()> {
    let mut lines_read = lines_before;
    while let Some((place, line)) = next_line(path, &mut *reader, &mut lines_read)? {
        chunks.push(place, RawJson::Line(line))?;
    }
    Ok(())
}

/// A `.json` file that begins with `{`: JSON Lines under another name if its first line is a whole value and more
/// lines follow, else one object.
fn read_lines_or_object(
    path: &Path,
    mut reader: Box<dyn BufRead>,
    lines_before: usize,
    chunks: &mut Chunks,
) -> Result<()> {
    let mut lines_read = lines_before;
    let Some((first_place, mut first)) = next_line(path, &mut *reader, &mut lines_read)? else {
        return Err(no_record(path));
    };
    if serde_json::from_str::<serde::de::IgnoredAny>(&first).is_ok() {
        let Some((place, line)) = next_line(path, &mut *reader, &mut lines_read)? else {
            let value =
                serde_json::from_str(&first).map_err(|error| broken(path, lines_before, &error, None))?;
            return read_object(path, value, chunks);
        };
        chunks.push(first_place, RawJson::Line(first))?;
        chunks.push(place, RawJson::Line(line))?;
        return read_lines(path, reader, lines_read, chunks);
    }
    let mut rest = Vec::new();
    reader.read_to_end(&mut rest).map_err(|error| read_error(path, error))?;
    first.push_str(std::str::from_utf8(&rest).map_err(|error| not_utf8(path, lines_read, &error))?);
    let value = serde_json::from_str(&first).map_err(|error| broken(path, lines_before, &error, None))?;
    read_object(path, value, chunks)
}

/// One object over the whole file: columns, a list of records under one name, or one record.
fn read_object(path: &Path, value: Value, chunks: &mut Chunks) -> Result<()> {
    let members = match value {
        Value::Object(members) => members,
        other => return chunks.push_value(other),
    };
    if is_columns(&members) {
        return read_columns(path, members, chunks);
    }
    if members.contains_key("chosen") {
        return chunks.push_value(Value::Object(members));
    }
    let is_rows =
        |value: &Value| matches!(value, Value::Array(rows) if rows.first().is_some_and(Value::is_object));
    let lists: Vec<String> =
        members.iter().filter(|(_, value)| is_rows(value)).map(|(name, _)| name.clone()).collect();
    match lists.as_slice() {
        [] => chunks.push_value(Value::Object(members)),
        [name] => {
            let rows = members.into_iter().find(|(key, _)| key == name).map(|(_, rows)| rows);
            let Some(Value::Array(rows)) = rows else { return Ok(()) };
            rows.into_iter().try_for_each(|row| chunks.push_value(row))
        }
        several => Err(Error::data(
            path,
            None,
            format!("several lists of records: `{}`", several.join("`, `")),
            "write the one to train on to a file of its own",
        )),
    }
}

/// Whether `chosen` is a column of strings or of message lists, rather than one record's messages.
fn is_columns(members: &Map<String, Value>) -> bool {
    let holds_lists = |name: &str| {
        let first = members.get(name).and_then(Value::as_array).and_then(|values| values.first());
        first.is_some_and(Value::is_array)
    };
    match members.get("chosen").and_then(Value::as_array) {
        Some(values) => {
            values.iter().all(|value| !value.is_object())
                || holds_lists("conversations")
                || holds_lists("prompt")
        }
        None => false,
    }
}

/// Turns columns into rows; `chosen` says how many there are.
fn read_columns(path: &Path, members: Map<String, Value>, chunks: &mut Chunks) -> Result<()> {
    let rows = members.get("chosen").and_then(Value::as_array).map_or(0, Vec::len);
    let mut columns = Vec::with_capacity(members.len());
    for (name, value) in members {
        match value {
            Value::Array(values) if values.len() == rows => columns.push((name, values.into_iter())),
            Value::Array(values) => {
                return Err(Error::data(
                    path,
                    None,
                    format!("column `{name}` has {} values and `chosen` has {rows}", values.len()),
                    "every column of an object of columns has one value a record",
                ));
            }
            other => {
                return Err(Error::data(
                    path,
                    None,
                    format!("column `{name}` is {}, not a list", type_name(&other)),
                    "every column of an object of columns is a list with one value a record",
                ));
            }
        }
    }
    for _ in 0..rows {
        let row =
            columns.iter_mut().filter_map(|(name, values)| Some((name.clone(), values.next()?))).collect();
        chunks.push_value(Value::Object(row))?;
    }
    Ok(())
}

fn read_array(path: &Path, reader: Box<dyn BufRead>, chunks: &mut Chunks) -> Result<()> {
    let mut refused = None;
    let mut deserializer = serde_json::Deserializer::from_reader(reader);
    let seed = Rows { chunks: &mut *chunks, refused: &mut refused };
    let parsed = deserializer.deserialize_seq(seed).and_then(|()| deserializer.end());
    match (refused, parsed) {
        (Some(error), _) => Err(error),
        (None, Ok(())) => Ok(()),
        (None, Err(error)) if error.is_io() => Err(read_error(path, error.into())),
        (None, Err(error)) => {
            // Records before the break may hold an error of their own, which comes first in the file.
            chunks.flush()?;
            Err(broken(path, 0, &error, Some(chunks.index + 1)))
        }
    }
}

/// Receives an array's records one by one, so that only a chunk of them is ever in memory.
struct Rows<'a, 'b, 'c> {
    chunks: &'a mut Chunks<'b, 'c>,
    /// The sink's own error, which serde's error type cannot carry.
    refused: &'a mut Option<Error>,
}

impl<'de> Visitor<'de> for Rows<'_, '_, '_> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a list of records")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut rows: A) -> std::result::Result<(), A::Error> {
        while let Some(row) = rows.next_element::<Value>()? {
            if let Err(error) = self.chunks.push_value(row) {
                *self.refused = Some(error);
                return Err(A::Error::custom("refused"));
            }
        }
        Ok(())
    }
}

fn read_error(path: &Path, error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput => {
            Error::data(
                path,
                None,
                format!("the gzip stream is broken or cut short ({error})"),
                "fetch or write the file again; `gzip -t FILE` checks it",
            )
        }
        _ => Error::io(path, "read", error),
    }
}

fn not_utf8(path: &Path, line: usize, error: &dyn fmt::Display) -> Error {
    Error::data(
        path,
        Some(line),
        format!("not UTF-8 text: {error}"),
        "JSON is UTF-8; convert the file with `iconv`",
    )
}

/// A syntax error of a document; its line is counted from behind the `lines_before` that were skipped.
fn broken(path: &Path, lines_before: usize, error: &serde_json::Error, record: Option<usize>) -> Error {
    let inside = record.map_or_else(String::new, |record| format!(" (in or behind record {record})"));
    Error::data(
        path,
        Some(lines_before + error.line()),
        format!("broken JSON{inside}: {}", without_line(error)),
        "the number behind the file's name is the line of the break",
    )
}

/// serde_json's message with the column alone, since the line is named in front.
fn without_line(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let suffix = format!(" at line {} column {}", error.line(), error.column());
    match text.strip_suffix(&suffix) {
        Some(message) => format!("{message} at column {}", error.column()),
        None => text,
    }
}
