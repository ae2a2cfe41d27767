//! The emulated device of `kernels/emulator/`, in its fast or its instrumented variant.

use std::ffi::{CStr, c_int, c_void};
use std::fmt::{self, Debug};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::backend::{Address, Backend, EventHandle, Lane, LaunchCall, Moment};
use super::bindings::{
    EmulatorTable, KernelTable, checked, emulated, mmpo_emulator_counters, mmpo_emulator_options,
};
use super::emulated_queues::{Pending, PendingCollective, PendingCopy, Queues, Run};
use crate::device::Queue;
use crate::error::{Error, Result};

pub use super::bindings::{
    MMPO_EMULATOR_ASYNC_EARLY, MMPO_EMULATOR_ASYNC_LATE, MMPO_EMULATOR_ASYNC_RANDOM,
    MMPO_EMULATOR_SCHEDULE_ORDERED, MMPO_EMULATOR_SCHEDULE_RANDOM,
};
/// How the emulated device behaves, see `kernels/emulator/emulator_api.h`.
pub type EmulatorOptions = mmpo_emulator_options;
/// What the emulated device counted since the last reset, see `kernels/emulator/emulator_api.h`.
pub type EmulatorCounters = mmpo_emulator_counters;

/// What one launcher did.
#[derive(Clone, Debug)]
pub struct EmulatedLaunch {
    /// The launcher, as `kernels/api.h` names it.
    pub launcher: String,
    /// What the launcher's kernels did.
    pub counters: EmulatorCounters,
}

/// Which build of the kernels runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EmulatorVariant {
    /// The fast build. It behaves as a GPU does, and finds deadlocks, writes past an allocation, and misaligned or wild
    /// addresses of the instructions that the emulator implements (copies, matrix instructions).
    Plain,
    /// Every load and store is watched: bounds, uninitialised memory, races.
    Checked,
}

/// One variant of the emulated device. A process has one of each, and calls into it must not overlap.
struct Variant {
    name: &'static str,
    kernels: &'static KernelTable,
    emulator: &'static EmulatorTable,
    calls: Mutex<()>,
    /// Launches since counting began; `None` while no one counts.
    launches: Mutex<Option<Vec<EmulatedLaunch>>>,
}

static PLAIN: Variant = Variant {
    name: "emulated",
    kernels: &emulated::KERNELS,
    emulator: &emulated::EMULATOR,
    calls: Mutex::new(()),
    launches: Mutex::new(None),
};
static CHECKED: Variant = Variant {
    name: "emulated, every access checked",
    kernels: &checked::KERNELS,
    emulator: &checked::EMULATOR,
    calls: Mutex::new(()),
    launches: Mutex::new(None),
};

impl EmulatorVariant {
    fn get(self) -> &'static Variant {
        match self {
            EmulatorVariant::Plain => &PLAIN,
            EmulatorVariant::Checked => &CHECKED,
        }
    }

    /// Sets how all devices of this variant behave from now on.
    pub fn configure(self, options: EmulatorOptions) -> Result<()> {
        let variant = self.get();
        let _one_at_a_time = variant.lock();
        // SAFETY: the options are read during the call.
        variant.check("configure", unsafe { (variant.emulator.configure)(&options) })
    }

    /// Counts since [`EmulatorVariant::reset_counters`], of all devices of this variant.
    pub fn counters(self) -> EmulatorCounters {
        let variant = self.get();
        let _one_at_a_time = variant.lock();
        variant.counters()
    }

    /// Sets all counters of the variant to 0.
    pub fn reset_counters(self) {
        let variant = self.get();
        let _one_at_a_time = variant.lock();
        variant.reset_counters();
    }

    /// Runs `work` and says what each launcher in it did, in order. Resets the counters.
    pub fn count_launches<R>(self, work: impl FnOnce() -> R) -> (R, Vec<EmulatedLaunch>) {
        let variant = self.get();
        *variant.launches.lock().unwrap_or_else(PoisonError::into_inner) = Some(Vec::new());
        let result = work();
        let launches = variant.launches.lock().unwrap_or_else(PoisonError::into_inner).take();
        (result, launches.unwrap_or_default())
    }
}

impl Variant {
    fn lock(&self) -> MutexGuard<'_, ()> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The caller must hold [`Variant::lock`].
    fn counters(&self) -> EmulatorCounters {
        let mut counters = std::mem::MaybeUninit::zeroed();
        // SAFETY: the call assigns the counters, which are plain numbers and valid as zeros anyway.
        unsafe {
            (self.emulator.counters)(counters.as_mut_ptr());
            counters.assume_init()
        }
    }

    /// The caller must hold [`Variant::lock`].
    fn reset_counters(&self) {
        // SAFETY: no launch is running, because the lock is held.
        unsafe { (self.emulator.reset_counters)() };
    }

    fn check(&self, operation: &str, status: c_int) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: the text is a C string that lives until the next failing call, which the held lock excludes.
        let text = unsafe { CStr::from_ptr((self.emulator.last_error)()) }.to_string_lossy().into_owned();
        Err(Error::bug(format!("{operation} on the emulated device: {text}")))
    }
}

/// The stream of collectives as a library sees it that stands in for NCCL: the first two fields, which
/// `tests/nccl/emulated_stream.h` declares too.
#[repr(C)]
struct EmulatedStream {
    magic: u64,
    enqueue: unsafe extern "C" fn(*mut EmulatedStream, Run, *mut c_void),
    queues: Arc<Mutex<Queues>>,
}

/// Tells an [`EmulatedStream`] from anything else that a stream's pointer may lead to.
const STREAM_MAGIC: u64 = 0x6d6d_706f_5f73_7472;

/// # Safety
/// `stream` is that of a live backend, and `run` may be called once with `argument`, on any thread.
unsafe extern "C" fn enqueue(stream: *mut EmulatedStream, run: Run, argument: *mut c_void) {
    // SAFETY: the caller's promise; the stream is only ever shared.
    let queues = unsafe { &(*stream).queues };
    queues.lock().unwrap_or_else(PoisonError::into_inner).collective(run, argument);
}

/// The emulated device as a backend.
pub(super) struct EmulatedBackend {
    variant: &'static Variant,
    queues: Arc<Mutex<Queues>>,
    /// Held while work of the queues is done, so that another thread that waits for the same work goes on after it.
    landing: Mutex<()>,
    /// Its address stays the same.
    stream: Box<EmulatedStream>,
}

impl EmulatedBackend {
    pub(super) fn new(variant: EmulatorVariant) -> Self {
        let queues: Arc<Mutex<Queues>> = Arc::default();
        let stream = EmulatedStream { magic: STREAM_MAGIC, enqueue, queues: Arc::clone(&queues) };
        EmulatedBackend { variant: variant.get(), queues, landing: Mutex::new(()), stream: Box::new(stream) }
    }

    fn queues(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does the work of the queues whose time has come, which `due` takes out of them.
    fn land(&self, due: impl FnOnce(&mut Queues) -> Vec<Pending>) -> Result<()> {
        let _one_after_the_other = self.landing.lock().unwrap_or_else(PoisonError::into_inner);
        let due = due(&mut self.queues());
        // A failed copy must not keep the collectives from being given back to their library.
        let mut result = Ok(());
        for pending in due {
            match pending {
                Pending::Copy(copy) => result = result.and_then(|()| self.land_copy(&copy)),
                Pending::Collective(PendingCollective { run, argument, races }) => {
                    // The emulated device is not locked: other ranks may be threads that use it before they come here too.
                    // SAFETY: the promise of `enqueue`; allocations wait for the queues before they are freed.
                    unsafe { run(argument, races.into()) };
                }
            }
        }
        result
    }

    fn land_copy(&self, copy: &PendingCopy) -> Result<()> {
        let _one_at_a_time = self.variant.lock();
        let emulator = self.variant.emulator;
        let &PendingCopy { lane, out, source, bytes, .. } = copy;
        let (raced, len) = (copy.raced_bytes(), bytes as u64);
        match lane {
            Lane::ToDevice => {
                let source = raced.as_ref().map_or(source, |raced| raced.as_ptr().cast());
                // SAFETY: the promise of `copy_beside`; allocations wait for the copies before they are freed.
                self.variant.check("fetch", unsafe { (emulator.upload)(out, source, len) })?;
            }
            Lane::ToHost => {
                // SAFETY: as above.
                self.variant.check("store", unsafe { (emulator.download)(out, source, len) })?;
                if let Some(raced) = raced {
                    // SAFETY: `out` was just written, `bytes` of them.
                    unsafe { std::ptr::copy_nonoverlapping(raced.as_ptr(), out.cast(), bytes) };
                }
            }
        }
        Ok(())
    }
}

impl Debug for EmulatedBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EmulatedBackend({})", self.variant.name)
    }
}

impl Backend for EmulatedBackend {
    fn describe(&self) -> String {
        format!("cuda ({}: the GPU's kernels on the CPU, for tests and not for speed)", self.variant.name)
    }

    fn allocate(&self, bytes: usize) -> Result<Address> {
        let _one_at_a_time = self.variant.lock();
        let mut address: *mut c_void = std::ptr::null_mut();
        let malloc = self.variant.emulator.malloc;
        // SAFETY: the call writes the address.
        self.variant.check("malloc", unsafe { malloc(&mut address, bytes as u64) })?;
        NonNull::new(address).map(Address).ok_or_else(|| {
            Error::device(format!("no memory for {bytes} bytes"), "use a smaller model or token budget")
        })
    }

    unsafe fn free(&self, address: Address) {
        if let Err(error) = self.finish_copies() {
            tracing::error!("{error}");
        }
        let _one_at_a_time = self.variant.lock();
        // SAFETY: the caller's promise; launches are over when they return, so none uses it.
        let freed = self.variant.check("free", unsafe { (self.variant.emulator.free)(address.pointer()) });
        if let Err(error) = freed {
            // A destructor cannot return it, and a corrupted guard must not pass unseen.
            tracing::error!("{error}");
        }
    }

    unsafe fn copy_in(&self, out: *mut c_void, source: &[u8]) -> Result<()> {
        self.queues().launched();
        let _one_at_a_time = self.variant.lock();
        let (bytes, source) = (source.len() as u64, source.as_ptr().cast());
        // SAFETY: the caller's promise.
        self.variant.check("upload", unsafe { (self.variant.emulator.upload)(out, source, bytes) })
    }

    unsafe fn copy_out(&self, out: &mut [u8], source: *const c_void) -> Result<()> {
        let _one_at_a_time = self.variant.lock();
        let (bytes, out) = (out.len() as u64, out.as_mut_ptr().cast());
        // SAFETY: the call only reads the guard bytes around every allocation; it fails if a kernel overwrote any.
        self.variant.check("synchronize", unsafe { (self.variant.emulator.synchronize)() })?;
        // SAFETY: the caller's promise.
        self.variant.check("download", unsafe { (self.variant.emulator.download)(out, source, bytes) })
    }

    unsafe fn copy(&self, out: *mut c_void, source: *const c_void, bytes: usize) -> Result<()> {
        self.queues().launched();
        let _one_at_a_time = self.variant.lock();
        // SAFETY: the caller's promise.
        self.variant.check("copy", unsafe { (self.variant.emulator.copy)(out, source, bytes as u64) })
    }

    fn launch(&self, operation: &str, shape: &dyn Debug, call: LaunchCall<'_>) -> Result<()> {
        self.queues().launched();
        let _one_at_a_time = self.variant.lock();
        let mut launches = self.variant.launches.lock().unwrap_or_else(PoisonError::into_inner);
        if launches.is_some() {
            self.variant.reset_counters();
        }
        let status = call(self.variant.kernels, std::ptr::null_mut());
        if let Some(launches) = &mut *launches {
            let launch = EmulatedLaunch { launcher: operation.to_owned(), counters: self.variant.counters() };
            // A launcher that only answers a question, or only sets memory, runs no kernel.
            if launch.counters.launches > 0 {
                launches.push(launch);
            }
        }
        self.variant.check(&format!("{operation} of {shape:?}"), status)
    }

    fn seconds_between(&self, start: &Moment, end: &Moment) -> Result<f64> {
        match (start, end) {
            (Moment::Host(start), Moment::Host(end)) => Ok((*end - *start).as_secs_f64()),
            #[cfg(mmpo_gpu_kernels)]
            _ => Err(Error::bug("a moment of another device")),
        }
    }

    fn allocate_host(&self, bytes: usize) -> Result<Address> {
        let memory = vec![0_u8; bytes].into_boxed_slice();
        // SAFETY: a box is never null.
        Ok(Address(unsafe { NonNull::new_unchecked(Box::into_raw(memory).cast()) }))
    }

    unsafe fn free_host(&self, address: Address, bytes: usize) {
        if let Err(error) = self.finish_copies() {
            tracing::error!("{error}");
        }
        let memory = std::ptr::slice_from_raw_parts_mut(address.pointer().cast::<u8>(), bytes.max(1));
        // SAFETY: the caller's promise: the box of `allocate_host`, which no copy uses any more.
        drop(unsafe { Box::from_raw(memory) });
    }

    fn finish_copies(&self) -> Result<()> {
        self.land(Queues::finish)
    }

    fn collectives_stream(&self) -> Result<*mut c_void> {
        Ok(std::ptr::from_ref(&*self.stream).cast_mut().cast())
    }

    fn flush_collectives(&self) -> Result<()> {
        self.finish_copies()
    }

    unsafe fn copy_beside(
        &self,
        lane: Lane,
        out: *mut c_void,
        source: *const c_void,
        bytes: usize,
    ) -> Result<()> {
        self.queues().copy(lane, out, source, bytes);
        Ok(())
    }

    fn new_event(&self) -> Result<EventHandle> {
        Ok(self.queues().new_event())
    }

    unsafe fn free_event(&self, event: EventHandle) {
        self.queues().free_event(event);
    }

    unsafe fn record(&self, event: EventHandle, queue: Queue) -> Result<()> {
        self.queues().record(event, queue);
        Ok(())
    }

    unsafe fn wait(&self, queue: Queue, event: EventHandle) -> Result<()> {
        self.land(|queues| queues.wait(queue, event))
    }
}
