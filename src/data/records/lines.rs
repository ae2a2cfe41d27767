//! The lines of a file, with their places and a limit to their length.

use std::io::{BufRead, Read};
use std::path::Path;

use super::source::{MAX_RECORD_BYTES, Position, Start, read_error, too_long};
use crate::{Error, Result};

/// A line that is not blank, without its end.
#[derive(Debug)]
pub(super) struct Line {
    pub text: Vec<u8>,
    position: Position,
}

impl Line {
    pub fn start(&self, is_line: bool) -> Start {
        Start { line: self.position.line, byte: Some(self.position.byte), is_line }
    }
}

/// Reads lines that end in `\n`, `\r\n` or `\r`, as Python's text files do: JSON has none of these inside a string.
pub(super) struct Lines {
    reader: Box<dyn BufRead>,
    position: Position,
    /// Whether the last byte was `\r`: a `\n` that follows belongs to the same line end.
    after_return: bool,
}

impl Lines {
    pub fn new(reader: Box<dyn BufRead>, position: Position) -> Self {
        Lines { reader, position, after_return: false }
    }

    /// The next line that is not blank. Fails with the line's number if it has more than `limit` bytes.
    pub fn next(&mut self, path: &Path, limit: usize) -> Result<Option<Line>> {
        loop {
            let position = self.position;
            let mut text = Vec::new();
            let ended = self.read_line(&mut text, limit).map_err(|error| read_error(path, error))?;
            if text.len() > limit {
                let start = Start { line: position.line, byte: Some(position.byte), is_line: true };
                return Err(if limit == MAX_RECORD_BYTES {
                    too_long(path, position.line, start)
                } else {
                    table_too_long(path, limit)
                });
            }
            // Files that were joined from several may have their byte order marks in the middle.
            let mark = if text.starts_with(b"\xEF\xBB\xBF") { 3 } else { 0 };
            if !text[mark..].iter().all(u8::is_ascii_whitespace) {
                text.drain(..mark);
                let position = Position { byte: position.byte + mark as u64, ..position };
                return Ok(Some(Line { text, position }));
            }
            if !ended {
                return Ok(None);
            }
        }
    }

    /// Appends the rest of the file to the line that was read last.
    pub fn read_rest(mut self, path: &Path, text: &mut Vec<u8>, limit: usize) -> Result<()> {
        text.push(b'\n');
        if self.after_return && self.reader.fill_buf().is_ok_and(|buffer| buffer.first() == Some(&b'\n')) {
            self.reader.consume(1);
        }
        let room = limit.saturating_sub(text.len()) as u64;
        let mut rest = self.reader.take(room + 1);
        let read = rest.read_to_end(text).map_err(|error| read_error(path, error))?;
        if read as u64 > room { Err(table_too_long(path, limit)) } else { Ok(()) }
    }

    /// Reads a line and its end; `false` at the end of the file. Stops shortly after `limit`.
    fn read_line(&mut self, text: &mut Vec<u8>, limit: usize) -> std::io::Result<bool> {
        loop {
            let buffer = self.reader.fill_buf()?;
            if buffer.is_empty() {
                return Ok(false);
            }
            if std::mem::take(&mut self.after_return) && buffer[0] == b'\n' {
                self.reader.consume(1);
                self.position.byte += 1;
                continue;
            }
            let end = buffer.iter().position(|&byte| byte == b'\n' || byte == b'\r');
            let length = end.unwrap_or(buffer.len());
            text.extend_from_slice(&buffer[..length]);
            self.after_return = end.is_some_and(|end| buffer[end] == b'\r');
            let read = length + usize::from(end.is_some());
            self.reader.consume(read);
            self.position.byte += read as u64;
            if end.is_some() {
                self.position.line += 1;
                return Ok(true);
            }
            if text.len() > limit {
                return Ok(true);
            }
        }
    }
}

fn table_too_long(path: &Path, limit: usize) -> Error {
    Error::data(
        path,
        None,
        format!(
            "a file that is one JSON object is held in memory, and this one is longer than {} MiB",
            limit >> 20
        ),
        "write it as JSON Lines, one record per line",
    )
}
