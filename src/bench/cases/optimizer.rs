//! The operations of the optimiser, over as many weights as the products of an MLP have.

use super::{Case, Maker, Outputs, WORD, compute_size, outputs};
use crate::bench::inputs::{compute, filled, floats, normal};
use crate::bench::shapes::{self, Shape};
use crate::device::{AdamWState, Device};
use crate::error::Result;

pub(super) fn makers<D: Device>() -> Vec<Maker<D>> {
    vec![gradient_norm, adamw]
}

fn weights(shape: &Shape) -> usize {
    3 * shape.config.hidden_size * shape.config.intermediate_size
}

fn gradient_norm<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let values = weights(shape);
    let gradient = floats(device, 1, values, 1.0)?;
    let out = outputs(device, &[], &[2])?;
    let case = Case::new("gradient_norm", out, move |device: &D, out| {
        device.gradient_norm(&mut out.floats[0], &[&gradient], Some(1.0))
    });
    Ok(case.bytes(WORD * values))
}

fn adamw<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let values = weights(shape);
    let mut state = AdamWState::new(device, values)?;
    if let Some(master) = &mut state.master {
        device.upload(master, 0, &normal(1, values, 0.02))?;
    }
    let (gradient, norm) = (floats(device, 2, values, 1.0)?, filled(device, &[1.0f32, 1.0])?);
    let settings = shapes::settings()?;
    let masters = if state.master.is_some() { 2 * WORD } else { compute_size::<D>() };
    let out = Outputs { compute: vec![compute(device, 1, values, 0.02)?], floats: Vec::new() };
    let case = Case::new("adamw", out, move |device: &D, out| {
        device.adamw(&mut out.compute[0], &mut state, &gradient, &norm, settings.adamw(1))
    });
    // Both moments are read and written, the gradient read, the weight written and what it comes from read.
    let bytes = 5 * WORD + compute_size::<D>() + masters;
    Ok(case.updates().bytes(bytes * values))
}
