//! Goldens that transformers and PyTorch made, read for a test on any device.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use mmpo_fast::checkpoint::ModelFolder;
use mmpo_fast::data::TokenizedPair;
use mmpo_fast::device::Device;
use mmpo_fast::device::cpu::CpuDevice;
use mmpo_fast::model::{HeadOptions, Llama};
use mmpo_fast::objective::{Mmpo, Objective, ObjectiveKind, Settings};
use mmpo_fast::optimizer::AdamWStep;
use mmpo_fast::score::{PairScore, Scorer};
use mmpo_fast::train::{Trainer, TrainingPair, Workload};
use serde_json::Value;

/// MMPO with every part of its loss at work, and no weight saturated.
pub const MMPO: Mmpo = Mmpo {
    beta: 0.05,
    epsilon: 0.9,
    reward_group: 2,
    reward_normalize: true,
    length_normalize: true,
    preference_weight: 0.5,
    entropy_weight: 0.05,
};

/// [`MMPO`] as it trains.
pub const OBJECTIVE: Objective = Objective::Mmpo(MMPO);

/// A first update.
pub const STEP: AdamWStep =
    AdamWStep { learning_rate: 1e-3, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01, step: 1 };

pub struct Golden {
    pub folder: PathBuf,
    pub json: Value,
    pub pairs: Vec<TokenizedPair>,
}

impl Golden {
    pub fn read(folder: &Path) -> Golden {
        let text = std::fs::read_to_string(folder.join("golden.json")).expect("golden.json");
        let json: Value = serde_json::from_str(&text).expect("golden.json parses");
        let pairs = array(&json["pairs"])
            .iter()
            .enumerate()
            .map(|(record, pair)| TokenizedPair {
                record,
                prompt: ids(&pair["prompt_ids"]).into(),
                chosen: ids(&pair["chosen_ids"]).into(),
                rejected: ids(&pair["rejected_ids"]).into(),
            })
            .collect();
        Golden { folder: folder.to_path_buf(), json, pairs }
    }

    /// The golden of this name, with the first `pairs` of its pairs.
    pub fn named(name: &str, pairs: usize) -> Golden {
        let mut golden =
            Golden::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name));
        golden.pairs.truncate(pairs);
        assert_eq!(golden.pairs.len(), pairs, "pairs of {name}");
        golden
    }

    /// The folders of `tests/goldens` that have a `golden.json`.
    pub fn all() -> Vec<Golden> {
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/goldens");
        let mut folders: Vec<PathBuf> = std::fs::read_dir(&root)
            .unwrap()
            .filter_map(|entry| entry.ok().map(|entry| entry.path()))
            .filter(|path| path.join("golden.json").is_file())
            .collect();
        folders.sort();
        assert!(!folders.is_empty(), "no goldens under {root:?}");
        folders.iter().map(|folder| Golden::read(folder)).collect()
    }

    pub fn name(&self) -> String {
        self.folder.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    pub fn load<D: Device>(&self, device: &Arc<D>) -> Llama<D> {
        let folder = ModelFolder::open(&self.folder.join("model")).expect("model folder");
        Llama::load(Arc::clone(device), &folder, 2048).expect("weights")
    }

    /// The objective named by `options`; the first fixture, which has none, names it by its key alone.
    pub fn objective(&self, key: &str, options: &Value) -> Objective {
        let option = |name: &str, default: f64| options[name].as_f64().unwrap_or(default);
        let flag = |name: &str, default: bool| options[name].as_bool().unwrap_or(default);
        let beta = option("beta", number(&self.json["beta"]));
        let family = options["objective"].as_str().unwrap_or(key.split('_').next().unwrap_or(key));
        let kind = ObjectiveKind::from_name(family)
            .unwrap_or_else(|| panic!("golden objective `{family}` is not known to the program"));
        (kind.descriptor().build)(&Settings {
            beta,
            epsilon: 0.9,
            reward_group: option("reward_group", self.pairs.len() as f64) as usize,
            reward_normalize: flag("reward_normalize", true),
            length_normalize: flag("length_normalize", key == "mmpo_length"),
            preference_weight: option("preference_weight", 0.0),
            entropy_weight: option("entropy_weight", 0.0),
            gamma_beta_ratio: option("gamma_beta_ratio", 1.6),
            label_smoothing: option("label_smoothing", 0.0),
        })
    }

    /// Runs `body` with a trainer at the stored weights, whose head works as `head` says, and the pairs with their
    /// references.
    pub fn with_trainer<D: Device>(
        &self,
        device: &Arc<D>,
        objective: Objective,
        head: HeadOptions,
        body: impl FnOnce(&mut Trainer<D>, &[TrainingPair]),
    ) {
        self.with_trainer_of(device, objective, |workload| Workload { head, ..workload }, body);
    }

    /// As [`Golden::with_trainer`], of the usual workload as `adjust` changes it.
    pub fn with_trainer_of<D: Device>(
        &self,
        device: &Arc<D>,
        objective: Objective,
        adjust: impl FnOnce(Workload) -> Workload,
        body: impl FnOnce(&mut Trainer<D>, &[TrainingPair]),
    ) {
        let model = self.load(device);
        let scores = score(&model, &self.pairs);
        let pairs = training_pairs(&self.pairs, &scores);
        let workload = adjust(Workload::plan(&self.pairs, &objective, pairs.len(), 700));
        let mut trainer = Trainer::new(model, objective, workload).expect("trainer");
        body(&mut trainer, &pairs);
    }
}

pub fn array(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_else(|| panic!("not an array: {value}"))
}

pub fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("not a number: {value}"))
}

pub fn ids(value: &Value) -> Vec<u32> {
    array(value).iter().map(|id| number(id) as u32).collect()
}

pub fn score<D: Device>(model: &Llama<D>, pairs: &[TokenizedPair]) -> Vec<PairScore> {
    Scorer::new(model, pairs, 700).expect("scorer").run(true, |_| ()).expect("scores")
}

/// The CPU device, on two threads.
pub fn cpu() -> Arc<CpuDevice> {
    Arc::new(CpuDevice::new(Some(2)).expect("the CPU device starts"))
}

/// The pairs with what a reference of these scores says of them.
pub fn training_pairs<'a>(pairs: &'a [TokenizedPair], scores: &[PairScore]) -> Vec<TrainingPair<'a>> {
    let pairs = pairs.iter().zip(scores);
    pairs.map(|(pair, score)| TrainingPair { pair, reference: score.reference() }).collect()
}

pub fn adamw(settings: &Value, learning_rate: Option<f64>, step: u32) -> AdamWStep {
    let beta = |index: usize| number(&settings["betas"][index]);
    AdamWStep {
        learning_rate: learning_rate.unwrap_or_else(|| number(&settings["lr"])),
        beta1: beta(0),
        beta2: beta(1),
        epsilon: number(&settings["eps"]),
        weight_decay: number(&settings["weight_decay"]),
        step,
    }
}
