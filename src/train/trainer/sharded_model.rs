//! The model of a run as it comes from the disk, before a trainer takes it: whole, or where weights are sharded among ranks, with this
//! rank's part of each layer, so that no rank ever holds all of it.

use std::ops::Range;
use std::sync::Arc;

use super::gathered::{GatherUp, GatheredLayers};
use super::ranks::OtherRanks;
use crate::checkpoint::ModelFolder;
use crate::config::{MemoryConfig, ShardConfig};
use crate::device::{BatchBuffers, Device, StorageType};
use crate::error::Result;
use crate::model::{Activations, Context, Llama, LlamaConfig};
use crate::ranks::RankGroup;
use crate::score::{ScoredModel, ShardedForward};
use crate::train::cut::Cut;

/// A model that is loaded.
#[derive(Debug)]
pub struct LoadedModel<D: Device> {
    model: Llama<D>,
    /// What brings the layers together, where this rank has its part of each alone.
    gathering: Option<Gathering<D>>,
}

/// See [`LoadedModel`].
#[derive(Debug)]
struct Gathering<D: Device> {
    ranks: OtherRanks<D>,
    gathered: GatheredLayers<D>,
}

impl<D: Device> LoadedModel<D> {
    /// The group, where `memory` cuts the weights among its ranks.
    pub fn cut_among<'a>(
        group: Option<&'a Arc<RankGroup<D>>>,
        memory: &MemoryConfig,
    ) -> Option<&'a Arc<RankGroup<D>>> {
        group.filter(|group| memory.shard == ShardConfig::Weights && group.place().ranks > 1)
    }

    /// Loads the part of a model that this rank of `sharded` keeps, or without one all of it; where `is_frozen`, as
    /// [`Llama::load_frozen`] does.
    ///
    /// # Errors
    /// As [`Llama::load`].
    pub fn load(
        device: &Arc<D>,
        folder: &ModelFolder,
        (positions, is_frozen): (usize, bool),
        sharded: Option<&Arc<RankGroup<D>>>,
    ) -> Result<Self> {
        let device = Arc::clone(device);
        let model = match (sharded, is_frozen) {
            (Some(group), _) => Llama::load_sharded(device, folder, positions, own(group)),
            (None, true) => Llama::load_frozen(device, folder, positions),
            (None, false) => Llama::load(device, folder, positions),
        };
        Self::of(model?, sharded)
    }

    /// As [`LoadedModel::load`], on a device that is planned for.
    ///
    /// # Errors
    /// Those of the device.
    pub fn planned(
        device: &Arc<D>,
        (config, storage): (LlamaConfig, StorageType),
        (positions, is_frozen): (usize, bool),
        sharded: Option<&Arc<RankGroup<D>>>,
    ) -> Result<Self> {
        let model = match (sharded, is_frozen) {
            (Some(group), _) => Llama::planned_sharded(device, config, positions, storage, own(group)),
            (None, true) => Llama::planned_frozen(device, config, positions, storage),
            (None, false) => Llama::planned(device, config, positions, storage),
        };
        Self::of(model?, sharded)
    }

    fn of(mut model: Llama<D>, sharded: Option<&Arc<RankGroup<D>>>) -> Result<Self> {
        let memory = MemoryConfig { shard: ShardConfig::Weights, ..MemoryConfig::default() };
        let gathering = match OtherRanks::new(sharded.cloned(), &memory)? {
            Some(ranks) => Some(Gathering { gathered: GatheredLayers::new(&mut model, &ranks)?, ranks }),
            None => None,
        };
        Ok(LoadedModel { model, gathering })
    }

    /// The model as a [`Scorer`](crate::score::Scorer) asks it.
    pub fn scored(&mut self) -> ScoredModel<'_, D> {
        match self.gathering {
            None => ScoredModel::Whole(&self.model),
            Some(_) => ScoredModel::Sharded(self),
        }
    }

    /// Whether this rank has its part of each layer alone.
    pub fn has_parts(&self) -> bool {
        self.gathering.is_some()
    }

    /// Lets `tokens` end what the model generates, beside its own end tokens.
    pub fn end_with(&mut self, tokens: Vec<u32>) {
        self.model.config.stop_token_ids.extend(tokens);
    }

    /// The model for a trainer. That of one rank among several takes one with parts of layers as well as a whole one.
    pub fn into_model(self) -> Llama<D> {
        self.model
    }
}

/// The values of a layer's tensor that this rank of a group keeps.
fn own<D: Device>(group: &RankGroup<D>) -> impl Fn(usize) -> Range<usize> + use<D> {
    let place = group.place();
    move |len| Cut::new(len, place).own()
}

impl<D: Device> ShardedForward<D> for LoadedModel<D> {
    fn model(&self) -> &Llama<D> {
        &self.model
    }

    fn forward(
        &mut self,
        activations: &mut Activations<D>,
        batch: &BatchBuffers<D>,
        tokens: usize,
    ) -> Result<()> {
        let Some(Gathering { ranks, gathered }) = &mut self.gathering else {
            return self.model.forward(activations, batch, tokens, Context::Packed);
        };
        self.model.forward_from(&mut GatherUp { ranks, gathered }, activations, batch, tokens)
    }

    fn idle(&mut self) -> Result<()> {
        let Some(Gathering { ranks, gathered }) = &mut self.gathering else { return Ok(()) };
        GatherUp { ranks, gathered }.idle(&mut self.model.weights.layers)
    }
}
