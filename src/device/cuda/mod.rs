//! The CUDA device: bf16 weights and activations, the kernels of `kernels/*.cu`, on a real GPU or on the emulated one.
//!
//! A file here is one operation, named as its kernels: it checks sizes and launches. `backend.rs` says what a device is
//! to them, `backend_gpu.rs` and `backend_emulated.rs` are the two there are. All work of a device is queued on one
//! stream; only downloads wait.

#[cfg(any(mmpo_gpu_kernels, test))]
mod arena;
mod attention;
mod backend;
#[cfg(mmpo_emulated)]
mod backend_emulated;
#[cfg(mmpo_gpu_kernels)]
mod backend_gpu;
mod bindings;
#[cfg(mmpo_gpu_kernels)]
mod cublaslt;
mod embedding;
mod gather_rows;
mod head_chunks;
mod kernel_path;
mod linear;
mod logp_head;
mod memory;
mod optimizer;
mod pair_objective;
mod probe;
mod product_table;
mod products;
mod rms_norm;
mod rope;
mod swiglu;

use std::ffi::c_void;
use std::fmt::{self, Debug};
use std::ops::Range;
use std::sync::Arc;

use half::bf16;

pub use self::attention::AttentionOrder;
use self::backend::{Backend, Moment};
#[cfg(mmpo_emulated)]
pub use self::backend_emulated::{
    EmulatedLaunch, EmulatorCounters, EmulatorOptions, EmulatorVariant, MMPO_EMULATOR_ASYNC_EARLY,
    MMPO_EMULATOR_ASYNC_LATE, MMPO_EMULATOR_ASYNC_RANDOM, MMPO_EMULATOR_SCHEDULE_ORDERED,
    MMPO_EMULATOR_SCHEDULE_RANDOM,
};
use self::bindings::{KernelTable, mmpo_status, mmpo_stream};
pub use self::kernel_path::KernelPath;
pub use self::memory::CudaBuffer;
use self::memory::{Memory, Workspace};
#[cfg(not(mmpo_emulated))]
pub(crate) use self::probe::no_emulated_device;
pub use self::probe::{Gpu, build_info, emulated_info, gpus};
pub use self::products::{ProductTile, Products};
use super::trace::{OperationTime, Trace};
use super::{
    AdamWStep, AdamWUpdate, AttentionShape, BatchBuffers, Compute, Device, Element, Floats, HeadMode,
    HeadShape, Indices, LinearShape, MemoryUse, NormShape, RawValues, RopeDirection, TokenCoefficients,
    TokenScores,
};
use crate::error::{Error, Result};
use crate::objective::Objective;

/// A GPU, or the emulated one, as a [`Device`].
pub struct CudaDevice {
    memory: Arc<Memory>,
    workspace: Workspace,
    path: KernelPath,
    products: Products,
    attention_order: AttentionOrder,
    trace: Trace<Moment>,
}

impl Debug for CudaDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CudaDevice({})", self.describe())
    }
}

impl CudaDevice {
    /// The GPU of this ordinal.
    ///
    /// # Errors
    /// [`Error::Device`] if the program was built without GPU kernels, the driver is absent or too old, there is no such
    /// GPU, or its compute capability is below 8.0.
    pub fn open(ordinal: usize) -> Result<Self> {
        Self::open_gpu(&probe::usable(ordinal)?)
    }

    #[cfg(mmpo_gpu_kernels)]
    fn open_gpu(gpu: &Gpu) -> Result<Self> {
        Ok(Self::new(Box::new(backend_gpu::GpuBackend::open(gpu)?), KernelPath::of(gpu)))
    }

    #[cfg(not(mmpo_gpu_kernels))]
    fn open_gpu(_gpu: &Gpu) -> Result<Self> {
        Err(probe::no_kernels())
    }

    /// The emulated device, on the portable kernels. Both variants can be used side by side.
    #[cfg(mmpo_emulated)]
    pub fn emulated(variant: EmulatorVariant) -> Self {
        Self::new(Box::new(backend_emulated::EmulatedBackend::new(variant)), KernelPath::Portable)
    }

    #[cfg(any(mmpo_gpu_kernels, mmpo_emulated))]
    fn new(backend: Box<dyn Backend>, path: KernelPath) -> Self {
        CudaDevice {
            memory: Memory::new(backend),
            workspace: Workspace::default(),
            path,
            products: Products::default(),
            attention_order: AttentionOrder::default(),
            trace: Trace::default(),
        }
    }

    /// The same device on the other set of kernels: to test or to time them side by side. The emulated device runs both;
    /// a real one without Hopper's instructions fails at the first Hopper kernel.
    #[must_use]
    pub fn with_path(self, path: KernelPath) -> Self {
        CudaDevice { path, ..self }
    }

    /// Which kernels run where an operation has two sets of them.
    pub fn path(&self) -> KernelPath {
        self.path
    }

    /// The same device with this choice of matrix products: to test or to time them side by side.
    #[must_use]
    pub fn with_products(self, products: Products) -> Self {
        CudaDevice { products, ..self }
    }

    /// Whose matrix products run where there is a choice.
    pub fn products(&self) -> Products {
        self.products
    }

    /// Another handle of this GPU, whose buffers either takes, with this order of the sums in attention's backward pass: to
    /// time or to test them side by side. It has scratch memory and a trace of its own.
    ///
    /// No option of a training run: a device starts with the fixed order, nothing but tests and benchmarks asks for
    /// another, and training gives the same bits every time.
    #[must_use]
    pub fn with_attention_order(&self, attention_order: AttentionOrder) -> Self {
        CudaDevice {
            memory: Arc::clone(&self.memory),
            workspace: Workspace::default(),
            path: self.path,
            products: self.products,
            attention_order,
            trace: Trace::default(),
        }
    }

    fn backend(&self) -> &dyn Backend {
        &*self.memory.backend
    }

    /// Runs one launcher.
    fn launch(
        &self,
        operation: &str,
        shape: &dyn Debug,
        mut call: impl FnMut(&KernelTable, mmpo_stream) -> mmpo_status,
    ) -> Result<()> {
        self.traced(operation, || self.backend().launch(operation, shape, &mut call))
    }

    /// Queues work, and notes when the device did it if a trace runs.
    fn traced<R>(&self, operation: &str, work: impl FnOnce() -> Result<R>) -> Result<R> {
        self.trace.around(operation, || self.backend().moment(), work)
    }

    /// What a launcher says of its sizes: a pure function on the host, which launches nothing and is not traced.
    fn ask(&self, operation: &str, shape: &dyn Debug, call: impl Fn(&KernelTable) -> i64) -> Result<i64> {
        let mut answer = 0;
        self.backend().launch(operation, shape, &mut |kernels, _| {
            answer = call(kernels);
            0
        })?;
        Ok(answer)
    }

    /// What a launcher's own rule, a pure function, asks for.
    fn workspace_bytes(
        &self,
        operation: &str,
        shape: &dyn Debug,
        bytes: impl Fn(&KernelTable) -> i64,
    ) -> Result<usize> {
        let needed = self.ask(operation, shape, bytes)?;
        usize::try_from(needed).map_err(|_| {
            Error::device(format!("{operation}: no scratch memory is enough for {shape:?}"), REPORT)
        })
    }

    /// Runs one launcher with the scratch memory that `bytes` asks for.
    fn launch_with_workspace(
        &self,
        operation: &str,
        shape: &dyn Debug,
        bytes: impl Fn(&KernelTable) -> i64,
        mut call: impl FnMut(&KernelTable, *mut c_void, mmpo_stream) -> mmpo_status,
    ) -> Result<()> {
        let needed = self.workspace_bytes(operation, shape, bytes)?;
        if needed == 0 {
            return self
                .launch(operation, shape, |kernels, stream| call(kernels, std::ptr::null_mut(), stream));
        }
        self.workspace.with(&self.memory, needed, |workspace| {
            self.launch(operation, shape, |kernels, stream| call(kernels, workspace, stream))
        })
    }
}

const REPORT: &str = "this is a mistake in the program, not in your input; please report it";

/// Refuses a launch whose buffers are smaller than its shape: `(name, values it holds, values needed)`.
fn check_sizes(operation: &str, shape: &dyn Debug, buffers: &[(&str, usize, usize)]) -> Result<()> {
    for &(name, holds, needed) in buffers {
        if holds < needed {
            return Err(Error::device(
                format!("{operation}: `{name}` holds {holds} values, {needed} are needed for {shape:?}"),
                REPORT,
            ));
        }
    }
    Ok(())
}

/// Sizes as the launchers take them.
fn launch_sizes<const COUNT: usize>(operation: &str, sizes: [usize; COUNT]) -> Result<[i32; COUNT]> {
    let mut converted = [0; COUNT];
    for (converted, &size) in converted.iter_mut().zip(&sizes) {
        *converted = i32::try_from(size).map_err(|_| {
            Error::device(
                format!("{operation}: {size} of {sizes:?} exceeds what a launch can take"),
                "lower the token budget",
            )
        })?;
    }
    Ok(converted)
}

impl Device for CudaDevice {
    type Compute = bf16;
    type Buffer<T: Element> = CudaBuffer<T>;

    fn describe(&self) -> String {
        self.backend().describe()
    }

    fn arithmetic(&self) -> String {
        format!("{} bf16", self.backend().describe())
    }

    fn needs_master(&self) -> bool {
        true
    }

    fn memory(&self) -> MemoryUse {
        self.memory.read()
    }

    fn free_memory(&self) -> Result<Option<usize>> {
        self.backend().free_memory()
    }

    fn time(&self, work: impl FnOnce() -> Result<()>) -> Result<f64> {
        let start = self.backend().moment()?;
        work()?;
        let end = self.backend().moment()?;
        self.backend().seconds_between(&start, &end)
    }

    fn trace<R>(&self, work: impl FnOnce() -> Result<R>) -> Result<(R, Vec<OperationTime>)> {
        self.trace.run(work, |start, end| self.backend().seconds_between(start, end))
    }

    fn alloc<T: Element>(&self, len: usize) -> Result<CudaBuffer<T>> {
        memory::alloc(self, len)
    }

    fn len<T: Element>(&self, buffer: &CudaBuffer<T>) -> usize {
        buffer.len()
    }

    fn upload<T: Element>(&self, out: &mut CudaBuffer<T>, offset: usize, source: &[T]) -> Result<()> {
        memory::upload(self, out, offset, source)
    }

    fn download<T: Element>(&self, out: &mut [T], source: &CudaBuffer<T>, offset: usize) -> Result<()> {
        memory::download(self, out, source, offset)
    }

    fn upload_values(&self, out: &mut CudaBuffer<bf16>, offset: usize, source: RawValues<'_>) -> Result<()> {
        memory::upload_values(self, out, offset, source)
    }

    fn download_compute(&self, out: &mut [f32], source: &CudaBuffer<bf16>, offset: usize) -> Result<()> {
        memory::download_compute(self, out, source, offset)
    }

    fn zero<T: Element>(&self, out: &mut CudaBuffer<T>, range: Range<usize>) -> Result<()> {
        memory::zero(self, out, range)
    }

    fn zero_all(&self, outs: &mut [&mut Floats<Self>]) -> Result<()> {
        memory::zero_all(self, outs)
    }

    fn copy<T: Element>(
        &self,
        out: &mut CudaBuffer<T>,
        out_offset: usize,
        source: &CudaBuffer<T>,
        offset: usize,
        len: usize,
    ) -> Result<()> {
        memory::copy(self, out, out_offset, source, offset, len)
    }

    fn embedding_forward(
        &self,
        out: &mut Compute<Self>,
        table: &Compute<Self>,
        token_ids: &Indices<Self>,
        rows: usize,
        width: usize,
    ) -> Result<()> {
        embedding::forward(self, out, table, token_ids, rows, width)
    }

    fn embedding_backward(
        &self,
        dtable: &mut Floats<Self>,
        dout: &Compute<Self>,
        batch: &BatchBuffers<Self>,
        rows: usize,
        width: usize,
    ) -> Result<()> {
        embedding::backward(self, dtable, dout, batch, rows, width)
    }

    fn rms_norm_forward(
        &self,
        out: &mut Compute<Self>,
        rstd: &mut Floats<Self>,
        x: &Compute<Self>,
        weight: &Compute<Self>,
        shape: NormShape,
    ) -> Result<()> {
        rms_norm::forward(self, out, rstd, x, weight, shape)
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
        rms_norm::add_forward(self, sum, out, rstd, x, delta, weight, shape)
    }

    fn add(
        &self,
        sum: &mut Compute<Self>,
        x: &Compute<Self>,
        delta: &Compute<Self>,
        len: usize,
    ) -> Result<()> {
        rms_norm::add(self, sum, x, delta, len)
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
        rms_norm::backward(self, dx, dweight, dout, x, weight, rstd, shape)
    }

    fn linear_forward(
        &self,
        out: &mut Compute<Self>,
        x: &Compute<Self>,
        weight: &Compute<Self>,
        bias: Option<&Compute<Self>>,
        shape: LinearShape,
    ) -> Result<()> {
        linear::forward(self, out, x, weight, bias, shape)
    }

    fn linear_backward_input(
        &self,
        dx: &mut Compute<Self>,
        dout: &Compute<Self>,
        weight: &Compute<Self>,
        shape: LinearShape,
    ) -> Result<()> {
        linear::backward_input(self, dx, dout, weight, shape)
    }

    fn linear_backward_weight(
        &self,
        dweight: &mut Floats<Self>,
        dbias: Option<&mut Floats<Self>>,
        dout: &Compute<Self>,
        x: &Compute<Self>,
        shape: LinearShape,
    ) -> Result<()> {
        linear::backward_weight(self, dweight, dbias, dout, x, shape)
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
        rope::rope(self, qkv, table, positions, rows, shape, direction)
    }

    fn attention_forward(
        &self,
        out: &mut Compute<Self>,
        lse: &mut Floats<Self>,
        qkv: &Compute<Self>,
        batch: &BatchBuffers<Self>,
        shape: AttentionShape,
    ) -> Result<()> {
        attention::forward(self, out, lse, qkv, batch, shape)
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
        attention::backward(self, dqkv, dout, out, lse, qkv, batch, shape)
    }

    fn reserve_attention_backward(&self, rows: usize, pairs: usize, shape: AttentionShape) -> Result<()> {
        attention::reserve_backward(self, rows, pairs, shape)
    }

    fn attention_decode(
        &self,
        out: &mut Compute<Self>,
        cache: &Compute<Self>,
        length: usize,
        shape: AttentionShape,
    ) -> Result<()> {
        attention::decode(self, out, cache, length, shape)
    }

    fn linear_swiglu_forward(
        &self,
        out: &mut Compute<Self>,
        gate_up: &mut Compute<Self>,
        x: &Compute<Self>,
        weight: &Compute<Self>,
        bias: Option<&Compute<Self>>,
        shape: LinearShape,
    ) -> Result<()> {
        swiglu::linear_forward(self, out, gate_up, x, weight, bias, shape)
    }

    fn swiglu_forward(
        &self,
        out: &mut Compute<Self>,
        gate_up: &Compute<Self>,
        rows: usize,
        width: usize,
    ) -> Result<()> {
        swiglu::forward(self, out, gate_up, rows, width)
    }

    fn swiglu_backward(
        &self,
        dgate_up: &mut Compute<Self>,
        dout: &Compute<Self>,
        gate_up: &Compute<Self>,
        rows: usize,
        width: usize,
    ) -> Result<()> {
        swiglu::backward(self, dgate_up, dout, gate_up, rows, width)
    }

    fn gather_rows(
        &self,
        out: &mut Compute<Self>,
        hidden: &Compute<Self>,
        batch: &BatchBuffers<Self>,
        scored: usize,
        width: usize,
    ) -> Result<()> {
        gather_rows::forward(self, out, hidden, batch, scored, width)
    }

    fn gather_rows_backward(
        &self,
        dhidden: &mut Compute<Self>,
        dout: &Compute<Self>,
        batch: &BatchBuffers<Self>,
        rows: usize,
        width: usize,
    ) -> Result<()> {
        gather_rows::backward(self, dhidden, dout, batch, rows, width)
    }

    /// As much as a step is asked to take, see [`crate::model::HeadOptions`]: larger products, fewer walks over the
    /// vocabulary matrix.
    const HEAD_CHUNK_BYTES: usize = usize::MAX;

    fn logp_head_workspace(&self, mode: HeadMode, rows: usize, width: usize, vocab: usize) -> Result<usize> {
        logp_head::workspace_values(self, mode, rows, width, vocab)
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
        self.trace.scope("logp_head_forward", || {
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
        pair_objective::pair_objective(self, outcomes, coefficients, scores, batch, objective, pairs)
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
        self.trace.scope("logp_head_backward", || {
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
        self.trace.scope("gradient_norm", || optimizer::gradient_norm(self, out, gradients, max_norm))
    }

    fn adamw(
        &self,
        updates: &mut [AdamWUpdate<'_, Self>],
        norm: &Floats<Self>,
        step: AdamWStep,
    ) -> Result<()> {
        optimizer::adamw(self, updates, norm, step)
    }
}
