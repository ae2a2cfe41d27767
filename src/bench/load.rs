//! `mmpo-fast bench load`: how fast a model's weights come onto the device, beside what the disk and the bus give, and how much of
//! the host's memory that takes.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use serde_json::json;

use super::report::{self, figures};
use super::{BenchConfig, ModelChoice};
use crate::checkpoint::{ModelFolder, atomic};
use crate::device::{Device, Queue};
use crate::error::{Error, Result};
use crate::model::Llama;

/// Bytes of a read, and of a copy over the bus.
const PIECE: usize = 64 << 20;
/// Copies over the bus.
const COPIES: usize = 32;
/// Threads that read a file side by side: one alone does not keep a fast disk busy.
const READERS: usize = 4;

/// Rates in bytes a second, of one model.
struct Rates {
    bytes: f64,
    /// Reading the files into memory, after they were dropped from the system's cache.
    disk: f64,
    /// Reading them again, out of the cache.
    cache: f64,
    /// Copying pinned memory to the device; `None` where the device computes in the host's memory.
    bus: Option<f64>,
    /// Loading the model from the disk.
    cold: f64,
    /// Loading it from the cache.
    warm: f64,
}

impl Rates {
    /// The most that loading from a source of this rate could reach.
    fn limit(&self, source: f64) -> f64 {
        self.bus.map_or(source, |bus| bus.min(source))
    }
}

/// Measures and prints.
///
/// # Errors
/// [`Error::Config`] without a model folder; those of the folder, of the device and of standard output.
pub fn run<D: Device>(device: &Arc<D>, config: &BenchConfig) -> Result<()> {
    let Some(ModelChoice::Folder(path)) = &config.model else {
        return Err(Error::config(
            "`bench load` reads the weights of a model folder, and none is given",
            "give one with --model DIR",
        ));
    };
    let files = weights(path)?;
    let disk = rate(&files, || read(&files), true)?;
    let cache = rate(&files, || read(&files), false)?;
    let load = || {
        let folder = ModelFolder::open(path)?;
        let llama = Llama::load(Arc::clone(device), &folder, 8)?;
        // The device is done when this is there.
        device.download_compute(&mut [0.0], &llama.weights.final_norm, 0)
    };
    let (cold, warm) = (rate(&files, load, true)?, rate(&files, load, false)?);
    let bus = bus(&**device)?;
    let rates = Rates { bytes: total(&files)? as f64, disk, cache, bus, cold, warm };
    show(config, path, device.describe(), &rates)
}

fn show(config: &BenchConfig, path: &Path, device: String, rates: &Rates) -> Result<()> {
    let peak = peak_memory();
    if config.json {
        let (cold_limit, warm_limit) = (rates.limit(rates.disk), rates.limit(rates.cache));
        let report = json!({
            "part": "load", "device": device, "model": path.display().to_string(), "bytes": rates.bytes,
            "disk": rates.disk, "cache": rates.cache, "bus": rates.bus,
            "cold": rates.cold, "cold_share": rates.cold / cold_limit,
            "warm": rates.warm, "warm_share": rates.warm / warm_limit,
            "peak_memory": peak,
        });
        return report::print(&format!("{report}\n"));
    }
    let row = |name: &str, rate: f64, limit: Option<f64>| {
        let share = limit.map_or(String::new(), |limit| format!("{:.0} %", 100.0 * rate / limit));
        vec![name.to_owned(), figures(rate * 1e-9), share]
    };
    let mut rows =
        vec![row("files from the disk", rates.disk, None), row("files from the cache", rates.cache, None)];
    rows.extend(rates.bus.map(|bus| row("pinned memory to the device", bus, None)));
    rows.push(row("weights from the disk", rates.cold, Some(rates.limit(rates.disk))));
    rows.push(row("weights from the cache", rates.warm, Some(rates.limit(rates.cache))));
    let mut text = format!("{}, {} GB on {device}\n\n", path.display(), figures(rates.bytes * 1e-9));
    text += &report::table(&["", "GB/s", "of the slower source"], &rows);
    if let Some(peak) = peak {
        text += &format!(
            "\nmost of the host's memory that the process held: {} GB\n",
            figures(peak as f64 * 1e-9)
        );
    }
    report::print(&text)
}

/// The safetensors files of a model folder.
fn weights(folder: &Path) -> Result<Vec<PathBuf>> {
    let is_weights = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "safetensors");
    let files: Vec<PathBuf> = atomic::list(folder)?.into_iter().filter(is_weights).collect();
    match files.is_empty() {
        false => Ok(files),
        true => Err(Error::model(folder, "has no safetensors files", "give a Hugging Face model folder")),
    }
}

fn total(files: &[PathBuf]) -> Result<u64> {
    files
        .iter()
        .map(|file| Ok(std::fs::metadata(file).map_err(|error| Error::io(file, "read", error))?.len()))
        .sum()
}

/// Bytes of `files` for each second that `work` takes; `is_cold` drops them from the system's cache before.
fn rate(files: &[PathBuf], work: impl FnOnce() -> Result<()>, is_cold: bool) -> Result<f64> {
    if is_cold {
        files.iter().try_for_each(|file| drop_from_cache(file))?;
    }
    let started = Instant::now();
    work()?;
    Ok(total(files)? as f64 / started.elapsed().as_secs_f64())
}

#[cfg(target_os = "linux")]
fn drop_from_cache(path: &Path) -> Result<()> {
    let failed = |error: std::io::Error| Error::io(path, "drop from the cache", error);
    let file = File::open(path).map_err(failed)?;
    // Pages that are not on the disk yet stay.
    file.sync_all().map_err(failed)?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).map_err(|error| failed(error.into()))
}

#[cfg(not(target_os = "linux"))]
fn drop_from_cache(_: &Path) -> Result<()> {
    Ok(())
}

/// Reads all files into memory, each by several threads.
fn read(files: &[PathBuf]) -> Result<()> {
    for path in files {
        let failed = |error: std::io::Error| Error::io(path, "read", error);
        let length = std::fs::metadata(path).map_err(failed)?.len();
        let share = length.div_ceil(READERS as u64);
        let read_share = |reader: u64| -> std::io::Result<()> {
            let mut file = File::open(path)?;
            std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(reader * share))?;
            let mut rest = file.take(share);
            let mut buffer = vec![0; PIECE.min(share as usize).max(1)];
            while rest.read(&mut buffer)? > 0 {}
            Ok(())
        };
        let results: Vec<std::io::Result<()>> = std::thread::scope(|threads| {
            let readers: Vec<_> =
                (0..READERS as u64).map(|reader| threads.spawn(move || read_share(reader))).collect();
            readers.into_iter().map(|reader| reader.join().unwrap_or(Ok(()))).collect()
        });
        results.into_iter().collect::<std::io::Result<()>>().map_err(failed)?;
    }
    Ok(())
}

/// The rate of copies from pinned memory; `None` for a device that has none.
fn bus<D: Device>(device: &D) -> Result<Option<f64>> {
    if device.check_offload().is_err() {
        return Ok(None);
    }
    let values = PIECE / size_of::<f32>();
    let (host, mut out) = (device.alloc_host(PIECE)?, device.alloc::<f32>(values)?);
    let (mut ready, mut copied) = (device.new_event()?, device.new_event()?);
    let mut seconds = 0.0;
    // The first time pays for what is set up once.
    for copies in [1, COPIES] {
        device.record(&mut ready, Queue::Compute)?;
        device.wait(Queue::ToDevice, &ready)?;
        let started = Instant::now();
        for _ in 0..copies {
            device.fetch(&mut out, &host, 0, values)?;
        }
        device.record(&mut copied, Queue::ToDevice)?;
        device.wait(Queue::Compute, &copied)?;
        device.download(&mut [0.0], &out, 0)?;
        seconds = started.elapsed().as_secs_f64();
    }
    Ok(Some((COPIES * PIECE) as f64 / seconds))
}

/// The most memory that this process held at once, as Linux counts it.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}
