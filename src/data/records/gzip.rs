//! A gzip stream as files have it: one member or several, and zeros after the last one.

use std::io::{self, BufRead, Read};

use flate2::bufread::GzDecoder;

/// Reads all members. Zeros after a member are padding, as `gzip` and Python's `gzip` have it (tapes and some stores
/// fill up their blocks); anything else there is an error.
pub(super) struct Gzip<R> {
    decoder: Option<GzDecoder<R>>,
}

impl<R: BufRead> Gzip<R> {
    pub fn new(reader: R) -> Self {
        Gzip { decoder: Some(GzDecoder::new(reader)) }
    }
}

impl<R: BufRead> Read for Gzip<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let Some(decoder) = &mut self.decoder else { return Ok(0) };
            let read = decoder.read(buffer)?;
            if read > 0 || buffer.is_empty() {
                return Ok(read);
            }
            let inner = self.decoder.take().map(GzDecoder::into_inner);
            self.decoder = inner.map(next_member).transpose()?.flatten();
        }
    }
}

/// The decoder of the member that follows, if one does.
fn next_member<R: BufRead>(mut reader: R) -> io::Result<Option<GzDecoder<R>>> {
    loop {
        let buffer = reader.fill_buf()?;
        let Some(&first) = buffer.first() else { return Ok(None) };
        let zeros = buffer.iter().take_while(|&&byte| byte == 0).count();
        if zeros == 0 {
            return match first {
                0x1f => Ok(Some(GzDecoder::new(reader))),
                _ => Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "the bytes after its end are neither gzip nor zeros",
                )),
            };
        }
        reader.consume(zeros);
    }
}
