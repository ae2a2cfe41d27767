//! Folders that runs share, and how fast their disk is.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rustix::fs::{Advice, fadvise, statvfs};

use super::{Finding, bytes};
use crate::data::cache_folder;
use crate::error::{Error, Result};
use crate::foreign::hub;

/// Bytes that are written and read: enough for a second of a slow network disk, and a blink of a fast one.
const TRIAL_BYTES: usize = 64 << 20;
/// A block of the trial.
const BLOCK_BYTES: usize = 1 << 20;
/// Free space below which nothing is tried.
const LEAST_FREE: u64 = 4 * TRIAL_BYTES as u64;
/// Bytes per second below which checkpoints are worth planning for.
const SLOW: f64 = 100e6;
/// Bytes per parameter of a checkpoint: an f32 weight and two moments.
const CHECKPOINT_BYTES: f64 = 12.0;

/// The cache of reference log-probs, or the folder that was asked for, with its disk's speed; and the Hugging Face cache.
pub(super) fn findings(folder: Option<&Path>) -> Vec<Finding> {
    let disk = match (folder.map(Path::to_path_buf), cache_folder()) {
        // A folder that is named is not made: one that is not there is a mistake in the path, or a disk that is not mounted.
        (Some(folder), _) => match fs::read_dir(&folder) {
            Ok(_) => disk("disk", &folder),
            Err(cause) => Finding::from_error("disk", &Error::io(&folder, "read", cause))
                .with("folder", folder.display().to_string()),
        },
        (None, Some(cache)) => disk("cache", &cache),
        (None, None) => Finding::lack(
            "cache",
            "none: neither MMPO_FAST_CACHE nor XDG_CACHE_HOME nor HOME is set, so reference log-probs stay with each run",
            "set MMPO_FAST_CACHE to a folder that runs share",
        ),
    };
    vec![disk, hub_cache()]
}

fn disk(name: &'static str, folder: &Path) -> Finding {
    match timed(folder) {
        Ok(Trial::Full { free }) => Finding::lack(
            name,
            format!("{}: {} free, too little to time the disk", folder.display(), bytes(free)),
            "free some space, or set MMPO_FAST_CACHE to a folder on another disk",
        )
        .with("folder", folder.display().to_string())
        .with("free_bytes", free),
        Ok(Trial::Timed(speed)) => told(name, folder, &speed),
        Err(error) => Finding::from_error(name, &error).with("folder", folder.display().to_string()),
    }
}

/// Speed of a disk in bytes per second, and its free bytes.
struct Speed {
    written: f64,
    read: f64,
    free: u64,
}

enum Trial {
    Full { free: u64 },
    Timed(Speed),
}

fn told(name: &'static str, folder: &Path, speed: &Speed) -> Finding {
    let Speed { written, read, free } = *speed;
    let found = format!(
        "{}: writes {:.0} MB/s, reads {:.0} MB/s, {} free",
        folder.display(),
        written / 1e6,
        read / 1e6,
        bytes(free)
    );
    let finding = if written < SLOW {
        let seconds = 1e9 * CHECKPOINT_BYTES / written;
        let advice = format!(
            "a checkpoint of a model with a billion parameters takes {seconds:.0} s here: put --output on a faster disk, or save more seldom (--save-steps)"
        );
        Finding::lack(name, found, advice)
    } else {
        Finding::good(name, found)
    };
    finding
        .with("folder", folder.display().to_string())
        .with("write_bytes_per_second", written.round())
        .with("read_bytes_per_second", read.round())
        .with("free_bytes", free)
}

/// Writes a file that is gone afterwards, and reads it from the disk again.
fn timed(folder: &Path) -> Result<Trial> {
    fs::create_dir_all(folder).map_err(|cause| Error::io(folder, "create", cause))?;
    let free = statvfs(folder).map_err(|code| Error::io(folder, "read", code.into()))?;
    let free = free.f_bavail.saturating_mul(free.f_frsize);
    if free < LEAST_FREE {
        return Ok(Trial::Full { free });
    }
    let failed = |action| move |cause| Error::io(folder, action, cause);
    let file = tempfile::NamedTempFile::new_in(folder).map_err(failed("write"))?;
    // What cannot be compressed: some disks would store zeros in no time.
    let mut block = vec![0; BLOCK_BYTES];
    ChaCha8Rng::seed_from_u64(42).fill_bytes(&mut block);
    let blocks = TRIAL_BYTES / BLOCK_BYTES;

    let started = Instant::now();
    for _ in 0..blocks {
        file.as_file().write_all(&block).map_err(failed("write"))?;
    }
    file.as_file().sync_all().map_err(failed("sync"))?;
    let written = TRIAL_BYTES as f64 / started.elapsed().as_secs_f64();

    let mut again = File::open(file.path()).map_err(failed("read"))?;
    // Or the system would hand out its copy in memory. A file system that ignores this reads at the speed of memory.
    let _ = fadvise(&again, 0, None, Advice::DontNeed);
    let started = Instant::now();
    for _ in 0..blocks {
        again.read_exact(&mut block).map_err(failed("read"))?;
    }
    let read = TRIAL_BYTES as f64 / started.elapsed().as_secs_f64();
    Ok(Trial::Timed(Speed { written, read, free }))
}

/// What the Hugging Face cache on this disk holds.
pub(super) fn hub_cache() -> Finding {
    told_hub(&hub::cache())
}

fn told_hub(folder: &Path) -> Finding {
    let shown = folder.display();
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(_) if !folder.exists() => {
            return Finding::note(
                "hub",
                format!("{shown}: not there; names such as org/name are found once `hf download org/name` has filled it"),
            )
            .with("folder", shown.to_string());
        }
        Err(cause) => return Finding::from_error("hub", &Error::io(folder, "read", cause)),
    };
    let paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    let count = |prefix: &str| {
        let begins =
            |path: &&PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix));
        paths.iter().filter(begins).count()
    };
    let (models, data_sets) = (count("models--"), count("datasets--"));
    let plural = |count: usize| if count == 1 { "" } else { "s" };
    Finding::good(
        "hub",
        format!("{shown}: {models} model{}, {data_sets} data set{}", plural(models), plural(data_sets)),
    )
    .with("folder", shown.to_string())
    .with("models", models)
    .with("data_sets", data_sets)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_disk_is_a_lack_that_says_what_a_checkpoint_takes() {
        let fast = Speed { written: 1e9, read: 2e9, free: 1 << 33 };
        let finding = told("cache", Path::new("/c"), &fast);
        assert_eq!(finding.found, "/c: writes 1000 MB/s, reads 2000 MB/s, 8.0 GiB free");
        assert_eq!(finding.advice, None);
        let slow = told("cache", Path::new("/c"), &Speed { written: 50e6, ..fast });
        assert!(slow.advice.as_deref().unwrap_or_default().contains("takes 240 s"), "{slow:?}");
    }

    #[test]
    fn the_trial_leaves_nothing_and_a_folder_that_cannot_be_made_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("cache");
        assert!(matches!(timed(&inner), Ok(Trial::Timed(speed)) if speed.written > 0.0 && speed.read > 0.0));
        assert_eq!(fs::read_dir(&inner).unwrap().count(), 0);
        fs::write(folder.path().join("file"), "").unwrap();
        let finding = disk("disk", &folder.path().join("file/cache"));
        assert!(finding.found.contains("cannot create") && finding.advice.is_some(), "{finding:?}");
        let mistyped = folder.path().join("scrach");
        let finding = findings(Some(&mistyped)).remove(0);
        assert!(finding.found.contains("cannot read") && finding.advice.is_some(), "{finding:?}");
        assert!(!mistyped.exists(), "a folder that was only asked about is made");
    }

    #[test]
    fn the_hub_cache_is_counted() {
        let folder = tempfile::tempdir().unwrap();
        assert!(told_hub(&folder.path().join("none")).found.contains("not there"));
        for name in ["models--a--b", "models--c", "datasets--d--e", "version.txt"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        assert!(told_hub(folder.path()).found.ends_with(": 2 models, 1 data set"));
    }
}
