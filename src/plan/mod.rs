//! What a run will take, told before it: device memory by part, work, expected time, and which options take less.

mod footprint;

pub use footprint::{Choice, Footprint, Job, Sizes};
