//! What the CUDA device stands on: a real GPU or the emulated one. Everything above is written once.

use std::ffi::c_void;
use std::fmt::Debug;
use std::ptr::NonNull;
use std::time::Instant;

use half::bf16;

use super::bindings::{KernelTable, mmpo_status, mmpo_stream};
use crate::device::Queue;
use crate::error::Result;

/// A point in a device's work: the moment at which everything queued before it was done.
#[derive(Debug)]
#[cfg_attr(not(mmpo_emulated), allow(dead_code, reason = "only the emulated device reads the clock"))]
pub(super) enum Moment {
    /// A moment of a device whose calls end with their work.
    Host(Instant),
    #[cfg(mmpo_gpu_kernels)]
    Stream(cudarc::driver::CudaEvent),
}

/// An address in device memory; the host must not dereference it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Address(pub NonNull<c_void>);

impl Address {
    pub(super) fn pointer(self) -> *mut c_void {
        self.0.as_ptr()
    }

    /// The address `bytes` further on, inside the same allocation or one past its end.
    pub(super) fn offset(self, bytes: usize) -> *mut c_void {
        self.pointer().wrapping_byte_add(bytes)
    }
}

// SAFETY: an address is a number here: only a backend and its kernels dereference it, in the order of one stream.
unsafe impl Send for Address {}
// SAFETY: as above; sharing the number shares no access.
unsafe impl Sync for Address {}

/// A queue of copies beside the computation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lane {
    ToDevice,
    ToHost,
}

/// An event of a backend: a number that only the backend understands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct EventHandle(pub usize);

/// One launch, as [`Backend::launch`] runs it: it calls one launcher of the table on the stream.
pub(super) type LaunchCall<'a> = &'a mut dyn FnMut(&KernelTable, mmpo_stream) -> mmpo_status;

/// Memory, copies and launches of one device. A single stream keeps all of them in the order they were asked for, but for the
/// copies of [`Backend::copy_beside`], which events order.
pub(super) trait Backend: Debug + Send + Sync + 'static {
    /// One line for people.
    fn describe(&self) -> String;

    /// At least `bytes` bytes on a 256-byte boundary, of unknown content.
    fn allocate(&self, bytes: usize) -> Result<Address>;

    /// The most bytes that one more allocation may have; `None` where there is no fixed limit.
    fn free_memory(&self) -> Result<Option<usize>> {
        Ok(None)
    }

    /// Gives an allocation back. Work queued before may still use it: what is queued later runs after that.
    ///
    /// # Safety
    /// `address` comes from [`Backend::allocate`] of this backend, and is not used again.
    unsafe fn free(&self, address: Address);

    /// Copies `source` to device memory; `source` may be reused at once.
    ///
    /// # Safety
    /// `out` begins `source.len()` bytes inside a live allocation of this backend.
    unsafe fn copy_in(&self, out: *mut c_void, source: &[u8]) -> Result<()>;

    /// Copies device memory to `out`, after waiting for everything queued before.
    ///
    /// # Safety
    /// `source` begins `out.len()` bytes inside a live allocation of this backend.
    unsafe fn copy_out(&self, out: &mut [u8], source: *const c_void) -> Result<()>;

    /// Copies inside device memory.
    ///
    /// # Safety
    /// Both begin `bytes` bytes inside live allocations of this backend, and do not overlap.
    unsafe fn copy(&self, out: *mut c_void, source: *const c_void, bytes: usize) -> Result<()>;

    /// Runs `call` with the device current on this thread; `operation` and `shape` are for the message of an error.
    fn launch(&self, operation: &str, shape: &dyn Debug, call: LaunchCall<'_>) -> Result<()>;

    /// As [`Backend::launch`], of a function that only answers a question.
    fn ask(&self, operation: &str, shape: &dyn Debug, call: LaunchCall<'_>) -> Result<()> {
        self.launch(operation, shape, call)
    }

    /// Whether this device is only planned for: see [`Memory::planned`](crate::device::Memory::planned).
    fn only_counts(&self) -> bool {
        false
    }

    /// Whether memory comes in pieces that are larger than a buffer.
    fn takes_pieces(&self) -> bool {
        false
    }

    /// The most bytes that were taken at once, idle ones included, where that is counted.
    fn taken_at_peak(&self) -> Option<usize> {
        None
    }

    /// The moment at which all work queued so far is done.
    fn moment(&self) -> Result<Moment> {
        Ok(Moment::Host(Instant::now()))
    }

    /// Seconds from one moment of this backend to a later one, which is waited for.
    fn seconds_between(&self, start: &Moment, end: &Moment) -> Result<f64>;

    /// At least `bytes` zeros of the host's memory, pinned so that copies run beside the computation.
    fn allocate_host(&self, bytes: usize) -> Result<Address>;

    /// Gives pinned memory back, after waiting for the copies.
    ///
    /// # Safety
    /// `address` comes from [`Backend::allocate_host`] of this backend for `bytes` bytes, and is not used again.
    unsafe fn free_host(&self, address: Address, bytes: usize);

    /// Waits for all copies of the two queues beside the computation.
    fn finish_copies(&self) -> Result<()>;

    /// Queues a copy between pinned memory and the device on a queue of its own.
    ///
    /// # Safety
    /// Both begin `bytes` bytes inside live allocations, one pinned and one on the device as `lane` says, and the host
    /// touches the pinned ones only after [`Backend::finish_copies`].
    unsafe fn copy_beside(
        &self,
        lane: Lane,
        out: *mut c_void,
        source: *const c_void,
        bytes: usize,
    ) -> Result<()>;

    /// A new event, not recorded yet: a wait for it is over at once.
    fn new_event(&self) -> Result<EventHandle>;

    /// Gives an event back.
    ///
    /// # Safety
    /// `event` comes from [`Backend::new_event`] of this backend, and is not used again.
    unsafe fn free_event(&self, event: EventHandle);

    /// Makes `event` the moment at which what `queue` holds now is done.
    ///
    /// # Safety
    /// `event` comes from [`Backend::new_event`] of this backend.
    unsafe fn record(&self, event: EventHandle, queue: Queue) -> Result<()>;

    /// Makes what is queued on `queue` from now on wait for `event` as it was recorded last.
    ///
    /// # Safety
    /// As [`Backend::record`].
    unsafe fn wait(&self, queue: Queue, event: EventHandle) -> Result<()>;

    /// The stream of [`Queue::Collectives`] as NCCL takes it, with the device current on this thread. Work may be queued on it until this
    /// is called again or anything is waited for.
    fn collectives_stream(&self) -> Result<*mut c_void>;

    /// Does the collectives that were queued and that nothing waited for, where they do not run by themselves.
    fn flush_collectives(&self) -> Result<()> {
        Ok(())
    }

    /// The vendor's gemm library, where there is one; `gemm.rs` says which kernel runs otherwise.
    fn gemm_library(&self) -> Option<&dyn GemmLibrary> {
        None
    }

    /// Whether there is a vendor's gemm library.
    fn has_gemm_library(&self) -> bool {
        self.gemm_library().is_some()
    }
}

/// A library of gemms on the backend's stream.
pub(super) trait GemmLibrary {
    /// Queues one gemm.
    ///
    /// # Safety
    /// The operands lie in live allocations of the backend, of at least the sizes that `gemm` states, and `out`
    /// overlaps none of the others.
    unsafe fn multiply(&self, gemm: &Gemm) -> Result<()>;
}

/// Output of a gemm, and its type.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(mmpo_gpu_kernels), allow(dead_code, reason = "only the vendor's library reads it"))]
pub(super) enum GemmOut {
    /// Rounded to nearest even.
    Bf16(*mut bf16),
    /// The accumulators as they are.
    F32(*mut f32),
}

/// A row-major matrix that enters a gemm as it lies in memory, or transposed.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(mmpo_gpu_kernels), allow(dead_code, reason = "only the vendor's library reads it"))]
pub(super) struct Operand {
    /// Address of the first value in device memory.
    pub values: *const bf16,
    /// Whether the matrix is read transposed.
    pub transposed: bool,
}

/// `out[rows, columns] = left[rows, depth] * right[depth, columns] (+ bias[columns])`, or `+=` to accumulate.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(mmpo_gpu_kernels), allow(dead_code, reason = "only the vendor's library reads it"))]
pub(super) struct Gemm {
    /// Where the result goes, and in which type.
    pub out: GemmOut,
    /// Whether the result is added to what is there.
    pub accumulate: bool,
    /// `[rows, depth]`
    pub left: Operand,
    /// `[depth, columns]`
    pub right: Operand,
    /// `[columns]`, added to every row.
    pub bias: Option<*const bf16>,
    /// Rows of the result.
    pub rows: usize,
    /// Columns of the result.
    pub columns: usize,
    /// Length of each sum.
    pub depth: usize,
}
