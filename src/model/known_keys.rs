//! Which keys of `config.json` mean what: those that are read, those that cannot matter, and those that transformers
//! acts on and this program does not compute.
//!
//! The list that counts is what transformers reads for a model of the family (for Llama `LlamaConfig`, `modeling_llama`,
//! and the masks and caches they call). A key outside it cannot change the model there, so it is named in a warning and
//! ignored here.

use serde_json::Value;

use super::config_keys::Keys;
use super::family::{FAMILIES, Family};
use crate::error::Result;

/// Keys that `LlamaConfig::parse` reads of every family; `Family::own_keys` has the others.
const READ_KEYS: &[&str] = &[
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "is_causal",
    "max_position_embeddings",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "original_max_position_embeddings",
    "pad_token_id",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_weights",
    "vocab_size",
];

/// Keys that are widespread and known to say nothing about the arithmetic: provenance, generation defaults, settings
/// of training programs, and what transformers only looks at outside a Llama. They are not worth a warning; neither
/// are names that begin with an underscore, which are private to the program that wrote them.
const HARMLESS_KEYS: &[&str] = &[
    "add_cross_attention",
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "attn_implementation",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token",
    "chunk_size_feed_forward",
    "classifier_dropout",
    "cls_token_id",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "eos_token",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "gradient_checkpointing",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_encoder_decoder",
    "is_llama_config",
    "label2id",
    "length_penalty",
    "mask_token_id",
    "max_length",
    "max_new_tokens",
    "max_sequence_length",
    "min_length",
    "model_max_length",
    "name_or_path",
    "neftune_noise_alpha",
    "no_repeat_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "num_beam_groups",
    "num_beams",
    "num_labels",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "output_scores",
    "pad_token",
    "prefix",
    "pretraining_tp",
    "problem_type",
    "pruned_heads",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "rope_interleaved",
    "sep_token_id",
    "suppress_tokens",
    "target_lookbehind",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "typical_p",
    "unk_token",
    "unk_token_id",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
    "use_return_dict",
];

/// Most keys that the warning about unread keys names.
const SHOWN_KEYS: usize = 20;

impl Keys {
    /// Finds the family of the config. transformers goes by `model_type`, and by `architectures` only where there is no
    /// `model_type`.
    pub(super) fn check_architecture(&self) -> Result<()> {
        let help = "mmpo-fast trains models with `model_type` llama, mistral (without a sliding window) or qwen2: convert \
                    the model, or choose another";
        let architectures = self.get("architectures");
        let names: Vec<&str> = match architectures {
            Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
            Some(Value::String(name)) => vec![name],
            _ => Vec::new(),
        };
        if let Some(kind) = self.get("model_type") {
            let family = FAMILIES
                .iter()
                .find(|family| kind == family.model_type)
                .ok_or_else(|| self.error(format!("unknown architecture: `model_type` is {kind}"), help))?;
            self.family.set(family);
            let causal = names.iter().all(|name| family.causal_models.contains(name));
            if let (Some(value), false) = (architectures, causal) {
                let Family { model_type, causal_models, .. } = family;
                self.warn(format!(
                    "`architectures` is {value}; `model_type` is {model_type}, so it is read as {}, as transformers does",
                    causal_models[0]
                ));
            }
            return Ok(());
        }
        let Some(name) = names.first() else {
            return Err(self.error("neither `architectures` nor `model_type` says what model this is", help));
        };
        let named = |family: &&Family| family.causal_models.contains(name) || family.base_model == *name;
        match FAMILIES.iter().find(named) {
            Some(family) => self.family.set(family),
            None => {
                let value = architectures.unwrap_or(&Value::Null);
                return Err(self.error(format!("unknown architecture: `architectures` is {value}"), help));
            }
        }
        Ok(())
    }

    /// Refuses by name what transformers would act on and this program does not compute.
    pub(super) fn check_unsupported(&self) -> Result<()> {
        if let Some(value) = self.get("hidden_act")
            && value != "silu"
            && value != "swish"
        {
            return Err(self.error(
                format!("`hidden_act` is {value}; of activations only silu (also called swish) is computed"),
                "choose a model with silu, which nearly every Llama has",
            ));
        }
        if self.get("is_causal") == Some(&Value::Bool(false)) {
            return Err(self.error(
                "`is_causal` is false: transformers lets every token of this model see the later ones, which is not computed here",
                "choose a causal model, or remove the key if the model was trained as a causal one",
            ));
        }
        for (key, what, help) in [
            (
                "quantization_config",
                "the weights are quantised",
                "use the unquantised (bf16, f16 or f32) version of this model",
            ),
            (
                "compression_config",
                "the weights are compressed",
                "use the uncompressed (bf16, f16 or f32) version of this model",
            ),
            (
                "per_layer_config",
                "layers differ from each other, which is not computed here",
                "choose a model whose layers are all alike",
            ),
            (
                "configuration_files",
                "the config lies in another file",
                "copy the file that it names for your version of transformers over config.json",
            ),
        ] {
            if let Some(value) = self.get(key).filter(|value| !asks_nothing(value)) {
                let method = value.get("quant_method").and_then(Value::as_str);
                let method = method.map_or(String::new(), |name| format!(" (method {name:?})"));
                return Err(self.error(format!("`{key}`{method}: {what}"), help));
            }
        }
        Ok(())
    }

    /// Gives one warning that lists the keys that no model of the family reads. `unread_rope` are those of the rope
    /// section.
    pub(super) fn warn_of_unread(&self, unread_rope: &[String]) {
        let Family { name, own_keys, .. } = self.family.get();
        let known = |key: &str| {
            key.starts_with('_')
                || READ_KEYS.contains(&key)
                || own_keys.contains(&key)
                || HARMLESS_KEYS.contains(&key)
        };
        let unread: Vec<String> = self
            .map
            .iter()
            .filter(|(key, value)| !known(key) && !asks_nothing(value))
            .map(|(key, _)| format!("`{key}`"))
            .chain(unread_rope.iter().map(|key| format!("`{key}`")))
            .collect();
        if unread.is_empty() {
            return;
        }
        let more = match unread.len() - unread.len().min(SHOWN_KEYS) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let code = match self.map.contains_key("auto_map") {
            true => "; the folder's own Python code is never run",
            false => "",
        };
        let shown = &unread[..unread.len().min(SHOWN_KEYS)];
        self.warn(format!(
            "ignored, because transformers' {name} does not read {}: {}{more}{code}",
            if unread.len() == 1 { "this key" } else { "these keys" },
            shown.join(", ")
        ));
    }
}

/// Values that stand for "not set".
pub(super) fn asks_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}
