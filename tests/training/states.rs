//! Formats of the optimiser's states against bitsandbytes (`tests/reference/make_state_goldens.py`), and against f32 states over a run.

use std::path::Path;
use std::sync::Arc;

use bytemuck::Pod;
use mmpo_fast::config::MemoryConfig;
use mmpo_fast::device::prelude::*;
use mmpo_fast::device::{Floats, RawValues};
use mmpo_fast::optimizer::{
    AdamWStep, BLOCK, DynamicMap, MasterWeights, MomentFormat, OptimizerState, StateBuffer, StateOptions,
    StateValues, StochasticRounding, quantize_block,
};
use mmpo_fast::train::{Trainer, Workload};
use safetensors::SafeTensors;

use crate::golden::{self, Golden, OBJECTIVE, cpu, training_pairs};

/// The settings of `make_state_goldens.py`.
const STEP: AdamWStep =
    AdamWStep { learning_rate: 1e-3, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01, step: 1 };
const MAPS: [(DynamicMap, &str); 2] = [(DynamicMap::Signed, "signed"), (DynamicMap::Unsigned, "unsigned")];

fn goldens() -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/states.safetensors");
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn tensor<T: Pod>(file: &[u8], name: &str) -> Vec<T> {
    let tensors = SafeTensors::deserialize(file).expect("a safetensors file");
    let tensor = tensors.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"));
    tensor.data().chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()
}

#[test]
fn the_maps_are_those_of_bitsandbytes() {
    let file = goldens();
    for (map, name) in MAPS {
        let wanted: Vec<f32> = tensor(&file, &format!("map_{name}"));
        assert_eq!(wanted.len(), 256);
        for (code, wanted) in (0..=255).zip(wanted) {
            let entry = map.decode(code);
            // Two units in the last place: PyTorch forms its boundaries in f32.
            assert!(
                (entry - wanted).abs() <= 2.4e-7 * wanted.abs(),
                "{name} {code}: {entry:e}, wanted {wanted:e}"
            );
        }
    }
}

/// Scales to the bit, and codes but for values that lie on the boundary between two entries, and for small second moments, which
/// here never become 0.
#[test]
fn blocks_are_quantised_as_bitsandbytes_does() {
    let file = goldens();
    let values: Vec<f32> = tensor(&file, "values");
    for (map, name) in MAPS {
        let codes: Vec<u8> = tensor(&file, &format!("codes_{name}"));
        let scales: Vec<f32> = tensor(&file, &format!("scales_{name}"));
        assert_eq!((values.len().div_ceil(BLOCK), values.len()), (scales.len(), codes.len()));
        for (block, (values, wanted)) in values.chunks(BLOCK).zip(codes.chunks(BLOCK)).enumerate() {
            let values: Vec<f32> = match map {
                DynamicMap::Signed => values.to_vec(),
                DynamicMap::Unsigned => values.iter().map(|value| value.abs()).collect(),
            };
            let mut codes = vec![9; values.len()];
            let scale = quantize_block(&mut codes, &values, map);
            assert_eq!(scale, scales[block], "{name} block {block}");
            for ((&code, &wanted), &value) in codes.iter().zip(wanted).zip(&values) {
                let error = |code| (map.decode(code) * scale - value).abs();
                let rounded_up = map == DynamicMap::Unsigned && value > 0.0 && (code, wanted) == (1, 0);
                assert!(
                    code == wanted || rounded_up || error(code) <= error(wanted) + 1e-6 * value.abs(),
                    "{name} block {block}: {value:e} has code {code}, bitsandbytes' {wanted}"
                );
            }
        }
    }
}

/// The largest and the mean distance from what is exact.
fn errors(values: &[f32], exact: &[f32]) -> [f64; 2] {
    assert_eq!(values.len(), exact.len());
    let errors: Vec<f64> = values
        .iter()
        .zip(exact)
        .map(|(value, exact)| (f64::from(*value) - f64::from(*exact)).abs())
        .collect();
    let largest =
        errors.iter().fold(0.0, |largest: f64, error| if *error <= largest { largest } else { *error });
    [largest, errors.iter().sum::<f64>() / errors.len() as f64]
}

/// Moments as numbers, from codes and scales.
fn dequantized(codes: &[u8], scales: &[f32], map: DynamicMap) -> Vec<f32> {
    let blocks = codes.chunks(BLOCK).zip(scales);
    blocks.flat_map(|(codes, scale)| codes.iter().map(move |&code| map.decode(code) * scale)).collect()
}

fn floats<D: Device>(device: &D, values: &[f32]) -> Floats<D> {
    let mut buffer = device.alloc(values.len()).expect("buffer");
    device.upload(&mut buffer, 0, values).expect("upload");
    buffer
}

/// The weights and both moments after the updates of the goldens, with 8-bit moments.
fn eight_bit_updates<D: Device>(device: &D, file: &[u8]) -> [Vec<f32>; 3] {
    let start: Vec<f32> = tensor(file, "weight");
    let gradients: Vec<f32> = tensor(file, "gradients");
    let mut weight = device.alloc(start.len()).expect("buffer");
    device.upload_values(&mut weight, 0, RawValues::from_f32(&start)).expect("upload");
    let options = StateOptions { moments: MomentFormat::EightBit, master: MasterWeights::F32 };
    let rounding = StochasticRounding::default();
    let mut state = OptimizerState::before_first(device, &weight, options, rounding).expect("state");
    if let Some(master) = &mut state.master {
        // Not the weight's bf16.
        master.upload(device, 0, &start).expect("upload");
    }
    let norm = floats(device, &[0.0, 1.0]);
    for (gradient, number) in gradients.chunks(start.len()).zip(1..) {
        let gradient = floats(device, gradient);
        let step = AdamWStep { step: number, ..STEP };
        device.adamw(&mut [state.update(&mut weight, &gradient)], &norm, step).expect("update");
    }
    let read = |buffer| {
        let Some(StateValues::F32(buffer)) = state.get(buffer) else { panic!("{buffer:?}") };
        let mut values = vec![0.0; device.len(buffer)];
        device.download(&mut values, buffer, 0).expect("download");
        values
    };
    let codes = |buffer| {
        let Some(StateValues::U8(buffer)) = state.get(buffer) else { panic!("{buffer:?}") };
        let mut values = vec![0u8; device.len(buffer)];
        device.download(&mut values, buffer, 0).expect("download");
        values
    };
    let weights = match &state.master {
        Some(_) => read(StateBuffer::Weight),
        None => {
            let mut values = vec![0.0; start.len()];
            device.download_compute(&mut values, &weight, 0).expect("download");
            values
        }
    };
    let first =
        dequantized(&codes(StateBuffer::FirstMoment), &read(StateBuffer::FirstScales), DynamicMap::Signed);
    let second = dequantized(
        &codes(StateBuffer::SecondMoment),
        &read(StateBuffer::SecondScales),
        DynamicMap::Unsigned,
    );
    [weights, first, second]
}

/// Three updates with 8-bit moments: weights and moments are as near to exact AdamW as those of bitsandbytes' AdamW8bit are, which
/// gets the same weights and gradients.
fn updates_are_as_good_as_those_of_bitsandbytes<D: Device>(device: &D) {
    let file = goldens();
    let [weights, first, second] = eight_bit_updates(device, &file);
    let theirs = |codes: &str, scales: &str, map| {
        dequantized(&tensor::<u8>(&file, codes), &tensor::<f32>(&file, scales), map)
    };
    for (what, ours, theirs) in [
        ("weight", weights, tensor::<f32>(&file, "weight_8bit")),
        ("first", first, theirs("first_codes", "first_scales", DynamicMap::Signed)),
        ("second", second, theirs("second_codes", "second_scales", DynamicMap::Unsigned)),
    ] {
        let exact: Vec<f32> = tensor(&file, &format!("{what}_exact"));
        let (ours, theirs) = (errors(&ours, &exact), errors(&theirs, &exact));
        for (kind, ours, theirs) in [("largest", ours[0], theirs[0]), ("mean", ours[1], theirs[1])] {
            assert!(ours <= 1.02 * theirs, "{what}: {kind} error {ours:e}, bitsandbytes' {theirs:e}");
        }
    }
}

#[test]
fn eight_bit_updates_are_as_good_as_those_of_bitsandbytes() {
    updates_are_as_good_as_those_of_bitsandbytes(&*cpu());
}

#[cfg(mmpo_emulated)]
#[test]
fn eight_bit_updates_are_as_good_on_the_emulated_gpu() {
    use mmpo_fast::device::cuda::{CudaDevice, EmulatorVariant};
    updates_are_as_good_as_those_of_bitsandbytes(&CudaDevice::emulated(EmulatorVariant::Plain));
}

/// Losses of a run over a golden's pairs, all of them in every step.
fn losses<D: Device>(golden: &Golden, device: &Arc<D>, states: StateOptions, steps: u32) -> Vec<f64> {
    let model = golden.load(device);
    let scores = golden::score(&model, &golden.pairs);
    let pairs = training_pairs(&golden.pairs, &scores);
    let workload = Workload {
        memory: MemoryConfig { states, ..MemoryConfig::default() },
        rounding_seed: 42,
        ..Workload::plan(&golden.pairs, &OBJECTIVE, pairs.len(), 700)
    };
    let mut trainer = Trainer::new(model, OBJECTIVE, workload).expect("trainer");
    (1..=steps)
        .map(|step| {
            let adamw = AdamWStep { step, weight_decay: 0.0, ..STEP };
            trainer.step(&pairs, adamw, Some(1.0)).expect("step").loss
        })
        .collect()
}

/// Asserts that a run's losses stay within `bound` of f32's, in units of what the f32 run gains.
#[track_caller]
fn assert_near(what: &str, losses: &[f64], wanted: &[f64], bound: f64) {
    let gain = wanted[0] - wanted[wanted.len() - 1];
    assert!(gain > 0.0, "{what}: the f32 run gains nothing: {wanted:?}");
    let worst = losses.iter().zip(wanted).map(|(loss, wanted)| (loss - wanted).abs() / gain);
    let (step, worst) = worst.enumerate().fold(
        (0, 0.0),
        |most, (step, error)| {
            if error <= most.1 { most } else { (step, error) }
        },
    );
    eprintln!("{what}: gain {gain:.4}, worst {worst:.2e} of it at step {step}");
    assert!(worst <= bound, "{what}: step {step} is off by {worst:.3} of the gain, {bound} allowed");
}

/// 200 steps of a small model: the losses with bf16 and with 8-bit moments stay near those with f32 ones. The bounds are ten
/// times what was measured, 4.4e-5 and 2.5e-4 of what the run gains.
#[test]
fn bf16_and_8_bit_moments_learn_as_f32_ones_do() {
    let golden = Golden::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/base"));
    let device = cpu();
    let run = |moments| losses(&golden, &device, StateOptions { moments, master: MasterWeights::F32 }, 200);
    let wanted = run(MomentFormat::F32);
    assert_near("bf16", &run(MomentFormat::Bf16), &wanted, 5e-4);
    assert_near("8-bit", &run(MomentFormat::EightBit), &wanted, 2.5e-3);
}
