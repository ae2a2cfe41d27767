//! The operations of the optimiser, over the weights of an MLP.

use half::bf16;

use super::{Case, Maker, Outputs, WORD, compute_size, outputs};
use crate::bench::inputs::{compute, filled, floats, normal};
use crate::bench::shapes::{self, Shape};
use crate::device::{Device, Floats, Gradient};
use crate::error::Result;
use crate::optimizer::{
    Master, MasterWeights, MomentFormat, OptimizerState, StateOptions, StochasticRounding,
};

/// Gate, up and down: these operations take many tensors at once.
const TENSORS: usize = 3;

pub(super) fn makers<D: Device>() -> Vec<Maker<D>> {
    vec![
        zero_all,
        accumulate,
        accumulate_compute,
        gradient_norm,
        gradient_norm_bf16,
        adamw_f32,
        adamw_bf16,
        adamw_8bit,
        adamw_split,
        adamw_8bit_split,
        adamw_no_master,
        adamw_bf16_no_master,
        adamw_8bit_no_master,
        adamw_bf16_gradients,
        adamw_8bit_bf16_gradients,
    ]
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

/// The gradient of a matrix, added to its sum over micro-batches in f32.
fn accumulate<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let len = values(shape);
    let source = floats(device, 10, len, 1.0)?;
    let case = Case::new("accumulate", outputs(device, &[], &[len])?, move |device: &D, out| {
        device.accumulate(&mut out.floats[0], 0, &source, 0, len)
    });
    Ok(case.updates().bytes(3 * WORD * len))
}

/// The same in the type of weights.
fn accumulate_compute<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let len = values(shape);
    let source = floats(device, 10, len, 1.0)?;
    let case = Case::new("accumulate", outputs(device, &[len], &[])?, move |device: &D, out| {
        device.accumulate(&mut out.compute[0], 0, &source, 0, len)
    });
    let is_narrow = compute_size::<D>() < WORD;
    let case = case.updates().redundant(!is_narrow).part(if is_narrow { "bf16" } else { "compute" });
    Ok(case.bytes((WORD + 2 * compute_size::<D>()) * len))
}

fn gradient_norm<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let gradients = gradients(device, shape)?;
    let out = outputs(device, &[], &[2])?;
    let case = Case::new("gradient_norm", out, move |device: &D, out| {
        device.gradient_norm(&mut out.floats[0], &gradients.iter().collect::<Vec<_>>(), Some(1.0))
    });
    Ok(case.bytes(WORD * TENSORS * values(shape)))
}

fn gradient_norm_bf16<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let sums = narrow_gradients(device, shape)?;
    let out = outputs(device, &[], &[2])?;
    let case = Case::new("gradient_norm", out, move |device: &D, out| {
        let gradients: Vec<_> = sums.iter().map(Gradient::Bf16).collect();
        device.gradient_norm_of(&mut out.floats[0], &gradients, Some(1.0))
    });
    Ok(case.part("bf16").bytes(WORD / 2 * TENSORS * values(shape)))
}

/// The gradients of the case, as `--gradients bf16` has them.
fn narrow_gradients<D: Device>(device: &D, shape: &Shape) -> Result<Vec<D::Buffer<bf16>>> {
    tensors(|tensor| {
        let wide = normal(10 + tensor as u64, values(shape), 1.0);
        filled(device, &wide.into_iter().map(bf16::from_f32).collect::<Vec<_>>())
    })
}

/// Gradients of one type.
enum Gradients<D: Device> {
    F32(Vec<Floats<D>>),
    Bf16(Vec<D::Buffer<bf16>>),
}

impl<D: Device> Gradients<D> {
    fn get(&self, tensor: usize) -> Gradient<'_, D> {
        match self {
            Gradients::F32(all) => Gradient::F32(&all[tensor]),
            Gradients::Bf16(all) => Gradient::Bf16(&all[tensor]),
        }
    }

    /// Bytes of one value.
    fn size(&self) -> usize {
        match self {
            Gradients::F32(_) => WORD,
            Gradients::Bf16(_) => WORD / 2,
        }
    }
}

/// The update of AdamW from f32 gradients with what a state may be made of.
fn adamw<D: Device>(device: &D, shape: &Shape, part: &'static str, options: StateOptions) -> Result<Case<D>> {
    adamw_from(device, shape, part, options, Gradients::F32(gradients(device, shape)?))
}

fn adamw_from<D: Device>(
    device: &D,
    shape: &Shape,
    part: &'static str,
    options: StateOptions,
    gradients: Gradients<D>,
) -> Result<Case<D>> {
    let values = values(shape);
    let rounding = |tensor| StochasticRounding { seed: 1, tensor: tensor as u32 };
    let mut states =
        tensors(|tensor| OptimizerState::with_options(device, values, options, rounding(tensor)))?;
    for (tensor, state) in states.iter_mut().enumerate() {
        if let Some(master) = &mut state.master {
            master.upload(device, 0, &normal(tensor as u64, values, 0.02))?;
        }
    }
    let (norm, gradient_size) = (filled(device, &[1.0f32, 1.0])?, gradients.size());
    let settings = shapes::settings()?;
    // What the weight comes from is read: a master copy, which is written too, or the weight itself.
    let masters = match states[0].master.as_ref().map(Master::kind) {
        Some(MasterWeights::F32) => 2 * WORD,
        Some(MasterWeights::Split) => WORD + compute_size::<D>(),
        _ => compute_size::<D>(),
    };
    let weights = tensors(|tensor| compute(device, tensor as u64, values, 0.02))?;
    let out = Outputs { compute: weights, floats: Vec::new() };
    let case = Case::new("adamw", out, move |device: &D, out| {
        let tensors = out.compute.iter_mut().zip(&mut states).enumerate();
        let mut updates: Vec<_> = tensors
            .map(|(tensor, (weight, state))| state.update_from(weight, gradients.get(tensor)))
            .collect();
        device.adamw(&mut updates, &norm, settings.adamw(1))
    });
    // Both moments are read and written, the gradient is read, the weight is written.
    let bytes = 2 * options.moments.bytes(values) + (gradient_size + compute_size::<D>() + masters) * values;
    // A weight that is its own master copy is another case where there could be one alone.
    let redundant = options.master != MasterWeights::F32 && !device.needs_master();
    Ok(case.updates().part(part).redundant(redundant).bytes(bytes * TENSORS))
}

fn adamw_f32<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    adamw(device, shape, "", StateOptions::default())
}

fn adamw_bf16<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let options = StateOptions { moments: MomentFormat::Bf16, master: MasterWeights::F32 };
    adamw(device, shape, "bf16 moments", options)
}

fn adamw_8bit<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let options = StateOptions { moments: MomentFormat::EightBit, master: MasterWeights::F32 };
    adamw(device, shape, "8-bit moments", options)
}

fn adamw_split<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let options = StateOptions { moments: MomentFormat::F32, master: MasterWeights::Split };
    adamw(device, shape, "split master", options)
}

fn adamw_8bit_split<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let options = StateOptions { moments: MomentFormat::EightBit, master: MasterWeights::Split };
    adamw(device, shape, "8-bit moments, split master", options)
}

fn adamw_no_master<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let options = StateOptions { moments: MomentFormat::F32, master: MasterWeights::None };
    adamw(device, shape, "no master", options)
}

fn adamw_bf16_no_master<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let options = StateOptions { moments: MomentFormat::Bf16, master: MasterWeights::None };
    adamw(device, shape, "bf16 moments, no master", options)
}

fn adamw_8bit_no_master<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let options = StateOptions { moments: MomentFormat::EightBit, master: MasterWeights::None };
    adamw(device, shape, "8-bit moments, no master", options)
}

fn adamw_bf16_gradients<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let gradients = Gradients::Bf16(narrow_gradients(device, shape)?);
    adamw_from(device, shape, "bf16 gradients", StateOptions::default(), gradients)
}

fn adamw_8bit_bf16_gradients<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let options = StateOptions { moments: MomentFormat::EightBit, master: MasterWeights::None };
    let gradients = Gradients::Bf16(narrow_gradients(device, shape)?);
    adamw_from(device, shape, "8-bit moments, no master, bf16 gradients", options, gradients)
}
