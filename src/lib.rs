//! mmpo-fast trains Llama-family models on preference pairs.
//!
//! Tokens of pairs flow down through the model to per-token log-probs, an objective turns those into per-token
//! coefficients, and the same path is walked back up to weight gradients; everything else feeds or records that.
//!
//! The program is the crate's main user, and [`cli`] its entry. Each command is one function: [`train::run`],
//! [`check::run`], [`score::run`], [`generate::run`], [`merge::run`], [`verify::run`], [`bench::run`],
//! [`import::run`], [`doctor::run`]. Below them, in the order of a training step:
//!
//! | module | holds |
//! |---|---|
//! | [`config`] | options, recipes, and the checked configuration that a command runs |
//! | [`data`] | preference files, chat templates, token ids, packed batches |
//! | [`checkpoint`] | model folders and the state of a run, read and written |
//! | [`device`] | the operations that compute, as traits, and the CPU and CUDA devices that have them |
//! | [`model`] | the Llama: forward, backward and log-prob head, written once over [`device::Device`] |
//! | [`objective`] | losses of a pair and their coefficients for each token |
//!  | [`optimizer`] | settings, factors and states of AdamW, and the learning rate of each step |
//! | [`report`] | metrics, charts and the report of a run |
//!
//! # Example
//!
//! The log-probs of two pairs under the demo's model:
//!
//! ```
//! use std::path::Path;
//! use std::sync::Arc;
//!
//! use mmpo_fast::checkpoint::ModelFolder;
//! use mmpo_fast::config::LengthLimits;
//! use mmpo_fast::data::{TextEncoder, load_pairs};
//! use mmpo_fast::device::cpu::CpuDevice;
//! use mmpo_fast::model::Llama;
//! use mmpo_fast::score::Scorer;
//!
//! # fn main() -> mmpo_fast::Result<()> {
//! let demo = Path::new("examples/demo");
//! let limits = LengthLimits { max_length: 128, max_prompt_length: 64 };
//! let encoder = TextEncoder::load(&demo.join("model"), None)?;
//! let dataset = load_pairs(&demo.join("eval_pairs.jsonl"), &encoder, limits)?;
//!
//! let device = Arc::new(CpuDevice::new(Some(1))?);
//! let model = Llama::load(device, &ModelFolder::open(&demo.join("model"))?, limits.max_length)?;
//! let scores = Scorer::new(&model, &dataset.pairs[..2], 1024)?.run(false, |_| ())?;
//!
//! for score in &scores {
//!     let per_token = score.logp_chosen / score.tokens_chosen as f64;
//!     assert!(per_token < 0.0, "a probability is below 1");
//! }
//! assert_eq!(scores.len(), 2);
//! # Ok(())
//! # }
//! ```

#![warn(missing_docs)]

pub mod bench;
pub mod check;
pub mod checkpoint;
pub mod cli;
pub mod config;
pub mod context;
pub mod data;
pub mod demo;
pub mod device;
pub mod doctor;
pub mod error;
pub mod foreign;
pub mod generate;
mod host_memory;
pub mod import;
pub mod interrupt;
pub mod merge;
pub mod model;
pub mod objective;
pub mod optimizer;
pub mod plan;
pub mod ranks;
pub mod report;
pub mod runs;
pub mod score;
pub mod train;
pub mod verify;

pub use error::{Error, Result};
