//! The program as a user runs it, from the command line to the files it leaves.

mod bad_input;
mod checkpoints;
mod context;
mod demo;
#[cfg(mmpo_emulated)]
mod emulated;
mod generate;
mod harness;
mod learning;
mod reliability;
mod resume;
mod score;
mod templates;
mod train;
