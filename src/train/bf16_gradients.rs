//! Gradients that are summed over micro-batches in bf16: 2 bytes for each trained weight of a layer instead of 4.
//!
//! The backward forms the gradients of a layer in f32, in buffers that all layers share, and they are added to the layer's bf16
//! sums when they are complete. The tensors outside the layers keep the f32 buffers in which their gradients are formed as their
//! sums: a bf16 sum beside them would take more memory, not less.

use half::bf16;

use crate::device::{Device, Gradient, MemoryPart};
use crate::error::Result;
use crate::model::{CompleteLayer, GradientSink, Gradients, LayerTensors, Llama, LlamaTensors};

/// The bf16 sums of the layers' trained tensors.
#[derive(Debug)]
pub struct Bf16Sums<D: Device> {
    /// `None` for a frozen tensor and for those outside the layers.
    tensors: LlamaTensors<Option<D::Buffer<bf16>>>,
}

impl<D: Device> Bf16Sums<D> {
    /// Zeros for what the layers of `model` train.
    ///
    /// # Errors
    /// [`crate::Error::Device`] where the device has no memory for them.
    pub fn new(model: &Llama<D>) -> Result<Self> {
        let mut layout = model.layout.clone();
        layout.outside_layers_mut().for_each(|tensor| tensor.trained = false);
        let device = &*model.device;
        let tensors = device.as_part(MemoryPart::Gradients, || {
            layout.try_map(|tensor| match tensor.trained {
                true => device.alloc(tensor.values()).map(Some),
                false => Ok(None),
            })
        })?;
        Ok(Bf16Sums { tensors })
    }

    /// Sets all sums to zero, before the first micro-batch of a step.
    ///
    /// # Errors
    /// Those of the device.
    pub fn clear(&mut self, device: &D) -> Result<()> {
        self.tensors.iter_mut().flatten().try_for_each(|sum| {
            let len = device.len(sum);
            device.zero(sum, 0..len)
        })
    }

    /// What a backward gives the gradients of each layer to.
    pub fn sink<'a>(&'a mut self, device: &'a D) -> AddToSums<'a, D> {
        AddToSums { device, layers: &mut self.tensors.layers }
    }

    /// The gradients of a step for each tensor in the order of the tree: the sums of the layers, and outside of them the f32
    /// gradients.
    fn with_outside<'a>(&'a self, gradients: &'a Gradients<D>) -> Vec<Option<Gradient<'a, D>>> {
        let mut outside = gradients.outside_layers().map(|gradient| gradient.as_ref().map(Gradient::F32));
        let layers = self.tensors.layers.iter().flat_map(LayerTensors::iter);
        let mut all: Vec<_> = outside.next().into_iter().collect();
        all.extend(layers.map(|sum| sum.as_ref().map(Gradient::Bf16)));
        all.extend(outside);
        all
    }
}

/// The gradients of a step for each tensor in the order of the tree, `None` for a frozen one.
pub fn of_step<'a, D: Device>(
    gradients: &'a Gradients<D>,
    sums: Option<&'a Bf16Sums<D>>,
) -> Vec<Option<Gradient<'a, D>>> {
    match sums {
        Some(sums) => sums.with_outside(gradients),
        None => gradients.iter().map(|gradient| gradient.as_ref().map(Gradient::F32)).collect(),
    }
}

/// Adds each layer's gradients to its sums, and sets them to zero for the next layer.
pub struct AddToSums<'a, D: Device> {
    device: &'a D,
    layers: &'a mut [LayerTensors<Option<D::Buffer<bf16>>>],
}

impl<D: Device> GradientSink<D> for AddToSums<'_, D> {
    fn layer_complete(&mut self, layer: CompleteLayer<'_, D>) -> Result<()> {
        let CompleteLayer { layer, gradients, .. } = layer;
        // A tensor that is frozen in this layer has gradients of its own only where other layers train it.
        for (sum, gradient) in self.layers[layer].iter_mut().zip(gradients.iter()) {
            if let (Some(sum), Some(gradient)) = (sum, gradient) {
                self.device.accumulate(sum, 0, gradient, 0, self.device.len(gradient))?;
            }
        }
        self.device.zero_all(&mut gradients.iter_mut().flatten().collect::<Vec<_>>())
    }
}
