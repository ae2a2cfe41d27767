//! The program as a user runs it, from the command line to the files it leaves.

mod adapters;
mod advice;
mod bad_input;
mod bench;
mod capsules;
mod check;
mod checkpoints;
mod choice;
mod cli;
mod context;
mod data_cache;
mod data_sources;
mod demo;
#[cfg(target_os = "linux")]
mod device_choice;
#[cfg(target_os = "linux")]
mod doctor;
#[cfg(mmpo_emulated)]
mod emulated;
mod generate;
mod harness;
mod hostile_templates;
mod hostile_templates_list;
mod kills;
mod learning;
mod log_format;
mod own_data;
mod plan;
mod precision;
mod reliability;
mod report;
mod resume;
mod score;
mod self_test;
#[path = "../support/mod.rs"]
mod support;
mod templates;
mod train;
mod verify;
