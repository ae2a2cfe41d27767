//! A file that is one JSON list of records: read record by record, so that only a chunk of them is ever in memory.

use std::io::{self, BufRead};
use std::path::Path;

use super::scan::{Broken, Scanner};
use super::source::{Chunks, MAX_RECORD_BYTES, Position, Start, broken, read_error, too_long};
use crate::{Error, Result};

/// Reads the list whose `[` is next.
pub(super) fn read(
    path: &Path,
    reader: Box<dyn BufRead>,
    position: Position,
    chunks: &mut Chunks,
) -> Result<()> {
    let mut text = Text { reader, position, after_return: false };
    let outcome = read_items(path, &mut text, chunks);
    if outcome.is_err() {
        // An earlier record may hold an error of its own, which comes first in the file.
        chunks.flush()?;
    }
    outcome
}

fn read_items(path: &Path, text: &mut Text, chunks: &mut Chunks) -> Result<()> {
    let failed = |error| read_error(path, error);
    text.bump().map_err(failed)?;
    let mut first = true;
    loop {
        match text.peek().map_err(failed)? {
            Some(b']') if first => break,
            Some(b']') => return Err(text.fault(path, chunks, "a comma stands before `]`: trailing comma")),
            Some(b',') => return Err(text.fault(path, chunks, "expected a value, found `,`")),
            Some(_) => {}
            None => return Err(text.fault(path, chunks, "the text ends inside a list (EOF)")),
        }
        first = false;
        let start = text.start();
        let mut item = Vec::new();
        let whole = text.item(&mut item).map_err(failed)?;
        if item.len() > MAX_RECORD_BYTES {
            return Err(too_long(path, chunks.count() + 1, start));
        }
        if !whole {
            return Err(unfinished(path, &item, start, chunks.count() + 1));
        }
        chunks.push(start, item)?;
        match text.peek().map_err(failed)? {
            Some(b',') => text.bump().map_err(failed)?,
            Some(b']') => break,
            Some(_) => return Err(text.fault(path, chunks, "expected `,` or `]` between records")),
            None => return Err(text.fault(path, chunks, "the text ends inside a list (EOF)")),
        }
    }
    text.bump().map_err(failed)?;
    match text.peek().map_err(failed)? {
        None => Ok(()),
        Some(_) => Err(text.fault(path, chunks, "trailing text follows the list")),
    }
}

/// The error of a record in which the file ends: that of the first break in it, which may be a quote that was never
/// closed.
fn unfinished(path: &Path, item: &[u8], start: Start, record: usize) -> Error {
    let ended =
        Broken { at: item.len(), message: "the text ends inside a record (EOF)".to_string(), ended: true };
    let fault = Scanner::new(item, 0).value().err().unwrap_or(ended);
    broken(path, item, start, &fault, &format!(" (in record {record})"))
}

struct Text {
    reader: Box<dyn BufRead>,
    position: Position,
    after_return: bool,
}

impl Text {
    fn start(&self) -> Start {
        Start { line: self.position.line, byte: Some(self.position.byte), is_line: false }
    }

    fn fault(&self, path: &Path, chunks: &Chunks, message: &str) -> Error {
        Error::data(
            path,
            Some(self.position.line),
            format!("broken JSON (at record {}): {message}", chunks.count() + 1),
            "the number after the file's name is the line of the break",
        )
    }

    fn consume(&mut self, count: usize) -> io::Result<()> {
        let buffer = self.reader.fill_buf()?;
        for &byte in &buffer[..count] {
            self.position.line += usize::from(byte == b'\r' || (byte == b'\n' && !self.after_return));
            self.after_return = byte == b'\r';
        }
        self.position.byte += count as u64;
        self.reader.consume(count);
        Ok(())
    }

    /// The next byte that is not white space, still to be read.
    fn peek(&mut self) -> io::Result<Option<u8>> {
        loop {
            let buffer = self.reader.fill_buf()?;
            if buffer.is_empty() {
                return Ok(None);
            }
            let blank = buffer.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
            let first = buffer.get(blank).copied();
            self.consume(blank)?;
            if first.is_some() {
                return Ok(first);
            }
        }
    }

    fn bump(&mut self) -> io::Result<()> {
        self.reader.fill_buf()?;
        self.consume(1)
    }

    /// Appends the next item: up to the bracket that closes it, or, of anything but a list or an object, up to where
    /// the list goes on. `false` if the file ends in it. Stops shortly after [`MAX_RECORD_BYTES`].
    fn item(&mut self, item: &mut Vec<u8>) -> io::Result<bool> {
        let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
        loop {
            let buffer = self.reader.fill_buf()?;
            if buffer.is_empty() {
                return Ok(depth == 0 && !in_string);
            }
            let mut end = None;
            for (place, &byte) in buffer.iter().enumerate() {
                if in_string {
                    in_string = escaped || byte != b'"';
                    escaped = !escaped && byte == b'\\';
                    continue;
                }
                match byte {
                    b'"' => in_string = true,
                    b'{' | b'[' => depth += 1,
                    b'}' | b']' if depth > 0 => {
                        depth -= 1;
                        if depth == 0 {
                            end = Some(place + 1);
                        }
                    }
                    b',' | b']' if depth == 0 => end = Some(place),
                    _ => {}
                }
                if end.is_some() {
                    break;
                }
            }
            let length = end.unwrap_or(buffer.len());
            item.extend_from_slice(&buffer[..length]);
            self.consume(length)?;
            if end.is_some() || item.len() > MAX_RECORD_BYTES {
                return Ok(true);
            }
        }
    }
}
