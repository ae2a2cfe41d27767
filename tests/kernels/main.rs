//! Every operation of every device against naive f64 code ([`naive`]), one file per operation.

#[cfg(mmpo_emulated)]
mod emulated;
mod harness;
mod naive;
#[path = "../ptx_machine/mod.rs"]
mod ptx_machine;

mod accumulate;
mod adamw;
mod adapted_linear;
mod attention;
mod attention_backward;
mod attention_forward;
mod batch_buffers;
mod determinism;
mod embedding;
mod grad_norm;
mod linear;
mod logp_head;
mod low_rank;
mod memory;
mod pair_objective;
#[cfg(mmpo_gpu_kernels)]
mod ptx;
mod rms_norm;
mod rope;
mod same_bits;
mod swiglu;
