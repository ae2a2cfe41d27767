//! Our Llama, head, objectives and optimiser against the numbers in `tests/goldens/`, which transformers and PyTorch made.

use std::sync::Arc;

use crate::golden::{Golden, adamw, array, ids, number, score};
use mmpo_fast::device::Device;
use mmpo_fast::device::cpu::CpuDevice;
use mmpo_fast::generate::{Sampling, generate};
use mmpo_fast::model::{Generation, HeadChoice, HeadOptions};
use mmpo_fast::train::{StepResult, Trainer};
use serde_json::Value;

use crate::support::close::{self, Bounds};

/// The agreement that is asked for.
const BOUNDS: Bounds = Bounds { relative: 1e-3, absolute: 1e-10 };

#[track_caller]
fn assert_close(what: &str, ours: f64, golden: f64) {
    close::assert_close(what, ours, golden, BOUNDS);
}

#[test]
fn log_probs_and_entropies_agree() {
    let device = Arc::new(CpuDevice::new(Some(2)).expect("cpu"));
    for golden in Golden::all() {
        let model = golden.load(&device);
        let scores = score(&model, &golden.pairs);
        for (index, (score, pair)) in scores.iter().zip(array(&golden.json["pairs"])).enumerate() {
            for (key, ours) in [
                ("logp_chosen", score.logp_chosen),
                ("logp_rejected", score.logp_rejected),
                ("entropy_chosen", score.entropy_chosen),
                ("entropy_rejected", score.entropy_rejected),
            ] {
                assert_close(&format!("{} pair {index} {key}", golden.name()), ours, number(&pair[key]));
            }
        }
    }
}

#[test]
fn losses_gradients_and_one_adamw_step_agree() {
    let device = Arc::new(CpuDevice::new(Some(2)).expect("cpu"));
    for golden in Golden::all() {
        let objectives = golden.json["objectives"].as_object().expect("objectives");
        for (name, expected) in objectives {
            for mode in [HeadChoice::Auto, HeadChoice::Recompute] {
                let head = HeadOptions { mode, ..HeadOptions::default() };
                check_objective(&golden, &device, name, expected, head);
            }
        }
    }
}

fn check_objective<D: Device>(
    golden: &Golden,
    device: &Arc<D>,
    name: &str,
    expected: &Value,
    head: HeadOptions,
) {
    let what = format!("{} {name}, head {:?}", golden.name(), head.mode);
    let objective = golden.objective(name, &expected["options"]);
    golden.with_trainer(device, objective, head, |trainer, pairs| {
        let result = trainer.accumulate_gradients(pairs, None).expect("gradients");
        check_gradients(&what, trainer, &result, expected);
        trainer.update(adamw(&expected["adamw"], None, 1)).expect("update");
        check_log_probs(&what, golden, trainer, &expected["logps_after_one_step"]);
    });
}

#[test]
fn three_adamw_steps_agree() {
    let device = Arc::new(CpuDevice::new(Some(2)).expect("cpu"));
    for golden in Golden::all() {
        for (name, expected) in golden.json["three_steps"].as_object().into_iter().flatten() {
            let what = format!("{} {name}", golden.name());
            let single = &golden.json["objectives"][name];
            let objective = golden.objective(name, &single["options"]);
            golden.with_trainer(&device, objective, HeadOptions::default(), |trainer, pairs| {
                for step in 0..3 {
                    let what = format!("{what} step {}", step + 1);
                    let settings = adamw(&single["adamw"], expected["lr"].as_f64(), step as u32 + 1);
                    let result = trainer.step(pairs, settings, None).expect("step");
                    assert_close(&format!("{what} loss"), result.loss, number(&expected["losses"][step]));
                    let norm = number(&expected["grad_norms"][step]);
                    assert_close(&format!("{what} norm"), result.gradient_norm as f64, norm);
                    check_log_probs(&what, &golden, trainer, &expected["logps"][step]);
                }
            });
        }
    }
}

#[test]
fn logits_and_greedy_tokens_agree() {
    let device = Arc::new(CpuDevice::new(Some(2)).expect("cpu"));
    for golden in Golden::all() {
        let model = golden.load(&device);
        let sequence = [golden.pairs[0].prompt.as_slice(), &golden.pairs[0].chosen].concat();
        for entry in golden.json["logits"].as_array().into_iter().flatten() {
            let position = number(&entry["position"]) as usize;
            // Half by the prompt's forward, half token by token, so that the cache is checked too.
            let half = position.div_ceil(2).max(1);
            let mut generation = Generation::start(&model, &sequence[..half], 200).expect("prefill");
            for &token in &sequence[half..=position.max(half - 1)] {
                generation.push(token).expect("decode");
            }
            for (id, (&ours, golden_logit)) in
                generation.logits().iter().zip(array(&entry["values"])).enumerate()
            {
                let expected = number(golden_logit);
                let error = (ours as f64 - expected).abs();
                assert!(
                    error <= BOUNDS.relative * expected.abs().max(1.0),
                    "{} position {position} logit {id}: ours {ours}, golden {expected}",
                    golden.name()
                );
            }
        }
        for entry in golden.json["generate"].as_array().into_iter().flatten() {
            let expected = ids(&entry["new_ids"]);
            let (ours, _) =
                generate(&model, &ids(&entry["prompt_ids"]), 12, Sampling::GREEDY, |_| Ok(())).expect("text");
            let ended = model.config.stop_token_ids.contains(expected.last().expect("tokens"));
            assert_eq!(ours, expected[..expected.len() - usize::from(ended)], "{}", golden.name());
        }
    }
}

#[track_caller]
fn check_log_probs<D: Device>(what: &str, golden: &Golden, trainer: &Trainer<D>, expected: &Value) {
    let scores = score(&trainer.model, &golden.pairs);
    assert_eq!(scores.len(), array(expected).len());
    for (index, (score, expected)) in scores.iter().zip(array(expected)).enumerate() {
        let what = format!("{what} pair {index}");
        assert_close(&format!("{what} logp_chosen"), score.logp_chosen, number(&expected[0]));
        assert_close(&format!("{what} logp_rejected"), score.logp_rejected, number(&expected[1]));
    }
}

fn check_gradients<D: Device>(what: &str, trainer: &Trainer<D>, result: &StepResult, expected: &Value) {
    assert_close(&format!("{what} loss"), result.loss, number(&expected["loss"]));
    assert_close(&format!("{what} total norm"), result.gradient_norm as f64, number(&expected["grad_norm"]));
    let mut norms = std::collections::BTreeMap::new();
    for (gradient, fused) in trainer.gradients.iter().flatten().zip(trainer.model.layout.iter()) {
        let mut values = vec![0.0f32; fused.values()];
        trainer.device().download(&mut values, gradient, 0).expect("download");
        for (offset, part) in fused.offsets() {
            let squares = values[offset..offset + part.values()].iter().map(|&v| (v as f64).powi(2));
            norms.insert(part.name.clone(), squares.sum::<f64>().sqrt());
        }
    }
    for (tensor, norm) in expected["grad_norms"].as_object().expect("grad_norms") {
        let ours = *norms.get(tensor).unwrap_or_else(|| panic!("no gradient named {tensor}"));
        assert_close(&format!("{what} gradient norm of {tensor}"), ours, number(norm));
    }
    assert_eq!(norms.len(), expected["grad_norms"].as_object().map_or(0, |norms| norms.len()));
}
