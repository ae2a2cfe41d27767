//! Weights of layers that are sharded among ranks: each rank keeps its own values, and a layer is whole while it computes.
//!
//! Two slots have room for a layer each. While one layer computes in one of them, the next one, which is the one above in the
//! forward and the one below in the backward, is gathered into the other. The model finds a slot in the place of a layer's parts
//! for as long as the layer runs. Embedding, final norm and head stay whole on every rank.

use std::mem;
use std::ops::Range;

use super::own_sums::OwnSums;
use super::ranks::OtherRanks;
use crate::device::{ComputeBuffer, Device, MemoryPart, Queue};
use crate::error::Result;
use crate::model::{CompleteLayer, FusedTensor, GradientSink, Gradients, LayerTensors, Llama, WeightSource};

type LayerWeights<D> = LayerTensors<ComputeBuffer<D>>;

/// The slots, and what is in them.
#[derive(Debug)]
pub(super) struct GatheredLayers<D: Device> {
    slots: [LayerWeights<D>; 2],
    holds: [Option<usize>; 2],
    /// The gather into each slot is over.
    done: [D::Event; 2],
    layers: usize,
}

impl<D: Device> GatheredLayers<D> {
    /// Replaces the layers of `model` by this rank's values of them, where it was loaded whole, and makes the slots.
    ///
    /// # Errors
    /// [`crate::Error::Device`] where the device has no memory for them.
    pub fn new(model: &mut Llama<D>, ranks: &OtherRanks<D>) -> Result<Self> {
        let device = &*model.device;
        device.as_part(MemoryPart::Weights, || {
            let layers = model.weights.layers.iter_mut().zip(&model.layout.layers);
            for (weight, tensor) in layers.flat_map(|(weights, layout)| weights.iter_mut().zip(layout.iter()))
            {
                let own = ranks.own(tensor.values());
                // Loaded as a part; or all of a small tensor is this rank's.
                if device.len(weight) != tensor.values() || own.len() == tensor.values() {
                    continue;
                }
                // A buffer of no values would be none on some devices.
                let mut part = device.alloc(own.len().max(1))?;
                device.copy(&mut part, 0, weight, own.start, own.len())?;
                *weight = part;
            }
            let layers = &model.layout.layers;
            let slot = || layers[0].try_map(&mut |tensor: &FusedTensor| device.alloc(tensor.values()));
            Ok(GatheredLayers {
                slots: [slot()?, slot()?],
                holds: [None; 2],
                done: [device.new_event()?, device.new_event()?],
                layers: layers.len(),
            })
        })
    }

    /// The slots hold old values from now on: the parts have been updated.
    pub fn forget(&mut self) {
        self.holds = [None; 2];
    }

    /// A layer that [`GatheredLayers::fetch`] has gathered.
    pub fn layer(&self, layer: usize) -> &LayerWeights<D> {
        &self.slots[layer % 2]
    }

    /// Queues the gather of a layer into its slot, unless it is there, and lets the device's computation wait for it.
    ///
    /// # Errors
    /// Those of the device and of the other ranks.
    pub fn fetch(
        &mut self,
        ranks: &mut OtherRanks<D>,
        layer: usize,
        parts: &[LayerWeights<D>],
    ) -> Result<()> {
        self.ask_for(ranks, layer, parts)?;
        ranks.device().wait(Queue::Compute, &self.done[layer % 2])
    }

    /// As [`GatheredLayers::fetch`], without the wait.
    fn ask_for(&mut self, ranks: &mut OtherRanks<D>, layer: usize, parts: &[LayerWeights<D>]) -> Result<()> {
        let slot = layer % 2;
        if self.holds[slot] == Some(layer) {
            return Ok(());
        }
        for (whole, part) in self.slots[slot].iter_mut().zip(parts[layer].iter()) {
            let device = ranks.device();
            let own = ranks.own(device.len(whole));
            device.copy(whole, own.start, part, 0, own.len())?;
        }
        ranks.gather(&mut self.slots[slot].iter_mut().collect::<Vec<_>>())?;
        ranks.device().record(&mut self.done[slot], Queue::Collectives)?;
        self.holds[slot] = Some(layer);
        Ok(())
    }

    /// Puts a layer in the place of its parts, and asks for the `next` one.
    fn enter(
        &mut self,
        ranks: &mut OtherRanks<D>,
        (layer, next): (usize, Option<usize>),
        weights: &mut [LayerWeights<D>],
    ) -> Result<()> {
        self.fetch(ranks, layer, weights)?;
        if let Some(next) = next {
            self.ask_for(ranks, next, weights)?;
        }
        mem::swap(&mut weights[layer], &mut self.slots[layer % 2]);
        Ok(())
    }

    /// Puts the parts back in their place.
    fn leave(&mut self, layer: usize, weights: &mut LayerWeights<D>) {
        mem::swap(weights, &mut self.slots[layer % 2]);
    }
}

/// Gathers each layer of a forward.
pub(super) struct GatherUp<'a, D: Device> {
    pub ranks: &'a mut OtherRanks<D>,
    pub gathered: &'a mut GatheredLayers<D>,
}

impl<D: Device> WeightSource<D> for GatherUp<'_, D> {
    fn before_layer(&mut self, layer: usize, weights: &mut [LayerWeights<D>]) -> Result<()> {
        let next = Some(layer + 1).filter(|&next| next < self.gathered.layers);
        self.gathered.enter(self.ranks, (layer, next), weights)
    }

    fn after_layer(&mut self, layer: usize, weights: &mut [LayerWeights<D>]) -> Result<()> {
        self.gathered.leave(layer, &mut weights[layer]);
        Ok(())
    }
}

impl<D: Device> GatherUp<'_, D> {
    /// Takes part in a forward that other ranks have and this one has not.
    ///
    /// # Errors
    /// As [`GatheredLayers::fetch`].
    pub fn idle(&mut self, weights: &mut [LayerWeights<D>]) -> Result<()> {
        for layer in 0..self.gathered.layers {
            self.before_layer(layer, weights)?;
            self.after_layer(layer, weights)?;
        }
        Ok(())
    }
}

/// Gathers each layer of a backward, and sums its gradients over the ranks.
pub(super) struct GatherDown<'a, D: Device> {
    pub ranks: &'a mut OtherRanks<D>,
    pub gathered: &'a mut GatheredLayers<D>,
    pub sums: &'a mut OwnSums<D>,
    /// The layer with which the backward ends.
    pub lowest: usize,
}

impl<D: Device> GradientSink<D> for GatherDown<'_, D> {
    fn before_layer(&mut self, layer: usize, weights: &mut [LayerWeights<D>]) -> Result<()> {
        let next = layer.checked_sub(1).filter(|&next| next >= self.lowest);
        self.gathered.enter(self.ranks, (layer, next), weights)
    }

    fn layer_complete(&mut self, layer: CompleteLayer<'_, D>) -> Result<()> {
        self.gathered.leave(layer.layer, layer.weights);
        self.sums.take(self.ranks, layer.layer, layer.gradients)
    }
}

impl<D: Device> GatherDown<'_, D> {
    /// Takes part, with gradients of 0, in a backward that other ranks have and this one has not.
    ///
    /// # Errors
    /// As [`GatheredLayers::fetch`].
    pub fn idle(
        &mut self,
        weights: &mut [LayerWeights<D>],
        gradients: &mut Gradients<D>,
        layers: Range<usize>,
    ) -> Result<()> {
        for layer in layers.rev() {
            self.before_layer(layer, weights)?;
            let (weights, gradients) = (&mut weights[layer], &mut gradients.layers[0]);
            self.layer_complete(CompleteLayer { layer, weights, gradients })?;
        }
        Ok(())
    }
}
