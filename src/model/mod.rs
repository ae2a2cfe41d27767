//! The Llama model over [`crate::device::Device`].

pub mod config;
pub mod rope;
