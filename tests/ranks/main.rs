//! Runs of several ranks as users start them, on the library that stands in for NCCL: what they compute, and how they end.

mod bytes;
mod faults;
#[allow(dead_code, reason = "other test programs use the rest")]
#[path = "../end_to_end/harness.rs"]
mod harness;
mod joining;
mod launched;
mod processes;
mod signals;
#[path = "../support/mod.rs"]
mod support;
