//! The operations of the optimiser, over the weights of an MLP.

use super::{Case, Maker, Outputs, WORD, compute_size, outputs};
use crate::bench::inputs::{compute, filled, floats, normal};
use crate::bench::shapes::{self, Shape};
use crate::device::{Device, Floats};
use crate::error::Result;
use crate::optimizer::OptimizerState;

/// Gate, up and down: these operations take many tensors at once.
const TENSORS: usize = 3;

pub(super) fn makers<D: Device>() -> Vec<Maker<D>> {
    vec![zero_all, gradient_norm, adamw]
}

/// Values of one tensor.
fn values(shape: &Shape) -> usize {
    shape.config.hidden_size * shape.config.intermediate_size
}

fn tensors<T>(make: impl FnMut(usize) -> Result<T>) -> Result<Vec<T>> {
    (0..TENSORS).map(make).collect()
}

fn gradients<D: Device>(device: &D, shape: &Shape) -> Result<Vec<Floats<D>>> {
    tensors(|tensor| floats(device, 10 + tensor as u64, values(shape), 1.0))
}

fn zero_all<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let out = outputs(device, &[], &[values(shape); TENSORS])?;
    let case = Case::new("zero_all", out, |device: &D, out| {
        device.zero_all(&mut out.floats.iter_mut().collect::<Vec<_>>())
    });
    Ok(case.bytes(WORD * TENSORS * values(shape)))
}

fn gradient_norm<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let gradients = gradients(device, shape)?;
    let out = outputs(device, &[], &[2])?;
    let case = Case::new("gradient_norm", out, move |device: &D, out| {
        device.gradient_norm(&mut out.floats[0], &gradients.iter().collect::<Vec<_>>(), Some(1.0))
    });
    Ok(case.bytes(WORD * TENSORS * values(shape)))
}

fn adamw<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let values = values(shape);
    let mut states = tensors(|_| OptimizerState::new(device, values))?;
    for (tensor, state) in states.iter_mut().enumerate() {
        if let Some(master) = &mut state.master {
            device.upload(master, 0, &normal(tensor as u64, values, 0.02))?;
        }
    }
    let (gradients, norm) = (gradients(device, shape)?, filled(device, &[1.0f32, 1.0])?);
    let settings = shapes::settings()?;
    let masters = if device.needs_master() { 2 * WORD } else { compute_size::<D>() };
    let weights = tensors(|tensor| compute(device, tensor as u64, values, 0.02))?;
    let out = Outputs { compute: weights, floats: Vec::new() };
    let case = Case::new("adamw", out, move |device: &D, out| {
        let states = states.iter_mut().zip(&gradients);
        let mut updates: Vec<_> = out
            .compute
            .iter_mut()
            .zip(states)
            .map(|(weight, (state, gradient))| state.update(weight, gradient))
            .collect();
        device.adamw(&mut updates, &norm, settings.adamw(1))
    });
    // Both moments are read and written, the gradient read, the weight written and what it comes from read.
    let bytes = 5 * WORD + compute_size::<D>() + masters;
    Ok(case.updates().bytes(bytes * TENSORS * values))
}
