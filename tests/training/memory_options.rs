//! Recomputation, and updates inside the backward: the bits of a step without them, in less memory. On the CPU device and on
//! the emulated GPU.

use std::sync::Arc;

use mmpo_fast::config::{GradientConfig, MemoryConfig};
use mmpo_fast::device::cpu::CpuDevice;
use mmpo_fast::device::prelude::*;
use mmpo_fast::model::{FusedTensor, Llama, LlamaTensors, Recompute};
use mmpo_fast::optimizer::{AdamWStep, StateBuffer, StateValues};
use mmpo_fast::score::PairScore;
use mmpo_fast::train::{Trainer, Workload};

use crate::golden::{self, Golden, OBJECTIVE, STEP, cpu, training_pairs};
use crate::layers::{bits, compute_bits};

/// Pairs of a step.
const PAIRS: usize = 4;

fn golden(name: &str) -> Golden {
    Golden::named(name, PAIRS)
}

/// The model, and its scores of the pairs.
fn load<D: Device>(golden: &Golden, device: &Arc<D>) -> (Llama<D>, Vec<PairScore>) {
    let model = golden.load(device);
    let scores = golden::score(&model, &golden.pairs);
    (model, scores)
}

/// What a step with this recomputation leaves: gradient norm, loss and weights as bits, and the bytes on the device before it.
fn recomputed_step<D: Device>(
    golden: &Golden,
    device: D,
    recompute: Recompute,
) -> (u32, u64, Vec<Vec<u32>>, usize) {
    let device = Arc::new(device);
    let (model, scores) = load(golden, &device);
    let workload = Workload {
        memory: MemoryConfig { recompute, ..MemoryConfig::default() },
        ..Workload::plan(&golden.pairs, &OBJECTIVE, PAIRS, 150)
    };
    let mut trainer = Trainer::new(model, OBJECTIVE, workload).expect("trainer");
    let memory = device.memory();
    let result = trainer.step(&training_pairs(&golden.pairs, &scores), STEP, Some(1.0)).expect("step");
    // Everything was reserved before the step.
    assert_eq!(device.memory(), memory, "{recompute:?}");
    let weights = trainer.model.weights.iter().map(|weight| compute_bits(&*device, weight)).collect();
    (result.gradient_norm.to_bits(), result.loss.to_bits(), weights, memory.now)
}

/// Every recomputation gives the bits of none, with less memory: exactly the buffers of all layers but one.
fn recomputation_gives_the_same_bits<D: Device>(golden: &Golden, device: impl Fn() -> D) {
    let (norm, loss, weights, bytes) = recomputed_step(golden, device(), Recompute::None);
    let config = golden.load(&cpu()).config;
    let attention = config.attention_shape();
    let tokens = Workload::plan(&golden.pairs, &OBJECTIVE, PAIRS, 150).micro_batch.tokens;
    let gate_up = 2 * config.intermediate_size * size_of::<D::Compute>();
    let rest = (attention.qkv_width() + attention.out_width() + config.hidden_size) * size_of::<D::Compute>()
        + (attention.heads + 2) * size_of::<f32>();
    for (recompute, row) in [(Recompute::Selective, gate_up), (Recompute::Layer, gate_up + rest)] {
        let what = format!("{} {recompute:?}", golden.name());
        let step = recomputed_step(golden, device(), recompute);
        assert_eq!((step.0, step.1), (norm, loss), "{what}: norm and loss");
        assert!(step.2 == weights, "{what}: weights");
        assert_eq!(bytes - step.3, (config.layers - 1) * tokens * row, "{what}: bytes");
    }
}

#[test]
fn recomputed_layers_give_the_same_step_from_less_memory() {
    for name in ["base", "tied", "bias"] {
        recomputation_gives_the_same_bits(&golden(name), || CpuDevice::new(Some(2)).expect("the CPU device"));
    }
}

#[cfg(mmpo_emulated)]
#[test]
fn recomputed_layers_give_the_same_step_on_the_emulated_gpu() {
    use mmpo_fast::device::cuda::{CudaDevice, EmulatorVariant, KernelPath};
    for path in [KernelPath::Portable, KernelPath::Hopper] {
        let device = || CudaDevice::emulated(EmulatorVariant::Plain).with_path(path);
        recomputation_gives_the_same_bits(&golden("bias"), device);
    }
}

/// Three steps without clipping: the bits of weights and moments, the last norm, and the bytes on the device.
fn steps_with_gradients<D: Device>(
    golden: &Golden,
    device: D,
    gradients: GradientConfig,
) -> (Vec<Vec<u32>>, f32, usize) {
    let device = Arc::new(device);
    let (model, scores) = load(golden, &device);
    let workload = Workload {
        memory: MemoryConfig { gradients, ..MemoryConfig::default() },
        ..Workload::plan(&golden.pairs, &OBJECTIVE, PAIRS, usize::MAX)
    };
    let mut trainer = Trainer::new(model, OBJECTIVE, workload).expect("trainer");
    let (memory, pairs) = (device.memory(), training_pairs(&golden.pairs, &scores));
    let mut norm = 0.0;
    for step in 1..=3 {
        // The gradients of one pair, which change nothing: a checkpoint asks for them.
        trainer.accumulate_gradients(&pairs[..1], None).expect("gradients");
        norm = trainer.step(&pairs, AdamWStep { step, ..STEP }, None).expect("step").gradient_norm;
    }
    assert_eq!(device.memory(), memory, "{gradients:?}: everything was reserved before the step");
    let weights = trainer.model.weights.iter().map(|weight| compute_bits(&*device, weight));
    let states = trainer.states.iter().flatten().map(|state| match state.get(StateBuffer::SecondMoment) {
        Some(StateValues::F32(moment)) => bits(&*device, moment),
        other => panic!("{other:?}"),
    });
    (weights.chain(states).collect(), norm, memory.now)
}

/// The optimiser inside the backward gives the bits of one update over all gradients, and keeps those of one layer alone.
fn layers_are_updated_as_the_whole_is<D: Device>(golden: &Golden, device: impl Fn() -> D) {
    let name = golden.name();
    let (whole, norm, bytes) = steps_with_gradients(golden, device(), GradientConfig::F32);
    let (layers, layer_norm, layer_bytes) = steps_with_gradients(golden, device(), GradientConfig::Layer);
    assert!(layers == whole, "{name}: weights and moments");
    assert!((layer_norm - norm).abs() <= 1e-6 * norm, "{name}: norm {layer_norm}, wanted {norm}");
    let layout = LlamaTensors::layout(&golden.load(&cpu()).config);
    let layer: usize = layout.layers[0].iter().map(FusedTensor::values).sum();
    let saved = (layout.layers.len() - 1) * layer * size_of::<f32>();
    // The norms of the layers, and scratch memory of the sums.
    assert!(bytes - layer_bytes >= saved - 1024, "{name}: {bytes} and {layer_bytes}, {saved} to be saved");
}

#[test]
fn layers_are_updated_inside_the_backward() {
    for name in ["base", "tied", "bias"] {
        layers_are_updated_as_the_whole_is(&golden(name), || {
            CpuDevice::new(Some(2)).expect("the CPU device")
        });
    }
}

#[cfg(mmpo_emulated)]
#[test]
fn layers_are_updated_inside_the_backward_on_the_emulated_gpu() {
    use mmpo_fast::device::cuda::{CudaDevice, EmulatorVariant};
    layers_are_updated_as_the_whole_is(&golden("tied"), || CudaDevice::emulated(EmulatorVariant::Plain));
}

/// What needs all gradients at once is refused.
#[test]
fn updates_by_layer_refuse_clipping_and_several_micro_batches() {
    let (golden, device) = (golden("tied"), cpu());
    let (model, scores) = load(&golden, &device);
    let memory = MemoryConfig { gradients: GradientConfig::Layer, ..MemoryConfig::default() };
    let workload = Workload { memory, ..Workload::plan(&golden.pairs, &OBJECTIVE, PAIRS, 1) };
    let mut trainer = Trainer::new(model, OBJECTIVE, workload).expect("trainer");
    let pairs = training_pairs(&golden.pairs, &scores);
    let several = trainer.step(&pairs, STEP, None).expect_err("several micro-batches");
    assert!(several.exit_code() == 2 && several.to_string().contains("a step has 4 of them"), "{several}");
    let clipped = trainer.step(&pairs[..1], STEP, Some(1.0)).expect_err("clipping");
    assert!(clipped.exit_code() == 2 && clipped.to_string().contains("cannot be clipped"), "{clipped}");
    trainer.step(&pairs[..1], STEP, None).expect("one micro-batch, no clipping");
    assert!(trainer.update(STEP).is_err());
}
