//! The optimiser's schedule. The update itself is a device operation, [`crate::device::Optimizer::adamw`].

mod schedule;

pub use schedule::Schedule;
