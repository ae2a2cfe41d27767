//! Every operation of every device against naive f64 code ([`naive`]), one file an operation.

#[cfg(mmpo_emulated)]
mod emulated;
mod harness;
mod naive;
#[path = "../ptx_machine/mod.rs"]
mod ptx_machine;

mod adamw;
mod attention;
#[cfg(mmpo_emulated)]
mod attention_backward;
mod attention_forward;
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
#[cfg(mmpo_emulated)]
mod same_bits;
mod swiglu;
