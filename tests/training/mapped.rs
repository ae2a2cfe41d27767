//! Weights that are only read are used where they lie in the mapped files: no byte of them is allocated, and no bit of a result
//! changes.

use std::sync::Arc;

use half::bf16;
use mmpo_fast::checkpoint::ModelFolder;
use mmpo_fast::device::cpu::{CpuDevice, Storage};
use mmpo_fast::device::prelude::*;
use mmpo_fast::generate::{Sampling, generate};
use mmpo_fast::model::{AdaptedModule, AdaptedModules, Llama, LoraSettings, initial_values};
use mmpo_fast::objective::ReferencePair;
use mmpo_fast::optimizer::AdamWStep;
use mmpo_fast::train::{Trainer, TrainingPair, Workload};
use serde_json::json;

use crate::golden::{Golden, score};

const POSITIONS: usize = 512;

fn open<C: Storage>() -> Arc<CpuDevice<C>> {
    Arc::new(CpuDevice::open(Some(2)).expect("the CPU device starts"))
}

fn folder(golden: &Golden) -> ModelFolder {
    ModelFolder::open(&golden.folder.join("model")).expect("model folder")
}

/// The goldens whose files hold bf16. Values of another type are converted, and so copied.
fn stored_in_bf16() -> Vec<Golden> {
    let is_bf16 = |golden: &Golden| {
        let config = std::fs::read_to_string(golden.folder.join("model/config.json")).expect("a config");
        config.contains("\"bfloat16\"")
    };
    let goldens: Vec<Golden> = Golden::all().into_iter().filter(is_bf16).collect();
    assert!(goldens.len() > 4, "{} goldens", goldens.len());
    goldens
}

/// A model with the device that holds it.
type OnDevice<C> = (Arc<CpuDevice<C>>, Llama<CpuDevice<C>>);

/// The golden's model twice: its weights copied, and where they lie.
fn models<C: Storage>(golden: &Golden) -> [OnDevice<C>; 2] {
    let (copied, mapped) = (open(), open());
    let folder = folder(golden);
    let models = [
        Llama::load(Arc::clone(&copied), &folder, POSITIONS).expect("weights"),
        Llama::load_frozen(Arc::clone(&mapped), &folder, POSITIONS).expect("weights"),
    ];
    let [first, second] = models;
    [(copied, first), (mapped, second)]
}

/// Bytes of the table of rotary positions, which every model has beside its weights.
fn table_bytes<C: Storage>(model: &Llama<CpuDevice<C>>) -> usize {
    POSITIONS * model.config.head_size * size_of::<f32>()
}

#[test]
fn loading_allocates_no_weights_and_scoring_needs_none() {
    for golden in stored_in_bf16() {
        let [(copied_device, copied), (mapped_device, mapped)] = models::<bf16>(&golden);
        let weights = copied.parameters() * size_of::<bf16>();
        assert_eq!(copied_device.memory().now, weights + table_bytes(&copied), "{}", golden.name());
        assert_eq!(mapped_device.memory().peak, table_bytes(&mapped), "{}", golden.name());

        let scores = [score(&copied, &golden.pairs), score(&mapped, &golden.pairs)];
        assert_eq!(scores[0], scores[1], "{}", golden.name());
        let prompt = &golden.pairs[0].prompt;
        let sampling = Sampling { temperature: 0.0, top_p: 1.0, seed: 1 };
        let answers = [
            generate(&copied, prompt, 8, sampling, |_| Ok(())).expect("an answer"),
            generate(&mapped, prompt, 8, sampling, |_| Ok(())).expect("an answer"),
        ];
        assert_eq!(answers[0], answers[1], "{}", golden.name());
        // Biases of several projections are joined into one buffer; they are the only weights that may be.
        let biases: usize = mapped
            .layout
            .layers
            .iter()
            .flat_map(|layer| [&layer.qkv.bias, &layer.gate_up.bias])
            .flatten()
            .map(|bias| bias.values() * size_of::<bf16>())
            .sum();
        let used = [copied_device.memory().now, mapped_device.memory().now];
        assert_eq!(used[0] - used[1], weights - biases, "{}", golden.name());
    }
}

/// In f32 the files' bf16 has to be widened, so the weights are copied as ever.
#[test]
fn weights_of_another_type_are_copied() {
    for golden in Golden::all() {
        let [(copied_device, copied), (mapped_device, mapped)] = models::<f32>(&golden);
        assert_eq!(copied_device.memory().now, mapped_device.memory().now, "{}", golden.name());
        assert_eq!(score(&copied, &golden.pairs), score(&mapped, &golden.pairs), "{}", golden.name());
    }
}

/// Whoever writes to a mapped weight writes to a copy.
#[test]
fn a_weight_that_is_written_to_becomes_a_copy() {
    for golden in stored_in_bf16() {
        let folder = folder(&golden);
        let before = folder.fingerprint();
        let (device, mut model) = {
            let device = open::<bf16>();
            let model = Llama::load_frozen(Arc::clone(&device), &folder, POSITIONS).expect("weights");
            (device, model)
        };
        let held = device.memory().now;
        let qkv = &mut model.weights.layers[0].qkv.weight;
        let len = device.len(qkv);
        let mut wanted = vec![0.0; len];
        device.download_compute(&mut wanted, qkv, 0).expect("values");
        device.zero(qkv, 0..3).expect("zeros");
        wanted[..3].fill(0.0);
        let mut found = vec![1.0; len];
        device.download_compute(&mut found, qkv, 0).expect("values");
        assert_eq!(found, wanted, "{}", golden.name());
        assert_eq!(device.memory().now, held + len * size_of::<bf16>(), "{}", golden.name());
        assert_eq!(folder.fingerprint(), before, "{}", golden.name());
    }
}

/// The backward through a mapped base, whose parts lie apart in the file, gives what it gives through a copied one.
#[test]
fn adapters_train_over_mapped_weights_as_over_copied_ones() {
    let modules = AdaptedModules::of(AdaptedModule::ALL);
    let lora = LoraSettings { modules, rank: 4, alpha: 8.0, dropout: 0.0, rslora: false };
    for golden in stored_in_bf16() {
        let objective = golden.objective("mmpo", &json!({}));
        let pairs: Vec<TrainingPair<'_>> = golden
            .pairs
            .iter()
            .map(|pair| TrainingPair { pair, reference: ReferencePair::default() })
            .collect();
        let results = models::<bf16>(&golden).map(|(device, mut model)| {
            model
                .adapt(lora, |tensor| {
                    Ok(initial_values(5, tensor).into_iter().map(|value| 0.5 * value).collect())
                })
                .expect("adapters");
            let workload = Workload::plan(&golden.pairs, &objective, pairs.len(), 700);
            let mut trainer = Trainer::new(model, objective, workload).expect("trainer");
            let losses: Vec<f64> = (1..=2)
                .map(|step| trainer.step(&pairs, adamw(step), Some(1.0)).expect("a step").loss)
                .collect();
            (losses, device.memory().now)
        });
        assert_eq!(results[0].0, results[1].0, "{}", golden.name());
        assert!(results[1].1 < results[0].1, "{}: {results:?}", golden.name());
    }
}

fn adamw(step: u32) -> AdamWStep {
    AdamWStep { learning_rate: 1e-3, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01, step }
}
