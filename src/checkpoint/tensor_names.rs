//! Names of tensors: those of a checkpoint, those a Llama has, and what it means where they do not agree.

use std::collections::HashSet;
use std::path::Path;

use crate::error::{Error, Result};
use crate::model::{LlamaConfig, TensorSpec};

/// The vocabulary matrix of the head.
pub const HEAD: &str = "lm_head.weight";
/// The embedding table.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// The prefix of the base model (`LlamaModel`) inside `LlamaForCausalLM`.
const BASE: &str = "model.";

/// Parts of names that wrappers of a model leave in a checkpoint that was saved with them.
const WRAPPERS: [(&str, &str); 5] = [
    ("module", "DataParallel or DeepSpeed"),
    ("_orig_mod", "torch.compile"),
    ("_fsdp_wrapped_module", "FSDP"),
    ("_checkpoint_wrapped_module", "activation checkpointing"),
    ("_forward_module", "Lightning"),
];

/// First parts of the names of heads that models of other tasks have beside, or in place of, `lm_head`.
const OTHER_HEADS: [&str; 6] = ["score", "v_head", "value_head", "reward_head", "classifier", "qa_outputs"];

/// Ends of names that quantised weights have.
const QUANTISED: [&str; 12] = [
    ".qweight",
    ".qzeros",
    ".g_idx",
    ".scales",
    ".biases",
    ".SCB",
    ".absmax",
    ".quant_map",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_packed",
    ".weight_format",
];

/// How many names a message shows.
const SHOWN: usize = 3;

/// The names that a checkpoint of this model may have. A tied head is among them.
pub fn expected(config: &LlamaConfig) -> HashSet<String> {
    config.tensors().into_iter().map(|spec| spec.name).chain([HEAD.to_string()]).collect()
}

/// The name under which transformers loads the tensor `stored`: it takes the prefix of the base model away, or puts
/// it in front, where that gives a name that the model has.
pub fn loaded(stored: &str, expected: &HashSet<String>) -> String {
    match stored.strip_prefix(BASE) {
        Some(rest) if expected.contains(rest) => return rest.to_string(),
        _ => {}
    }
    let with_base = format!("{BASE}{stored}");
    match expected.contains(&with_base) {
        true => with_base,
        false => stored.to_string(),
    }
}

/// Refuses `missing` and `extra` names, but for extra tensors that no Llama computes with; returns a warning where such
/// tensors deserve one. `file` holds the tensors.
///
/// # Errors
/// [`Error::Model`] with a few of the names, their number, and what they mean.
pub fn check(file: &Path, specs: &[TensorSpec], missing: &[&str], extra: &[&str]) -> Result<Option<String>> {
    let is_rotary = |name: &str| name.contains("rotary_emb.");
    let is_other_head = |name: &str| OTHER_HEADS.contains(&name.split('.').next().unwrap_or_default());
    let (heads, strange): (Vec<&str>, Vec<&str>) =
        extra.iter().copied().filter(|name| !is_rotary(name)).partition(|name| is_other_head(name));
    if missing.is_empty() && strange.is_empty() {
        return Ok((!heads.is_empty())
            .then(|| format!("a causal model has no {}; ignored, as transformers does", listed(&heads))));
    }
    let wrapped = wrapper(specs, &strange).map(|(part, program)| {
        let message = format!(
            "the tensors have names such as `{}`: {program} left the part `{part}.` in them",
            strange[0]
        );
        (message, rename_help(file, part))
    });
    let (message, help) = wrapped
        .or_else(|| describe_strange(&strange))
        .unwrap_or_else(|| describe_missing(specs, missing, &strange, !heads.is_empty()));
    Err(Error::model(file, message, help))
}

/// The wrapper that was left in the names: without its part they are names that the model has.
fn wrapper(specs: &[TensorSpec], strange: &[&str]) -> Option<(&'static str, &'static str)> {
    let known: HashSet<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
    let is_part = |part: &&str| WRAPPERS.iter().any(|(wrapper, _)| wrapper == part);
    let name = strange.iter().find(|name| name.split('.').any(|part| is_part(&part)))?;
    let bare: Vec<&str> = name.split('.').filter(|part| !is_part(part)).collect();
    let bare = bare.join(".");
    if !known.contains(bare.as_str()) && !known.contains(format!("{BASE}{bare}").as_str()) && bare != HEAD {
        return None;
    }
    WRAPPERS.into_iter().find(|(wrapper, _)| name.split('.').any(|part| part == *wrapper))
}

fn rename_help(file: &Path, part: &str) -> String {
    if file.is_dir() {
        return "save the model again without the wrapper: `accelerator.unwrap_model(model).save_pretrained(...)`, \
                or `model.module.save_pretrained(...)`"
            .into();
    }
    let file = file.display();
    format!(
        "take it away: `python -c \"from safetensors.torch import load_file as l, save_file as s; f = '{file}'; \
         s({{k.replace('{part}.', ''): v for k, v in l(f).items()}}, f, {{'format': 'pt'}})\"`"
    )
}

/// Extra tensors that show what the folder is.
fn describe_strange(strange: &[&str]) -> Option<(String, String)> {
    let having = |matches: &dyn Fn(&str) -> bool| -> Vec<&str> {
        strange.iter().copied().filter(|name| matches(name)).collect()
    };
    let adapter = having(&|name| {
        name.contains("lora_") || name.contains(".base_layer.") || name.starts_with("base_model.")
    });
    if !adapter.is_empty() {
        return Some((
            listed_as("unexpected ", &adapter),
            "this looks like an adapter: give its base model with --model, and the adapter's own folder with --adapter"
                .into(),
        ));
    }
    let quantised = having(&|name| QUANTISED.iter().any(|end| name.ends_with(end)));
    (!quantised.is_empty()).then(|| {
        (
            format!("{}: these weights are quantised", listed_as("unexpected ", &quantised)),
            "use the unquantised (bf16, f16 or f32) version of this model".into(),
        )
    })
}

fn describe_missing(
    specs: &[TensorSpec],
    missing: &[&str],
    strange: &[&str],
    has_other_head: bool,
) -> (String, String) {
    let all_end =
        |names: &[&str], end: &str| !names.is_empty() && names.iter().all(|name| name.ends_with(end));
    let message = match (missing, strange) {
        ([], _) => listed_as("unexpected ", strange),
        (_, []) => format!("{} missing", is_or_are(missing)),
        _ => format!("{} missing; found instead {}", is_or_are(missing), listed(strange)),
    };
    let help = match missing {
        [HEAD] if has_other_head => {
            "this is a model with another head (a classifier or reward model): only the causal model has log-probs".into()
        }
        [HEAD] => "if the head is the embedding table, set tie_word_embeddings in config.json to true; else this is a \
                   base model without a head, which transformers would fill with random numbers"
            .into(),
        [] if all_end(strange, ".bias") => {
            "if the model has biases, set attention_bias or mlp_bias in config.json to true (model_type llama)".into()
        }
        [] if strange.iter().all(|name| name.starts_with("model.layers.")) => {
            let layers = specs.iter().filter(|spec| spec.name.ends_with(".input_layernorm.weight")).count();
            format!(
                "the weights are not those of the model that config.json describes, which has {layers} layers: \
                 correct config.json, or remove the tensors"
            )
        }
        [] => "the weights are not those of the model that config.json describes: correct config.json, or remove the tensor"
            .into(),
        _ if all_end(missing, ".bias") => {
            "if the model has no biases, set attention_bias and mlp_bias in config.json to false".into()
        }
        _ => "the weights are not those of the model that config.json describes, or a file of it is missing".into(),
    };
    (message, help)
}

fn is_or_are(names: &[&str]) -> String {
    format!("{} {}", listed(names), if names.len() == 1 { "is" } else { "are" })
}

/// "tensor `a`", or "12 tensors (`a`, `b`, `c` and 9 more)".
fn listed(names: &[&str]) -> String {
    listed_as("", names)
}

fn listed_as(adjective: &str, names: &[&str]) -> String {
    let shown = |names: &[&str]| names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    match names {
        [name] => format!("{adjective}tensor `{name}`"),
        _ if names.len() <= SHOWN => format!("{adjective}tensors {}", shown(names)),
        _ => format!(
            "{} {adjective}tensors ({} and {} more)",
            names.len(),
            shown(&names[..SHOWN]),
            names.len() - SHOWN
        ),
    }
}
