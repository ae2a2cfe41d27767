//! `adapter_config.json` of PEFT, as one checked value.
//!
//! A key that makes PEFT compute something other than plain LoRA is refused by name, and so is a key that is not known
//! here: it may be of a newer PEFT and mean anything.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::adapter_patterns::Patterns;
use crate::error::{Error, Result};
use crate::foreign::json;
use crate::model::{AdaptedModules, LoraSettings};

/// The file's name.
pub const ADAPTER_CONFIG: &str = "adapter_config.json";

/// Keys that say nothing about what a trained adapter computes.
const HARMLESS: [&str; 16] = [
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
];

/// Keys that are read, or compared below.
const READ: [&str; 10] = [
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "bias",
    "init_lora_weights",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
];

/// Keys of variants, with what each of them is.
const VARIANTS: [(&str, &str); 16] = [
    ("use_dora", "DoRA, which also scales the weights' columns"),
    ("modules_to_save", "whole modules saved beside the adapter"),
    ("lora_bias", "biases of the adapter's own"),
    ("fan_in_fan_out", "weights stored the other way round, as GPT-2 has them"),
    ("layers_to_transform", "an adapter on some layers only"),
    ("layer_replication", "layers that are used several times"),
    ("trainable_token_indices", "trained rows of the embedding"),
    ("target_parameters", "adapters of bare parameters"),
    ("megatron_config", "modules of Megatron"),
    ("use_qalora", "QA-LoRA"),
    ("use_bdlora", "block-diagonal LoRA"),
    ("alora_invocation_tokens", "activated LoRA"),
    ("velora_config", "VeLoRA"),
    ("monteclora_config", "MonteCLoRA"),
    ("kasa_config", "KaSA"),
    ("arrow_config", "Arrow, which mixes several adapters"),
];

/// First values that leave the base model's weights as they were.
const PLAIN_STARTS: [&str; 3] = ["gaussian", "eva", "orthogonal"];

/// What [`parse`] reads but for the modules, which the tensors tell.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct AdapterForm {
    pub rank: usize,
    pub alpha: f64,
    pub dropout: f64,
    pub rslora: bool,
    /// Ranks and scales of modules that have others.
    pub patterns: Patterns,
}

/// Reads the text of the file `path`.
///
/// # Errors
/// [`Error::Model`] naming the key, for what is not plain LoRA.
pub(super) fn parse(path: &Path, text: &str) -> Result<AdapterForm> {
    let again = "copy the adapter's file again";
    let json = json::parse(text)
        .map_err(|error| Error::model(path, format!("is not valid JSON: {error}"), again))?;
    let Some(keys) = json.as_object() else { return Err(Error::model(path, "is not a JSON object", again)) };
    check_kind(path, keys)?;
    check_variants(path, keys)?;
    let number = |key: &str, default: f64, rule: fn(f64) -> bool, must: &str| match keys.get(key) {
        None | Some(Value::Null) => Ok(default),
        Some(value) => value.as_f64().filter(|&number| rule(number)).ok_or_else(|| {
            Error::model(
                path,
                format!("`{key}` is {}, and must be {must}", json::shown(value.to_string())),
                again,
            )
        }),
    };
    let is_rank = |rank: f64| (1.0..=65536.0).contains(&rank) && rank.fract() == 0.0;
    // PEFT's own defaults stand in for absent keys.
    Ok(AdapterForm {
        rank: number("r", 8.0, is_rank, "a whole number from 1 to 65536")? as usize,
        alpha: number(
            "lora_alpha",
            8.0,
            |alpha| alpha as f32 > 0.0 && (alpha as f32).is_finite(),
            "greater than 0",
        )?,
        dropout: number(
            "lora_dropout",
            0.0,
            |rate| (0.0..1.0).contains(&rate),
            "at least 0 and less than 1",
        )?,
        rslora: flag(path, keys, "use_rslora")?,
        patterns: Patterns::of(path, keys)?,
    })
}

fn flag(path: &Path, keys: &Map<String, Value>, key: &str) -> Result<bool> {
    match keys.get(key) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(flag)) => Ok(*flag),
        Some(other) => Err(Error::model(
            path,
            format!("`{key}` is {other}, and must be true or false"),
            "copy the adapter's file again",
        )),
    }
}

fn check_kind(path: &Path, keys: &Map<String, Value>) -> Result<()> {
    match keys.get("peft_type").and_then(Value::as_str) {
        Some("LORA") => Ok(()),
        Some(other) => Err(Error::model(
            path,
            format!("`peft_type` is {other:?}: only LoRA adapters (\"LORA\") are read"),
            merge_with_peft(),
        )),
        None => Err(Error::model(
            path,
            "has no `peft_type`: this is not the config of a PEFT adapter",
            "give the folder that PEFT's save_pretrained wrote, with adapter_config.json and adapter_model.safetensors",
        )),
    }
}

fn check_variants(path: &Path, keys: &Map<String, Value>) -> Result<()> {
    for (key, what) in VARIANTS {
        if let Some(value) = keys.get(key).filter(|value| says_something(value)) {
            return Err(Error::model(
                path,
                format!("`{key}` is {value}: {what}, not plain LoRA"),
                merge_with_peft(),
            ));
        }
    }
    if let Some(bias) = keys.get("bias").filter(|bias| !bias.is_null() && *bias != "none") {
        return Err(Error::model(
            path,
            format!("`bias` is {bias}: the model's biases were trained too"),
            merge_with_peft(),
        ));
    }
    let start = keys.get("init_lora_weights").unwrap_or(&Value::Null);
    let is_plain = match start {
        Value::Null | Value::Bool(_) => true,
        Value::String(name) => PLAIN_STARTS.contains(&name.as_str()),
        _ => false,
    };
    if !is_plain {
        return Err(Error::model(
            path,
            format!(
                "`init_lora_weights` is {start}: such an adapter goes with base weights that were changed"
            ),
            "let PEFT convert it to a plain LoRA adapter: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        ));
    }
    let known = |key: &str| {
        HARMLESS.contains(&key) || READ.contains(&key) || VARIANTS.iter().any(|(variant, _)| *variant == key)
    };
    match keys.iter().find(|(key, value)| !known(key) && says_something(value)) {
        None => Ok(()),
        Some((key, value)) => Err(Error::model(
            path,
            format!(
                "`{key}` is {value}, and is not a key of LoRA that is known here: it may change what the adapter computes"
            ),
            format!("remove the key if it does not; otherwise {}", merge_with_peft()),
        )),
    }
}

/// Whether a key that turns a variant on does so.
fn says_something(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(values) => !values.is_empty(),
        Value::Object(values) => !values.is_empty(),
        _ => true,
    }
}

fn merge_with_peft() -> String {
    "merge it into its base model with PEFT's merge_and_unload(), and give the merged model".into()
}

impl AdapterForm {
    /// The form of adapters that all have the same.
    pub(super) fn of(settings: &LoraSettings) -> Self {
        let LoraSettings { rank, alpha, dropout, rslora, .. } = *settings;
        AdapterForm { rank, alpha, dropout, rslora, patterns: Patterns::default() }
    }
}

/// The text of the file for an adapter of these modules of the model `base`, with every key that an earlier PEFT asks for.
pub(super) fn write(form: &AdapterForm, modules: AdaptedModules, base: &str) -> String {
    let modules: Vec<&str> = modules.iter().map(|module| module.peft_name()).collect();
    let mut config = json!({
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "lora_alpha": whole(form.alpha),
        "lora_dropout": form.dropout,
        "modules_to_save": null,
        "peft_type": "LORA",
        "r": form.rank,
        "target_modules": modules,
        "task_type": "CAUSAL_LM",
        "use_dora": false,
        "use_rslora": form.rslora,
    });
    for (key, pattern) in [("rank_pattern", &form.patterns.ranks), ("alpha_pattern", &form.patterns.alphas)] {
        if !pattern.is_empty() {
            config[key] = Value::Object(pattern.clone());
        }
    }
    json::write(&config) + "\n"
}

/// A number as PEFT writes it: without a fraction where it has none.
fn whole(number: f64) -> Value {
    match number.fract() == 0.0 && number <= 1e15 {
        true => (number as u64).into(),
        false => number.into(),
    }
}
