//! The Llama runtime, written once over [`Device`].

mod backward;
mod buffers;
mod config;
mod config_keys;
mod decode;
mod forward;
mod head;
mod head_plan;
mod known_keys;
mod load;
mod projection;
mod rope;
mod rope_keys;
mod tensors;

use std::sync::Arc;

pub use backward::{GradientSink, KeepGradients};
pub use buffers::{Activations, BackwardScratch, Capacity, HeadBuffers, Purpose};
pub use config::{LlamaConfig, TensorSpec};
pub use decode::{Generation, KvCache};
pub use forward::Context;
pub use head_plan::{HeadChoice, HeadOptions, HeadPlan};
pub use projection::Projection;
pub use rope::{Rope, RopeScaling};
pub use tensors::{FusedTensor, LayerTensors, LlamaTensors};

use crate::device::{ComputeBuffer, Device, Floats};

/// Weights on a device, and what is needed to run them.
#[derive(Debug)]
pub struct Llama<D: Device> {
    pub device: Arc<D>,
    pub config: LlamaConfig,
    /// Names and shapes of the checkpoint's tensors inside `weights`.
    pub layout: LlamaTensors<FusedTensor>,
    pub weights: LlamaTensors<ComputeBuffer<D>>,
    /// `[positions, E]`: cosines, then sines.
    rope_table: Floats<D>,
}
