//! The one interface between the model and what computes it.
//!
//! The Llama forward and backward in `model/` are written once over [`Device`], the sum of a trait for each family of
//! operations. A trait's file holds the family's shapes, documentation and size checks; `cpu/` and `cuda/` implement it in
//! the file of the operation. A device has one storage type for weights and activations ([`Memory::Compute`]: f32 or
//! bf16 on the CPU, bf16 on CUDA); statistics, log-probs, gradients of weights and optimiser states are f32 everywhere. Every
//! operation takes its sizes explicitly, because buffers are allocated once for the largest micro-batch and reused.
//!
//! Legend of shapes: `T` tokens of a packed batch, `N` scored tokens, `D` hidden width, `F` MLP width, `V` vocabulary,
//! `H`/`K` query and key/value heads, `E` head size. Matrices are row-major. `out` comes first, then what is updated,
//! then inputs, then the shape. The documentation of each operation says whether it *assigns* or *accumulates*.

#![allow(unsafe_code)]

mod accumulate;
mod attention;
mod batch;
mod check;
mod collectives;
pub mod cpu;
pub mod cuda;
mod embedding;
mod hardware;
mod head;
mod host_memory;
mod linear;
mod low_rank;
mod mapped_file;
mod memory;
mod memory_counter;
mod mlp;
mod nccl;
mod norm;
mod offload;
mod optimizer;
mod pair_objective;
mod queues;
mod rope;
mod select;
mod trace;

pub use accumulate::{Accumulate, Sum};
pub use attention::{Attention, AttentionBackward, AttentionCapacity, AttentionGradient, AttentionShape};
pub use batch::BatchBuffers;
pub use check::Checked;
pub use collectives::{Abort, Collective, Collectives, GroupId, GroupPlace, NCCL_MEMORY, Summand};
pub use embedding::Embedding;
pub use hardware::Hardware;
pub use head::{
    Head, HeadBackward, HeadForward, HeadMode, HeadShape, HeadSizes, RECOMPUTE_WORKSPACE, TokenCoefficients,
    TokenScores,
};
pub use host_memory::LargeBlocks;
pub use linear::{Linear, LinearShape};
pub use low_rank::{
    AdaptedBackwardInput, AdaptedLinear, AdapterTerms, Dropout, LowRank, LowRankShape, RowPart, hash,
};
pub use mapped_file::{MappedFile, MappedValues};
pub use memory::{ComputeBuffer, Element, Floats, Indices, Memory, MemoryUse, RawValues, StorageType};
pub use memory_counter::{MemoryCounter, MemoryPart, MemoryParts};
pub use mlp::{LinearSwiglu, Mlp};
pub use norm::{AddRmsNorm, Norm, NormShape, RmsNormBackward};
pub use offload::Offload;
pub use optimizer::{AdamWUpdate, Gradient, GradientPart, Optimizer};
pub use pair_objective::{ObjectiveOperands, PairObjective};
pub use queues::{Queue, Queues};
pub use rope::{RopeDirection, RotaryPositions};
pub use select::{DeviceChoice, DeviceReport, DeviceTask, Precision, ask_on, run_on};
pub use trace::OperationTime;

/// A device that computes: the CPU, a CUDA GPU, or the emulated one.
///
/// Operations are asynchronous where the device is; [`Memory::download`] waits. Errors name the operation and shapes.
pub trait Device:
    Embedding
    + Norm
    + Linear
    + LowRank
    + RotaryPositions
    + Attention
    + AttentionBackward
    + Mlp
    + Head
    + PairObjective
    + Optimizer
    + Offload
    + Collectives
    + Accumulate
{
}

impl<D> Device for D where
    D: Embedding
        + Norm
        + Linear
        + LowRank
        + RotaryPositions
        + Attention
        + AttentionBackward
        + Mlp
        + Head
        + PairObjective
        + Optimizer
        + Offload
        + Collectives
        + Accumulate
{
}

/// All traits of a device, for `use mmpo_fast::device::prelude::*`.
pub mod prelude {
    pub use super::{
        Accumulate, Attention, AttentionBackward, Collectives, Device, Embedding, Hardware, Head, Linear,
        LowRank, Memory, Mlp, Norm, Offload, Optimizer, PairObjective, Queues, RotaryPositions,
    };
}
