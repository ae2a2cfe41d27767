//! The emulated GPU in its two variants, each configured once.

use std::sync::Once;

use mmpo_fast::device::cuda::{
    CudaDevice, EmulatorOptions, EmulatorVariant, MMPO_EMULATOR_ASYNC_LATE, MMPO_EMULATOR_SCHEDULE_ORDERED,
    MMPO_EMULATOR_SCHEDULE_RANDOM,
};

/// The emulated GPU as it is: threads in order, asynchronous copies as late as they may.
pub fn emulated() -> CudaDevice {
    configure_once();
    CudaDevice::emulated(EmulatorVariant::Plain)
}

/// The emulated GPU that watches every access, its blocks, warps and lanes in a random order. `MMPO_FAST_EMULATOR_SEED`
/// chooses the order.
pub fn checked() -> CudaDevice {
    configure_once();
    CudaDevice::emulated(EmulatorVariant::Checked)
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

fn configure_once() {
    static CONFIGURED: Once = Once::new();
    CONFIGURED.call_once(|| {
        let seed = match std::env::var("MMPO_FAST_EMULATOR_SEED") {
            Ok(seed) => {
                seed.parse().unwrap_or_else(|_| panic!("MMPO_FAST_EMULATOR_SEED={seed} is no number"))
            }
            Err(_) => 1,
        };
        EmulatorVariant::Plain.configure(emulator_options(0)).unwrap();
        EmulatorVariant::Checked.configure(emulator_options(seed)).unwrap();
    });
}
