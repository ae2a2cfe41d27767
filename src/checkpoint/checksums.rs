//! The checksums of a folder's files, in the form that `b3sum --check` reads: a line `<BLAKE3>  <name>` for each file.

use std::collections::BTreeMap;
use std::path::{Component, Path};

use blake3::Hash;

use crate::device::MappedFile;
use crate::error::{Error, Result};

/// Name of the file that holds the checksums of the others.
pub const CHECKSUMS_FILE: &str = "B3SUMS";

/// The text of [`CHECKSUMS_FILE`].
pub fn text(files: &[(&str, Hash)]) -> String {
    files.iter().map(|(name, hash)| format!("{}  {name}\n", hash.to_hex())).collect()
}

/// Makes sure that the files `names` of `folder` are those whose checksums are in it, byte for byte.
///
/// # Errors
/// [`Error::Model`] naming the first file that is not what was written; [`Error::Io`] where one cannot be read.
pub fn verify(folder: &Path, names: &[&str]) -> Result<()> {
    let sums = folder.join(CHECKSUMS_FILE);
    let recorded = std::fs::read(&sums).map_err(|error| Error::io(&sums, "read", error))?;
    let mut found = Vec::new();
    for &name in names {
        found.push((name, hash_file(&folder.join(name))?));
    }
    if recorded == text(&found).as_bytes() {
        return Ok(());
    }
    let differs = |(name, hash): &&(&str, Hash)| {
        let line = format!("{}  {name}", hash.to_hex());
        !recorded.split(|&byte| byte == b'\n').any(|recorded| recorded == line.as_bytes())
    };
    let mut differing = found.iter().filter(differs);
    let (damaged, reason) = match (differing.next(), differing.next()) {
        (Some((name, _)), None) => (
            folder.join(name),
            format!("damaged: its bytes do not have the checksum that {CHECKSUMS_FILE} holds"),
        ),
        _ => (sums, "damaged: these are not the checksums of the files beside it".to_string()),
    };
    Err(Error::model(&damaged, reason, "use another checkpoint, or a copy of this one"))
}

/// Reads what [`text`] writes, and what `b3sum` writes for names without a backslash or a line break: names, each with
/// its checksum. A name is a path within the folder.
///
/// # Errors
/// A sentence that says which line is no checksum, or names a file outside the folder.
pub fn parse(text: &str) -> std::result::Result<BTreeMap<String, Hash>, String> {
    let mut sums = BTreeMap::new();
    for (index, line) in text.lines().enumerate() {
        let wrong = |what: &str| format!("line {} of {CHECKSUMS_FILE} {what}", index + 1);
        let (hash, name) = line.split_once("  ").ok_or_else(|| wrong("is no checksum and name"))?;
        let hash = Hash::from_hex(hash).map_err(|_| wrong("does not begin with a BLAKE3 checksum"))?;
        let is_within = Path::new(name).components().all(|part| matches!(part, Component::Normal(_)));
        if name.is_empty() || !is_within {
            return Err(wrong("names no file of its folder"));
        }
        if sums.insert(name.to_string(), hash).is_some() {
            return Err(wrong("names a file for the second time"));
        }
    }
    Ok(sums)
}

/// The BLAKE3 of a file's bytes, computed on all threads.
///
/// # Errors
/// [`Error::Io`] where it cannot be read.
pub fn hash_file(path: &Path) -> Result<Hash> {
    let map = MappedFile::open(path)?;
    Ok(blake3::Hasher::new().update_rayon(&map).finalize())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_bit_is_found_and_its_file_named() {
        let folder = tempfile::tempdir().unwrap();
        let files = [("one", b"state".as_slice()), ("two", b"weights")];
        let hashes = files.map(|(name, bytes)| (name, blake3::hash(bytes)));
        let files = [files[0], files[1], (CHECKSUMS_FILE, text(&hashes).leak().as_bytes())];
        let write = |name: &str, bytes: &[u8]| std::fs::write(folder.path().join(name), bytes).unwrap();
        files.iter().for_each(|(name, bytes)| write(name, bytes));
        verify(folder.path(), &["one", "two"]).unwrap();
        for (name, bytes) in files {
            for bit in 0..8 * bytes.len() {
                let mut damaged = bytes.to_vec();
                damaged[bit / 8] ^= 1 << (bit % 8);
                write(name, &damaged);
                let error = verify(folder.path(), &["one", "two"]).unwrap_err().to_string();
                assert!(error.contains("damaged"), "bit {bit} of {name}: {error}");
                if name != CHECKSUMS_FILE {
                    assert!(error.contains(&format!("/{name}: ")), "bit {bit} of {name}: {error}");
                }
            }
            write(name, &bytes[..bytes.len() - 1]);
            assert!(verify(folder.path(), &["one", "two"]).is_err(), "{name} cut short");
            write(name, bytes);
        }
    }

    #[test]
    fn what_is_written_is_read_and_nothing_outside_the_folder_is_named() {
        let hash = blake3::hash(b"weights");
        let sums = parse(&text(&[("model/a b.safetensors", hash), ("state.json", hash)])).unwrap();
        assert_eq!(sums.keys().collect::<Vec<_>>(), ["model/a b.safetensors", "state.json"]);
        assert_eq!(sums["state.json"], hash);
        let line = |name: &str| format!("{}  {name}\n", hash.to_hex());
        for (broken, part) in [
            (line("../elsewhere"), "line 1 of B3SUMS names no file of its folder"),
            (line("/etc/passwd"), "names no file of its folder"),
            (line(""), "names no file of its folder"),
            (line("a") + &line("a"), "line 2 of B3SUMS names a file for the second time"),
            ("state.json\n".to_string(), "is no checksum and name"),
            ("abc  state.json\n".to_string(), "does not begin with a BLAKE3 checksum"),
        ] {
            let problem = parse(&broken).unwrap_err();
            assert!(problem.contains(part), "{broken:?}: {problem}");
        }
    }

    #[test]
    fn b3sum_would_read_it() {
        // The checksum of no bytes, from the BLAKE3 test vectors.
        let empty = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262";
        assert_eq!(text(&[("state.json", blake3::hash(b""))]), format!("{empty}  state.json\n"));
    }
}
