//! The keys of a `config.json`: read one by one, each error naming file and key, and unknown ones refused.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::device::StorageType;
use crate::error::{Error, Result};

/// Keys that say nothing about the arithmetic: provenance, generation defaults, and what transformers only looks at
/// outside the model.
const HARMLESS_KEYS: &[&str] = &[
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_flash_attn_2_enabled",
    "_name_or_path",
    "attn_implementation",
    "bad_words_ids",
    "begin_suppress_tokens",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_llama_config",
    "label2id",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "output_scores",
    "prefix",
    "problem_type",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
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
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
];

/// Keys read by `LlamaConfig::parse`.
const READ_KEYS: &[&str] = &[
    "architectures",
    "attention_bias",
    "attention_dropout",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_bias",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "partial_rotary_factor",
    "pretraining_tp",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "torch_dtype",
    "vocab_size",
];

/// Largest size any dimension may have: beyond it a config is taken for damaged.
pub(super) const MAX_SIZE: u64 = 1 << 24;
pub(super) const MAX_LAYERS: u64 = 10_000;

/// The keys of a JSON file, with errors that name file and key.
pub(super) struct Keys {
    path: PathBuf,
    pub(super) map: Map<String, Value>,
}

impl Keys {
    pub(super) fn parse(path: &Path, text: &str) -> Result<Self> {
        let broken =
            |message: String| Error::model(path, message, "download the file again, or mend its JSON");
        match serde_json::from_str(text) {
            Ok(Value::Object(map)) => Ok(Keys { path: path.to_path_buf(), map }),
            Ok(_) => Err(broken("holds JSON that is not an object".into())),
            Err(error) => Err(broken(format!("is not valid JSON: {error}"))),
        }
    }

    pub(super) fn error(&self, message: impl Into<String>, help: impl Into<String>) -> Error {
        Error::model(&self.path, message, help)
    }

    /// `key` as the config asks for it, or the refusal of a value of the wrong kind.
    fn wrong(&self, key: &str, value: &Value, wanted: &str) -> Error {
        self.error(format!("`{key}` is {value}, not {wanted}"), format!("set `{key}` to {wanted}"))
    }

    /// The value of a key; `null` is absent.
    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn check_architecture(&self) -> Result<()> {
        let help =
            "mmpo-fast trains LlamaForCausalLM (model_type llama) alone; convert the model or choose another";
        if let Some(value) = self.get("architectures")
            && value != &serde_json::json!(["LlamaForCausalLM"])
        {
            return Err(self.error(format!("unknown architecture: `architectures` is {value}"), help));
        }
        match self.get("model_type") {
            Some(value) if value == "llama" => Ok(()),
            None if self.get("architectures").is_some() => Ok(()),
            None => Err(self.error("neither `architectures` nor `model_type` says what model this is", help)),
            Some(value) => Err(self.error(format!("unknown architecture: `model_type` is {value}"), help)),
        }
    }

    pub(super) fn check_unsupported(&self) -> Result<()> {
        self.only("hidden_act", "silu")?;
        self.only("pretraining_tp", 1)?;
        self.only("chunk_size_feed_forward", 0)?;
        if let Some(value) = self.get("attention_dropout")
            && value.as_f64() != Some(0.0)
        {
            return Err(self.error(
                format!("`attention_dropout` is {value}; attention dropout is not supported"),
                "set `attention_dropout` to 0: nearly every Llama is trained without it",
            ));
        }
        for (key, value) in &self.map {
            let asks_nothing = match value {
                Value::Null | Value::Bool(false) => true,
                Value::Array(items) => items.is_empty(),
                Value::Object(map) => map.is_empty(),
                _ => false,
            };
            let known = [READ_KEYS, HARMLESS_KEYS].iter().any(|keys| keys.contains(&key.as_str()));
            if !known && !asks_nothing {
                return Err(self.refuse(key, value));
            }
        }
        Ok(())
    }

    /// The refusal of a key that is neither read nor known to be harmless.
    fn refuse(&self, key: &str, value: &Value) -> Error {
        match key {
            "quantization_config" => self.error(
                "`quantization_config`: quantised weights are not supported",
                "use the unquantised (bf16, f16 or f32) version of this model",
            ),
            "sliding_window" => self.error(
                format!("`sliding_window` is {value}; windowed attention is not supported"),
                "use a model with full attention, or set it to null if the model was trained without it",
            ),
            "auto_map" => self.error(
                "`auto_map` asks for the folder's own Python code, which is never run",
                "remove `auto_map` if the model is a plain Llama",
            ),
            _ => self.error(
                format!("unknown key `{key}` = {value}: it may change the model's arithmetic"),
                format!("if it does not, remove `{key}` from config.json"),
            ),
        }
    }

    /// Refuses any value of `key` but `wanted`.
    fn only(&self, key: &str, wanted: impl Into<Value>) -> Result<()> {
        let wanted = wanted.into();
        match self.get(key) {
            Some(value) if value != &wanted => Err(self.error(
                format!("`{key}` is {value}; only {wanted} is supported"),
                "choose another model: this one computes something else",
            )),
            _ => Ok(()),
        }
    }

    pub(super) fn optional_size(&self, key: &str, largest: u64) -> Result<Option<usize>> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match value.as_u64() {
                Some(size) if (1..=largest).contains(&size) => Ok(Some(size as usize)),
                _ => Err(self.wrong(key, value, &format!("a whole number in 1..={largest}"))),
            },
        }
    }

    pub(super) fn size(&self, key: &str, largest: u64) -> Result<usize> {
        self.optional_size(key, largest)?.ok_or_else(|| {
            self.error(format!("`{key}` is missing"), format!("add `{key}`, or download config.json again"))
        })
    }

    pub(super) fn head_size(&self, hidden_size: usize, heads: usize) -> Result<usize> {
        if let Some(size) = self.optional_size("head_dim", MAX_SIZE)? {
            return Ok(size);
        }
        if !hidden_size.is_multiple_of(heads) {
            return Err(self.error(
                format!("hidden_size = {hidden_size} is not a multiple of num_attention_heads = {heads}"),
                "without `head_dim` the head size is their quotient: correct them, or add `head_dim`",
            ));
        }
        Ok(hidden_size / heads)
    }

    pub(super) fn positive(&self, key: &str, default: f64) -> Result<f64> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => match value.as_f64() {
                Some(number) if number > 0.0 && number.is_finite() => Ok(number),
                _ => Err(self.wrong(key, value, "a positive number")),
            },
        }
    }

    pub(super) fn flag(&self, key: &str) -> Result<bool> {
        match self.get(key) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(value) => Err(self.wrong(key, value, "true or false")),
        }
    }

    /// One id or a list of them; `null` is none, an absent key is `default`.
    pub(super) fn token_ids(&self, key: &str, default: &[u32]) -> Result<Vec<u32>> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = match self.map.get(key) {
            None => Some(default.to_vec()),
            Some(Value::Null) => Some(Vec::new()),
            Some(Value::Array(items)) => items.iter().map(id).collect(),
            Some(value) => id(value).map(|id| vec![id]),
        };
        ids.ok_or_else(|| self.wrong(key, &self.map[key], "a token id or a list of them"))
    }

    pub(super) fn pad_token_id(&self) -> Result<Option<u32>> {
        match self.get("pad_token_id").and_then(Value::as_i64) {
            Some(id) if id < 0 => Ok(None),
            _ => Ok(self.token_ids("pad_token_id", &[])?.first().copied()),
        }
    }

    pub(super) fn dtype(&self) -> Result<Option<StorageType>> {
        let Some(value) = self.get("dtype").or_else(|| self.get("torch_dtype")) else {
            return Ok(None);
        };
        match value.as_str() {
            Some("float32") => Ok(Some(StorageType::F32)),
            Some("float16") => Ok(Some(StorageType::F16)),
            Some("bfloat16") => Ok(Some(StorageType::Bf16)),
            _ => Err(self.wrong("dtype", value, "float32, float16 or bfloat16")),
        }
    }
}
