//! What a file really is, told from its first bytes: people give a git-lfs pointer, an archive or a page of HTML where
//! the program reads weights, a tokenizer, a config or pairs, and the error of a parser would not tell them so.

pub mod folder;
pub mod hub;
pub mod json;

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::error::{Error, Result};

/// The number of bytes that [`recognise`] looks at.
pub const START: usize = 512;

/// A kind of file that this program does not read, or does not read in that place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Foreign {
    /// An empty file.
    Empty,
    /// The text that git keeps in place of a large file.
    LfsPointer,
    /// A model of llama.cpp.
    Gguf,
    /// A safetensors file.
    Safetensors,
    /// A ZIP archive; `torch.save` writes one.
    Zip,
    /// Python's pickle, as `torch.save` wrote it before ZIP archives.
    Pickle,
    /// An HDF5 file; Keras saves one.
    Hdf5,
    /// A numpy array.
    Numpy,
    /// A Parquet file.
    Parquet,
    /// Arrow's file format (Feather version 2).
    Arrow,
    /// A gzip stream.
    Gzip,
    /// A Zstandard stream.
    Zstandard,
    /// An xz stream.
    Xz,
    /// A bzip2 stream.
    Bzip2,
    /// A 7-Zip archive.
    SevenZip,
    /// A tar archive.
    Tar,
    /// An SQLite database.
    Sqlite,
    /// A PDF document.
    Pdf,
    /// Text in UTF-16.
    Utf16,
    /// Text in UTF-32.
    Utf32,
    /// A web page: what a failed download saves.
    Html,
}

/// What a file that begins with `start` is; `None` for JSON, other plain text and everything unknown. Give
/// [`START`] bytes, or all of a shorter file.
pub fn recognise(start: &[u8]) -> Option<Foreign> {
    const PREFIXES: [(&[u8], Foreign); 17] = [
        (b"version https://git-lfs.github.com/", Foreign::LfsPointer),
        (b"version https://hawser.github.com/", Foreign::LfsPointer),
        (b"GGUF", Foreign::Gguf),
        (b"PK\x03\x04", Foreign::Zip),
        (b"PK\x05\x06", Foreign::Zip),
        (b"\x89HDF\r\n\x1a\n", Foreign::Hdf5),
        (b"\x93NUMPY", Foreign::Numpy),
        (b"PAR1", Foreign::Parquet),
        (b"ARROW1", Foreign::Arrow),
        (b"\x1f\x8b", Foreign::Gzip),
        (b"\x28\xb5\x2f\xfd", Foreign::Zstandard),
        (b"\xfd7zXZ\x00", Foreign::Xz),
        (b"BZh", Foreign::Bzip2),
        (b"7z\xbc\xaf\x27\x1c", Foreign::SevenZip),
        (b"SQLite format 3\x00", Foreign::Sqlite),
        (b"%PDF-", Foreign::Pdf),
        // UTF-32 in little-endian order begins with UTF-16's mark, so that it comes first.
        (b"\xff\xfe\x00\x00", Foreign::Utf32),
    ];
    if start.is_empty() {
        return Some(Foreign::Empty);
    }
    if let Some((_, kind)) = PREFIXES.iter().find(|(prefix, _)| start.starts_with(prefix)) {
        return Some(*kind);
    }
    match start {
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => Some(Foreign::Utf16),
        [0, 0, 0xfe, 0xff, ..] => Some(Foreign::Utf32),
        // Pickle's protocol mark, then its protocol, 2 to 5.
        [0x80, 2..=5, ..] => Some(Foreign::Pickle),
        // A safetensors header: its length in 8 bytes, then a JSON object.
        [_, _, _, _, _, 0, 0, 0, b'{', b'"' | b'}' | b' ', ..] => Some(Foreign::Safetensors),
        _ if start.get(257..262) == Some(b"ustar") => Some(Foreign::Tar),
        _ => text_without_a_mark(start),
    }
}

/// Web pages, and UTF-16 whose first bytes say nothing: ASCII text has a zero in every other byte there.
fn text_without_a_mark(start: &[u8]) -> Option<Foreign> {
    let trimmed = start.trim_ascii_start();
    let begins = |tag: &[u8]| trimmed.get(..tag.len()).is_some_and(|head| head.eq_ignore_ascii_case(tag));
    if begins(b"<!doctype html") || begins(b"<html") {
        return Some(Foreign::Html);
    }
    match start {
        [0, low, 0, next, ..] | [low, 0, next, 0, ..] if *low > 0 && *next > 0 => Some(Foreign::Utf16),
        _ => None,
    }
}

/// [`recognise`] of the file at `path`; `None` also where it cannot be read or is no plain file.
pub fn recognise_file(path: &Path) -> Option<Foreign> {
    // Opening a FIFO would wait for its writer.
    if !path.is_file() {
        return None;
    }
    let mut start = Vec::with_capacity(START);
    File::open(path).ok()?.take(START as u64).read_to_end(&mut start).ok()?;
    recognise(&start)
}

/// Refuses a file of a model folder whose content `bytes` is another kind of file than `wanted`, such as
/// "the tokenizer".
///
/// # Errors
/// [`Error::Model`] that says what the file is and how to get the right one.
pub fn refuse(path: &Path, bytes: &[u8], wanted: &str) -> Result<()> {
    match recognise(&bytes[..bytes.len().min(START)]) {
        Some(kind) => Err(Error::model(path, format!("this is {}, not {wanted}", kind.name()), kind.help())),
        None => Ok(()),
    }
}

/// The UTF-8 text of a file of a model folder, without a byte order mark; `wanted` as in [`refuse`].
///
/// # Errors
/// [`Error::Io`] where it cannot be read, [`Error::Model`] where it is something else or no UTF-8.
pub fn read_text(path: &Path, wanted: &str) -> Result<String> {
    let bytes = std::fs::read(path).map_err(|error| Error::io(path, "read", error))?;
    refuse(path, &bytes, wanted)?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        Error::model(path, format!("is not UTF-8 at byte {at}"), "download or copy the file again")
    })?;
    Ok(match text.strip_prefix('\u{feff}') {
        Some(rest) => rest.to_string(),
        None => text,
    })
}

impl Foreign {
    /// What the file is, to follow "this is".
    pub fn name(self) -> &'static str {
        match self {
            Foreign::Empty => "an empty file",
            Foreign::LfsPointer => {
                "a git-lfs pointer (a few lines of text in place of the real file, which was not downloaded)"
            }
            Foreign::Gguf => "a GGUF file of llama.cpp",
            Foreign::Safetensors => "a safetensors file",
            Foreign::Zip => "a ZIP archive, as torch.save writes it",
            Foreign::Pickle => "a Python pickle",
            Foreign::Hdf5 => "an HDF5 file",
            Foreign::Numpy => "a NumPy array",
            Foreign::Parquet => "a Parquet table",
            Foreign::Arrow => "an Arrow table",
            Foreign::Gzip => "a gzip file",
            Foreign::Zstandard => "a Zstandard file",
            Foreign::Xz => "an xz file",
            Foreign::Bzip2 => "a bzip2 file",
            Foreign::SevenZip => "a 7-Zip archive",
            Foreign::Tar => "a tar archive",
            Foreign::Sqlite => "an SQLite database",
            Foreign::Pdf => "a PDF document",
            Foreign::Utf16 => "text in UTF-16",
            Foreign::Utf32 => "text in UTF-32",
            Foreign::Html => "a web page, as a failed download saves it",
        }
    }

    /// How to get the file that was meant, if the advice is the same for every place.
    pub fn help(self) -> &'static str {
        match self {
            Foreign::LfsPointer => {
                "fetch the real file: run `git lfs install` and `git lfs pull` in the cloned repository, or download it again"
            }
            Foreign::Utf16 | Foreign::Utf32 => {
                "save it as UTF-8, for example with `iconv -f UTF-16 -t UTF-8`"
            }
            Foreign::Gzip => "unpack it with `gunzip`",
            Foreign::Zstandard => "unpack it with `unzstd`",
            Foreign::Xz => "unpack it with `unxz`",
            Foreign::Bzip2 => "unpack it with `bunzip2`",
            Foreign::Tar => "unpack it with `tar -xf`",
            Foreign::SevenZip => "unpack it",
            _ => "download or copy the file again",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_known_by_their_first_bytes() {
        let utf16 = |text: &str| text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
        let header = br#"{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#;
        let safetensors = [&(header.len() as u64).to_le_bytes()[..], header].concat();
        let cases: [(&[u8], Foreign); 12] = [
            (b"", Foreign::Empty),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", Foreign::LfsPointer),
            (b"GGUF\x03\x00\x00\x00", Foreign::Gguf),
            (b"PK\x03\x04rest", Foreign::Zip),
            (b"\x80\x02}q\x00", Foreign::Pickle),
            (b"PAR1\x15\x04", Foreign::Parquet),
            (b"\x28\xb5\x2f\xfd\x04", Foreign::Zstandard),
            (b"\xff\xfe{\x00", Foreign::Utf16),
            (&utf16("{\"a\": 1}"), Foreign::Utf16),
            (b"\xff\xfe\x00\x00{\x00\x00\x00", Foreign::Utf32),
            (b"\n<!DOCTYPE HTML>\n", Foreign::Html),
            (&safetensors, Foreign::Safetensors),
        ];
        for (start, kind) in cases {
            assert_eq!(recognise(start), Some(kind), "{start:?}");
            assert!(!kind.name().is_empty() && !kind.help().is_empty());
        }
    }

    #[test]
    fn json_and_plain_text_are_not_foreign() {
        for text in ["{\"a\": 1}", "[1, 2]", "{}", "prompt,chosen\n", "version 2\n", "\u{feff}{}", "<p>", "7"]
        {
            assert_eq!(recognise(text.as_bytes()), None, "{text}");
        }
    }
}
