//! The Llama model over [`crate::device::Device`].

pub mod config;
mod config_keys;
pub mod rope;
