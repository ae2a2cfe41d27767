//! What the kernels do, counted exactly by the emulated device: work, traffic, launches and bank conflicts, beside the
//! least that the task asks for, and what ptxas gives each kernel. `-- --nocapture` prints the tables.

#![cfg(mmpo_emulated)]

mod adapters;
mod attention_backward;
mod attention_forward;
mod head;
mod kernels;
mod table;

use std::sync::{Mutex, MutexGuard, PoisonError};

use mmpo_fast::device::cuda::{
    EmulatorOptions, EmulatorVariant, MMPO_EMULATOR_ASYNC_LATE, MMPO_EMULATOR_SCHEDULE_ORDERED,
};

/// Copies as late as they may, threads in order, every access counted.
const ORDINARY: EmulatorOptions = EmulatorOptions {
    async_: MMPO_EMULATOR_ASYNC_LATE as i32,
    schedule: MMPO_EMULATOR_SCHEDULE_ORDERED as i32,
    seed: 0,
    host_threads: 0,
    multiprocessors: 0,
    trace_accesses: 1,
};

/// The emulator's options and counters belong to the whole process, so a test holds this from its first line to its last.
/// Both variants begin with [`ORDINARY`] options.
fn emulator_alone() -> MutexGuard<'static, ()> {
    static EMULATOR: Mutex<()> = Mutex::new(());
    let alone = EMULATOR.lock().unwrap_or_else(PoisonError::into_inner);
    for variant in [EmulatorVariant::Plain, EmulatorVariant::Checked] {
        variant.configure(ORDINARY).unwrap();
    }
    alone
}
