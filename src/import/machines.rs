//! Keys of DeepSpeed and FSDP, which cut a model among devices: what `--shard` does the same here.
//!
//! How a run is spread over devices changes nothing of what is trained, so these keys have no line in the recipe. A
//! person who wants the same memory needs to know the flags.

use super::draft::Draft;
use super::yaml::{Node, Value};
use crate::config::ShardConfig;
use crate::config::value::OptionValue;

/// Keys that say how a model is cut among devices.
const KEYS: [&str; 7] = [
    "deepspeed",
    "fsdp",
    "fsdp_config",
    "fsdp_version",
    "dp_shard_size",
    "dp_replicate_size",
    "tensor_parallel_size",
];

/// Accounts for the keys of DeepSpeed and FSDP, of which none changes what is trained.
pub(super) fn read(draft: &mut Draft) {
    for key in KEYS {
        let Some(node) = draft.take(key) else { continue };
        let twin = match key {
            "deepspeed" => zero_stage(&node),
            "fsdp" | "fsdp_config" => fsdp_strategy(&node),
            _ => None,
        };
        let why = match twin {
            Some((name, shard)) => {
                let word = shard.to_toml();
                let word = word.trim_matches('"');
                format!("it spreads a run over devices: {name} is `--gpus N --shard {word}` here")
            }
            None => "it spreads a run over devices: see `--gpus` and `--shard`".to_string(),
        };
        draft.no_effect(key, &node, &why);
    }
}

/// ZeRO's stage, from a configuration in place or from the name of its file, such as `ds_z3_config.json`. The file itself is
/// not read: it is often on the machine that trained.
fn zero_stage(node: &Node) -> Option<(String, ShardConfig)> {
    let stage = match &node.value {
        Value::Scalar { text, .. } => {
            let file = text.rsplit(['/', '\\']).next()?.to_ascii_lowercase();
            let digits = ["zero", "stage", "z"].iter().find_map(|word| {
                let rest = &file[file.find(word)? + word.len()..];
                let rest = rest.trim_start_matches(['_', '-']);
                let rest = rest.strip_prefix("stage").unwrap_or(rest).trim_start_matches(['_', '-']);
                rest.chars().next().and_then(|digit| digit.to_digit(10))
            });
            digits?
        }
        Value::Mapping(_) => member(member(node, "zero_optimization")?, "stage")?.text()?.parse().ok()?,
        Value::List(_) => return None,
    };
    let shard = match stage {
        0 => ShardConfig::None,
        1 => ShardConfig::States,
        2 => ShardConfig::Gradients,
        3 => ShardConfig::Weights,
        _ => return None,
    };
    Some((format!("ZeRO stage {stage}"), shard))
}

/// FSDP's strategy, from its options (`full_shard auto_wrap`, or a list of them) or from its configuration.
fn fsdp_strategy(node: &Node) -> Option<(String, ShardConfig)> {
    let words: Vec<&str> = match &node.value {
        Value::Mapping(_) => {
            const NAMES: [&str; 4] = [
                "fsdp_sharding_strategy",
                "sharding_strategy",
                "fsdp_reshard_after_forward",
                "reshard_after_forward",
            ];
            let named = NAMES.iter().find_map(|name| member(node, name))?;
            match (named.truth(), named.text()?) {
                // Version 2 of FSDP has a truth value.
                (Some(true), _) => vec!["FULL_SHARD"],
                (Some(false), _) => vec!["SHARD_GRAD_OP"],
                // The numbers are those of PyTorch's `ShardingStrategy`.
                (None, "1") => vec!["FULL_SHARD"],
                (None, "2") => vec!["SHARD_GRAD_OP"],
                (None, "3") => vec!["NO_SHARD"],
                (None, text) => vec![text],
            }
        }
        _ => node.list().into_iter().filter_map(Node::text).flat_map(str::split_whitespace).collect(),
    };
    words.iter().find_map(|word| {
        let name = word.trim_end_matches(',').to_ascii_uppercase();
        let shard = match name.as_str() {
            "FULL_SHARD" => ShardConfig::Weights,
            "SHARD_GRAD_OP" => ShardConfig::Gradients,
            "NO_SHARD" => ShardConfig::None,
            _ => return None,
        };
        Some((name, shard))
    })
}

fn member<'a>(node: &'a Node, key: &str) -> Option<&'a Node> {
    match &node.value {
        Value::Mapping(members) => members.iter().find(|(name, _)| name == key).map(|(_, node)| node),
        _ => None,
    }
}
