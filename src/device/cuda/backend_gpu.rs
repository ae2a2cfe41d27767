//! A real GPU: the driver's primary context, one stream for all work, two for copies and one for collectives beside it, and pinned staging memory
//! for uploads.

use std::ffi::{CStr, c_void};
use std::fmt::{self, Debug};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::{CudaContext, CudaStream, sys};
use miette::Diagnostic as _;

use super::arena::{Arena, PieceSource};
use super::backend::{Address, Backend, EventHandle, GemmLibrary, Lane, LaunchCall, Moment};
use super::bindings::KernelTable;
use super::bindings::gpu::KERNELS;
use super::cublaslt::CublasLt;
use super::probe::{Gpu, advice, driver_error};
use crate::device::Queue;
use crate::error::{Error, Result};

/// Number of pinned slots, enough that the uploads of two micro-batches never wait for each other.
const SLOTS: usize = 32;
/// Large enough that a copy is as fast as the bus.
const SLOT_BYTES: usize = 4 << 20;
/// Slots that are filled at once, each by a thread: one thread reads a file's map at a fraction of what the bus takes. While
/// they are filled, those of the groups before are on their way.
const GROUP: usize = 8;

/// Launchers in place of those that are linked into the program; see [`super::launch_through`].
static STAND_IN: OnceLock<KernelTable> = OnceLock::new();

/// Takes the launchers of `table` from now on. False if others were taken before.
pub(super) fn launch_through(table: KernelTable) -> bool {
    STAND_IN.set(table).is_ok()
}

/// The launchers that every GPU of this process uses.
fn kernels() -> &'static KernelTable {
    STAND_IN.get().unwrap_or(&KERNELS)
}

/// One GPU, one stream.
pub(super) struct GpuBackend {
    // Dropped in this order: what needs the context goes before it.
    gemm_library: Option<CublasLt>,
    staging: Mutex<Staging>,
    arena: Mutex<Arena>,
    lanes: Mutex<Option<Lanes>>,
    stream: Arc<CudaStream>,
    context: Arc<CudaContext>,
    description: String,
}

impl GpuBackend {
    pub(super) fn open(gpu: &Gpu) -> Result<Self> {
        let failed = |error| driver_error(&format!("opening cuda:{}", gpu.ordinal), error);
        let context = CudaContext::new(gpu.ordinal).map_err(failed)?;
        let stream = context.new_stream().map_err(failed)?;
        let staging = Staging::new().map_err(failed)?;
        let (gemm_library, how) = match CublasLt::open(&stream) {
            Ok(library) => {
                let how = format!("cuBLASLt {}", library.version());
                (Some(library), how)
            }
            Err(why) => {
                let advice = why.help().map_or(String::new(), |help| format!("; {help}"));
                tracing::warn!("{why}: matrix products run on the slower portable kernel instead{advice}");
                (None, "portable kernel, no cuBLASLt".to_owned())
            }
        };
        let description = format!("cuda:{} ({gpu}; products: {how})", gpu.ordinal);
        // A stand-in checks accesses by allocation, so each buffer is an allocation of its own.
        let arena = if STAND_IN.get().is_some() { Arena::exact() } else { Arena::default() };
        let (staging, arena) = (Mutex::new(staging), Mutex::new(arena));
        let lanes = Mutex::default();
        Ok(GpuBackend { gemm_library, staging, arena, lanes, stream, context, description })
    }

    /// Runs `work` with the streams beside the computation, which exist from the first call on.
    fn with_lanes<R>(
        &self,
        operation: &str,
        work: impl FnOnce(&mut Lanes) -> std::result::Result<R, DriverError>,
    ) -> Result<R> {
        self.bind()?;
        let mut held = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        let run = |held: &mut Option<Lanes>| {
            let lanes = match held {
                Some(lanes) => lanes,
                None => held.insert(Lanes::new()?),
            };
            work(lanes)
        };
        run(&mut held).map_err(|error| driver_error(operation, error))
    }

    /// Makes the context current on this thread: the runtime inside the kernels' library and the driver's calls use it.
    fn bind(&self) -> Result<sys::CUstream> {
        self.context.bind_to_thread().map_err(|error| driver_error("using the GPU", error))?;
        Ok(self.stream.cu_stream())
    }
}

impl Drop for GpuBackend {
    fn drop(&mut self) {
        // The fields free what belongs to the context, on whichever thread this is.
        let freed = self.bind().and_then(|stream| {
            let arena = self.arena.get_mut().unwrap_or_else(PoisonError::into_inner);
            arena
                .pieces()
                .try_for_each(|piece| Driver { stream }.give_back(piece))
                .map_err(|error| driver_error("freeing GPU memory", error))
        });
        if let Err(error) = freed {
            tracing::debug!("{error}");
        }
    }
}

impl Debug for GpuBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GpuBackend({})", self.description)
    }
}

impl Backend for GpuBackend {
    fn describe(&self) -> String {
        self.description.clone()
    }

    fn allocate(&self, bytes: usize) -> Result<Address> {
        let stream = self.bind()?;
        let mut arena = self.arena.lock().unwrap_or_else(PoisonError::into_inner);
        let address = arena
            .allocate(bytes, &mut Driver { stream })
            .map_err(|error| self.out_of_memory(bytes, error))?;
        NonNull::new(address as *mut c_void)
            .map(Address)
            .ok_or_else(|| Error::device("the driver allocated nothing", "look at `nvidia-smi`"))
    }

    fn free_memory(&self) -> Result<Option<usize>> {
        self.bind()?;
        let (free, _) =
            result::mem_get_info().map_err(|error| driver_error("asking for free GPU memory", error))?;
        let arena = self.arena.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Some(free.max(arena.largest_free())))
    }

    unsafe fn free(&self, address: Address) {
        let freed = self.finish_copies().and_then(|()| self.bind()).and_then(|stream| {
            let mut arena = self.arena.lock().unwrap_or_else(PoisonError::into_inner);
            arena
                .free(address.pointer() as u64, &mut Driver { stream })
                .map_err(|error| driver_error("freeing GPU memory", error))
        });
        if let Err(error) = freed {
            // A destructor cannot return it; a failed kernel makes every later call fail, and was reported before.
            tracing::debug!("{error}");
        }
    }

    unsafe fn copy_in(&self, out: *mut c_void, source: &[u8]) -> Result<()> {
        let stream = self.bind()?;
        let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the caller's promise; the lock keeps the slots of one upload from those of another.
        unsafe { staging.copy_in(out as u64, source, stream) }
            .map_err(|error| driver_error(&format!("copying {} bytes to the GPU", source.len()), error))
    }

    unsafe fn copy_out(&self, out: &mut [u8], source: *const c_void) -> Result<()> {
        let stream = self.bind()?;
        let bytes = out.len();
        // SAFETY: the caller's promise, and `out` is borrowed until the wait is over.
        unsafe {
            result::memcpy_dtoh_async(out, source as u64, stream)
                .and_then(|()| result::stream::synchronize(stream))
        }
        .map_err(|error| {
            driver_error(&format!("waiting for the GPU, then copying {bytes} bytes from it"), error)
        })
    }

    unsafe fn copy(&self, out: *mut c_void, source: *const c_void, bytes: usize) -> Result<()> {
        let stream = self.bind()?;
        // SAFETY: the caller's promise.
        unsafe { result::memcpy_dtod_async(out as u64, source as u64, bytes, stream) }
            .map_err(|error| driver_error(&format!("copying {bytes} bytes inside the GPU"), error))
    }

    fn launch(&self, operation: &str, shape: &dyn Debug, call: LaunchCall<'_>) -> Result<()> {
        let stream = self.bind()?;
        let status = call(kernels(), stream.cast());
        if status == 0 {
            return Ok(());
        }
        // SAFETY: the launcher returns a static C string.
        let text = unsafe { CStr::from_ptr((kernels().error_text)(status)) }.to_string_lossy();
        Err(Error::device(format!("{operation} of {shape:?}: {text}"), advice(status)))
    }

    fn moment(&self) -> Result<Moment> {
        self.bind()?;
        // cudarc's default events record no times.
        let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
        let event = self.stream.record_event(flags);
        event.map(Moment::Stream).map_err(|error| driver_error("recording an event", error))
    }

    fn seconds_between(&self, start: &Moment, end: &Moment) -> Result<f64> {
        let (Moment::Stream(start), Moment::Stream(end)) = (start, end) else {
            return Err(Error::bug("a moment of another device"));
        };
        let milliseconds = start.elapsed_ms(end);
        milliseconds
            .map(|milliseconds| f64::from(milliseconds) * 1e-3)
            .map_err(|error| driver_error("waiting for the GPU's work between two events", error))
    }

    fn takes_pieces(&self) -> bool {
        STAND_IN.get().is_none()
    }

    fn allocate_host(&self, bytes: usize) -> Result<Address> {
        self.bind()?;
        // SAFETY: the context is current; the caller owns the memory from here on.
        let memory = unsafe { result::malloc_host(bytes, sys::CU_MEMHOSTALLOC_PORTABLE) };
        let memory = memory.map_err(|_| {
            Error::device(
                format!("no pinned host memory for {:.2} GiB more", bytes as f64 / f64::from(1 << 30)),
                "use a machine with more memory, make the states smaller (--optimizer-states 8bit), or leave --offload out",
            )
        })?;
        // SAFETY: the driver allocated `bytes` bytes.
        unsafe { std::ptr::write_bytes(memory.cast::<u8>(), 0, bytes) };
        NonNull::new(memory)
            .map(Address)
            .ok_or_else(|| Error::device("the driver allocated no pinned memory", "look at `free -h`"))
    }

    unsafe fn free_host(&self, address: Address, _: usize) {
        let freed = self.finish_copies().and_then(|()| {
            // SAFETY: the caller's promise, and no copy uses it any more.
            unsafe { result::free_host(address.pointer()) }
                .map_err(|error| driver_error("freeing pinned memory", error))
        });
        if let Err(error) = freed {
            tracing::debug!("{error}");
        }
    }

    fn finish_copies(&self) -> Result<()> {
        if self.lanes.lock().unwrap_or_else(PoisonError::into_inner).is_none() {
            return Ok(());
        }
        self.with_lanes("waiting for copies beside the computation", |lanes| lanes.finish())
    }

    unsafe fn copy_beside(
        &self,
        lane: Lane,
        out: *mut c_void,
        source: *const c_void,
        bytes: usize,
    ) -> Result<()> {
        self.with_lanes(&format!("copying {bytes} bytes beside the computation"), |lanes| {
            lanes.busy = true;
            let stream = lanes.streams[lane as usize];
            // SAFETY: the caller's promise. The driver reads and writes the pinned bytes, of which no reference is left
            // when the copy runs.
            unsafe {
                match lane {
                    Lane::ToDevice => {
                        let source = std::slice::from_raw_parts(source.cast::<u8>(), bytes);
                        result::memcpy_htod_async(out as u64, source, stream)
                    }
                    Lane::ToHost => {
                        let out = std::slice::from_raw_parts_mut(out.cast::<u8>(), bytes);
                        result::memcpy_dtoh_async(out, source as u64, stream)
                    }
                }
            }
        })
    }

    fn new_event(&self) -> Result<EventHandle> {
        self.bind()?;
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
        event.map(|event| EventHandle(event as usize)).map_err(|error| driver_error("making an event", error))
    }

    unsafe fn free_event(&self, event: EventHandle) {
        let freed = self.bind().and_then(|_| {
            // SAFETY: the caller's promise.
            unsafe { result::event::destroy(event.0 as sys::CUevent) }
                .map_err(|error| driver_error("freeing an event", error))
        });
        if let Err(error) = freed {
            tracing::debug!("{error}");
        }
    }

    unsafe fn record(&self, event: EventHandle, queue: Queue) -> Result<()> {
        let compute = self.bind()?;
        self.with_lanes("recording an event", |lanes| {
            // SAFETY: the caller's promise; the streams live as long as the backend.
            unsafe { result::event::record(event.0 as sys::CUevent, lanes.stream(queue, compute)) }
        })
    }

    unsafe fn wait(&self, queue: Queue, event: EventHandle) -> Result<()> {
        let compute = self.bind()?;
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        self.with_lanes("waiting for an event", |lanes| {
            // SAFETY: as above.
            unsafe {
                result::stream::wait_event(lanes.stream(queue, compute), event.0 as sys::CUevent, flags)
            }
        })
    }

    fn collectives_stream(&self) -> Result<*mut c_void> {
        self.with_lanes("making the stream of collectives", |lanes| {
            lanes.busy = true;
            Ok(lanes.collectives.cast())
        })
    }

    fn gemm_library(&self) -> Option<&dyn GemmLibrary> {
        self.gemm_library.as_ref().map(|library| library as &dyn GemmLibrary)
    }
}

impl GpuBackend {
    fn out_of_memory(&self, bytes: usize, error: DriverError) -> Error {
        if error.0 != sys::cudaError_enum::CUDA_ERROR_OUT_OF_MEMORY {
            return driver_error("allocating GPU memory", error);
        }
        let gib = |bytes: usize| bytes as f64 / f64::from(1 << 30);
        let free = result::mem_get_info().map(|(free, total)| (gib(free), gib(total)));
        let place = match free {
            Ok((free, total)) => format!("{free:.2} GiB of {total:.2} GiB are free"),
            Err(_) => "the driver does not say how much is free".to_owned(),
        };
        Error::device(
            format!(
                "no GPU memory for {:.2} GiB more on cuda:{}: {place}",
                gib(bytes),
                self.context.ordinal()
            ),
            "lower the token budget of a micro-batch, use a smaller model, or end other programs on this GPU",
        )
    }
}

/// The streams beside the computation.
struct Lanes {
    /// The streams of copies, in the order of [`Lane`].
    streams: [sys::CUstream; 2],
    collectives: sys::CUstream,
    /// Whether a copy or a collective was queued since the last wait for all of them.
    busy: bool,
}

// SAFETY: streams may be used from any thread; the lock of `GpuBackend::lanes` guards the rest.
unsafe impl Send for Lanes {}

impl Lanes {
    /// The context must be current.
    fn new() -> std::result::Result<Self, DriverError> {
        let new = || result::stream::create(result::stream::StreamKind::NonBlocking);
        Ok(Lanes { streams: [new()?, new()?], collectives: new()?, busy: false })
    }

    fn stream(&self, queue: Queue, compute: sys::CUstream) -> sys::CUstream {
        match queue {
            Queue::Compute => compute,
            Queue::ToDevice => self.streams[Lane::ToDevice as usize],
            Queue::ToHost => self.streams[Lane::ToHost as usize],
            Queue::Collectives => self.collectives,
        }
    }

    fn all(&self) -> [sys::CUstream; 3] {
        [self.streams[0], self.streams[1], self.collectives]
    }

    fn finish(&mut self) -> std::result::Result<(), DriverError> {
        if std::mem::take(&mut self.busy) {
            for stream in self.all() {
                // SAFETY: the streams live as long as this does.
                unsafe { result::stream::synchronize(stream)? };
            }
        }
        Ok(())
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        for stream in self.all() {
            // SAFETY: nothing is queued on it any more: buffers waited for their copies and collectives.
            if let Err(error) = unsafe { result::stream::destroy(stream) } {
                tracing::debug!("freeing a stream: {error:?}");
            }
        }
    }
}

/// The driver as the arena's source; the context must be current.
struct Driver {
    stream: sys::CUstream,
}

impl PieceSource for Driver {
    type Error = DriverError;

    fn take(&mut self, bytes: usize) -> std::result::Result<u64, DriverError> {
        // SAFETY: the context is current; the arena owns the piece from here on.
        unsafe { result::malloc_sync(bytes) }
    }

    fn give_back(&mut self, address: u64) -> std::result::Result<(), DriverError> {
        // SAFETY: no buffer lies in the piece any more, and after the wait nothing queued uses it.
        unsafe { result::stream::synchronize(self.stream).and_then(|()| result::free_sync(address)) }
    }
}

/// Pinned memory in slots: an upload is copied there and goes to the GPU in its own time, so the caller need not wait
/// for work queued before, as an upload from pageable memory would.
struct Staging {
    slots: Vec<Slot>,
    next: usize,
}

struct Slot {
    memory: *mut u8,
    /// Recorded after the last copy out of the slot.
    copied: sys::CUevent,
}

// SAFETY: the pointers are used under the lock of `GpuBackend::staging` alone; the driver's calls are thread-safe.
unsafe impl Send for Staging {}

impl Staging {
    /// The context must be current.
    fn new() -> std::result::Result<Self, DriverError> {
        let mut staging = Staging { slots: Vec::with_capacity(SLOTS), next: 0 };
        for _ in 0..SLOTS {
            let copied = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
            // SAFETY: the context is current; the memory is freed with the slot.
            let memory = unsafe { result::malloc_host(SLOT_BYTES, 0)? };
            staging.slots.push(Slot { memory: memory.cast(), copied });
        }
        Ok(staging)
    }

    /// # Safety
    /// The context is current, and `out` begins `source.len()` bytes inside a live allocation.
    unsafe fn copy_in(
        &mut self,
        out: sys::CUdeviceptr,
        source: &[u8],
        stream: sys::CUstream,
    ) -> std::result::Result<(), DriverError> {
        for (group, bytes) in source.chunks(GROUP * SLOT_BYTES).enumerate() {
            let out = out + (group * GROUP * SLOT_BYTES) as u64;
            // SAFETY: the caller's promise.
            unsafe { self.copy_group(out, bytes, stream)? };
        }
        Ok(())
    }

    /// As [`Staging::copy_in`], of at most [`GROUP`] slots.
    ///
    /// # Safety
    /// As [`Staging::copy_in`].
    unsafe fn copy_group(
        &mut self,
        out: sys::CUdeviceptr,
        source: &[u8],
        stream: sys::CUstream,
    ) -> std::result::Result<(), DriverError> {
        let mut staged = Vec::with_capacity(GROUP);
        for bytes in source.chunks(SLOT_BYTES) {
            let slot = &self.slots[self.next];
            self.next = (self.next + 1) % SLOTS;
            // SAFETY: the wait ends the slot's last copy, so the slot is free; a chunk fits into it; a group has fewer chunks
            // than there are slots, so no slot is named twice.
            let memory = unsafe {
                result::event::synchronize(slot.copied)?;
                std::slice::from_raw_parts_mut(slot.memory, bytes.len())
            };
            staged.push((memory, bytes, slot.copied));
        }
        match &mut staged[..] {
            [(memory, bytes, _)] => memory.copy_from_slice(bytes),
            several => std::thread::scope(|threads| {
                for (memory, bytes, _) in several {
                    threads.spawn(|| memory.copy_from_slice(bytes));
                }
            }),
        }
        for (chunk, (memory, _, copied)) in staged.into_iter().enumerate() {
            // SAFETY: the range of `out` is the caller's promise; the slot is written again only after the event.
            unsafe {
                result::memcpy_htod_async(out + (chunk * SLOT_BYTES) as u64, memory, stream)?;
                result::event::record(copied, stream)?;
            }
        }
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        for slot in &self.slots {
            // SAFETY: the wait ends the slot's last copy, and nothing names the slot any more. An error means that the
            // context is lost, and its memory with it.
            let freed = unsafe {
                result::event::synchronize(slot.copied)
                    .and_then(|()| result::free_host(slot.memory.cast()))
                    .and_then(|()| result::event::destroy(slot.copied))
            };
            if let Err(error) = freed {
                tracing::debug!("freeing pinned memory: {error:?}");
            }
        }
    }
}
