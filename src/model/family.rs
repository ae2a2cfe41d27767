//! The model families that this runtime computes: Llama, and those that are a Llama but for a name, a bias or a default.
//!
//! A family is a kind of model for which transformers has a configuration class of its own. The descriptors hold
//! everything in which families differ; the values are those of the classes in transformers 5.

use super::config_keys::Keys;
use crate::error::Result;

/// A model family, as transformers names it and fills its configuration.
#[derive(Debug, PartialEq, Eq)]
pub struct Family {
    /// `model_type` in `config.json`.
    pub model_type: &'static str,
    /// Its name in messages.
    pub name: &'static str,
    /// Its configuration class in transformers.
    pub config_class: &'static str,
    /// Names of its causal language model under `architectures`, the usual one first.
    pub(super) causal_models: &'static [&'static str],
    /// Name of the model without a head under `architectures`.
    pub(super) base_model: &'static str,
    /// Keys that this family reads beside those that all read.
    pub(super) own_keys: &'static [&'static str],
    /// Values of keys that are absent.
    pub(super) defaults: Defaults,
    /// Which linear layers of the attention have a bias.
    pub(super) attention_bias: AttentionBias,
}

/// What a family's configuration class takes for a key that `config.json` does not have.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Defaults {
    pub vocab_size: usize,
    pub intermediate_size: usize,
    /// `None`: as many as there are query heads.
    pub kv_heads: Option<usize>,
    pub max_position_embeddings: usize,
    pub bos_token_ids: &'static [u32],
    pub eos_token_ids: &'static [u32],
}

/// Where the biases of the attention come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AttentionBias {
    /// The key `attention_bias`, for q, k, v and o alike; `mlp_bias` does the same for gate, up and down.
    Keys,
    /// No linear layer of the attention has a bias.
    Never,
    /// q, k and v have biases, and nothing else does.
    QueryKeyValue,
}

const LLAMA: Family = Family {
    model_type: "llama",
    name: "Llama",
    config_class: "LlamaConfig",
    causal_models: &["LlamaForCausalLM", "LLaMAForCausalLM"],
    base_model: "LlamaModel",
    own_keys: &["attention_bias", "mlp_bias"],
    defaults: Defaults {
        vocab_size: 32_000,
        intermediate_size: 11_008,
        kv_heads: None,
        max_position_embeddings: 2048,
        bos_token_ids: &[1],
        eos_token_ids: &[2],
    },
    attention_bias: AttentionBias::Keys,
};

const MISTRAL: Family = Family {
    model_type: "mistral",
    name: "Mistral",
    config_class: "MistralConfig",
    causal_models: &["MistralForCausalLM"],
    base_model: "MistralModel",
    own_keys: &["sliding_window"],
    defaults: Defaults {
        vocab_size: 32_000,
        intermediate_size: 14_336,
        kv_heads: Some(8),
        max_position_embeddings: 4096 * 32,
        bos_token_ids: &[1],
        eos_token_ids: &[2],
    },
    attention_bias: AttentionBias::Never,
};

const QWEN2: Family = Family {
    model_type: "qwen2",
    name: "Qwen2",
    config_class: "Qwen2Config",
    causal_models: &["Qwen2ForCausalLM"],
    base_model: "Qwen2Model",
    own_keys: &["layer_types", "max_window_layers", "sliding_window", "use_sliding_window"],
    defaults: Defaults {
        vocab_size: 151_936,
        intermediate_size: 22_016,
        kv_heads: Some(32),
        max_position_embeddings: 32_768,
        bos_token_ids: &[],
        eos_token_ids: &[],
    },
    attention_bias: AttentionBias::QueryKeyValue,
};

/// All families, Llama first.
pub(super) static FAMILIES: [Family; 3] = [LLAMA, MISTRAL, QWEN2];

/// The window that both Mistral's and Qwen2's configuration classes take where the key is absent.
const DEFAULT_WINDOW: usize = 4096;

impl Family {
    /// Refuses a window on the attention that is shorter than the positions the model was trained for: it is not
    /// computed here. A longer one changes nothing.
    pub(super) fn check_window(
        &self,
        keys: &Keys,
        layers: usize,
        max_position_embeddings: usize,
    ) -> Result<()> {
        let Some(window) = self.window(keys, layers)? else { return Ok(()) };
        if window >= max_position_embeddings {
            return Ok(());
        }
        let absent = if keys.map.contains_key("sliding_window") {
            String::new()
        } else {
            format!(" (the default of transformers' {}, because the key is absent)", self.config_class)
        };
        Err(keys.error(
            format!(
                "`sliding_window` is {window}{absent}: a token of this model sees only the {window} before it, \
                 which is not computed here"
            ),
            "choose a model without a sliding window, such as Mistral 7B from version 0.2 on; where all your texts are \
             shorter than the window, set `max_position_embeddings` to it, which changes nothing for them",
        ))
    }

    /// The window of those layers that have one, in tokens; `None` if no layer has.
    fn window(&self, keys: &Keys, layers: usize) -> Result<Option<usize>> {
        let reads = |key: &str| self.own_keys.contains(&key);
        if !reads("sliding_window") {
            return Ok(None);
        }
        if reads("use_sliding_window") {
            let slides = match keys.get("layer_types").and_then(|types| types.as_array()) {
                Some(types) => types.iter().any(|kind| kind != "full_attention"),
                None => {
                    let first = keys.optional_size("max_window_layers", u64::MAX).ok().flatten();
                    keys.flag("use_sliding_window")? && first.unwrap_or(0) < layers
                }
            };
            if !slides {
                return Ok(None);
            }
        }
        match keys.map.get("sliding_window") {
            None => Ok(Some(DEFAULT_WINDOW)),
            Some(_) => keys.optional_size("sliding_window", 1 << 53),
        }
    }
}
