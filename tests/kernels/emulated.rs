//! The emulated GPU in its two variants, and who may change its options.
//!
//! The options belong to the whole process, while tests run side by side. Tests that take the device as it is share a lock;
//! a test that sets options of its own holds it alone ([`OwnOptions`]), so that no other test runs under them.

use std::cell::RefCell;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use mmpo_fast::device::cuda::{
    CudaDevice, EmulatorOptions, EmulatorVariant, MMPO_EMULATOR_ASYNC_LATE, MMPO_EMULATOR_SCHEDULE_ORDERED,
    MMPO_EMULATOR_SCHEDULE_RANDOM,
};

/// Set until a test changes the options: whoever locks first configures both variants.
static IS_CONFIGURED: RwLock<bool> = RwLock::new(false);

/// What the thread of a test holds of the lock, until it ends.
enum Hold {
    Nothing,
    Shared(#[expect(dead_code, reason = "held, not read")] RwLockReadGuard<'static, bool>),
    Alone,
}

thread_local! {
    static HOLD: RefCell<Hold> = const { RefCell::new(Hold::Nothing) };
}

/// The emulated GPU as it is: threads in order, asynchronous copies as late as they may.
pub fn emulated() -> CudaDevice {
    share_options();
    CudaDevice::emulated(EmulatorVariant::Plain)
}

/// The emulated GPU that watches every access, its blocks, warps and lanes in a random order. `MMPO_FAST_EMULATOR_SEED`
/// chooses the order.
pub fn checked() -> CudaDevice {
    share_options();
    CudaDevice::emulated(EmulatorVariant::Checked)
}

/// Options of the plain variant that one test sets and no other test sees; the usual ones come back when it is dropped.
pub struct OwnOptions {
    is_configured: RwLockWriteGuard<'static, bool>,
}

impl OwnOptions {
    /// Waits until no other test uses the emulated GPU.
    pub fn take() -> Self {
        // A thread that runs tests one after the other still shares the lock from the one before.
        HOLD.replace(Hold::Nothing);
        let is_configured = IS_CONFIGURED.write().unwrap_or_else(PoisonError::into_inner);
        HOLD.replace(Hold::Alone);
        OwnOptions { is_configured }
    }

    pub fn set(&self, options: EmulatorOptions) {
        EmulatorVariant::Plain.configure(options).unwrap();
    }
}

impl Drop for OwnOptions {
    fn drop(&mut self) {
        *self.is_configured = false;
        HOLD.replace(Hold::Nothing);
    }
}

/// How the emulated device runs: `schedule` 0 in order, else random with this seed.
pub fn emulator_options(schedule_seed: u64) -> EmulatorOptions {
    EmulatorOptions {
        async_: MMPO_EMULATOR_ASYNC_LATE as i32,
        schedule: if schedule_seed == 0 {
            MMPO_EMULATOR_SCHEDULE_ORDERED
        } else {
            MMPO_EMULATOR_SCHEDULE_RANDOM
        } as i32,
        seed: schedule_seed,
        host_threads: 0,
        multiprocessors: 0,
        trace_accesses: 0,
    }
}

fn share_options() {
    if HOLD.with_borrow(|hold| !matches!(hold, Hold::Nothing)) {
        return;
    }
    loop {
        let is_configured = IS_CONFIGURED.read().unwrap_or_else(PoisonError::into_inner);
        if *is_configured {
            HOLD.replace(Hold::Shared(is_configured));
            return;
        }
        drop(is_configured);
        let mut is_configured = IS_CONFIGURED.write().unwrap_or_else(PoisonError::into_inner);
        if !*is_configured {
            configure();
            *is_configured = true;
        }
    }
}

/// The options of every test that does not set its own.
fn configure() {
    let seed = match std::env::var("MMPO_FAST_EMULATOR_SEED") {
        Ok(seed) => seed.parse().unwrap_or_else(|_| panic!("MMPO_FAST_EMULATOR_SEED={seed} is no number")),
        Err(_) => 1,
    };
    EmulatorVariant::Plain.configure(emulator_options(0)).unwrap();
    EmulatorVariant::Checked.configure(emulator_options(seed)).unwrap();
}
