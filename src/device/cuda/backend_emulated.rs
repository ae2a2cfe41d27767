//! The emulated device of `kernels/emulator/`, in its fast or its instrumented variant.

use std::ffi::{CStr, c_int, c_void};
use std::fmt::{self, Debug};
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::backend::{Address, Backend, LaunchCall, Moment};
use super::bindings::{
    EmulatorTable, KernelTable, checked, emulated, mmpo_emulator_counters, mmpo_emulator_options,
};
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

/// The emulated device as a backend.
pub(super) struct EmulatedBackend(&'static Variant);

impl EmulatedBackend {
    pub(super) fn new(variant: EmulatorVariant) -> Self {
        EmulatedBackend(variant.get())
    }
}

impl Debug for EmulatedBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EmulatedBackend({})", self.0.name)
    }
}

impl Backend for EmulatedBackend {
    fn describe(&self) -> String {
        format!("cuda ({}: the GPU's kernels on the CPU, for tests and not for speed)", self.0.name)
    }

    fn allocate(&self, bytes: usize) -> Result<Address> {
        let _one_at_a_time = self.0.lock();
        let mut address: *mut c_void = std::ptr::null_mut();
        // SAFETY: the call writes the address.
        self.0.check("malloc", unsafe { (self.0.emulator.malloc)(&mut address, bytes as u64) })?;
        NonNull::new(address).map(Address).ok_or_else(|| {
            Error::device(format!("no memory for {bytes} bytes"), "use a smaller model or token budget")
        })
    }

    unsafe fn free(&self, address: Address) {
        let _one_at_a_time = self.0.lock();
        // SAFETY: the caller's promise; launches are over when they return, so none uses it.
        let freed = self.0.check("free", unsafe { (self.0.emulator.free)(address.pointer()) });
        if let Err(error) = freed {
            // A destructor cannot return it, and a corrupted guard must not pass unseen.
            tracing::error!("{error}");
        }
    }

    unsafe fn copy_in(&self, out: *mut c_void, source: &[u8]) -> Result<()> {
        let _one_at_a_time = self.0.lock();
        let (bytes, source) = (source.len() as u64, source.as_ptr().cast());
        // SAFETY: the caller's promise.
        self.0.check("upload", unsafe { (self.0.emulator.upload)(out, source, bytes) })
    }

    unsafe fn copy_out(&self, out: &mut [u8], source: *const c_void) -> Result<()> {
        let _one_at_a_time = self.0.lock();
        let (bytes, out) = (out.len() as u64, out.as_mut_ptr().cast());
        // SAFETY: the call only reads the guard bytes around every allocation; it fails if a kernel overwrote any.
        self.0.check("synchronize", unsafe { (self.0.emulator.synchronize)() })?;
        // SAFETY: the caller's promise.
        self.0.check("download", unsafe { (self.0.emulator.download)(out, source, bytes) })
    }

    unsafe fn copy(&self, out: *mut c_void, source: *const c_void, bytes: usize) -> Result<()> {
        let _one_at_a_time = self.0.lock();
        // SAFETY: the caller's promise.
        self.0.check("copy", unsafe { (self.0.emulator.copy)(out, source, bytes as u64) })
    }

    fn launch(&self, operation: &str, shape: &dyn Debug, call: LaunchCall<'_>) -> Result<()> {
        let _one_at_a_time = self.0.lock();
        let mut launches = self.0.launches.lock().unwrap_or_else(PoisonError::into_inner);
        if launches.is_some() {
            self.0.reset_counters();
        }
        let status = call(self.0.kernels, std::ptr::null_mut());
        if let Some(launches) = &mut *launches {
            let launch = EmulatedLaunch { launcher: operation.to_owned(), counters: self.0.counters() };
            // A launcher that only answers a question, or only sets memory, runs no kernel.
            if launch.counters.launches > 0 {
                launches.push(launch);
            }
        }
        self.0.check(&format!("{operation} of {shape:?}"), status)
    }

    fn seconds_between(&self, start: &Moment, end: &Moment) -> Result<f64> {
        match (start, end) {
            (Moment::Host(start), Moment::Host(end)) => Ok((*end - *start).as_secs_f64()),
            #[cfg(mmpo_gpu_kernels)]
            _ => Err(Error::bug("a moment of another device")),
        }
    }
}
