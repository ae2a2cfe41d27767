//! The reference device: all cores of the CPU. Every kernel is tested against it in f32, and it runs where there is no GPU.
//!
//! Weights and activations are stored in f32 or in bf16 ([`Storage`]); everything is computed in f32 from either. Matrix
//! products in f32 go through the `gemm` crate, those in bf16 through `bf16_gemm.rs`; everything else is plain loops that `CpuDevice::vectorized` compiles
//! for AVX-512, AVX2 and the baseline, and picks from at run time. Work is cut by fixed rules that never ask which
//! thread is free, and every reduction has a fixed order, so that the same inputs give the same bits at any number of
//! threads.
//!
//! Each file holds one operation; `attention_tile.rs` holds what the two attention passes share.

mod accumulate;
mod adamw;
mod adapted_bf16;
mod attention_backward;
mod attention_forward;
mod attention_tile;
mod bf16_gemm;
#[cfg(target_arch = "x86_64")]
mod bf16_kernel;
mod bf16_widened;
mod collectives;
mod embedding;
mod linear;
mod linear_bf16;
mod linear_f32;
mod logp_head;
mod low_rank;
mod memory;
mod offload;
mod optimizer;
mod pair_objective;
mod products;
mod queues;
mod rms_norm;
mod rope;
mod scratch;
mod shared_rows;
mod simd;
mod storage;
mod swiglu;
mod transpose;

use std::fmt::Debug;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Instant;

pub use memory::CpuBuffer;
use scratch::ScratchPool;
pub use storage::Storage;

use super::trace::{OperationTime, Trace};
use super::{Hardware, MemoryCounter, StorageType};
use crate::error::{Error, Result};

/// Elements below which a block is not worth handing to another thread (64 KiB of f32: a few microseconds of work).
const BLOCK_ELEMENTS: usize = 16 * 1024;

/// The CPU as a [`Device`](super::Device) that stores weights and activations as `C`: its own thread pool, buffers, and a
/// count of their bytes.
pub struct CpuDevice<C = f32> {
    pool: rayon::ThreadPool,
    threads: usize,
    arch: pulp::Arch,
    memory: Arc<MemoryCounter>,
    scratch: ScratchPool,
    /// Whether buffers hold nothing: the device is planned for, and computes nothing.
    only_counts: bool,
    trace: Trace<Instant>,
    /// Whether bf16 products use the processor's instructions for them.
    has_bf16: bool,
    storage: PhantomData<C>,
}

impl<C: Storage> Debug for CpuDevice<C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CpuDevice({})", self.describe())
    }
}

impl CpuDevice {
    /// The device with f32 storage. `threads` of `None` takes all cores the process may use.
    ///
    /// # Errors
    /// As [`CpuDevice::open`].
    pub fn new(threads: Option<usize>) -> Result<Self> {
        Self::open(threads)
    }
}

impl<C: Storage> CpuDevice<C> {
    /// `threads` of `None` takes all cores the process may use.
    ///
    /// # Errors
    /// [`Error::Config`] for zero threads, [`Error::Device`] where the system refuses to start them.
    pub fn open(threads: Option<usize>) -> Result<Self> {
        Self::start(threads, false)
    }

    /// As [`CpuDevice::open`], for [`Memory::planned`](super::Memory::planned).
    ///
    /// # Errors
    /// As [`CpuDevice::open`].
    pub fn open_planned(threads: Option<usize>) -> Result<Self> {
        Self::start(threads, true)
    }

    fn start(threads: Option<usize>, only_counts: bool) -> Result<Self> {
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
        Ok(CpuDevice {
            pool,
            threads,
            arch: pulp::Arch::new(),
            memory,
            scratch,
            only_counts,
            trace: Trace::default(),
            has_bf16: bf16_gemm::has_instructions(),
            storage: PhantomData,
        })
    }

    /// The device as it is on a processor without instructions for bf16 products: values are widened, and the products are
    /// those of f32.
    pub fn without_bf16_instructions(mut self) -> Self {
        self.has_bf16 = false;
        self
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

impl<C: Storage> Hardware for CpuDevice<C> {
    const IS_CPU: bool = true;

    fn describe(&self) -> String {
        let name = processor_name().unwrap_or_else(|| std::env::consts::ARCH.to_string());
        let plural = if self.threads == 1 { "" } else { "s" };
        let vectors = match C::TYPE == StorageType::Bf16 && self.has_bf16 {
            true => "AVX-512 BF16",
            false => simd::name(self.arch),
        };
        format!("cpu ({name}, {} thread{plural}, {vectors}, {})", self.threads, C::NAME)
    }

    fn arithmetic(&self) -> String {
        format!("cpu {}", C::NAME)
    }

    fn together<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.parallel(work)
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
