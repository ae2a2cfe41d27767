//! Gradients that are summed over micro-batches in bf16, beside f32 sums: on the CPU device and on the emulated GPU.

use std::sync::Arc;

use half::bf16;
use mmpo_fast::config::{GradientConfig, MemoryConfig};
use mmpo_fast::device::cpu::CpuDevice;
use mmpo_fast::device::prelude::*;
use mmpo_fast::device::{Gradient, Sum};
use mmpo_fast::model::{FusedTensor, LlamaTensors};
use mmpo_fast::optimizer::{AdamWStep, Master};
use mmpo_fast::train::{Trainer, TrainingPair, Workload};

use crate::golden::{self, Golden, OBJECTIVE, STEP, training_pairs};

/// Pairs of a step.
const PAIRS: usize = 4;
/// A budget that takes a step in one micro-batch, and one that takes a pair at a time.
const BUDGETS: [usize; 2] = [usize::MAX, 1];

fn golden(name: &str) -> Golden {
    Golden::named(name, PAIRS)
}

fn cpu() -> CpuDevice {
    CpuDevice::new(Some(2)).expect("the CPU device starts")
}

/// A trainer with these gradients, given with the pairs to `work`.
fn with_trainer<D: Device, R>(
    golden: &Golden,
    device: &Arc<D>,
    (gradients, budget): (GradientConfig, usize),
    is_frozen: impl Fn(&FusedTensor) -> bool,
    work: impl FnOnce(&mut Trainer<D>, &[TrainingPair<'_>]) -> R,
) -> R {
    let mut model = golden.load(device);
    model.freeze(is_frozen);
    let scores = golden::score(&model, &golden.pairs);
    let memory = MemoryConfig { gradients, ..MemoryConfig::default() };
    let workload = Workload { memory, ..Workload::plan(&golden.pairs, &OBJECTIVE, PAIRS, budget) };
    let mut trainer = Trainer::new(model, OBJECTIVE, workload).expect("trainer");
    work(&mut trainer, &training_pairs(&golden.pairs, &scores))
}

fn download<D: Device, T: Sum>(device: &D, buffer: &D::Buffer<T>) -> Vec<f32> {
    let mut values = vec![T::default(); device.len(buffer)];
    device.download(&mut values, buffer, 0).expect("download");
    values.into_iter().map(T::widen).collect()
}

/// The gradient of each tensor, and whether its sum is bf16.
type Gradients = Vec<Option<(Vec<f32>, bool)>>;

/// Gradients of a step and their norm.
fn gradients<D: Device>(
    golden: &Golden,
    device: D,
    kind: (GradientConfig, usize),
    is_frozen: impl Fn(&FusedTensor) -> bool,
) -> (Gradients, f32) {
    let device = Arc::new(device);
    with_trainer(golden, &device, kind, is_frozen, |trainer, pairs| {
        // Sums of an earlier step, which must not be left.
        trainer.accumulate_gradients(&pairs[..1], None).expect("gradients");
        let memory = device.memory();
        let norm = trainer.accumulate_gradients(pairs, Some(1.0)).expect("gradients").gradient_norm;
        assert_eq!(device.memory(), memory, "a step takes no memory");
        let read = |gradient: Gradient<'_, D>| match gradient {
            Gradient::F32(values) => (download::<D, f32>(&device, values), false),
            Gradient::Bf16(values) => (download::<D, bf16>(&device, values), true),
        };
        (trainer.step_gradients().into_iter().map(|gradient| gradient.map(read)).collect(), norm)
    })
}

fn root_mean_square(values: impl ExactSizeIterator<Item = f32>) -> f64 {
    let count = values.len().max(1) as f64;
    (values.map(|value| f64::from(value).powi(2)).sum::<f64>() / count).sqrt()
}

/// With one micro-batch a sum is the f32 gradient, rounded once; with a micro-batch for each pair it is off by what the roundings
/// of four sums may be. The tensors outside the layers have f32 gradients with the same bits.
fn sums_are_those_of_f32_but_for_rounding<D: Device>(name: &str, device: impl Fn() -> D) {
    let golden = golden(name);
    for budget in BUDGETS {
        let (wanted, norm) = gradients(&golden, device(), (GradientConfig::F32, budget), |_| false);
        let (got, bf16_norm) = gradients(&golden, device(), (GradientConfig::Bf16, budget), |_| false);
        let layout = LlamaTensors::layout(&golden.load(&Arc::new(cpu())).config);
        let mut narrow = 0;
        for ((got, wanted), tensor) in got.iter().zip(&wanted).zip(layout.iter()) {
            let what = format!("{name}, budget {budget}: {}", tensor.name());
            let ((got, is_bf16), (wanted, _)) = (got.as_ref().unwrap(), wanted.as_ref().unwrap());
            assert_eq!(*is_bf16, tensor.name().starts_with("model.layers."), "{what}: type");
            narrow += usize::from(*is_bf16);
            let rounded: Vec<f32> = match is_bf16 {
                true => wanted.iter().map(|&value| bf16::from_f32(value).to_f32()).collect(),
                false => wanted.clone(),
            };
            if budget > 1 || !is_bf16 {
                assert!(*got == rounded, "{what}: the f32 gradient, rounded");
                continue;
            }
            // Each of four roundings is off by a 512th of a partial sum at most, and by a part of that in the mean.
            let error = root_mean_square(got.iter().zip(wanted).map(|(got, wanted)| got - wanted));
            let allowed = root_mean_square(wanted.iter().copied()) / 256.0;
            assert!(error <= allowed, "{what}: error {error:e}, {allowed:e} allowed");
            assert!(error > 0.0, "{what}: sums are rounded");
        }
        assert!(narrow > 0);
        assert!((bf16_norm - norm).abs() <= norm / 256.0, "{name}: norm {bf16_norm}, wanted {norm}");
    }
}

/// Three steps from bf16 sums end near those from f32 ones: the difference is a small part of what the steps change.
fn steps_are_near_those_of_f32<D: Device>(name: &str, device: impl Fn() -> D) {
    let golden = golden(name);
    let weights = |kind, steps: u32| {
        let device = Arc::new(device());
        with_trainer(
            &golden,
            &device,
            kind,
            |_| false,
            |trainer, pairs| {
                for step in 1..=steps {
                    trainer.step(pairs, AdamWStep { step, ..STEP }, Some(1.0)).expect("step");
                }
                let weights = trainer.model.weights.iter().zip(trainer.states.iter());
                let values = weights.flat_map(|(weight, state)| {
                    match state.as_ref().and_then(|state| state.master.as_ref()) {
                        Some(Master::Whole(master)) => download::<D, f32>(&device, master),
                        _ => download::<D, D::Compute>(&device, weight),
                    }
                });
                values.collect::<Vec<f32>>()
            },
        )
    };
    for budget in BUDGETS {
        let start = weights((GradientConfig::F32, budget), 0);
        let wanted = weights((GradientConfig::F32, budget), 3);
        let got = weights((GradientConfig::Bf16, budget), 3);
        let moved = root_mean_square(wanted.iter().zip(&start).map(|(now, start)| now - start));
        let error = root_mean_square(got.iter().zip(&wanted).map(|(got, wanted)| got - wanted));
        assert!(moved > 1e-4, "{name}: the steps change weights by {moved:e}");
        assert!(error <= 0.02 * moved, "{name}, budget {budget}: off by {error:e} of {moved:e}");
        assert!(error > 0.0, "{name}, budget {budget}: not the same gradients");
    }
}

#[test]
fn bf16_sums_on_the_cpu() {
    for name in ["base", "tied", "bias"] {
        sums_are_those_of_f32_but_for_rounding(name, cpu);
        steps_are_near_those_of_f32(name, cpu);
    }
    let narrow = || CpuDevice::<bf16>::open(Some(2)).expect("the CPU device starts");
    sums_are_those_of_f32_but_for_rounding("tied", narrow);
    steps_are_near_those_of_f32("tied", narrow);
}

#[cfg(mmpo_emulated)]
#[test]
fn bf16_sums_on_the_emulated_gpu() {
    use mmpo_fast::device::cuda::{CudaDevice, EmulatorVariant, KernelPath};
    for path in [KernelPath::Portable, KernelPath::Hopper] {
        let device = || CudaDevice::emulated(EmulatorVariant::Plain).with_path(path);
        sums_are_those_of_f32_but_for_rounding("bias", device);
        steps_are_near_those_of_f32("bias", device);
    }
}

/// A tensor that is frozen in one layer and trained in another has a sum in the other alone, with the same bits as where all are
/// trained.
#[test]
fn frozen_tensors_have_no_sums() {
    let golden = golden("bias");
    let is_frozen = |tensor: &FusedTensor| {
        tensor.name().contains("layers.1.mlp") || tensor.name().contains("embed_tokens")
    };
    let kind = (GradientConfig::Bf16, 1);
    let (all, _) = gradients(&golden, cpu(), kind, |_| false);
    let (some, _) = gradients(&golden, cpu(), kind, is_frozen);
    let layout = LlamaTensors::layout(&golden.load(&Arc::new(cpu())).config);
    let mut frozen = 0;
    for ((all, some), tensor) in all.into_iter().zip(some).zip(layout.iter()) {
        let wanted = if is_frozen(tensor) { None } else { all };
        frozen += usize::from(wanted.is_none());
        assert!(some == wanted, "{}", tensor.name());
    }
    assert!(frozen > 1, "{frozen} frozen tensors");
}

/// Two bytes for each weight of a layer, and the f32 gradients of one layer, in place of four bytes for each.
#[test]
fn sums_take_half_the_memory() {
    for name in ["base", "tied", "bias"] {
        let golden = golden(name);
        let bytes = |gradients| {
            let device = Arc::new(cpu());
            with_trainer(&golden, &device, (gradients, usize::MAX), |_| false, |_, _| device.memory().now)
        };
        let layout = LlamaTensors::layout(&golden.load(&Arc::new(cpu())).config);
        let layer: usize = layout.layers[0].iter().map(FusedTensor::values).sum();
        let layers = layout.layers.len();
        assert!(layers > 1);
        // With two layers the sums take what the f32 gradients of the second one would have.
        assert_eq!(
            bytes(GradientConfig::F32) + 4 * layer,
            bytes(GradientConfig::Bf16) + 2 * layers * layer,
            "{name}"
        );
    }
}
