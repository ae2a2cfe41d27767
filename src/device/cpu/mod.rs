//! The reference device: f32 on all cores, what every kernel is tested against and what runs where there is no GPU.
//!
//! Products go through the `gemm` crate; everything else is plain loops that `CpuDevice::vectorized` compiles for
//! AVX-512, AVX2 or the baseline and picks at run time. Work is cut by fixed rules that never ask which thread is free,
//! and every reduction has a fixed order, so that the same inputs give the same bits at any number of threads.
//!
//! A file is one operation; `attention_tile.rs` holds what the two attention passes share.

mod adamw;
mod attention_backward;
mod attention_forward;
mod attention_tile;
mod embedding;
mod grad_norm;
mod linear;
mod logp_head;
mod memory;
mod pair_objective;
mod rms_norm;
mod rope;
mod scratch;
mod shared_rows;
mod simd;
mod swiglu;
mod transpose;

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

pub use memory::CpuBuffer;
use memory::MemoryCounter;
use scratch::ScratchPool;

use super::trace::{OperationTime, Trace};
use super::{
    AdamWStep, AdamWUpdate, AttentionShape, BatchBuffers, Compute, Device, Element, Floats, HeadMode,
    HeadShape, Indices, LinearShape, MemoryUse, NormShape, RawValues, RopeDirection, TokenCoefficients,
    TokenScores,
};
use crate::error::{Error, Result};
use crate::objective::Objective;

/// Elements below which a block is not worth handing to another thread (64 KiB of f32: a few microseconds of work).
const BLOCK_ELEMENTS: usize = 16 * 1024;

/// The CPU as a [`Device`]: its own thread pool, f32 buffers, and a count of their bytes.
pub struct CpuDevice {
    pool: rayon::ThreadPool,
    threads: usize,
    arch: pulp::Arch,
    memory: Arc<MemoryCounter>,
    scratch: ScratchPool,
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
            .num_threads(threads)
            .thread_name(|index| format!("cpu-device-{index}"))
            .build()
            .map_err(|error| {
                Error::device(
                    format!("cpu: cannot start {threads} threads: {error}"),
                    "ask for fewer threads, or raise the limit of processes (`ulimit -u`)",
                )
            })?;
        let memory = Arc::default();
        let scratch = ScratchPool::new(&memory);
        Ok(CpuDevice { pool, threads, arch: pulp::Arch::new(), memory, scratch, trace: Trace::default() })
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

    /// Runs one operation, and notes its time if a trace runs.
    fn traced<R>(&self, operation: &str, work: impl FnOnce() -> Result<R>) -> Result<R> {
        self.trace.around(operation, || Ok(Instant::now()), work)
    }

    /// Rows of one block of parallel work on `[rows, width]`.
    fn block_rows(&self, width: usize) -> usize {
        BLOCK_ELEMENTS.div_ceil(width.max(1))
    }
}

/// Errors if a buffer is smaller than the operation needs: `(name, values it holds, values needed)`.
fn check_sizes(operation: &str, shape: &dyn Debug, buffers: &[(&str, usize, usize)]) -> Result<()> {
    for &(name, holds, needed) in buffers {
        if holds < needed {
            return Err(Error::device(
                format!("{operation}: `{name}` holds {holds} values, {needed} are needed for {shape:?}"),
                "this is a mistake in the program, not in your input; please report it",
            ));
        }
    }
    Ok(())
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

impl Device for CpuDevice {
    type Compute = f32;
    type Buffer<T: Element> = CpuBuffer<T>;

    fn describe(&self) -> String {
        let name = processor_name().unwrap_or_else(|| std::env::consts::ARCH.to_string());
        let plural = if self.threads == 1 { "" } else { "s" };
        format!("cpu ({name}, {} thread{plural}, {})", self.threads, simd::name(self.arch))
    }

    fn arithmetic(&self) -> String {
        "cpu f32".to_string()
    }

    fn needs_master(&self) -> bool {
        false
    }

    fn memory(&self) -> MemoryUse {
        self.memory.read()
    }

    fn free_memory(&self) -> Result<Option<usize>> {
        Ok(None)
    }

    fn time(&self, work: impl FnOnce() -> Result<()>) -> Result<f64> {
        let started = Instant::now();
        work()?;
        Ok(started.elapsed().as_secs_f64())
    }

    fn trace<R>(&self, work: impl FnOnce() -> Result<R>) -> Result<(R, Vec<OperationTime>)> {
        self.trace.run(work, |start, end| Ok((*end - *start).as_secs_f64()))
    }

    fn alloc<T: Element>(&self, len: usize) -> Result<CpuBuffer<T>> {
        CpuBuffer::new(len, &self.memory)
    }

    fn len<T: Element>(&self, buffer: &CpuBuffer<T>) -> usize {
        buffer.len()
    }

    fn upload<T: Element>(&self, out: &mut CpuBuffer<T>, offset: usize, source: &[T]) -> Result<()> {
        self.traced("upload", || memory::upload(out, offset, source))
    }

    fn download<T: Element>(&self, out: &mut [T], source: &CpuBuffer<T>, offset: usize) -> Result<()> {
        memory::download(out, source, offset)
    }

    fn upload_values(&self, out: &mut CpuBuffer<f32>, offset: usize, source: RawValues<'_>) -> Result<()> {
        self.traced("upload_values", || memory::upload_values(self, out, offset, source))
    }

    fn download_compute(&self, out: &mut [f32], source: &CpuBuffer<f32>, offset: usize) -> Result<()> {
        memory::download(out, source, offset)
    }

    fn zero<T: Element>(&self, out: &mut CpuBuffer<T>, range: Range<usize>) -> Result<()> {
        self.traced("zero", || memory::zero(self, out, range))
    }

    fn zero_all(&self, outs: &mut [&mut Floats<Self>]) -> Result<()> {
        self.traced("zero_all", || memory::zero_all(self, outs))
    }

    fn copy<T: Element>(
        &self,
        out: &mut CpuBuffer<T>,
        out_offset: usize,
        source: &CpuBuffer<T>,
        offset: usize,
        len: usize,
    ) -> Result<()> {
        self.traced("copy", || memory::copy(out, out_offset, source, offset, len))
    }

    fn embedding_forward(
        &self,
        out: &mut Compute<Self>,
        table: &Compute<Self>,
        token_ids: &Indices<Self>,
        rows: usize,
        width: usize,
    ) -> Result<()> {
        self.traced("embedding_forward", || embedding::forward(self, out, table, token_ids, rows, width))
    }

    fn embedding_backward(
        &self,
        dtable: &mut Floats<Self>,
        dout: &Compute<Self>,
        batch: &BatchBuffers<Self>,
        rows: usize,
        width: usize,
    ) -> Result<()> {
        self.traced("embedding_backward", || embedding::backward(self, dtable, dout, batch, rows, width))
    }

    fn rms_norm_forward(
        &self,
        out: &mut Compute<Self>,
        rstd: &mut Floats<Self>,
        x: &Compute<Self>,
        weight: &Compute<Self>,
        shape: NormShape,
    ) -> Result<()> {
        self.traced("rms_norm_forward", || rms_norm::forward(self, out, rstd, x, weight, shape))
    }

    fn add_rms_norm_forward(
        &self,
        sum: &mut Compute<Self>,
        out: &mut Compute<Self>,
        rstd: &mut Floats<Self>,
        x: &Compute<Self>,
        delta: &Compute<Self>,
        weight: &Compute<Self>,
        shape: NormShape,
    ) -> Result<()> {
        self.traced("add_rms_norm_forward", || {
            rms_norm::add_forward(self, sum, out, rstd, x, delta, weight, shape)
        })
    }

    fn add(
        &self,
        sum: &mut Compute<Self>,
        x: &Compute<Self>,
        delta: &Compute<Self>,
        len: usize,
    ) -> Result<()> {
        self.traced("add", || rms_norm::add(self, sum, x, delta, len))
    }

    fn rms_norm_backward(
        &self,
        dx: &mut Compute<Self>,
        dweight: &mut Floats<Self>,
        dout: &Compute<Self>,
        x: &Compute<Self>,
        weight: &Compute<Self>,
        rstd: &Floats<Self>,
        shape: NormShape,
    ) -> Result<()> {
        self.traced("rms_norm_backward", || {
            rms_norm::backward(self, dx, dweight, dout, x, weight, rstd, shape)
        })
    }

    fn linear_forward(
        &self,
        out: &mut Compute<Self>,
        x: &Compute<Self>,
        weight: &Compute<Self>,
        bias: Option<&Compute<Self>>,
        shape: LinearShape,
    ) -> Result<()> {
        self.traced("linear_forward", || linear::forward(self, out, x, weight, bias, shape))
    }

    fn linear_backward_input(
        &self,
        dx: &mut Compute<Self>,
        dout: &Compute<Self>,
        weight: &Compute<Self>,
        shape: LinearShape,
    ) -> Result<()> {
        self.traced("linear_backward_input", || linear::backward_input(self, dx, dout, weight, shape))
    }

    fn linear_backward_weight(
        &self,
        dweight: &mut Floats<Self>,
        dbias: Option<&mut Floats<Self>>,
        dout: &Compute<Self>,
        x: &Compute<Self>,
        shape: LinearShape,
    ) -> Result<()> {
        self.traced("linear_backward_weight", || {
            linear::backward_weight(self, dweight, dbias, dout, x, shape)
        })
    }

    fn rope(
        &self,
        qkv: &mut Compute<Self>,
        table: &Floats<Self>,
        positions: &Indices<Self>,
        rows: usize,
        shape: AttentionShape,
        direction: RopeDirection,
    ) -> Result<()> {
        self.traced("rope", || rope::rotate(self, qkv, table, positions, rows, shape, direction))
    }

    fn attention_forward(
        &self,
        out: &mut Compute<Self>,
        lse: &mut Floats<Self>,
        qkv: &Compute<Self>,
        batch: &BatchBuffers<Self>,
        shape: AttentionShape,
    ) -> Result<()> {
        self.traced("attention_forward", || attention_forward::forward(self, out, lse, qkv, batch, shape))
    }

    fn attention_backward(
        &self,
        dqkv: &mut Compute<Self>,
        dout: &Compute<Self>,
        out: &Compute<Self>,
        lse: &Floats<Self>,
        qkv: &Compute<Self>,
        batch: &BatchBuffers<Self>,
        shape: AttentionShape,
    ) -> Result<()> {
        self.traced("attention_backward", || {
            attention_backward::backward(self, dqkv, dout, out, lse, qkv, batch, shape)
        })
    }

    fn reserve_attention_backward(&self, _: usize, _: usize, _: AttentionShape) -> Result<()> {
        Ok(())
    }

    fn attention_decode(
        &self,
        out: &mut Compute<Self>,
        cache: &Compute<Self>,
        length: usize,
        shape: AttentionShape,
    ) -> Result<()> {
        self.traced("attention_decode", || attention_forward::decode(self, out, cache, length, shape))
    }

    fn swiglu_forward(
        &self,
        out: &mut Compute<Self>,
        gate_up: &Compute<Self>,
        rows: usize,
        width: usize,
    ) -> Result<()> {
        self.traced("swiglu_forward", || swiglu::forward(self, out, gate_up, rows, width))
    }

    fn swiglu_backward(
        &self,
        dgate_up: &mut Compute<Self>,
        dout: &Compute<Self>,
        gate_up: &Compute<Self>,
        rows: usize,
        width: usize,
    ) -> Result<()> {
        self.traced("swiglu_backward", || swiglu::backward(self, dgate_up, dout, gate_up, rows, width))
    }

    fn gather_rows(
        &self,
        out: &mut Compute<Self>,
        hidden: &Compute<Self>,
        batch: &BatchBuffers<Self>,
        scored: usize,
        width: usize,
    ) -> Result<()> {
        self.traced("gather_rows", || embedding::gather_rows(self, out, hidden, batch, scored, width))
    }

    fn gather_rows_backward(
        &self,
        dhidden: &mut Compute<Self>,
        dout: &Compute<Self>,
        batch: &BatchBuffers<Self>,
        rows: usize,
        width: usize,
    ) -> Result<()> {
        self.traced("gather_rows_backward", || {
            embedding::gather_rows_backward(self, dhidden, dout, batch, rows, width)
        })
    }

    /// Logits of more rows than this would leave the caches between the passes over them, with nothing gained.
    const HEAD_CHUNK_BYTES: usize = 64 << 20;

    fn logp_head_workspace(&self, mode: HeadMode, rows: usize, _: usize, vocab: usize) -> Result<usize> {
        Ok(logp_head::workspace_values(mode, rows, vocab))
    }

    fn logp_head_forward(
        &self,
        scores: &mut TokenScores<Self>,
        workspace: &mut Compute<Self>,
        hidden: &Compute<Self>,
        weight: &Compute<Self>,
        targets: &Indices<Self>,
        shape: &HeadShape,
    ) -> Result<()> {
        self.traced("logp_head_forward", || {
            logp_head::forward(self, scores, workspace, hidden, weight, targets, shape)
        })
    }

    fn pair_objective(
        &self,
        outcomes: &mut Floats<Self>,
        coefficients: &mut TokenCoefficients<Self>,
        scores: &TokenScores<Self>,
        batch: &BatchBuffers<Self>,
        objective: &Objective,
        pairs: Range<usize>,
    ) -> Result<()> {
        self.traced("pair_objective", || {
            pair_objective::evaluate(outcomes, coefficients, scores, batch, objective, pairs)
        })
    }

    fn logp_head_backward(
        &self,
        hidden: &mut Compute<Self>,
        dweight: Option<&mut Floats<Self>>,
        workspace: &mut Compute<Self>,
        weight: &Compute<Self>,
        targets: &Indices<Self>,
        scores: &TokenScores<Self>,
        coefficients: &TokenCoefficients<Self>,
        shape: &HeadShape,
    ) -> Result<()> {
        self.traced("logp_head_backward", || {
            logp_head::backward(
                self,
                hidden,
                dweight,
                workspace,
                weight,
                targets,
                scores,
                coefficients,
                shape,
            )
        })
    }

    fn gradient_norm(
        &self,
        out: &mut Floats<Self>,
        gradients: &[&Floats<Self>],
        max_norm: Option<f32>,
    ) -> Result<()> {
        self.traced("gradient_norm", || grad_norm::gradient_norm(self, out, gradients, max_norm))
    }

    fn adamw(
        &self,
        updates: &mut [AdamWUpdate<'_, Self>],
        norm: &Floats<Self>,
        step: AdamWStep,
    ) -> Result<()> {
        self.traced("adamw", || adamw::update(self, updates, norm, step))
    }
}
