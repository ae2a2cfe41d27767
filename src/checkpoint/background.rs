//! Saves that run beside the work that comes after them, from a snapshot in the host's memory.

use std::thread::JoinHandle;

use crate::checkpoint::tensor_writer::{PIECE_VALUES, StoredTensor};
use crate::error::{Error, Result};
use crate::host_memory::HostMemory;

/// At most one save at a time, in a thread of its own. Dropped, it waits for that one.
#[derive(Debug, Default)]
pub struct BackgroundSaves {
    running: Option<JoinHandle<Result<()>>>,
    /// Processes of this machine that save at the same time; 0 counts as 1.
    processes: usize,
}

impl BackgroundSaves {
    /// The saves of one of `processes` ranks on this machine, all of which save their parts at the same time.
    pub fn of_ranks(processes: usize) -> Self {
        BackgroundSaves { running: None, processes }
    }

    /// Processes of this machine that save their parts at the same time, at least 1.
    pub fn processes(&self) -> usize {
        self.processes.max(1)
    }

    /// Waits for the save before, then starts `save` and returns.
    ///
    /// # Errors
    /// That of the save before; [`Error::Device`] where the system starts no thread.
    pub fn start(&mut self, save: impl FnOnce() -> Result<()> + Send + 'static) -> Result<()> {
        self.wait()?;
        let started = std::thread::Builder::new().name("save".into()).spawn(save);
        let running = started.map_err(|error| {
            Error::device(
                format!("no thread can be started to save: {error}"),
                "raise the limit of processes (`ulimit -u`)",
            )
        })?;
        self.running = Some(running);
        Ok(())
    }

    /// Whether a save has ended since it was last asked for; does not wait for one that has not.
    ///
    /// # Errors
    /// That of the save.
    pub fn check(&mut self) -> Result<bool> {
        match &self.running {
            Some(running) if running.is_finished() => self.wait().map(|()| true),
            _ => Ok(false),
        }
    }

    /// Waits until nothing is being saved.
    ///
    /// # Errors
    /// That of the save.
    pub fn wait(&mut self) -> Result<()> {
        let Some(running) = self.running.take() else { return Ok(()) };
        running.join().unwrap_or_else(|_| Err(Error::bug("the thread that saves a checkpoint panicked")))
    }
}

impl Drop for BackgroundSaves {
    fn drop(&mut self) {
        // The run ends for another reason, which is the one that is returned.
        if let Err(error) = self.wait() {
            tracing::error!("{error}");
        }
    }
}

/// Stored tensors with their values, in the host's memory.
#[derive(Debug)]
pub struct Snapshot {
    /// u64 storage: aligned for every dtype.
    tensors: Vec<(StoredTensor, Vec<u64>)>,
}

impl Snapshot {
    /// The values of `tensors`, as `fill` gives them: that of [`super::tensor_writer::write_tensors`].
    ///
    /// # Errors
    /// Those of `fill`.
    pub fn take(
        tensors: &[StoredTensor],
        mut fill: impl FnMut(&StoredTensor, usize, &mut [u8]) -> Result<()>,
    ) -> Result<Self> {
        let filled = tensors.iter().map(|tensor| {
            let mut values = vec![0_u64; tensor.bytes().div_ceil(8)];
            let bytes = &mut bytemuck::cast_slice_mut(&mut values)[..tensor.bytes()];
            let size = tensor.bytes() / tensor.values().max(1);
            for (piece, bytes) in bytes.chunks_mut((PIECE_VALUES * size).max(1)).enumerate() {
                fill(tensor, piece * PIECE_VALUES, bytes)?;
            }
            Ok((tensor.clone(), values))
        });
        Ok(Snapshot { tensors: filled.collect::<Result<_>>()? })
    }

    /// Copies values of a tensor from row-major index `offset` on.
    ///
    /// # Errors
    /// [`Error::Bug`] for a tensor that is not in the snapshot.
    pub fn fill(&self, tensor: &StoredTensor, offset: usize, out: &mut [u8]) -> Result<()> {
        let found = self.tensors.iter().find(|(other, _)| other.name == tensor.name);
        let (_, values) = found.ok_or_else(|| Error::bug(format!("no `{}` in the snapshot", tensor.name)))?;
        let start = offset * (tensor.bytes() / tensor.values().max(1));
        out.copy_from_slice(&bytemuck::cast_slice(values)[start..start + out.len()]);
        Ok(())
    }
}

/// Whether the host can hold a copy of as much as `tensors` for each of `processes`, and keep as much memory again for everything
/// else. Where the system does not say what is free, it can.
pub fn fits_in_memory(tensors: &[StoredTensor], processes: usize) -> bool {
    let each: u64 = tensors.iter().map(|tensor| tensor.bytes() as u64).sum();
    let needed = each.saturating_mul(processes as u64);
    HostMemory::read().is_none_or(|memory| needed <= memory.available as u64 / 2)
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::mpsc;

    use safetensors::tensor::Dtype;

    use super::*;

    fn disk_full() -> Error {
        Error::io(Path::new("state"), "write", std::io::Error::from_raw_os_error(28))
    }

    /// The caller goes on while a save waits for its disk, and the next save waits for it.
    #[test]
    fn a_save_runs_beside_what_comes_after_it() {
        let (go, wait) = mpsc::channel::<()>();
        let (say, said) = mpsc::channel();
        let mut saves = BackgroundSaves::default();
        let first = say.clone();
        saves
            .start(move || {
                wait.recv().unwrap();
                first.send(1).unwrap();
                Ok(())
            })
            .unwrap();
        // Returned although the save cannot end.
        assert!(!saves.check().unwrap());
        assert!(said.try_recv().is_err());
        go.send(()).unwrap();
        saves
            .start(move || {
                say.send(2).unwrap();
                Ok(())
            })
            .unwrap();
        drop(saves);
        assert_eq!(said.iter().collect::<Vec<_>>(), [1, 2]);
    }

    /// A full disk reaches whoever asks next, once, with its own class of error.
    #[test]
    fn an_error_of_the_thread_is_returned() {
        let mut saves = BackgroundSaves::default();
        saves.start(|| Err(disk_full())).unwrap();
        let error = saves.wait().unwrap_err();
        assert_eq!(error.exit_code(), disk_full().exit_code(), "{error}");
        saves.wait().unwrap();
        saves.start(|| Err(disk_full())).unwrap();
        let error = loop {
            match saves.check() {
                Ok(_) => std::thread::yield_now(),
                Err(error) => break error,
            }
        };
        assert!(error.to_string().contains("state"), "{error}");
        saves.start(|| Err(disk_full())).unwrap();
        assert!(saves.start(|| Ok(())).is_err(), "the next save reports it too");
        saves.start(|| panic!("on purpose")).unwrap();
        assert!(saves.wait().unwrap_err().to_string().contains("panicked"));
    }

    #[test]
    fn a_snapshot_gives_back_what_it_was_given() {
        let tensors = [StoredTensor::new("a", Dtype::F32, &[3]), StoredTensor::new("b", Dtype::U8, &[5])];
        let value = |tensor: &StoredTensor, index: usize| (tensor.name.len() * 7 + index) as u8;
        let snapshot = Snapshot::take(&tensors, |tensor, offset, bytes| {
            let size = tensor.bytes() / tensor.values();
            for (index, byte) in bytes.iter_mut().enumerate() {
                *byte = value(tensor, offset * size + index);
            }
            Ok(())
        })
        .unwrap();
        let mut bytes = [0; 8];
        snapshot.fill(&tensors[0], 1, &mut bytes).unwrap();
        assert_eq!(bytes, [4, 5, 6, 7, 8, 9, 10, 11].map(|index| value(&tensors[0], index)));
        let mut bytes = [0; 2];
        snapshot.fill(&tensors[1], 3, &mut bytes).unwrap();
        assert_eq!(bytes, [3, 4].map(|index| value(&tensors[1], index)));
        assert!(snapshot.fill(&StoredTensor::new("c", Dtype::U8, &[1]), 0, &mut [0]).is_err());
        assert!(fits_in_memory(&tensors, 1));
        assert!(!fits_in_memory(&[StoredTensor::new("d", Dtype::F32, &[1 << 50])], 1));
    }

    /// Eight ranks of a machine that save their parts copy eight times as much as one of them.
    #[test]
    fn all_ranks_of_a_machine_share_its_memory() {
        let Some(memory) = HostMemory::read() else { return };
        let part = [StoredTensor::new("part", Dtype::U8, &[memory.available / 8])];
        assert!(fits_in_memory(&part, 1));
        assert!(!fits_in_memory(&part, 8));
        assert_eq!(BackgroundSaves::of_ranks(8).processes(), 8);
        assert_eq!(BackgroundSaves::default().processes(), 1);
    }
}
