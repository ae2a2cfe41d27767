//! TensorBoard event files: TFRecords of hand-written protocol buffers, just enough of both for scalars.
//!
//! A record is `length: u64 | masked crc32c of length: u32 | data | masked crc32c of data: u32`, little-endian
//! (tensorflow/core/lib/io/record_writer.h). The messages are `Event`, `Summary` and `SessionLog` of
//! tensorboard/compat/proto; the field numbers below are theirs.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::metrics::{EvalMetrics, StepMetrics};
use crate::error::{Error, Result};

/// Folder of the event files inside a run's output folder.
pub const EVENTS_FOLDER: &str = "tensorboard";

/// `SessionLog.SessionStatus.START`: readers forget earlier events from its step on.
const SESSION_START: u64 = 1;

/// Writes a run's scalars; `tensorboard --logdir OUTPUT` shows them.
#[derive(Debug)]
pub struct EventWriter {
    path: PathBuf,
    file: File,
}

impl EventWriter {
    /// Begins a new event file in the output folder `folder`. After a resume, `resumed` is the step that the run
    /// continues from: what earlier files say about later steps is then void.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io) if it cannot be made.
    pub fn create(folder: &Path, resumed: Option<usize>) -> Result<Self> {
        let folder = folder.join(EVENTS_FOLDER);
        std::fs::create_dir_all(&folder).map_err(|source| Error::io(&folder, "create", source))?;
        let (path, file) = new_file(&folder)?;
        let mut writer = EventWriter { path, file };
        let mut version = event(now(), 0);
        put_bytes(&mut version, 3, b"brain.Event:2");
        writer.record(&version)?;
        if let Some(step) = resumed {
            let mut session = Vec::new();
            put_varint_field(&mut session, 1, SESSION_START);
            let mut start = event(now(), step as u64 + 1);
            put_bytes(&mut start, 7, &session);
            writer.record(&start)?;
        }
        Ok(writer)
    }

    /// Writes the scalars of a step.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io) if they cannot be written.
    pub fn step(&mut self, metrics: &StepMetrics) -> Result<()> {
        self.scalars(metrics.step, &metrics.fields())
    }

    /// Writes the scalars of an evaluation.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io) if they cannot be written.
    pub fn evaluation(&mut self, metrics: &EvalMetrics) -> Result<()> {
        let mut fields = metrics.fields();
        // The steps' own `epoch` is the one to chart.
        fields.retain(|(name, _)| name != "epoch");
        self.scalars(metrics.step, &fields)
    }

    fn scalars(&mut self, step: usize, fields: &[(String, f64)]) -> Result<()> {
        self.record(&scalar_event(now(), step as u64, fields))
    }

    fn record(&mut self, data: &[u8]) -> Result<()> {
        self.file.write_all(&record(data)).map_err(|source| Error::io(&self.path, "write", source))
    }
}

/// Readers take files in the order of their names, which therefore begin with the time; a second run within one
/// second gets the next free number.
fn new_file(folder: &Path) -> Result<(PathBuf, File)> {
    let seconds = now() as u64;
    let mut number = 0u32;
    loop {
        let path = folder.join(format!("events.out.tfevents.{seconds:010}.mmpo-fast.{number}"));
        match OpenOptions::new().write(true).create_new(true).open(&path) {
            Ok(file) => return Ok((path, file)),
            Err(source) if source.kind() == std::io::ErrorKind::AlreadyExists => number += 1,
            Err(source) => return Err(Error::io(&path, "create", source)),
        }
    }
}

/// Seconds since 1970; 0 for a clock that stands before.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// `Event { wall_time = 1, step = 2 }`, to be continued.
fn event(wall_time: f64, step: u64) -> Vec<u8> {
    let mut event = Vec::new();
    put_key(&mut event, 1, 1);
    event.extend(wall_time.to_le_bytes());
    // A field of its default value is not written.
    if step != 0 {
        put_varint_field(&mut event, 2, step);
    }
    event
}

/// `Event { summary = 5 { value = 1 { tag = 1, simple_value = 2 } .. } }`
fn scalar_event(wall_time: f64, step: u64, fields: &[(String, f64)]) -> Vec<u8> {
    let mut summary = Vec::new();
    for (name, value) in fields {
        let mut entry = Vec::new();
        put_bytes(&mut entry, 1, name.as_bytes());
        put_key(&mut entry, 2, 5);
        entry.extend((*value as f32).to_le_bytes());
        put_bytes(&mut summary, 1, &entry);
    }
    let mut event = event(wall_time, step);
    put_bytes(&mut event, 5, &summary);
    event
}

/// A field's number and wire type: 0 varint, 1 eight bytes, 2 length and bytes, 5 four bytes.
fn put_key(out: &mut Vec<u8>, field: u64, wire_type: u64) {
    put_varint(out, field << 3 | wire_type);
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn put_varint_field(out: &mut Vec<u8>, field: u64, value: u64) {
    put_key(out, field, 0);
    put_varint(out, value);
}

fn put_bytes(out: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    put_key(out, field, 2);
    put_varint(out, bytes.len() as u64);
    out.extend(bytes);
}

fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(data.len() + 16);
    record.extend(length);
    record.extend(masked_crc32c(&length).to_le_bytes());
    record.extend(data);
    record.extend(masked_crc32c(data).to_le_bytes());
    record
}

/// TFRecord's mask keeps a checksum of data that holds checksums from being a weak one.
fn masked_crc32c(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that TensorBoard's own writer gave for the same events, see `tests/reference/tfevents.py`.
    #[test]
    fn records_are_tensorboards_own_bytes() {
        let mut version = event(1.5, 0);
        put_bytes(&mut version, 3, b"brain.Event:2");
        let fields = [("loss".to_string(), 0.25), ("rewards/chosen".to_string(), -3.0)];
        let scalars = scalar_event(2.5, 300, &fields);
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        assert_eq!(hex(&record(&version)), VERSION_RECORD);
        assert_eq!(hex(&record(&scalars)), SCALARS_RECORD);
    }

    const VERSION_RECORD: &str =
        "1800000000000000a37f4b2209000000000000f83f1a0d627261696e2e4576656e743a322a28646c";
    const SCALARS_RECORD: &str = "3200000000000000241956ec09000000000000044010ac022a240a0b0a046c6f7373\
         150000803e0a150a0e726577617264732f63686f73656e15000040c0f2985526";

    #[test]
    fn files_of_one_second_do_not_collide() {
        let folder = tempfile::tempdir().unwrap();
        let first = EventWriter::create(folder.path(), None).unwrap();
        let second = EventWriter::create(folder.path(), Some(7)).unwrap();
        assert!(first.path < second.path, "{} {}", first.path.display(), second.path.display());
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_named() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(EVENTS_FOLDER), "a file in the way").unwrap();
        let error = EventWriter::create(folder.path(), None).unwrap_err();
        assert!(matches!(error, Error::Io { .. }) && error.to_string().contains(EVENTS_FOLDER), "{error}");
    }
}
