//! The whole training path on the emulated device: the kernels' own arithmetic, in bf16, against the CPU's f32.
//!
//! Only goldens whose head size the attention kernels take (64) are run.

mod golden;

use std::sync::Arc;

use golden::{Golden, adamw, score};
use mmpo_fast::device::cpu::CpuDevice;
use mmpo_fast::device::cuda::{CudaDevice, EmulatorVariant};
use mmpo_fast::device::{Device, Floats};
use mmpo_fast::model::LlamaTensors;
use mmpo_fast::train::Trainer;

/// Half a unit in the last place of a bf16 number, relative.
const BF16_ROUNDING: f64 = 1.0 / 512.0;

fn emulated() -> Arc<CudaDevice> {
    Arc::new(CudaDevice::emulated(EmulatorVariant::Plain))
}

fn goldens() -> impl Iterator<Item = Golden> {
    Golden::all().into_iter().filter(|golden| {
        let shape = golden.load(&Arc::new(CpuDevice::new(Some(1)).expect("cpu"))).config.attention_shape();
        shape.head_size == 64
    })
}

/// Log-probs are sums over tokens of logits that each carry the rounding of every layer: the bound is that of a token,
/// times the square root of their number, for errors that are independent.
fn assert_log_prob(what: &str, ours: f64, cpu: f64, tokens: usize, logit_scale: f64) {
    let bound = 4.0 * BF16_ROUNDING * logit_scale * (tokens.max(1) as f64).sqrt() + BF16_ROUNDING * cpu.abs();
    assert!((ours - cpu).abs() <= bound, "{what}: emulated {ours}, cpu {cpu}, bound {bound}");
}

#[test]
fn log_probs_agree_with_the_cpu() {
    let cpu = Arc::new(CpuDevice::new(Some(2)).expect("cpu"));
    for golden in goldens() {
        let pairs = &golden.pairs;
        let expected = score(&golden.load(&cpu), pairs);
        let ours = score(&golden.load(&emulated()), pairs);
        for (index, (ours, expected)) in ours.iter().zip(&expected).enumerate() {
            let what = format!("{} pair {index}", golden.name());
            for (side, ours, expected, tokens) in [
                ("chosen", ours.logp_chosen, expected.logp_chosen, expected.tokens_chosen),
                ("rejected", ours.logp_rejected, expected.logp_rejected, expected.tokens_rejected),
                ("chosen entropy", ours.entropy_chosen, expected.entropy_chosen, expected.tokens_chosen),
                ("rejected entropy", ours.entropy_rejected, expected.entropy_rejected, expected.tokens_rejected),
            ] {
                println!("{what} {side}: {ours:.4} {expected:.4} {tokens} tokens");
                assert_log_prob(&format!("{what} {side}"), ours, expected, tokens, 8.0);
            }
        }
    }
}

/// The distance of two gradients, relative to the length of the second.
fn distance<A: Device, B: Device>(ours: &Trainer<A>, expected: &Trainer<B>) -> Vec<(String, f64)> {
    let download = |device: &dyn Fn(&mut [f32]), len: usize| {
        let mut values = vec![0.0; len];
        device(&mut values);
        values
    };
    let pairs = ours.gradients.iter().zip(expected.gradients.iter()).zip(expected.model.layout.iter());
    pairs
        .map(|((ours_gradient, expected_gradient), fused)| {
            let len = fused.values();
            let a = download(&|out| ours.device().download(out, ours_gradient, 0).expect("download"), len);
            let b = download(&|out| expected.device().download(out, expected_gradient, 0).expect("download"), len);
            let difference: f64 = a.iter().zip(&b).map(|(&a, &b)| (a as f64 - b as f64).powi(2)).sum();
            let length: f64 = b.iter().map(|&b| (b as f64).powi(2)).sum();
            (fused.parts[0].name.clone(), (difference / length.max(f64::MIN_POSITIVE)).sqrt())
        })
        .collect()
}

#[test]
fn gradients_and_three_steps_agree_with_the_cpu() {
    let cpu = Arc::new(CpuDevice::new(Some(2)).expect("cpu"));
    for golden in goldens() {
        // All objectives on one model, one on each of the others: what differs there is the model.
        let names: &[&str] = match golden.name().as_str() {
            "tied" => &["mmpo_length", "dpo", "sft", "mmpo_entropy_length"],
            _ => &["mmpo_length"],
        };
        for &name in names {
            let expected = &golden.json["objectives"][name];
            let what = format!("{} {name}", golden.name());
            let objective = golden.objective(name, &expected["options"]);
            golden.with_trainer(&cpu, objective, |reference, reference_pairs| {
                golden.with_trainer(&emulated(), objective, |trainer, pairs| {
                    for step in 1..=3 {
                        let result = trainer.accumulate_gradients(pairs, None).expect("gradients");
                        let cpu_result = reference.accumulate_gradients(reference_pairs, None).expect("gradients");
                        let error = (result.loss - cpu_result.loss).abs() / cpu_result.loss.abs().max(0.1);
                        println!("{what} step {step}: loss {} {} error {error:.1e}", result.loss, cpu_result.loss);
                        assert!(error <= 0.02, "{what} step {step}: loss {} cpu {}", result.loss, cpu_result.loss);
                        for (tensor, distance) in distance(trainer, reference) {
                            println!("{what} step {step} {tensor}: {distance:.1e}");
                            assert!(distance <= 0.1, "{what} step {step}: gradient of {tensor} off by {distance}");
                        }
                        let settings = adamw(&expected["adamw"], Some(1e-3), step);
                        trainer.update(settings).expect("update");
                        reference.update(settings).expect("update");
                    }
                });
            });
        }
    }
}

#[test]
fn two_runs_give_the_same_bits() {
    let golden = goldens().next().expect("a golden of head size 64");
    let run = |device: Arc<CudaDevice>| {
        let objective = golden.objective("mmpo_length", &golden.json["objectives"]["mmpo_length"]["options"]);
        let mut bits = Vec::new();
        golden.with_trainer(&device, objective, |trainer, pairs| {
            for step in 1..=2 {
                let settings = adamw(&golden.json["objectives"]["mmpo_length"]["adamw"], Some(1e-3), step);
                let result = trainer.step(pairs, settings, Some(1.0)).expect("step");
                bits.push(result.gradient_norm.to_bits());
                bits.extend(result.outcomes.iter().map(|outcome| outcome.loss.to_bits()));
            }
            bits.extend(gradient_bits(trainer.device(), &trainer.gradients));
        });
        bits
    };
    assert!(run(emulated()) == run(emulated()), "two runs differ");
}

fn gradient_bits<D: Device>(device: &D, gradients: &LlamaTensors<Floats<D>>) -> Vec<u32> {
    let download = |gradient: &Floats<D>| {
        let mut values = vec![0.0f32; device.len(gradient)];
        device.download(&mut values, gradient, 0).expect("download");
        values
    };
    gradients.iter().flat_map(download).map(f32::to_bits).collect()
}

/// Nothing is allocated between the first step and the second.
#[test]
fn a_step_allocates_nothing() {
    let golden = goldens().next().expect("a golden of head size 64");
    let objective = golden.objective("dpo", &golden.json["objectives"]["dpo"]["options"]);
    golden.with_trainer(&emulated(), objective, |trainer, pairs| {
        let settings = |step| adamw(&golden.json["objectives"]["dpo"]["adamw"], None, step);
        let few: Vec<_> = pairs[..2].to_vec();
        trainer.step(pairs, settings(1), None).expect("step");
        let before = trainer.device().memory();
        trainer.step(&few, settings(2), None).expect("step");
        trainer.step(pairs, settings(3), None).expect("step");
        assert_eq!(trainer.device().memory(), before);
    });
}
