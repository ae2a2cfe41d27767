//! The library under `train`, a part at a time: options, objectives, the Llama and its optimiser against numbers that
//! transformers and PyTorch made, what is saved, and the report.

mod adapters;
mod bf16_gradients;
mod checkpoint;
mod config;
mod golden;
mod goldens;
mod layers;
mod mapped;
mod memory_options;
mod memory_table;
mod objective;
mod plan;
mod published_configs;
mod python_options;
mod report;
mod states;
#[path = "../support/mod.rs"]
mod support;
