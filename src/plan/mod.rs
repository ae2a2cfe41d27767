//! What a run will take, told before it: device memory by part, work, expected time, and which options take less.
//!
//! `mmpo-fast plan` shows it; `train` refuses with it what cannot fit, and `--memory auto` chooses with it.

mod account;
mod command;
mod exchange;
mod fit;
mod footprint;
mod offload;
mod rates;
mod search;
mod show;
mod work;

pub(crate) use account::{Account, Models};
pub use command::{PlanConfig, largest_pairs, no_output, run};
pub use exchange::Links;
pub(crate) use fit::{FreeMemory, check, choose, chosen_before};
pub use footprint::{Choice, Footprint, Job, Sizes};
pub use rates::{GPUS, GpuKind, Rates, find};
pub use work::{Trained, Volume, Work};

/// Bytes for people: `24.0 GB`, `310 MB`.
pub fn size(bytes: usize) -> String {
    let bytes = bytes as f64;
    match bytes {
        1e9.. => format!("{:.1} GB", bytes / 1e9),
        1e6.. => format!("{:.1} MB", bytes / 1e6),
        _ => format!("{:.1} kB", bytes / 1e3),
    }
}
