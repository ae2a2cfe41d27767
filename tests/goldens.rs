//! Our Llama, head, objectives and optimiser against numbers that transformers and PyTorch made.
//!
//! `tests/goldens/` is committed; `MMPO_FAST_FIXTURES` may name a folder of further, larger ones.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use mmpo_fast::checkpoint::ModelFolder;
use mmpo_fast::data::TokenizedPair;
use mmpo_fast::device::cpu::CpuDevice;
use mmpo_fast::device::{AdamWStep, Device};
use mmpo_fast::model::Llama;
use mmpo_fast::objective::{Dpo, Mmpo, Objective, ReferencePair, Simpo};
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

    fn objective(&self, name: &str) -> Objective {
        let beta = number(&self.json["beta"]);
        let mmpo = Mmpo {
            beta,
            epsilon: 0.9,
            reward_group: self.pairs.len(),
            reward_normalize: true,
            length_normalize: false,
            preference_weight: 0.0,
            entropy_weight: 0.0,
        };
        match name {
            "mmpo" => Objective::Mmpo(mmpo),
            "mmpo_length" => Objective::Mmpo(Mmpo { length_normalize: true, ..mmpo }),
            "mmpo_preference" => Objective::Mmpo(Mmpo { preference_weight: 1.0, ..mmpo }),
            "mmpo_entropy" => Objective::Mmpo(Mmpo { entropy_weight: beta, ..mmpo }),
            "mmpo_raw" => Objective::Mmpo(Mmpo { reward_normalize: false, ..mmpo }),
            "dpo" => Objective::Dpo(Dpo { beta, label_smoothing: 0.0 }),
            "dpo_smoothing" => Objective::Dpo(Dpo { beta, label_smoothing: 0.1 }),
            "simpo" => Objective::Simpo(Simpo { beta, gamma_beta_ratio: 1.6 }),
            "sft" => Objective::Sft,
            other => panic!("golden objective `{other}` is not known to this test"),
        }
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
    let objective = golden.objective(name);
    let model = golden.load(device);
    let references: Vec<ReferencePair> =
        score(&model, &golden.pairs).iter().map(|score| score.reference()).collect();
    let pairs: Vec<TrainingPair> = golden
        .pairs
        .iter()
        .zip(references)
        .map(|(pair, reference)| TrainingPair { pair, reference })
        .collect();
    let workload = Workload::plan(&golden.pairs, &objective, model.config.vocab_size, pairs.len(), 700);
    let mut trainer = Trainer::new(model, objective, workload).expect("trainer");

    let result = trainer.accumulate_gradients(&pairs, None).expect("gradients");
    check_gradients(&what, &trainer, &result, expected);

    trainer.update(adamw(&expected["adamw"], 1)).expect("update");
    for (index, (score, golden)) in
        score(&trainer.model, &golden.pairs).iter().zip(array(&expected["logps_after_one_step"])).enumerate()
    {
        let [chosen, rejected] = after_step(golden);
        assert_close(&format!("{what} pair {index} logp_chosen after a step"), score.logp_chosen, chosen);
        assert_close(&format!("{what} pair {index} logp_rejected after a step"), score.logp_rejected, rejected);
    }
}

fn check_gradients<D: Device>(what: &str, trainer: &Trainer<D>, result: &StepResult, expected: &Value) {
    assert_close(&format!("{what} loss"), result.loss, number(&expected["loss"]));
    assert_close(
        &format!("{what} total norm"),
        result.gradient_norm as f64,
        number(&expected["grad_norm"]),
    );
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

fn adamw(settings: &Value, step: u32) -> AdamWStep {
    let beta = |index: usize| number(&settings["betas"][index]) as f32;
    AdamWStep {
        learning_rate: number(&settings["lr"]) as f32,
        beta1: beta(0),
        beta2: beta(1),
        epsilon: number(&settings["eps"]) as f32,
        weight_decay: number(&settings["weight_decay"]) as f32,
        step,
    }
}

/// `[chosen, rejected]` of `logps_after_one_step`.
fn after_step(golden: &Value) -> [f64; 2] {
    [number(&golden[0]), number(&golden[1])]
}
