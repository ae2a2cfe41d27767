//! Which optimiser states live in host memory, and in which order a step updates them.

use crate::config::{GradientConfig, MemoryConfig, OffloadConfig};
use crate::device::{ComputeBuffer, Device, Floats, Gradient};
use crate::error::Result;
use crate::model::{FusedTensor, Llama, LlamaTensors};
use crate::optimizer::{
    AdamWStep, OffloadPlan, OffloadedStates, PIECE_VALUES, StateBuffer, StochasticRounding, is_offloaded,
    remainder,
};

/// Values of a master copy that pass from the device to the host at a time, where pieces are not smaller.
const STAGED_VALUES: usize = 4 << 20;

/// The states of a model that are in host memory.
#[derive(Debug)]
pub struct Offloaded<D: Device> {
    /// Host memory and slots.
    pub states: OffloadedStates<D>,
    /// Seed of the stochastic rounding of weights without a master copy.
    rounding_seed: u64,
}

/// The sizes of a model's offloaded states under `memory`: none where nothing is offloaded. Tensors are numbered in the order
/// of the tree, frozen ones counted. `needs_master` is [`crate::device::Optimizer::needs_master`] of the device.
pub fn plan(layout: &LlamaTensors<FusedTensor>, memory: &MemoryConfig, needs_master: bool) -> OffloadPlan {
    plan_with(layout, memory, needs_master, PIECE_VALUES)
}

/// As [`plan`], with pieces of another size.
fn plan_with(
    layout: &LlamaTensors<FusedTensor>,
    memory: &MemoryConfig,
    needs_master: bool,
    piece_values: usize,
) -> OffloadPlan {
    let plan = OffloadPlan { options: memory.states, needs_master, piece_values, ..OffloadPlan::default() };
    if memory.offload == OffloadConfig::None {
        return plan;
    }
    let offloaded = |(number, tensor): (usize, &FusedTensor)| {
        let len = tensor.values();
        (tensor.trained && is_offloaded(len)).then_some((number, len))
    };
    if memory.gradients != GradientConfig::Layer {
        return OffloadPlan { tensors: layout.iter().enumerate().filter_map(offloaded).collect(), ..plan };
    }
    // The backward completes the last layer first, and the tensors outside the layers at its end.
    let (mut tensors, mut ahead) = (Vec::new(), Vec::new());
    for (layer, first) in layout.layers.iter().zip(layer_numbers(layout)).rev() {
        let before = tensors.len();
        tensors.extend(layer.iter().enumerate().filter_map(|(at, tensor)| offloaded((first + at, tensor))));
        ahead.push(tensors.len() - before);
    }
    tensors.extend(outside_numbers(layout).zip(layout.outside_layers()).filter_map(offloaded));
    OffloadPlan { tensors, ahead, ..plan }
}

/// The number of each layer's first tensor.
pub fn layer_numbers<T>(tree: &LlamaTensors<T>) -> Vec<usize> {
    let mut next = 1;
    let layers = tree.layers.iter().map(|layer| {
        let first = next;
        next += layer.iter().count();
        first
    });
    layers.collect()
}

/// The numbers of the tensors outside the layers, in their order.
pub fn outside_numbers<T>(tree: &LlamaTensors<T>) -> impl Iterator<Item = usize> {
    let after = 1 + tree.layers.iter().map(|layer| layer.iter().count()).sum::<usize>();
    std::iter::once(0).chain(after..)
}

impl<D: Device> Offloaded<D> {
    /// The states before the first update; `None` where nothing is offloaded.
    ///
    /// # Errors
    /// [`crate::Error::Config`] on a device that offloads nothing; [`crate::Error::Device`] where there is no memory for them.
    pub fn new(model: &Llama<D>, memory: &MemoryConfig, rounding_seed: u64) -> Result<Option<Self>> {
        Self::with_pieces(model, memory, rounding_seed, PIECE_VALUES)
    }

    /// As [`Offloaded::new`], with pieces of another size.
    ///
    /// # Errors
    /// As [`Offloaded::new`].
    pub fn with_pieces(
        model: &Llama<D>,
        memory: &MemoryConfig,
        rounding_seed: u64,
        piece_values: usize,
    ) -> Result<Option<Self>> {
        if memory.offload == OffloadConfig::None {
            return Ok(None);
        }
        let device = &*model.device;
        device.check_offload()?;
        let plan = plan_with(&model.layout, memory, device.needs_master(), piece_values);
        let mut states = OffloadedStates::new(device, &plan)?;
        let (mut staged, most) = (Vec::new(), STAGED_VALUES.min(piece_values));
        for (number, weight) in model.weights.iter().enumerate() {
            if !states.has(number, StateBuffer::Weight) {
                continue;
            }
            let len = device.len(weight);
            for first in (0..len).step_by(most) {
                staged.resize(most.min(len - first), 0.0);
                device.download_compute(&mut staged, weight, first)?;
                let place = (StateBuffer::Weight, first);
                states.write(device, number, place, bytemuck::cast_slice(&staged))?;
            }
        }
        Ok(Some(Offloaded { states, rounding_seed }))
    }

    /// Assigns the master copy of a tensor from value `first` on, if it is here. The weights must be these values, rounded to the
    /// nearest.
    ///
    /// # Errors
    /// Those of the device.
    pub fn write_master(&mut self, device: &D, number: usize, first: usize, values: &[f32]) -> Result<()> {
        if self.states.has(number, StateBuffer::Weight) {
            let place = (StateBuffer::Weight, first);
            return self.states.write(device, number, place, bytemuck::cast_slice(values));
        }
        if self.states.has(number, StateBuffer::Remainder) {
            let remainders: Vec<u16> = values.iter().copied().map(remainder).collect();
            let place = (StateBuffer::Remainder, first);
            return self.states.write(device, number, place, bytemuck::cast_slice(&remainders));
        }
        Ok(())
    }

    /// Updates a tensor from its gradient if its state is here.
    ///
    /// # Errors
    /// Those of the device.
    pub fn update(
        &mut self,
        device: &D,
        number: usize,
        weight: &mut ComputeBuffer<D>,
        gradient: Gradient<'_, D>,
        norm: &Floats<D>,
        step: AdamWStep,
    ) -> Result<()> {
        if !self.states.contains(number) {
            return Ok(());
        }
        let rounding = StochasticRounding { seed: self.rounding_seed, tensor: number as u32 };
        self.states.update(device, (number, rounding), weight, gradient, norm, step)
    }
}
