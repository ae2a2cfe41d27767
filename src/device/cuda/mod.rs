//! The CUDA device: bf16 weights and activations, the kernels of `kernels/*.cu`, on a real GPU or on the emulated one.
//!
//! Each file here launches the kernels of one family of operations. `backend.rs` declares what they need of a device;
//! `backend_gpu.rs` and `backend_emulated.rs` implement that for the two there are. All work of a device is queued on
//! one stream, but for copies of pinned host memory, which have two of their own; only downloads wait.

mod accumulate;
mod adapted_linear;
mod arena;
mod attention;
mod backend;
#[cfg(mmpo_emulated)]
mod backend_emulated;
#[cfg(mmpo_gpu_kernels)]
mod backend_gpu;
mod backend_planned;
mod bindings;
mod collectives;
#[cfg(mmpo_gpu_kernels)]
mod cublaslt;
mod embedding;
#[cfg(mmpo_emulated)]
mod emulated_queues;
mod gemm;
mod gemm_table;
mod head_chunks;
mod kernel_path;
pub mod libraries;
mod linear;
mod logp_head;
mod low_rank;
mod memory;
mod offload;
mod optimizer;
mod pair_objective;
mod probe;
mod queues;
mod rms_norm;
mod rope;
mod swiglu;
mod workspace_rules;

use std::ffi::c_void;
use std::fmt::{self, Debug};
use std::sync::Arc;
use std::sync::atomic::Ordering;

pub use self::attention::AttentionOrder;
use self::backend::{Backend, Moment};
#[cfg(mmpo_emulated)]
pub use self::backend_emulated::{
    EmulatedLaunch, EmulatorCounters, EmulatorOptions, EmulatorVariant, MMPO_EMULATOR_ASYNC_EARLY,
    MMPO_EMULATOR_ASYNC_LATE, MMPO_EMULATOR_ASYNC_RANDOM, MMPO_EMULATOR_SCHEDULE_ORDERED,
    MMPO_EMULATOR_SCHEDULE_RANDOM,
};
use self::bindings::{KernelTable, mmpo_status, mmpo_stream};
pub use self::gemm::{GemmChoice, GemmTile};
pub use self::kernel_path::KernelPath;
pub use self::memory::CudaBuffer;
use self::memory::{DeviceMemory, Workspace};
pub use self::offload::CudaHostBuffer;
#[cfg(not(mmpo_emulated))]
pub(crate) use self::probe::no_emulated_device;
pub use self::probe::{
    Gpu, build_info, check_driver_version, check_kernels, emulated_info, gpus, listed_gpus, start_driver,
};
pub use self::queues::CudaQueueEvent;
use super::Hardware;
use super::trace::{OperationTime, Trace};
use crate::error::{Error, Result};

/// A GPU, or the emulated one, as a [`Device`](super::Device).
pub struct CudaDevice {
    memory: Arc<DeviceMemory>,
    workspace: Workspace,
    path: KernelPath,
    gemm_choice: GemmChoice,
    attention_order: AttentionOrder,
    trace: Trace<Moment>,
}

/// Makes every GPU that is opened from now on take the launchers of another library, built from the same objects. This is
/// how tests execute the kernels' PTX on a stand-in for driver and runtime; no option of the program leads here.
///
/// # Errors
/// The name of a launcher that `find` does not have, or that launchers were replaced before.
///
/// # Safety
/// `find` gives, for a name of `kernels/api.h` without its prefix, the function declared there, which stays loaded.
#[cfg(mmpo_gpu_kernels)]
#[doc(hidden)]
pub unsafe fn launch_through(
    find: &dyn Fn(&str) -> Option<std::ptr::NonNull<c_void>>,
) -> std::result::Result<(), &'static str> {
    // SAFETY: the caller's promise.
    let table = unsafe { KernelTable::of(find)? };
    if backend_gpu::launch_through(table) { Ok(()) } else { Err("launchers were replaced before") }
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

    /// A GPU that is only planned for, see [`Memory::planned`](super::Memory::planned): on the kernels of `path`, with or
    /// without the vendor's library of gemms. It needs neither a GPU nor kernels.
    pub fn planned_gpu(path: KernelPath, has_gemm_library: bool) -> Self {
        Self::new(Box::new(backend_planned::PlannedBackend::new(true, has_gemm_library, None)), path)
    }

    /// As [`CudaDevice::planned_gpu`], of the emulated device.
    pub fn planned_emulated() -> Self {
        Self::new(Box::new(backend_planned::PlannedBackend::new(false, false, None)), KernelPath::Portable)
    }

    fn new(backend: Box<dyn Backend>, path: KernelPath) -> Self {
        CudaDevice {
            memory: DeviceMemory::new(backend),
            workspace: Workspace::default(),
            path,
            gemm_choice: GemmChoice::default(),
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

    /// The same device with this choice of gemm: to test or to time them side by side.
    #[must_use]
    pub fn with_gemm_choice(self, gemm_choice: GemmChoice) -> Self {
        CudaDevice { gemm_choice, ..self }
    }

    /// Whose gemm runs where there is a choice.
    pub fn gemm_choice(&self) -> GemmChoice {
        self.gemm_choice
    }

    /// Another handle of this GPU with this order of the sums in attention's backward pass, to time or to test the
    /// orders side by side. Either handle takes the buffers of the other; each has scratch memory and a trace of its
    /// own.
    ///
    /// No option of a training run leads here: a device starts with the fixed order, and only tests and benchmarks ask
    /// for another, so training gives the same bits every time.
    #[must_use]
    pub fn with_attention_order(&self, attention_order: AttentionOrder) -> Self {
        CudaDevice {
            memory: Arc::clone(&self.memory),
            workspace: Workspace::default(),
            path: self.path,
            gemm_choice: self.gemm_choice,
            attention_order,
            trace: Trace::default(),
        }
    }

    /// How often the host waited for the device since it was opened: for downloads, and for copies of pinned memory. Uploads go
    /// through staging memory and wait only where all of it is still on its way; that is not counted.
    pub fn host_waits(&self) -> usize {
        self.memory.waits.load(Ordering::Relaxed)
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

    /// Queues work, and records the device's time for it while a trace runs.
    fn traced<R>(&self, operation: &str, work: impl FnOnce() -> Result<R>) -> Result<R> {
        self.trace.around(operation, || self.backend().moment(), work)
    }

    /// Asks a launcher about its sizes: a pure function on the host, which launches nothing and is not traced.
    fn ask(&self, operation: &str, shape: &dyn Debug, call: impl Fn(&KernelTable) -> i64) -> Result<i64> {
        let mut answer = 0;
        self.backend().ask(operation, shape, &mut |kernels, _| {
            answer = call(kernels);
            0
        })?;
        Ok(answer)
    }

    /// Bytes of scratch memory that a launcher asks for by its own rule, a pure function.
    fn workspace_bytes(
        &self,
        operation: &str,
        shape: &dyn Debug,
        bytes: impl Fn(&KernelTable) -> i64,
    ) -> Result<usize> {
        let needed = self.ask(operation, shape, bytes)?;
        usize::try_from(needed)
            .map_err(|_| Error::bug(format!("{operation}: no scratch memory is enough for {shape:?}")))
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

impl Hardware for CudaDevice {
    const IS_CPU: bool = false;

    fn describe(&self) -> String {
        self.backend().describe()
    }

    fn arithmetic(&self) -> String {
        format!("{} bf16", self.backend().describe())
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
}
