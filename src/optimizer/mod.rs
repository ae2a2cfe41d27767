//! The optimiser's schedule. The update itself is a device operation, [`crate::device::Device::adamw`].

mod schedule;

pub use schedule::Schedule;
