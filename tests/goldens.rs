//! Our Llama, head, objectives and optimiser against numbers that transformers and PyTorch made.
//!
//! `tests/goldens/` is committed; `MMPO_FAST_FIXTURES` may name a folder of further, larger ones.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use mmpo_fast::checkpoint::ModelFolder;
use mmpo_fast::data::TokenizedPair;
use mmpo_fast::device::cpu::CpuDevice;
use mmpo_fast::device::{AdamWStep, Device};
use mmpo_fast::generate::{Sampling, generate};
use mmpo_fast::model::{Generation, Llama};
use mmpo_fast::objective::{Dpo, Mmpo, Objective, Simpo};
use mmpo_fast::score::Scorer;
use mmpo_fast::train::{StepResult, Trainer, TrainingPair, Workload};
use serde_json::Value;

/// Relative agreement asked for, of numbers that are not near zero.
const RELATIVE: f64 = 1e-3;

struct Golden {
    folder: PathBuf,
    json: Value,
    pairs: Vec<TokenizedPair>,
}

impl Golden {
    fn read(folder: &Path) -> Golden {
        let text = std::fs::read_to_string(folder.join("golden.json")).expect("golden.json");
        let json: Value = serde_json::from_str(&text).expect("golden.json parses");
        let pairs = array(&json["pairs"])
            .iter()
            .enumerate()
            .map(|(record, pair)| TokenizedPair {
                record,
                prompt: ids(&pair["prompt_ids"]),
                chosen: ids(&pair["chosen_ids"]),
                rejected: ids(&pair["rejected_ids"]),
            })
            .collect();
        Golden { folder: folder.to_path_buf(), json, pairs }
    }

    /// The folders with a `golden.json`: ours, and those of `MMPO_FAST_FIXTURES`.
    fn all() -> Vec<Golden> {
        let mut roots = vec![PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/goldens")];
        roots.extend(std::env::var_os("MMPO_FAST_FIXTURES").map(PathBuf::from));
        let mut folders: Vec<PathBuf> = roots
            .iter()
            .flat_map(|root| std::fs::read_dir(root).into_iter().flatten())
            .filter_map(|entry| entry.ok().map(|entry| entry.path()))
            .filter(|path| path.join("golden.json").is_file())
            .collect();
        folders.sort();
        assert!(!folders.is_empty(), "no goldens under {roots:?}");
        folders.iter().map(|folder| Golden::read(folder)).collect()
    }

    fn name(&self) -> String {
        self.folder.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    fn load<D: Device>(&self, device: &Arc<D>) -> Llama<D> {
        let folder = ModelFolder::open(&self.folder.join("model")).expect("model folder");
        Llama::load(Arc::clone(device), &folder, 2048).expect("weights")
    }

    /// The objective named by `options`; the first fixture, which has none, names it by its key alone.
    fn objective(&self, key: &str, options: &Value) -> Objective {
        let option = |name: &str, default: f64| options[name].as_f64().unwrap_or(default);
        let flag = |name: &str, default: bool| options[name].as_bool().unwrap_or(default);
        let beta = option("beta", number(&self.json["beta"]));
        let family = options["objective"].as_str().unwrap_or(key.split('_').next().unwrap_or(key));
        match family {
            "mmpo" => Objective::Mmpo(Mmpo {
                beta,
                epsilon: 0.9,
                reward_group: option("reward_group", self.pairs.len() as f64) as usize,
                reward_normalize: flag("reward_normalize", true),
                length_normalize: flag("length_normalize", key == "mmpo_length"),
                preference_weight: option("preference_weight", 0.0),
                entropy_weight: option("entropy_weight", 0.0),
            }),
            "dpo" => Objective::Dpo(Dpo { beta, label_smoothing: option("label_smoothing", 0.0) }),
            "simpo" => Objective::Simpo(Simpo { beta, gamma_beta_ratio: option("gamma_beta_ratio", 1.6) }),
            "sft" => Objective::Sft,
            other => panic!("golden objective `{other}` is not known to this test"),
        }
    }

    /// Runs `body` with a trainer at the stored weights, and the pairs with their references.
    fn with_trainer<D: Device>(
        &self,
        device: &Arc<D>,
        objective: Objective,
        body: impl FnOnce(&mut Trainer<D>, &[TrainingPair]),
    ) {
        let model = self.load(device);
        let references = score(&model, &self.pairs);
        let pairs: Vec<TrainingPair> = self
            .pairs
            .iter()
            .zip(references)
            .map(|(pair, score)| TrainingPair { pair, reference: score.reference() })
            .collect();
        let workload = Workload::plan(&self.pairs, &objective, model.config.vocab_size, pairs.len(), 700);
        let mut trainer = Trainer::new(model, objective, workload).expect("trainer");
        body(&mut trainer, &pairs);
    }
}

fn array(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_else(|| panic!("not an array: {value}"))
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("not a number: {value}"))
}

fn ids(value: &Value) -> Vec<u32> {
    array(value).iter().map(|id| number(id) as u32).collect()
}

#[track_caller]
fn assert_close(what: &str, ours: f64, golden: f64) {
    let error = (ours - golden).abs() / golden.abs().max(1e-7);
    assert!(error <= RELATIVE, "{what}: ours {ours}, golden {golden}, relative error {error:.2e}");
}

fn score<D: Device>(model: &Llama<D>, pairs: &[TokenizedPair]) -> Vec<mmpo_fast::score::PairScore> {
    Scorer::new(model, pairs, 700).expect("scorer").run(true, |_| ()).expect("scores")
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
            check_objective(&golden, &device, name, expected);
        }
    }
}

fn check_objective<D: Device>(golden: &Golden, device: &Arc<D>, name: &str, expected: &Value) {
    let what = format!("{} {name}", golden.name());
    let objective = golden.objective(name, &expected["options"]);
    golden.with_trainer(device, objective, |trainer, pairs| {
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
            golden.with_trainer(&device, objective, |trainer, pairs| {
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
                    error <= RELATIVE * expected.abs().max(1.0),
                    "{} position {position} logit {id}: ours {ours}, golden {expected}",
                    golden.name()
                );
            }
        }
        for entry in golden.json["generate"].as_array().into_iter().flatten() {
            let expected = ids(&entry["new_ids"]);
            let (ours, _) =
                generate(&model, &ids(&entry["prompt_ids"]), 12, Sampling::GREEDY, |_| ()).expect("text");
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
    for (gradient, fused) in trainer.gradients.iter().zip(trainer.model.layout.iter()) {
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

fn adamw(settings: &Value, learning_rate: Option<f64>, step: u32) -> AdamWStep {
    let beta = |index: usize| number(&settings["betas"][index]) as f32;
    AdamWStep {
        learning_rate: learning_rate.unwrap_or_else(|| number(&settings["lr"])) as f32,
        beta1: beta(0),
        beta2: beta(1),
        epsilon: number(&settings["eps"]) as f32,
        weight_decay: number(&settings["weight_decay"]) as f32,
        step,
    }
}
