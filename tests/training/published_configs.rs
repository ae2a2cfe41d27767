//! Models with the config.json keys of published ones, against log-probs that transformers gave them
//! (`tests/reference/make_config_goldens.py`). Both sides make the weights from one formula.

use std::path::Path;
use std::sync::Arc;

use crate::golden::{array, ids, number, score};
use half::{bf16, f16};
use mmpo_fast::checkpoint::ModelFolder;
use mmpo_fast::data::TokenizedPair;
use mmpo_fast::device::cpu::CpuDevice;
use mmpo_fast::model::{Llama, LlamaConfig, TensorSpec};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;

/// Largest relative difference of a sum of log-probs. transformers itself gives such differences between its
/// attention implementations.
const RELATIVE: f64 = 1e-5;

const HEAD: &str = "lm_head.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";

#[test]
fn log_probs_are_those_of_transformers() {
    let goldens: Value = serde_json::from_str(include_str!("../goldens/configs.json")).expect("goldens");
    let ids_of = |name: &str| ids(&goldens["ids"][name]);
    let pairs = [TokenizedPair {
        record: 0,
        prompt: ids_of("prompt_ids").into(),
        chosen: ids_of("chosen_ids").into(),
        rejected: ids_of("rejected_ids").into(),
    }];
    let device = Arc::new(CpuDevice::new(Some(1)).expect("cpu"));
    let models = array(&goldens["models"]);
    assert!(models.len() >= 48, "{} models", models.len());
    for golden in models {
        let name = &golden["name"];
        let folder = tempfile::tempdir().expect("folder");
        write_folder(folder.path(), golden);
        let opened = ModelFolder::open(folder.path()).unwrap_or_else(|error| panic!("{name}: {error}"));
        let model = Llama::load(Arc::clone(&device), &opened, 64).expect("weights");
        let scores = score(&model, &pairs);
        for (key, ours) in
            [("logp_chosen", scores[0].logp_chosen), ("logp_rejected", scores[0].logp_rejected)]
        {
            let theirs = number(&golden[key]);
            let error = ((ours - theirs) / theirs).abs();
            assert!(error <= RELATIVE, "{name} {key}: ours {ours}, transformers {theirs}, {error:.1e}");
        }
    }
}

/// The folder that the script made of `golden`.
fn write_folder(folder: &Path, golden: &Value) {
    let config = golden["config"].to_string();
    std::fs::write(folder.join("config.json"), &config).expect("config.json");
    let mut specs = LlamaConfig::parse(Path::new("config.json"), &config).expect("config").tensors();
    specs.sort_by(|a, b| a.name.cmp(&b.name));
    let (names, stored) = (text(&golden["names"]), text(&golden["stored"]));
    let tied = golden["config"]["tie_word_embeddings"] == true;
    // A tied head has a place in the order of the script's state dict, though it is not stored.
    let place = |spec: &TensorSpec| specs.iter().filter(|other| other.name < spec.name).count();
    let order = |spec: &TensorSpec| place(spec) + usize::from(tied && spec.name.as_str() > HEAD);
    let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = specs
        .iter()
        .map(|spec| {
            let dtype = dtype_of(order(spec), stored);
            (stored_name(&spec.name, names), dtype, spec.shape.clone(), encode(spec, dtype))
        })
        .collect();
    if names == "with_head" {
        let embedding = specs.iter().find(|spec| spec.name == EMBEDDING).expect("embedding");
        tensors.push((HEAD.into(), Dtype::BF16, embedding.shape.clone(), encode(embedding, Dtype::BF16)));
    }
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (name, TensorView::new(*dtype, shape.clone(), bytes).expect("tensor"))
    });
    let bytes = safetensors::serialize(views, None).expect("safetensors");
    std::fs::write(folder.join("model.safetensors"), bytes).expect("weights");
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("not a string: {value}"))
}

fn stored_name(name: &str, names: &str) -> String {
    match names {
        "bare" => name.strip_prefix("model.").unwrap_or(name).to_string(),
        "double" => format!("model.{name}"),
        "head_alone" if name == EMBEDDING => HEAD.to_string(),
        _ => name.to_string(),
    }
}

fn dtype_of(position: usize, stored: &str) -> Dtype {
    match stored {
        "float32" => Dtype::F32,
        "float16" => Dtype::F16,
        "bfloat16" => Dtype::BF16,
        _ => [Dtype::F32, Dtype::F16, Dtype::BF16][position % 3],
    }
}

fn encode(spec: &TensorSpec, dtype: Dtype) -> Vec<u8> {
    let values = (0..spec.values()).map(|index| weight(&spec.name, index));
    match dtype {
        Dtype::F32 => values.flat_map(f32::to_le_bytes).collect(),
        Dtype::F16 => values.flat_map(|value| f16::from_f32(value).to_le_bytes()).collect(),
        _ => values.flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect(),
    }
}

/// The script's `weight`.
fn weight(name: &str, index: usize) -> f32 {
    let salt =
        name.bytes().fold(2_166_136_261u32, |salt, byte| (salt ^ byte as u32).wrapping_mul(16_777_619));
    let mut mixed = (index as u32).wrapping_mul(2_654_435_761).wrapping_add(salt);
    mixed = (mixed ^ (mixed >> 15)).wrapping_mul(2_246_822_519);
    mixed ^= mixed >> 13;
    let signed = (mixed >> 24) as i32 - 128;
    if name.contains("norm") {
        1.0 + (signed >> 4) as f32 / 32.0
    } else if name.contains("embed") || name.contains("lm_head") {
        signed as f32 / 64.0
    } else {
        signed as f32 / 256.0
    }
}
