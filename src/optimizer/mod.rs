//! The optimiser: its settings, the factors of one update, the state of each trained tensor, and the schedule of the
//! learning rate.
//!
//! Settings stay f64 from the recipe to [`AdamWFactors`], whose f32 values a device's kernel takes. The update itself is
//! an operation of the device, [`crate::device::Optimizer::adamw`].

mod adamw;
mod schedule;
mod state;

pub use adamw::{AdamWFactors, AdamWSettings, AdamWStep};
pub use schedule::Schedule;
pub use state::{OptimizerState, StateBuffer};
