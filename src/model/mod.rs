//! The Llama runtime, written once over [`Device`]; [`Family`] has the models that it computes.

mod adapter;
mod backward;
mod buffers;
mod config;
mod config_keys;
mod decode;
mod family;
mod forward;
mod head;
mod head_plan;
mod known_keys;
mod layer_shapes;
mod load;
mod module_forms;
mod projection;
mod rope;
mod rope_keys;
mod tensors;

use std::sync::Arc;

pub use adapter::{AdaptedModule, AdaptedModules, Adapters, LoraSettings, PEFT_PREFIX, initial_values};
pub use backward::{CompleteLayer, GradientSink, KeepGradients};
pub use buffers::{Activations, BackwardScratch, Capacity, HeadBuffers, Purpose, Recompute};
pub use config::{LlamaConfig, TensorSpec};
pub use decode::{Generation, KvCache};
pub use family::Family;
pub use forward::{Context, WeightSource};
pub use head_plan::{HeadChoice, HeadOptions, HeadPlan};
pub use module_forms::{ModuleForm, ModuleForms};
pub use projection::{Adapter, Projection};
pub use rope::{Rope, RopeScaling};
pub use tensors::{FusedTensor, LayerTensors, LlamaTensors};

use crate::device::{ComputeBuffer, Device, Floats};

/// f32 gradients of a model's tensors; `None` for a frozen one.
pub type Gradients<D> = LlamaTensors<Option<Floats<D>>>;
/// f32 gradients of a layer's tensors; `None` for a frozen one.
pub type LayerGradients<D> = LayerTensors<Option<Floats<D>>>;

/// Weights on a device, and what is needed to run them.
#[derive(Debug)]
pub struct Llama<D: Device> {
    /// The device that holds the weights and computes.
    pub device: Arc<D>,
    /// Sizes and settings.
    pub config: LlamaConfig,
    /// Names and shapes of the checkpoint's tensors inside `weights`, and which of `weights` are trained.
    pub layout: LlamaTensors<FusedTensor>,
    /// The tensors themselves.
    pub weights: LlamaTensors<ComputeBuffer<D>>,
    /// What the adapters in `weights` are, where there are some.
    adapters: Option<Adapters>,
    /// `[positions, E]`: cosines, then sines.
    rope_table: Floats<D>,
}
