//! How much the cache may hold: above its limit, the files that no command asked for the longest go first.
//!
//! When a file was last asked for is its time of modification, which every use sets anew: times of access are not kept on
//! many systems. Whoever has pairs of a file holds a shared lock on it, and only a file that can be locked alone is removed.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::config::MemoryLimit;
use crate::config::value::OptionValue;
use crate::data::reference_cache::open_own_file;
use crate::{Error, Result};

/// The environment variable with the limit: a size such as `50GiB`, or `off`.
pub const CACHE_LIMIT: &str = "MMPO_FAST_CACHE_LIMIT";
/// Bytes that a cache may hold where [`CACHE_LIMIT`] is not set: about 5 million pairs of a thousand tokens each.
const DEFAULT: u64 = 20 << 30;
/// The end of the names of files of pairs.
pub(super) const EXTENSION: &str = "pairs";
/// Digits of a key in a file's name.
pub(super) const DIGITS: usize = 32;

/// Bytes that [`CACHE_LIMIT`] allows; `None` where it is `off`.
///
/// # Errors
/// [`Error::Config`] for anything else that is no size.
pub(super) fn from_environment() -> Result<Option<u64>> {
    let Some(text) = std::env::var_os(CACHE_LIMIT).filter(|text| !text.is_empty()) else {
        return Ok(Some(DEFAULT));
    };
    parse(&text.to_string_lossy())
}

fn parse(text: &str) -> Result<Option<u64>> {
    if text.trim() == "off" {
        return Ok(None);
    }
    match MemoryLimit::from_text(text) {
        Ok(MemoryLimit::Bytes(bytes)) => Ok(Some(bytes as u64)),
        Ok(MemoryLimit::Auto) | Err(_) => Err(Error::config(
            format!("the environment variable `{CACHE_LIMIT}` is no size: `{text}`"),
            "set it to a size such as 50GiB, 22.5GB or 800MB, or to `off` for a cache without a limit",
        )),
    }
}

/// Marks `file` as in use for as long as it is open, and as used now. Where the system refuses one of them, pairs are read all
/// the same: at worst the file is removed earlier, and a file that is mapped keeps its bytes when it is removed.
pub(super) fn note_use(file: &File) {
    let _ = file.try_lock_shared();
    let _ = file.set_modified(SystemTime::now());
}

/// A file of the cache.
struct Kept {
    path: PathBuf,
    bytes: u64,
    used: SystemTime,
}

/// Removes files of `folder` until they have at most `limit` bytes together: those that were not used for the longest first,
/// never `newest`, one in use, or a file that this cache did not make. Says what it removed.
pub(super) fn enforce(folder: &Path, limit: u64, newest: &Path) {
    let mut kept = list(folder);
    kept.sort_by(|one, other| (one.used, &one.path).cmp(&(other.used, &other.path)));
    let mut total: u64 = kept.iter().map(|file| file.bytes).sum();
    let (mut files, mut bytes) = (0, 0);
    for file in kept.iter().filter(|file| file.path != newest) {
        if total <= limit {
            break;
        }
        if remove_unused(&file.path) {
            (files, bytes, total) = (files + 1, bytes + file.bytes, total - file.bytes);
        }
    }
    if files > 0 {
        let plural = if files == 1 { "" } else { "s" };
        tracing::info!(
            "{}: {files} file{plural} of tokenised pairs ({}), unused for the longest, removed: the cache may hold {} \
             ({CACHE_LIMIT})",
            folder.display(),
            size(bytes),
            size(limit)
        );
    }
    if total > limit {
        tracing::info!(
            "{}: {} of tokenised pairs are in use, more than the {} that the cache may hold ({CACHE_LIMIT})",
            folder.display(),
            size(total),
            size(limit)
        );
    }
}

/// The files of pairs in a folder. What cannot be read is left alone.
fn list(folder: &Path) -> Vec<Kept> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let entry = |entry: std::fs::DirEntry| {
        let (path, metadata) = (entry.path(), entry.metadata().ok()?);
        let used = metadata.modified().ok()?;
        (is_ours(&path) && metadata.is_file()).then_some(Kept { path, bytes: metadata.len(), used })
    };
    entries.flatten().filter_map(entry).collect()
}

fn is_ours(path: &Path) -> bool {
    let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    path.extension().is_some_and(|end| end == EXTENSION)
        && stem.len() == DIGITS
        && stem.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
}

/// Removes a file unless somebody uses it; returns whether it is gone. Where the system cannot say, it stays.
fn remove_unused(path: &Path) -> bool {
    let Ok(Some(file)) = open_own_file(path) else { return false };
    // Held until it is removed. Whoever opens it in between reads it to the end all the same.
    file.try_lock().is_ok() && std::fs::remove_file(path).is_ok()
}

fn size(bytes: u64) -> String {
    match bytes {
        0..0x10_0000 => format!("{bytes} bytes"),
        0x10_0000..0x4000_0000 => format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20)),
        _ => format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_a_size_or_off() {
        assert_eq!(parse("50GiB").unwrap(), Some(50 << 30));
        assert_eq!(parse(" off ").unwrap(), None);
        for text in ["auto", "50", "-1GB", "0GB", "none", "1e300GB"] {
            let error = parse(text).unwrap_err();
            let said = error.to_string();
            assert!(said.contains(CACHE_LIMIT) && said.contains(&format!("`{text}`")), "{said}");
            assert_eq!(error.exit_code(), 2);
        }
        assert_eq!([size(7), size(3 << 20), size(5 << 29)], ["7 bytes", "3.0 MiB", "2.5 GiB"]);
    }

    #[test]
    fn files_of_other_names_are_not_ours() {
        let name = format!("{}.{EXTENSION}", "0a".repeat(DIGITS / 2));
        assert!(is_ours(Path::new(&name)));
        for other in [name.to_uppercase(), format!("a{name}"), format!("{name}.txt"), "x.pairs".into()] {
            assert!(!is_ours(Path::new(&other)), "{other}");
        }
    }
}
