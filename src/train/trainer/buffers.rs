//! The gradients and optimiser states that a trainer has room for.

use super::Workload;
use super::own_sums::OwnSums;
use super::ranks::OtherRanks;
use crate::config::{GradientConfig, MemoryConfig, OffloadConfig, ShardConfig};
use crate::device::{Device, Gradient};
use crate::error::Result;
use crate::model::{FusedTensor, Gradients, Llama, LlamaTensors};
use crate::optimizer::{OptimizerState, StochasticRounding, is_offloaded};
use crate::train::bf16_gradients::{self, Bf16Sums};
use crate::train::layer_updates::LayerNorms;

/// The buffers for gradients, and what is done with those of a layer.
pub(super) struct GradientBuffers<D: Device> {
    pub gradients: Gradients<D>,
    pub layer_norms: Option<LayerNorms<D>>,
    pub own_sums: Option<OwnSums<D>>,
    pub bf16_sums: Option<Bf16Sums<D>>,
}

impl<D: Device> GradientBuffers<D> {
    /// Those that `memory` asks for, with the scratch memory of their norm.
    pub fn new(model: &Llama<D>, memory: &MemoryConfig, ranks: Option<&OtherRanks<D>>) -> Result<Self> {
        let sharded = ranks.filter(|ranks| ranks.shard >= ShardConfig::Gradients);
        let is_whole = memory.gradients == GradientConfig::F32 && sharded.is_none();
        let gradients =
            if is_whole { model.zero_gradients()? } else { model.zero_gradients_of_one_layer()? };
        let (mut layer_norms, mut own_sums, mut bf16_sums) = (None, None, None);
        match (memory.gradients, sharded) {
            (GradientConfig::Layer, _) => layer_norms = Some(LayerNorms::new(model, &gradients)?),
            (GradientConfig::Bf16, _) => bf16_sums = Some(Bf16Sums::new(model)?),
            (GradientConfig::F32, Some(ranks)) => own_sums = Some(OwnSums::new(model, ranks, &gradients)?),
            (GradientConfig::F32, None) => {}
        }
        if layer_norms.is_none() {
            let own = own_sums.iter().flat_map(OwnSums::iter).map(Gradient::F32);
            let all =
                bf16_gradients::of_step(&gradients, bf16_sums.as_ref()).into_iter().flatten().chain(own);
            model.device.reserve_gradient_norm_of(&all.collect::<Vec<_>>())?;
        }
        Ok(GradientBuffers { gradients, layer_norms, own_sums, bf16_sums })
    }
}

/// The states on the device of the trained tensors before the first update. A tensor's number is its place in the model, frozen tensors counted:
/// the random bits of a tensor do not depend on which others are trained.
pub(super) fn new_states<D: Device>(
    model: &Llama<D>,
    workload: Workload,
    ranks: Option<&OtherRanks<D>>,
) -> Result<LlamaTensors<Option<OptimizerState<D>>>> {
    let (device, options) = (&*model.device, workload.memory.states);
    let offloads = workload.memory.offload == OffloadConfig::States;
    let mut weights = model.weights.iter().zip(0..);
    let stays = |tensor: &FusedTensor| tensor.trained && !(offloads && is_offloaded(tensor.values()));
    model.layout.try_map(|tensor| match (weights.next(), stays(tensor)) {
        (Some((weight, number)), true) => {
            let rounding = StochasticRounding { seed: workload.rounding_seed, tensor: number };
            match ranks.filter(|ranks| ranks.shard != ShardConfig::None) {
                None => OptimizerState::before_first(device, weight, options, rounding).map(Some),
                // A small tensor has no values for some ranks.
                Some(ranks) => match ranks.own(tensor.values()) {
                    own if own.is_empty() => Ok(None),
                    own => {
                        let whole = tensor.values();
                        OptimizerState::before_first_of_part(device, weight, (own, whole), options, rounding)
                            .map(Some)
                    }
                },
            }
        }
        _ => Ok(None),
    })
}
