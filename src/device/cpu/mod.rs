//! The reference device: f32 on all cores. Every kernel is tested against it, and it runs where there is no GPU.
//!
//! Matrix products go through the `gemm` crate; everything else is plain loops that `CpuDevice::vectorized` compiles
//! for AVX-512, AVX2 and the baseline, and picks from at run time. Work is cut by fixed rules that never ask which
//! thread is free, and every reduction has a fixed order, so that the same inputs give the same bits at any number of
//! threads.
//!
//! Each file holds one operation; `attention_tile.rs` holds what the two attention passes share.

mod adamw;
mod attention_backward;
mod attention_forward;
mod attention_tile;
mod embedding;
mod linear;
mod logp_head;
mod low_rank;
mod memory;
mod offload;
mod optimizer;
mod pair_objective;
mod rms_norm;
mod rope;
mod scratch;
mod shared_rows;
mod simd;
mod swiglu;
mod transpose;

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Instant;

pub use memory::CpuBuffer;
use scratch::ScratchPool;

use super::trace::{OperationTime, Trace};
use super::{Hardware, MemoryCounter};
use crate::error::{Error, Result};

/// Elements below which a block is not worth handing to another thread (64 KiB of f32: a few microseconds of work).
const BLOCK_ELEMENTS: usize = 16 * 1024;

/// The CPU as a [`Device`](super::Device): its own thread pool, f32 buffers, and a count of their bytes.
pub struct CpuDevice {
    pool: rayon::ThreadPool,
    threads: usize,
    arch: pulp::Arch,
    memory: Arc<MemoryCounter>,
    scratch: ScratchPool,
    /// Whether buffers hold nothing: the device is planned for, and computes nothing.
    only_counts: bool,
    trace: Trace<Instant>,
}

impl Debug for CpuDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CpuDevice({})", self.describe())
    }
}

impl CpuDevice {
    /// `threads` of `None` takes all cores the process may use.
    ///
    /// # Errors
    /// [`Error::Config`] for zero threads, [`Error::Device`] where the system refuses to start them.
    pub fn new(threads: Option<usize>) -> Result<Self> {
        Self::open(threads, false)
    }

    /// As [`CpuDevice::new`], for [`Memory::planned`](super::Memory::planned).
    ///
    /// # Errors
    /// As [`CpuDevice::new`].
    pub fn planned_for(threads: Option<usize>) -> Result<Self> {
        Self::open(threads, true)
    }

    fn open(threads: Option<usize>, only_counts: bool) -> Result<Self> {
        let threads = match threads {
            Some(0) => {
                return Err(Error::config(
                    "0 threads cannot compute",
                    "give `threads` of 1 or more, or none",
                ));
            }
            Some(threads) => threads,
            None => std::thread::available_parallelism().map_or(1, |cores| cores.get()),
        };
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(if only_counts { 1 } else { threads })
            .thread_name(|index| format!("cpu-device-{index}"))
            .build()
            .map_err(|error| {
                Error::device(
                    format!("cpu: cannot start {threads} threads: {error}"),
                    "ask for fewer threads, or raise the limit of processes (`ulimit -u`)",
                )
            })?;
        let memory = Arc::default();
        let scratch = ScratchPool::new(&memory, only_counts);
        let (arch, trace) = (pulp::Arch::new(), Trace::default());
        Ok(CpuDevice { pool, threads, arch, memory, scratch, only_counts, trace })
    }

    /// Number of threads of the device's pool.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Runs `work` on the device's pool. Every operation does so by itself; a loop of many small operations saves the
    /// hand-over (some microseconds each) by running inside one call of this.
    pub fn parallel<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.pool.install(work)
    }

    /// Runs `work` compiled for the widest vectors this machine has. Everything called inside has to be inlined
    /// (`#[inline(always)]`), or it is compiled for the baseline alone: right, but several times slower.
    #[inline(always)]
    fn vectorized<R>(&self, work: impl FnOnce() -> R) -> R {
        self.arch.dispatch(work)
    }

    /// Runs one operation, and records its time while a trace runs.
    fn traced<R>(&self, operation: &str, work: impl FnOnce() -> Result<R>) -> Result<R> {
        self.trace.around(operation, || Ok(Instant::now()), work)
    }

    /// Rows of one block of parallel work on `[rows, width]`.
    fn block_rows(&self, width: usize) -> usize {
        BLOCK_ELEMENTS.div_ceil(width.max(1))
    }
}

/// An error for an index (token id, row, position) that points outside its buffer.
fn index_error(operation: &str, name: &str, index: u32, limit: usize) -> Error {
    Error::device(
        format!("{operation}: {name} {index} lies outside 0..{limit}"),
        "a token id must lie below the model's vocabulary, a position below its table; check tokenizer and config",
    )
}

/// Errors unless every index lies below `limit`.
fn check_indices(operation: &str, name: &str, indices: &[u32], limit: usize) -> Result<()> {
    match indices.iter().find(|&&index| index as usize >= limit) {
        Some(&index) => Err(index_error(operation, name, index, limit)),
        None => Ok(()),
    }
}

/// The CPU's name for people, where the system tells it.
fn processor_name() -> Option<String> {
    let info = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = info.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_string())
}

impl Hardware for CpuDevice {
    fn describe(&self) -> String {
        let name = processor_name().unwrap_or_else(|| std::env::consts::ARCH.to_string());
        let plural = if self.threads == 1 { "" } else { "s" };
        format!("cpu ({name}, {} thread{plural}, {})", self.threads, simd::name(self.arch))
    }

    fn arithmetic(&self) -> String {
        "cpu f32".to_string()
    }

    fn time(&self, work: impl FnOnce() -> Result<()>) -> Result<f64> {
        let started = Instant::now();
        work()?;
        Ok(started.elapsed().as_secs_f64())
    }

    fn trace<R>(&self, work: impl FnOnce() -> Result<R>) -> Result<(R, Vec<OperationTime>)> {
        self.trace.run(work, |start, end| Ok((*end - *start).as_secs_f64()))
    }
}
