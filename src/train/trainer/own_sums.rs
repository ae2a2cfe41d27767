//! Gradients that exist for two layers at a time: while the backward forms one layer's, the last one's are summed over the ranks,
//! and each rank adds its own values of them to what it keeps in f32.

use std::mem;
use std::ops::Range;

use super::ranks::OtherRanks;
use crate::device::{Device, Floats, MemoryPart};
use crate::error::Result;
use crate::model::{CompleteLayer, GradientSink, Gradients, LayerGradients, Llama};

/// This rank's values of the summed gradient of one tensor.
#[derive(Debug)]
pub(super) struct OwnSum<D: Device> {
    /// Whether the tensor is trained in this layer: the gradients that layers share have room for all that is trained in any.
    is_trained: bool,
    /// The values of the tensor that are summed here.
    pub part: Range<usize>,
    /// Their sums over micro-batches and ranks; `None` where there are no values.
    pub values: Option<Floats<D>>,
}

/// This rank's values of the summed gradients of all layers.
#[derive(Debug)]
pub(super) struct OwnSums<D: Device> {
    /// In the order of [`crate::model::LayerTensors::iter`].
    pub layers: Vec<Vec<OwnSum<D>>>,
    /// The gradients that are being summed.
    on_the_way: LayerGradients<D>,
    /// The layer that they belong to.
    pending: Option<usize>,
}

impl<D: Device> OwnSums<D> {
    /// Sums of 0 for `model`, and the gradients of one layer beside those of `gradients`.
    ///
    /// # Errors
    /// [`crate::Error::Device`] where the device has no memory for them.
    pub fn new(model: &Llama<D>, ranks: &OtherRanks<D>, gradients: &Gradients<D>) -> Result<Self> {
        let device = &*model.device;
        device.as_part(MemoryPart::Gradients, || {
            let layers = model.layout.layers.iter().map(|layer| {
                let of = |tensor: &crate::model::FusedTensor| {
                    let part = ranks.own(tensor.values());
                    let values = match tensor.trained && !part.is_empty() {
                        true => Some(device.alloc(part.len())?),
                        false => None,
                    };
                    Ok(OwnSum { is_trained: tensor.trained, part, values })
                };
                layer.iter().map(of).collect()
            });
            let layers = layers.collect::<Result<_>>()?;
            let on_the_way = gradients.layers[0].try_map(&mut |gradient: &Option<Floats<D>>| {
                gradient.as_ref().map(|gradient| device.alloc(device.len(gradient))).transpose()
            })?;
            Ok(OwnSums { layers, on_the_way, pending: None })
        })
    }

    /// All sums that this rank has.
    pub fn iter(&self) -> impl Iterator<Item = &Floats<D>> {
        self.layers.iter().flatten().filter_map(|sum| sum.values.as_ref())
    }

    /// Everything that begins a step as 0.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Floats<D>> {
        let sums = self.layers.iter_mut().flatten().filter_map(|sum| sum.values.as_mut());
        sums.chain(self.on_the_way.iter_mut().flatten())
    }

    /// Takes the gradients of `layer`, which are complete for this micro-batch, and gives back others of 0 for the next layer.
    pub fn take(
        &mut self,
        ranks: &mut OtherRanks<D>,
        layer: usize,
        gradients: &mut LayerGradients<D>,
    ) -> Result<()> {
        self.settle(ranks)?;
        mem::swap(gradients, &mut self.on_the_way);
        let summed = self.on_the_way.iter_mut().zip(&self.layers[layer]);
        let summed = summed.filter(|(_, sum)| sum.is_trained).filter_map(|(gradient, _)| gradient.as_mut());
        ranks.sum_gradients(&mut summed.collect::<Vec<_>>())?;
        self.pending = Some(layer);
        Ok(())
    }

    /// Waits for the gradients that are on the way, adds this rank's values of them, and sets them to 0.
    ///
    /// # Errors
    /// Those of the device.
    pub fn settle(&mut self, ranks: &OtherRanks<D>) -> Result<()> {
        let Some(layer) = self.pending.take() else { return Ok(()) };
        ranks.finish()?;
        let device = ranks.device();
        for (sum, gradient) in self.layers[layer].iter_mut().zip(self.on_the_way.iter()) {
            let (Some(values), Some(gradient)) = (&mut sum.values, gradient) else { continue };
            device.accumulate(values, 0, gradient, sum.part.start, sum.part.len())?;
        }
        device.zero_all(&mut self.on_the_way.iter_mut().flatten().collect::<Vec<_>>())
    }
}

/// Sums each layer's gradients over the ranks, and keeps this rank's values alone.
pub(super) struct ScatterLayers<'a, D: Device> {
    pub ranks: &'a mut OtherRanks<D>,
    pub sums: &'a mut OwnSums<D>,
}

impl<D: Device> GradientSink<D> for ScatterLayers<'_, D> {
    fn layer_complete(&mut self, layer: CompleteLayer<'_, D>) -> Result<()> {
        self.sums.take(self.ranks, layer.layer, layer.gradients)
    }
}

impl<D: Device> ScatterLayers<'_, D> {
    /// Takes part with gradients of 0 in a micro-batch that other ranks have and this one has not: the layers come in the order
    /// of the backward.
    ///
    /// # Errors
    /// As [`OwnSums::settle`].
    pub fn idle(&mut self, gradients: &mut Gradients<D>, layers: Range<usize>) -> Result<()> {
        layers.rev().try_for_each(|layer| self.sums.take(self.ranks, layer, &mut gradients.layers[0]))
    }
}
