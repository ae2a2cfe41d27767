//! From a file to the texts of its records, a chunk at a time, each with its place.
//!
//! What a file is follows from its bytes and not from its name: gzip and Parquet by their magic numbers, a JSON array by
//! `[`, a CSV table by the names in its first line. A `{` begins JSON Lines where the first line is a whole object and more lines follow; otherwise one object over the
//! whole file ([`super::table`]), or objects that each take several lines. Any other kind of file is refused by name.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::Path;

use super::columns::Columns;
use super::gzip::Gzip;
use super::lines::{Line, Lines};
use super::renamed::Renamed;
use super::scan::{Broken, Scanner, excerpt};
use super::{FORMATS_HELP, delimited, list, parquet, table};
use crate::config::ColumnNames;
use crate::foreign::{self, Foreign};
use crate::{Error, Result};

/// Records that are read, parsed and tokenised together; with [`CHUNK_BYTES`] it bounds the memory of file text.
const CHUNK_RECORDS: usize = 1024;
const CHUNK_BYTES: usize = 8 << 20;
const BUFFER_BYTES: usize = 1 << 20;

/// Bytes of one record's JSON. A longer one is a file without line ends, or data that is no text.
pub(super) const MAX_RECORD_BYTES: usize = 32 << 20;
/// Bytes of a file that is one JSON object, which is held as a whole.
const MAX_TABLE_BYTES: usize = 2 << 30;

/// A record as it came from the file; parsed later, by whichever thread gets to it.
#[derive(Debug)]
pub(crate) struct RawRecord {
    pub index: usize,
    /// 1-based line of a JSON Lines file, 1-based record of any other.
    pub place: usize,
    text: Vec<u8>,
    start: Start,
}

/// Where a record's text begins in its file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Start {
    /// 1-based; 0 where the file has no lines, as a Parquet table.
    pub line: usize,
    /// 0-based byte of the unpacked file; `None` for a record put together from columns.
    pub byte: Option<u64>,
    /// Whether records are lines, so that `place` is this line.
    pub is_line: bool,
}

impl RawRecord {
    /// The record's columns.
    pub(super) fn parse<'a>(&self, path: &'a Path, renamed: &'a Renamed) -> Result<Columns<'a>> {
        if let Err(error) = std::str::from_utf8(&self.text) {
            return Err(not_utf8(path, self.start, &self.text, error.valid_up_to()));
        }
        Columns::parse(path, renamed, self.index, self.place, &self.text, self.start)
    }
}

/// What receives the records, in file order.
pub(super) type Sink<'a> = dyn FnMut(Vec<RawRecord>) -> Result<()> + 'a;

/// Hands the records of `path` to `sink` in file order, in chunks. An empty file is an error; a file of no record
/// hands over none. `columns` tells a table whose columns have names of their own.
pub(crate) fn for_each_chunk(path: &Path, columns: &ColumnNames, sink: &mut Sink) -> Result<()> {
    let mut chunks = Chunks { path, sink, chunk: Vec::new(), bytes: 0, index: 0 };
    let read = match foreign::recognise_file(path) {
        Some(Foreign::Parquet) => parquet::read(path, columns, &mut chunks),
        _ => read_text(path, columns, &mut chunks),
    };
    // A record before the fault may hold one of its own, which comes first.
    chunks.flush()?;
    read
}

fn read_text(path: &Path, columns: &ColumnNames, chunks: &mut Chunks) -> Result<()> {
    let mut reader = open(path)?;
    let (first, before) = skip_blank(&mut *reader).map_err(|error| read_error(path, error))?;
    match first {
        None => Err(Error::data(path, None, "the file is empty", FORMATS_HELP)),
        Some(b'[') => list::read(path, reader, before, chunks),
        Some(b'{') => read_lines_or_object(path, Lines::new(reader, before), chunks),
        Some(_) => {
            let head = reader.fill_buf().map_err(|error| read_error(path, error))?;
            let line = head.split(|&byte| byte == b'\n' || byte == b'\r').next().unwrap_or_default();
            match delimited::separator(line, path, columns) {
                Some(separator) => delimited::read(path, reader, before, separator, columns, chunks),
                None => Err(no_pairs(path, &mut *reader, before.line)),
            }
        }
    }
}

/// Gathers records into chunks for the sink.
pub(super) struct Chunks<'a, 'b> {
    path: &'a Path,
    sink: &'a mut Sink<'b>,
    chunk: Vec<RawRecord>,
    bytes: usize,
    index: usize,
}

impl Chunks<'_, '_> {
    /// The number of records so far.
    pub fn count(&self) -> usize {
        self.index
    }

    pub fn push(&mut self, start: Start, text: Vec<u8>) -> Result<()> {
        let place = if start.is_line { start.line } else { self.index + 1 };
        if text.len() > MAX_RECORD_BYTES {
            self.flush()?;
            return Err(too_long(self.path, place, start));
        }
        self.bytes += text.len();
        self.chunk.push(RawRecord { index: self.index, place, text, start });
        self.index += 1;
        if self.chunk.len() >= CHUNK_RECORDS || self.bytes >= CHUNK_BYTES { self.flush() } else { Ok(()) }
    }

    /// Hands over what was gathered; also done before an error, since an earlier record may hold one of its own.
    pub fn flush(&mut self) -> Result<()> {
        self.bytes = 0;
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
    if foreign::recognise(&head[..head.len().min(foreign::START)]) != Some(Foreign::Gzip) {
        refuse_foreign(path, head, "")?;
        return Ok(Box::new(reader));
    }
    let mut reader = BufReader::with_capacity(BUFFER_BYTES, Gzip::new(reader));
    let head = reader.fill_buf().map_err(|error| read_error(path, error))?;
    refuse_foreign(path, head, "under gzip, ")?;
    Ok(Box::new(reader))
}

/// Refuses a file that is not text in UTF-8; `under` says what it was unpacked from.
fn refuse_foreign(path: &Path, head: &[u8], under: &str) -> Result<()> {
    let Some(kind) = foreign::recognise(&head[..head.len().min(foreign::START)]) else { return Ok(()) };
    let help = match kind {
        Foreign::Empty => return Ok(()),
        Foreign::Parquet => "unpack it with `gunzip`: Parquet has compression of its own",
        Foreign::Arrow => "write it as Parquet: `datasets.Dataset.from_file(FILE).to_parquet(...)`",
        Foreign::Zip => "unpack it (`unzip`; a spreadsheet: save it as CSV) and give the file of pairs in it",
        Foreign::Gguf | Foreign::Safetensors | Foreign::Pickle | Foreign::Hdf5 | Foreign::Numpy => {
            "give the pairs file with --data and the model's folder with --model"
        }
        Foreign::Utf32 => "save it as UTF-8, for example with `iconv -f UTF-32 -t UTF-8`",
        other => other.help(),
    };
    Err(Error::data(path, None, format!("{under}this is {}, not JSON", kind.name()), help))
}

/// The place that reading has reached: the number of the line, and the byte of the unpacked file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Position {
    /// 1-based.
    pub line: usize,
    /// 0-based.
    pub byte: u64,
}

/// Skips a byte order mark and white space; the byte after them, still to be read, and its place.
fn skip_blank(reader: &mut dyn BufRead) -> io::Result<(Option<u8>, Position)> {
    let mut position = Position { line: 1, byte: 0 };
    if reader.fill_buf()?.starts_with(b"\xEF\xBB\xBF") {
        reader.consume(3);
        position.byte = 3;
    }
    let mut last = 0;
    loop {
        let buffer = reader.fill_buf()?;
        if buffer.is_empty() {
            return Ok((None, position));
        }
        let blank = buffer.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
        for &byte in &buffer[..blank] {
            position.line += usize::from(byte == b'\r' || (byte == b'\n' && last != b'\r'));
            last = byte;
        }
        let first = buffer.get(blank).copied();
        reader.consume(blank);
        position.byte += blank as u64;
        if first.is_some() {
            return Ok((first, position));
        }
    }
}

fn read_lines_or_object(path: &Path, mut lines: Lines, chunks: &mut Chunks) -> Result<()> {
    // This line may be a whole table, which is longer than a record.
    let Some(first) = lines.next(path, MAX_TABLE_BYTES)? else { return Ok(()) };
    let mut scanner = Scanner::new(&first.text, 0);
    match scanner.value().and_then(|_| scanner.end()) {
        Ok(()) => match lines.next(path, MAX_RECORD_BYTES)? {
            None => table::read(path, first, chunks),
            Some(second) => {
                let rest = std::iter::from_fn(|| lines.next(path, MAX_RECORD_BYTES).transpose());
                [first, second].into_iter().map(Ok).chain(rest).try_for_each(|line| {
                    let line: Line = line?;
                    chunks.push(line.start(true), line.text)
                })
            }
        },
        Err(broken) if broken.ended => read_whole(path, first, lines, chunks),
        // The line's own error, as any other line would give it.
        Err(_) => chunks.push(first.start(true), first.text),
    }
}

/// A file whose first line is not a whole value: one object over several lines, or several such objects.
fn read_whole(path: &Path, mut first: Line, lines: Lines, chunks: &mut Chunks) -> Result<()> {
    lines.read_rest(path, &mut first.text, MAX_TABLE_BYTES)?;
    let mut scanner = Scanner::new(&first.text, 0);
    let mut values = Vec::new();
    while scanner.peek().is_some() {
        let value =
            scanner.value().map_err(|fault| broken(path, &first.text, first.start(false), &fault, ""))?;
        values.push(value.range);
    }
    if values.len() <= 1 {
        return table::read(path, first, chunks);
    }
    for range in values {
        let start = first.start(false).moved(&first.text, range.start);
        chunks.push(start, first.text[range].to_vec())?;
    }
    Ok(())
}

impl Start {
    /// The start of a part of the text that begins here.
    pub fn moved(self, text: &[u8], by: usize) -> Start {
        Start {
            line: self.line + line_ends(&text[..by]),
            byte: self.byte.map(|byte| byte + by as u64),
            is_line: self.is_line,
        }
    }
}

/// The line ends in a text: `\n`, `\r`, or both together.
pub(super) fn line_ends(text: &[u8]) -> usize {
    let pairs = text.windows(2).filter(|pair| pair == b"\r\n").count();
    text.iter().filter(|&&byte| byte == b'\n' || byte == b'\r').count() - pairs
}

/// The error of a file that begins with neither `{` nor `[` and is no table.
fn no_pairs(path: &Path, reader: &mut dyn BufRead, line: usize) -> Error {
    let head = reader.fill_buf().unwrap_or_default();
    let head = &head[..head.len().min(4096)];
    let first_line = head.split(|&byte| byte == b'\n' || byte == b'\r').next().unwrap_or_default();
    let words = String::from_utf8_lossy(first_line);
    let is_binary = |&byte: &u8| byte == 0 || (byte < 0x20 && !byte.is_ascii_whitespace() && byte != 0x1b);
    let (what, help) = match () {
        () if head.iter().any(is_binary) => ("binary data, not JSON".to_string(), FORMATS_HELP),
        () if [&b"//"[..], b"/*", b"#"].iter().any(|mark| head.starts_with(mark)) => (
            format!("broken JSON: a comment begins here; JSON has none: `{}`", excerpt(&words)),
            "remove the comments",
        ),
        () => (
            format!(
                "neither `{{` nor `[` begins the file, nor the names of columns, but `{}`",
                excerpt(&words)
            ),
            "pairs are read from JSON Lines, JSON and CSV, any of them under gzip, and from Parquet; the first line of a \
             CSV table names its columns (`prompt,chosen,rejected`, or others with --columns)",
        ),
    };
    Error::data(path, Some(line), what, help)
}

pub(super) fn read_error(path: &Path, error: io::Error) -> Error {
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

/// The error of a record that is larger than any pair of texts.
pub(super) fn too_long(path: &Path, place: usize, start: Start) -> Error {
    let line = if start.is_line || start.line == 0 {
        String::new()
    } else {
        format!(", which begins in line {},", start.line)
    };
    Error::data(
        path,
        Some(place),
        format!("this record{line} is longer than {} MiB", MAX_RECORD_BYTES >> 20),
        "a record is one pair of texts; is this a file without line ends, or data other than text?",
    )
}

/// The error of bytes that are not UTF-8, with a guess at what they are.
pub(super) fn not_utf8(path: &Path, start: Start, text: &[u8], at: usize) -> Error {
    let start = start.moved(text, at);
    let place = start.byte.map_or_else(String::new, |byte| format!(" at byte {byte} of the file"));
    let guess = if looks_like_pairs_of_bytes(text) { "GBK" } else { "LATIN1" };
    Error::data(
        path,
        Some(start.line),
        format!("not UTF-8 text: 0x{:02x}{place}", text[at]),
        format!(
            "text is UTF-8; find out the file's encoding (it may be {guess}) and convert it, for example with \
             `iconv -f {guess} -t UTF-8 FILE > NEW`"
        ),
    )
}

/// Whether the bytes above ASCII come in runs, as in the encodings of Chinese, Japanese and Korean; in Western
/// European ones they mostly stand alone.
fn looks_like_pairs_of_bytes(text: &[u8]) -> bool {
    let runs = text.split(|byte| byte.is_ascii()).filter(|run| !run.is_empty());
    let (single, long) = runs.fold((0, 0), |(single, long), run| match run.len() {
        1 => (single + 1, long),
        _ => (single, long + 1),
    });
    long > single
}

/// The error of a break in a text that begins at `start`; its line is that of the break.
pub(super) fn broken(path: &Path, text: &[u8], start: Start, fault: &Broken, inside: &str) -> Error {
    let at = fault.at.min(text.len());
    let line_start =
        text[..at].iter().rposition(|&byte| byte == b'\n' || byte == b'\r').map_or(0, |end| end + 1);
    let column = String::from_utf8_lossy(&text[line_start..at]).chars().count() + 1;
    let help = if start.is_line {
        "every line of a JSON Lines file is one whole JSON object"
    } else {
        "the number after the file's name is the line of the break"
    };
    Error::data(
        path,
        Some(start.moved(text, at).line),
        format!("broken JSON{inside}: {} at column {column}", fault.message),
        help,
    )
}
