//! A checkpoint that the processes of a run write together, each its own part.
//!
//! The first process begins the folder under a temporary name. Every other one writes a file with its part there, and, when that is
//! on the disk, a note beside it with the file's checksum, or with what went wrong. The first one waits for all notes, writes the
//! state and all checksums, and puts the folder in its place. Until then the checkpoint does not exist.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use blake3::Hash;

use super::atomic::{self, AtomicFolder};
use super::run_state::{self, RunState, part_name};
use super::tensor_writer::{StoredTensor, write_tensors};
use crate::error::{Error, Result};

/// In every part, so that one without tensors has a header that can be read.
const METADATA: [(&str, &str); 1] = [("part_of", "checkpoint")];
/// What is added to a part's name for its note.
const NOTE: &str = ".note";
/// The first word of a note that says what went wrong.
const FAILED: &str = "failed: ";
/// Seconds without a byte more in the folder after which a missing part is given up.
const PATIENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(20);

/// A process among those that write a checkpoint.
#[derive(Clone, Copy, Debug)]
pub struct Writer {
    /// From 0; the first one puts the folder in its place.
    pub number: usize,
    /// How many there are.
    pub count: usize,
}

/// A checkpoint that this process has begun, for all of them.
#[derive(Debug)]
pub struct Begun {
    folder: AtomicFolder,
    target: PathBuf,
}

/// Begins the checkpoint of `state` in the run's folder. Its number, which the other processes need, is this process's id.
///
/// # Errors
/// As [`run_state::save_checkpoint`].
pub fn begin(run: &Path, state: &RunState) -> Result<Begun> {
    let target = run_state::folder_of(run, state.step as usize);
    Ok(Begun { folder: run_state::begin(run, state)?, target })
}

/// Writes the part of a process that is not the first, into the folder that process `first_id` has begun.
///
/// # Errors
/// Those of `fill` and of the disk, of which the first process is told.
pub fn write_part(
    run: &Path,
    state: &RunState,
    (writer, first_id): (Writer, u32),
    tensors: &[StoredTensor],
    fill: impl FnMut(&StoredTensor, usize, &mut [u8]) -> Result<()>,
) -> Result<()> {
    let target = run_state::folder_of(run, state.step as usize);
    // The first process has it from a path without links too.
    let target = fs::canonicalize(&target).unwrap_or(target);
    let unfinished = atomic::unfinished_of(&target, first_id);
    let name = part_name(writer.number, writer.count);
    let written = atomic::file_in(&unfinished, &name)
        .and_then(|file| write_tensors(file, tensors, &METADATA, fill))
        .map(|hash| hash.to_hex().to_string());
    let note = match &written {
        Ok(hash) => hash.clone(),
        Err(error) => format!("{FAILED}{error}"),
    };
    let told = leave_note(&unfinished, &name, &note);
    written.and(told)
}

/// Writes a note that is there whole or not at all.
fn leave_note(unfinished: &Path, name: &str, note: &str) -> Result<()> {
    let (hidden, path) = (format!("{name}{NOTE}.part"), unfinished.join(format!("{name}{NOTE}")));
    let mut file = atomic::file_in(unfinished, &hidden)?;
    file.write(note.as_bytes())?;
    file.finish()?;
    fs::rename(unfinished.join(hidden), &path).map_err(|error| Error::io(&path, "rename", error))
}

impl Begun {
    /// Writes the first process's part, waits for those of the others, and puts the checkpoint in its place.
    ///
    /// # Errors
    /// Those of `fill` and of the disk, and [`Error::Io`] naming a process whose part failed or did not come.
    pub fn finish(
        self,
        state: &RunState,
        count: usize,
        tensors: &[StoredTensor],
        fill: impl FnMut(&StoredTensor, usize, &mut [u8]) -> Result<()>,
    ) -> Result<PathBuf> {
        let names: Vec<String> = (0..count).map(|number| part_name(number, count)).collect();
        let own = write_tensors(self.folder.file(&names[0])?, tensors, &METADATA, fill)?;
        let mut hashes = vec![(names[0].as_str(), own)];
        for (number, name) in names.iter().enumerate().skip(1) {
            hashes.push((name, self.wait_for(number, name)?));
        }
        run_state::finish(self.folder, &self.target, state, Some(count), &hashes)?;
        Ok(self.target)
    }

    /// The checksum of another process's part, once it is there.
    fn wait_for(&self, number: usize, name: &str) -> Result<Hash> {
        let unfinished = self.folder.unfinished();
        let path = unfinished.join(format!("{name}{NOTE}"));
        let (mut bytes, mut since) = (0, Instant::now());
        loop {
            if let Ok(note) = fs::read_to_string(&path) {
                fs::remove_file(&path).map_err(|error| Error::io(&path, "remove", error))?;
                return Hash::from_hex(note.trim()).map_err(|_| {
                    let reason = note.strip_prefix(FAILED).unwrap_or("its note is damaged");
                    self.failed(number, reason)
                });
            }
            let now = bytes_in(unfinished);
            if now != bytes {
                (bytes, since) = (now, Instant::now());
            }
            if since.elapsed() > PATIENCE {
                return Err(self.failed(number, "nothing was written for 60 seconds"));
            }
            std::thread::sleep(PAUSE);
        }
    }

    fn failed(&self, number: usize, reason: &str) -> Error {
        let error = std::io::Error::other(format!("the part of rank {number} failed: {reason}"));
        Error::io(&self.target, "write", error)
    }
}

/// Bytes of all files of a folder so far.
fn bytes_in(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| Some(entry.metadata().ok()?.len())).sum()
}

#[cfg(test)]
mod tests {
    use safetensors::tensor::Dtype;

    use super::super::run_state::{Checkpoint, RngPosition, RunIdentity, StoredPiece, folder_of};
    use super::*;

    const WRITERS: usize = 3;
    /// What each process has of the tensor.
    const LENGTHS: [usize; WRITERS] = [4, 0, 3];

    fn state() -> RunState {
        RunState {
            step: 5,
            epoch: 0,
            pairs_seen: 0,
            rng: RngPosition::default(),
            identity: RunIdentity::default(),
        }
    }

    fn part(number: usize) -> Vec<StoredTensor> {
        match LENGTHS[number] {
            0 => Vec::new(),
            len => vec![StoredTensor::new("weight/a", Dtype::F32, &[len])],
        }
    }

    fn fill(number: usize) -> impl FnMut(&StoredTensor, usize, &mut [u8]) -> Result<()> {
        move |_, offset, bytes| {
            let before: usize = LENGTHS[..number].iter().sum();
            for (index, value) in bytemuck::cast_slice_mut::<u8, f32>(bytes).iter_mut().enumerate() {
                *value = (before + offset + index) as f32;
            }
            Ok(())
        }
    }

    /// All processes of a save, here threads of one.
    fn save(run: &Path, breaks: Option<usize>) -> Result<PathBuf> {
        let begun = begin(run, &state())?;
        let id = std::process::id();
        std::thread::scope(|scope| {
            for number in 1..WRITERS {
                scope.spawn(move || {
                    let mut fill = fill(number);
                    let fill = |tensor: &StoredTensor, offset: usize, bytes: &mut [u8]| match breaks {
                        Some(broken) if broken == number => Err(Error::numerics("not finite", "help")),
                        _ => fill(tensor, offset, bytes),
                    };
                    let writer = Writer { number, count: WRITERS };
                    let written = write_part(run, &state(), (writer, id), &part(number), fill);
                    assert_eq!(written.is_err(), breaks == Some(number), "{written:?}");
                });
            }
            begun.finish(&state(), WRITERS, &part(0), fill(0))
        })
    }

    #[test]
    fn parts_of_several_processes_are_one_tensor() {
        let run = tempfile::tempdir().unwrap();
        let path = save(run.path(), None).unwrap();
        let mut files: Vec<String> = atomic::list(&path)
            .unwrap()
            .iter()
            .map(|path| path.file_name().unwrap().to_str().unwrap().to_string())
            .collect();
        files.sort();
        let parts = (0..WRITERS).map(|number| part_name(number, WRITERS));
        let wanted: Vec<String> =
            ["B3SUMS".to_string()].into_iter().chain(parts).chain(["state.json".to_string()]).collect();
        assert_eq!(files, wanted, "no note is left");
        let checkpoint = Checkpoint::open(&path).unwrap();
        assert_eq!(checkpoint.state(), &state());
        checkpoint.check_tensors(&[StoredTensor::new("weight/a", Dtype::F32, &[7])]).unwrap();
        assert!(checkpoint.check_tensors(&[StoredTensor::new("weight/a", Dtype::F32, &[8])]).is_err());
        assert!(checkpoint.check_tensors(&[]).is_err(), "more than the model has");
        let read = |range: std::ops::Range<usize>| -> Vec<f32> {
            let pieces = checkpoint.pieces("weight/a", Dtype::F32, &[7], range.clone()).unwrap();
            let mut values = vec![f32::NAN; range.len()];
            for StoredPiece { first, bytes } in pieces {
                let start = first - range.start;
                values[start..start + bytes.len() / 4].copy_from_slice(bytemuck::cast_slice(bytes));
            }
            values
        };
        assert_eq!(read(0..7), [0., 1., 2., 3., 4., 5., 6.]);
        assert_eq!(read(2..5), [2., 3., 4.]);
        assert_eq!(read(5..7), [5., 6.]);
        // A flipped byte of any part is found.
        let file = path.join(part_name(2, WRITERS));
        let mut bytes = fs::read(&file).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&file, bytes).unwrap();
        assert!(Checkpoint::open(&path).unwrap_err().to_string().contains(&part_name(2, WRITERS)));
    }

    #[test]
    fn a_part_that_fails_leaves_no_checkpoint_and_names_its_rank() {
        let run = tempfile::tempdir().unwrap();
        let error = save(run.path(), Some(2)).unwrap_err().to_string();
        assert!(error.contains("rank 2") && error.contains("not finite"), "{error}");
        assert!(!folder_of(run.path(), 5).exists());
        let left = atomic::list(&run.path().join("checkpoints")).unwrap();
        assert!(left.is_empty(), "{left:?}");
        save(run.path(), None).unwrap();
    }
}
