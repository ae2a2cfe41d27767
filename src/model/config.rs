//! `config.json` of a Hugging Face Llama folder, as one checked value.
//!
//! The meaning of each key is that of `LlamaConfig` in transformers. A key that would change the arithmetic in a way
//! this program does not compute is refused by name; so is a key nobody here knows, unless its value (`null`, `false`,
//! an empty list or object) asks for nothing. [`HARMLESS_KEYS`] are the keys known to leave the logits alone.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::device::{AttentionShape, StorageType};
use crate::error::{Error, Result};
use crate::model::rope::{self, Rope};

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

/// Keys read by [`LlamaConfig::parse`].
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
const MAX_SIZE: u64 = 1 << 24;
const MAX_LAYERS: u64 = 10_000;

/// A Llama, as its `config.json` describes it. Symbols are those of the legend: `V D F L H K E`.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    /// `V`
    pub vocab_size: usize,
    /// `D`
    pub hidden_size: usize,
    /// `F`
    pub intermediate_size: usize,
    /// `L`
    pub layers: usize,
    /// `H`
    pub heads: usize,
    /// `K`; divides `H`.
    pub kv_heads: usize,
    /// `E`, even; `H * E` need not be `D`.
    pub head_size: usize,
    pub rms_norm_eps: f32,
    /// The output head is the embedding table.
    pub tie_word_embeddings: bool,
    /// Biases on q, k, v and o.
    pub attention_bias: bool,
    /// Biases on gate, up and down.
    pub mlp_bias: bool,
    pub max_position_embeddings: usize,
    pub rope: Rope,
    pub bos_token_id: Option<u32>,
    /// End tokens of `config.json`.
    pub eos_token_ids: Vec<u32>,
    /// Where generation stops: the end tokens of `config.json`, then those that `generation_config.json` adds.
    pub stop_token_ids: Vec<u32>,
    /// As transformers has it, this row of the embedding gets no gradient from its use as an input. A negative id,
    /// as old configs write it, is none.
    pub pad_token_id: Option<u32>,
    /// What the config says the weights are stored in; the tensors themselves are what counts.
    pub dtype: Option<StorageType>,
    /// The file as it was, key order included: a saved folder's config is this one.
    original: Map<String, Value>,
}

/// A weight's name in a Hugging Face folder and its shape there, row-major, `[outputs, inputs]` for matrices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    pub name: String,
    pub shape: Vec<usize>,
}

impl TensorSpec {
    pub fn new(name: impl Into<String>, shape: &[usize]) -> Self {
        TensorSpec { name: name.into(), shape: shape.to_vec() }
    }

    /// Number of values.
    pub fn values(&self) -> usize {
        self.shape.iter().product()
    }
}

impl LlamaConfig {
    /// Reads `config.json` of `folder`, and `generation_config.json` where there is one.
    ///
    /// # Errors
    /// [`Error::Io`] where a file cannot be read, [`Error::Model`] naming the file and the key otherwise.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        let text = match std::fs::read_to_string(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && folder.is_dir() => {
                return Err(Error::model(
                    folder,
                    "no config.json: this is not a Hugging Face model folder",
                    "give the folder that holds config.json, tokenizer.json and model.safetensors",
                ));
            }
            result => result.map_err(|error| Error::io(&path, "read", error))?,
        };
        let mut config = LlamaConfig::parse(&path, &text)?;
        let path = folder.join("generation_config.json");
        match std::fs::read_to_string(&path) {
            Ok(text) => config.add_generation_config(&path, &text)?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::io(&path, "read", error)),
        }
        Ok(config)
    }

    /// Parses the text of a `config.json`; `path` is for messages.
    pub fn parse(path: &Path, text: &str) -> Result<Self> {
        let keys = Keys::parse(path, text)?;
        keys.check_architecture()?;
        keys.check_unsupported()?;
        let hidden_size = keys.size("hidden_size", MAX_SIZE)?;
        let heads = keys.size("num_attention_heads", MAX_SIZE)?;
        let max_position_embeddings = keys.optional_size("max_position_embeddings", 1 << 32)?.unwrap_or(2048);
        let eos_token_ids = keys.token_ids("eos_token_id", &[2])?;
        let config = LlamaConfig {
            vocab_size: keys.size("vocab_size", MAX_SIZE)?,
            hidden_size,
            intermediate_size: keys.size("intermediate_size", MAX_SIZE)?,
            layers: keys.size("num_hidden_layers", MAX_LAYERS)?,
            heads,
            kv_heads: keys.optional_size("num_key_value_heads", MAX_SIZE)?.unwrap_or(heads),
            head_size: keys.head_size(hidden_size, heads)?,
            rms_norm_eps: keys.positive("rms_norm_eps", 1e-6)? as f32,
            tie_word_embeddings: keys.flag("tie_word_embeddings")?,
            attention_bias: keys.flag("attention_bias")?,
            mlp_bias: keys.flag("mlp_bias")?,
            max_position_embeddings,
            rope: rope::parse(&keys, max_position_embeddings)?,
            bos_token_id: keys.token_ids("bos_token_id", &[1])?.first().copied(),
            stop_token_ids: eos_token_ids.clone(),
            eos_token_ids,
            pad_token_id: keys.pad_token_id()?,
            dtype: keys.dtype()?,
            original: keys.map.clone(),
        };
        config.check_heads(&keys)?;
        config.check_token_ids(&keys)?;
        Ok(config)
    }

    /// Adds the end tokens of a `generation_config.json` to [`LlamaConfig::stop_token_ids`].
    pub fn add_generation_config(&mut self, path: &Path, text: &str) -> Result<()> {
        let keys = Keys::parse(path, text)?;
        for id in keys.token_ids("eos_token_id", &[])? {
            if !self.stop_token_ids.contains(&id) {
                self.stop_token_ids.push(id);
            }
        }
        self.check_token_ids(&keys)
    }

    /// The text of the saved folder's `config.json`: the original with its dtype set to bfloat16.
    pub fn to_saved_json(&self) -> String {
        let mut map = self.original.clone();
        // transformers before 4.56 knows only the old name.
        if map.contains_key("torch_dtype") {
            map.insert("torch_dtype".into(), "bfloat16".into());
        }
        map.insert("dtype".into(), "bfloat16".into());
        format!("{:#}\n", Value::Object(map))
    }

    pub fn attention_shape(&self) -> AttentionShape {
        AttentionShape { heads: self.heads, kv_heads: self.kv_heads, head_size: self.head_size }
    }

    /// `[positions, E]`: of each position `E/2` cosines, then `E/2` sines, as transformers computes them in f32.
    pub fn rope_table(&self, positions: usize) -> Vec<f32> {
        self.rope.table(self.head_size, positions)
    }

    /// Every tensor of the folder, in the order of transformers' state dict; without `lm_head` where it is tied.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let (hidden, mlp) = (self.hidden_size, self.intermediate_size);
        let mut specs = vec![TensorSpec::new("model.embed_tokens.weight", &[self.vocab_size, hidden])];
        for layer in 0..self.layers {
            let mut linear = |module: &str, outputs: usize, inputs: usize, bias: bool| {
                let stem = format!("model.layers.{layer}.{module}");
                specs.push(TensorSpec::new(format!("{stem}.weight"), &[outputs, inputs]));
                if bias {
                    specs.push(TensorSpec::new(format!("{stem}.bias"), &[outputs]));
                }
            };
            let (query, key) = (self.heads * self.head_size, self.kv_heads * self.head_size);
            linear("self_attn.q_proj", query, hidden, self.attention_bias);
            linear("self_attn.k_proj", key, hidden, self.attention_bias);
            linear("self_attn.v_proj", key, hidden, self.attention_bias);
            linear("self_attn.o_proj", hidden, query, self.attention_bias);
            linear("mlp.gate_proj", mlp, hidden, self.mlp_bias);
            linear("mlp.up_proj", mlp, hidden, self.mlp_bias);
            linear("mlp.down_proj", hidden, mlp, self.mlp_bias);
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                specs.push(TensorSpec::new(format!("model.layers.{layer}.{norm}.weight"), &[hidden]));
            }
        }
        specs.push(TensorSpec::new("model.norm.weight", &[hidden]));
        if !self.tie_word_embeddings {
            specs.push(TensorSpec::new("lm_head.weight", &[self.vocab_size, hidden]));
        }
        specs
    }

    /// Number of parameters; a tied head counts once.
    pub fn parameters(&self) -> usize {
        self.tensors().iter().map(TensorSpec::values).sum()
    }

    fn check_heads(&self, keys: &Keys) -> Result<()> {
        let LlamaConfig { heads, kv_heads, head_size, .. } = *self;
        if !heads.is_multiple_of(kv_heads) {
            return Err(keys.error(
                format!(
                    "num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}"
                ),
                "every key/value head serves the same number of query heads: correct one of the two",
            ));
        }
        if !head_size.is_multiple_of(2) {
            return Err(keys.error(
                format!("head size {head_size} is odd"),
                "rotary positions turn pairs of values: head_dim (or hidden_size / num_attention_heads) must be even",
            ));
        }
        Ok(())
    }

    fn check_token_ids(&self, keys: &Keys) -> Result<()> {
        let ids = self.stop_token_ids.iter().chain(&self.bos_token_id).chain(&self.pad_token_id);
        match ids.copied().find(|&id| id as usize >= self.vocab_size) {
            Some(id) => Err(keys.error(
                format!("token id {id} lies outside the vocabulary of {}", self.vocab_size),
                "correct bos_token_id, eos_token_id or pad_token_id, or vocab_size",
            )),
            None => Ok(()),
        }
    }
}

/// The keys of a JSON file, with errors that name file and key.
pub(super) struct Keys {
    path: PathBuf,
    pub(super) map: Map<String, Value>,
}

impl Keys {
    fn parse(path: &Path, text: &str) -> Result<Self> {
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

    fn check_architecture(&self) -> Result<()> {
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

    fn check_unsupported(&self) -> Result<()> {
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

    fn optional_size(&self, key: &str, largest: u64) -> Result<Option<usize>> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match value.as_u64() {
                Some(size) if (1..=largest).contains(&size) => Ok(Some(size as usize)),
                _ => Err(self.wrong(key, value, &format!("a whole number in 1..={largest}"))),
            },
        }
    }

    fn size(&self, key: &str, largest: u64) -> Result<usize> {
        self.optional_size(key, largest)?.ok_or_else(|| {
            self.error(format!("`{key}` is missing"), format!("add `{key}`, or download config.json again"))
        })
    }

    fn head_size(&self, hidden_size: usize, heads: usize) -> Result<usize> {
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

    fn flag(&self, key: &str) -> Result<bool> {
        match self.get(key) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(value) => Err(self.wrong(key, value, "true or false")),
        }
    }

    /// One id or a list of them; `null` is none, an absent key is `default`.
    fn token_ids(&self, key: &str, default: &[u32]) -> Result<Vec<u32>> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = match self.map.get(key) {
            None => Some(default.to_vec()),
            Some(Value::Null) => Some(Vec::new()),
            Some(Value::Array(items)) => items.iter().map(id).collect(),
            Some(value) => id(value).map(|id| vec![id]),
        };
        ids.ok_or_else(|| self.wrong(key, &self.map[key], "a token id or a list of them"))
    }

    fn pad_token_id(&self) -> Result<Option<u32>> {
        match self.get("pad_token_id").and_then(Value::as_i64) {
            Some(id) if id < 0 => Ok(None),
            _ => Ok(self.token_ids("pad_token_id", &[])?.first().copied()),
        }
    }

    fn dtype(&self) -> Result<Option<StorageType>> {
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
