//! The optimiser inside the backward: each layer is updated when its gradients are complete, and the next layer has their memory.
//!
//! A step is one micro-batch then, because the gradients of a second one would have nothing to be added to, and nothing is
//! clipped, because the norm over all gradients is known only at the end.

use super::offload::{self, Offloaded};
use crate::device::{Device, Floats, Gradient, MemoryPart};
use crate::error::{Error, Result};
use crate::model::{CompleteLayer, GradientSink, Gradients, LayerTensors, Llama, LlamaTensors};
use crate::optimizer::{AdamWStep, OptimizerState};

/// Norms of the gradients of each layer, and of the tensors outside the layers.
#[derive(Debug)]
pub struct LayerNorms<D: Device> {
    /// `[2]` each, as [`crate::device::Optimizer::gradient_norm`] assigns them.
    layers: Vec<Floats<D>>,
    outside: Floats<D>,
}

impl<D: Device> LayerNorms<D> {
    /// Buffers for a model, and the scratch memory of its norms.
    ///
    /// # Errors
    /// [`Error::Device`] where the device has no memory for them.
    pub fn new(model: &Llama<D>, gradients: &Gradients<D>) -> Result<Self> {
        let device = &*model.device;
        let shared: Vec<&Floats<D>> =
            gradients.layers.iter().flat_map(|layer| layer.iter().flatten()).collect();
        device.reserve_gradient_norm(&shared)?;
        device.reserve_gradient_norm(&gradients.outside_layers().flatten().collect::<Vec<_>>())?;
        device.as_part(MemoryPart::Gradients, || {
            let layers = (0..model.config.layers).map(|_| device.alloc(2)).collect::<Result<_>>()?;
            Ok(LayerNorms { layers, outside: device.alloc(2)? })
        })
    }

    /// How many norms there are.
    pub fn count(&self) -> usize {
        self.layers.len() + 1
    }

    /// Copies all of them to the beginning of `out`, two values each.
    ///
    /// # Errors
    /// Those of the device.
    pub fn copy_to(&self, device: &D, out: &mut Floats<D>) -> Result<()> {
        let all = self.layers.iter().chain([&self.outside]);
        all.enumerate().try_for_each(|(index, norm)| device.copy(out, 2 * index, norm, 0, 2))
    }

    /// The first layer, in the order of the backward, whose norm was not finite: `None` outside is that of the tensors outside
    /// the layers, which come last.
    ///
    /// # Errors
    /// Those of the device.
    pub fn first_broken(&self, device: &D) -> Result<Option<Option<usize>>> {
        let numbers = (0..self.layers.len()).rev().map(Some);
        for (number, norm) in numbers.zip(self.layers.iter().rev()).chain([(None, &self.outside)]) {
            let mut found = [0.0; 2];
            device.download(&mut found, norm, 0)?;
            if !found[0].is_finite() {
                return Ok(Some(number));
            }
        }
        Ok(None)
    }

    /// The norm of the gradients outside the layers, and the update of those tensors where `step` asks for one. Call it at the end
    /// of the backward. `states` are those on the device and those in host memory.
    ///
    /// # Errors
    /// Those of the device.
    pub fn finish(
        &mut self,
        model: &mut Llama<D>,
        (states, offloaded): (&mut LlamaTensors<Option<OptimizerState<D>>>, Option<&mut Offloaded<D>>),
        gradients: &Gradients<D>,
        step: Option<AdamWStep>,
    ) -> Result<()> {
        let all: Vec<&Floats<D>> = gradients.outside_layers().flatten().collect();
        model.device.gradient_norm(&mut self.outside, &all, None)?;
        let Some(step) = step else { return Ok(()) };
        let weights = model.weights.outside_layers_mut().zip(states.outside_layers_mut());
        let mut updates: Vec<_> = weights
            .zip(gradients.outside_layers())
            .filter_map(|((weight, state), gradient)| {
                Some(state.as_mut()?.update(weight, gradient.as_ref()?))
            })
            .collect();
        model.device.adamw(&mut updates, &self.outside, step)?;
        let Some(offloaded) = offloaded else { return Ok(()) };
        let numbers = offload::outside_numbers(states);
        let tensors = model.weights.outside_layers_mut().zip(gradients.outside_layers());
        for (number, (weight, gradient)) in numbers.zip(tensors) {
            let Some(gradient) = gradient else { continue };
            let gradient = Gradient::F32(gradient);
            offloaded.update(&model.device, number, weight, gradient, &self.outside, step)?;
        }
        Ok(())
    }
}

/// Takes the norm of each layer's gradients, updates the layer where `step` asks for it, and sets the gradients to zero for the
/// next layer.
pub struct UpdateLayers<'a, D: Device> {
    /// The device that computes.
    pub device: &'a D,
    /// The number of each layer's first tensor.
    pub numbers: Vec<usize>,
    /// The layers' states on the device.
    pub states: &'a mut [LayerTensors<Option<OptimizerState<D>>>],
    /// States in host memory.
    pub offloaded: Option<&'a mut Offloaded<D>>,
    /// Assigned.
    pub norms: &'a mut LayerNorms<D>,
    /// The update; `None` computes the norm alone.
    pub step: Option<AdamWStep>,
}

impl<D: Device> GradientSink<D> for UpdateLayers<'_, D> {
    fn layer_complete(&mut self, layer: CompleteLayer<'_, D>) -> Result<()> {
        let CompleteLayer { layer, weights, gradients } = layer;
        let (states, norm) = (&mut self.states[layer], &mut self.norms.layers[layer]);
        let first = self.numbers[layer];
        let offloaded = self.offloaded.as_deref();
        let is_trained = |(number, state): (usize, &Option<OptimizerState<D>>)| {
            state.is_some() || offloaded.is_some_and(|offloaded| offloaded.states.contains(number))
        };
        // A tensor that is frozen in this layer has gradients of its own only where other layers train it.
        let of_trained = |(state, gradient)| if is_trained(state) { gradient } else { None };
        let numbered = (first..).zip(states.iter());
        let trained: Vec<&Floats<D>> =
            numbered.zip(gradients.iter().map(Option::as_ref)).filter_map(of_trained).collect();
        self.device.gradient_norm(norm, &trained, None)?;
        if let Some(step) = self.step {
            let tensors = weights.iter_mut().zip(states.iter_mut()).zip(gradients.iter());
            let mut updates: Vec<_> = tensors
                .filter_map(|((weight, state), gradient)| {
                    Some(state.as_mut()?.update(weight, gradient.as_ref()?))
                })
                .collect();
            self.device.adamw(&mut updates, norm, step)?;
            if let Some(offloaded) = &mut self.offloaded {
                for (number, (weight, gradient)) in (first..).zip(weights.iter_mut().zip(gradients.iter())) {
                    let Some(gradient) = gradient else { continue };
                    let gradient = Gradient::F32(gradient);
                    offloaded.update(self.device, number, weight, gradient, norm, step)?;
                }
            }
        }
        self.device.zero_all(&mut gradients.iter_mut().flatten().collect::<Vec<_>>())
    }
}

/// The norm over all gradients, from those that [`LayerNorms::copy_to`] copied.
pub fn total(norms: &[f32]) -> f32 {
    norms.iter().step_by(2).map(|&norm| f64::from(norm).powi(2)).sum::<f64>().sqrt() as f32
}

/// Refuses what cannot be done layer by layer.
///
/// # Errors
/// [`Error::Config`] for several micro-batches, and for clipping.
pub fn check(micro_batches: usize, max_grad_norm: Option<f64>) -> Result<()> {
    if micro_batches > 1 {
        return Err(several_micro_batches(format!("a step has {micro_batches} of them")));
    }
    match max_grad_norm {
        None => Ok(()),
        Some(_) => Err(Error::config(
            "gradients that are applied layer by layer cannot be clipped by their global norm",
            "turn clipping off, or keep all gradients",
        )),
    }
}

/// The error of a run whose step takes more than one micro-batch; `what` says which.
pub fn several_micro_batches(what: String) -> Error {
    Error::config(
        format!("`gradients` = layer needs every step in one micro-batch, and {what}"),
        "raise --tokens-per-micro-batch, lower --pairs-per-step, or give --gradients f32",
    )
}
