//! NVIDIA's library of collectives, loaded at run time as the driver is.
//!
//! `libloading` and the few functions that are needed, and not cudarc's bindings: those end the process where the library or a
//! function is missing, and take every result for one of the numbers that their version of NCCL knows.

mod group;
mod library;

pub(super) use group::{Communicator, Group, call};
use library::Nccl;
pub use library::version;
