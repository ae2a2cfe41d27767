//! Every operation of every device against naive f64 code ([`naive`]), one file an operation.

mod harness;
mod naive;

mod adamw;
mod attention;
mod batch_buffers;
mod determinism;
mod embedding;
mod grad_norm;
mod linear;
mod logp_head;
mod memory;
mod pair_objective;
mod rms_norm;
mod rope;
mod same_bits;
mod swiglu;
