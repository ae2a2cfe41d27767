//! mmpo-fast trains Llama-family models on preference pairs.
//!
//! Tokens of pairs flow down through the model to per-token log-probs, an objective turns those into per-token
//! coefficients, and the same path is walked back up to weight gradients; everything else feeds or records that.

pub mod bench;
pub mod checkpoint;
pub mod cli;
pub mod config;
pub mod context;
pub mod data;
pub mod demo;
pub mod device;
pub mod error;
pub mod foreign;
pub mod generate;
pub mod interrupt;
pub mod model;
pub mod objective;
pub mod optimizer;
pub mod report;
pub mod score;
pub mod train;

pub use error::{Error, Result};
