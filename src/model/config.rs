//! `config.json` of a Hugging Face folder, as one checked value.
//!
//! The meaning of each key is that of the family's configuration class in transformers (`family.rs`). A key that
//! transformers acts on and this program does not compute is refused by name; a key that it does not read for this family
//! is ignored with a warning. `known_keys.rs` has the lists.

use std::path::Path;

use serde_json::{Map, Value};

use crate::device::{AttentionShape, StorageType};
use crate::error::{Error, Result};
use crate::foreign::{self, json};
use crate::model::config_keys::{Keys, MAX_LAYERS, MAX_SIZE};
use crate::model::family::{AttentionBias, Defaults, Family};
use crate::model::rope::Rope;
use crate::model::rope_keys;

/// The key that names the file of weights.
const WEIGHTS_FILE: &str = "transformers_weights";

/// A Llama, or a model of a family that is computed like one, as its `config.json` describes it. Symbols are those of the
/// legend: `V D F L H K E`.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    /// The family whose configuration class in transformers gives the keys their meaning.
    pub family: &'static Family,
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
    /// Added to the mean square before its root.
    pub rms_norm_eps: f32,
    /// Whether the output head is the embedding table.
    pub tie_word_embeddings: bool,
    /// Whether q, k and v have biases.
    pub qkv_bias: bool,
    /// Whether o has a bias.
    pub attention_out_bias: bool,
    /// Whether gate, up and down have biases.
    pub mlp_bias: bool,
    /// Share of the attention weights that transformers drops in training; nothing here drops any.
    pub attention_dropout: f64,
    /// Positions that the model was trained for.
    pub max_position_embeddings: usize,
    /// Rotary positions.
    pub rope: Rope,
    /// The token that begins a text, where the model has one.
    pub bos_token_id: Option<u32>,
    /// End tokens of `config.json`.
    pub eos_token_ids: Vec<u32>,
    /// Where generation stops: the end tokens of `config.json`, then those that `generation_config.json` adds.
    pub stop_token_ids: Vec<u32>,
    /// The token whose row of the embedding gets no gradient from its use as an input, as in transformers. A negative
    /// id, as old configs write it, was counted from the end of the vocabulary.
    pub pad_token_id: Option<u32>,
    /// The type that the config names for the weights; what counts is the type of the tensors themselves.
    pub dtype: Option<StorageType>,
    /// What the user should know about the file although it is no error, each a sentence without the file's name.
    pub warnings: Vec<String>,
    /// The file as it was, key order included: a saved folder's config is this one.
    original: Map<String, Value>,
}

/// A weight's name in a Hugging Face folder and its shape there, row-major, `[outputs, inputs]` for matrices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name in a Hugging Face checkpoint.
    pub name: String,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// A tensor of `shape`, outermost dimension first.
    pub fn new(name: impl Into<String>, shape: &[usize]) -> Self {
        TensorSpec { name: name.into(), shape: shape.to_vec() }
    }

    /// Number of values.
    pub fn values(&self) -> usize {
        self.shape.iter().product()
    }
}

impl LlamaConfig {
    /// Reads `config.json` of `folder`, and `generation_config.json` where there is one; logs what they warn of.
    ///
    /// # Errors
    /// [`Error::Io`] where a file cannot be read, [`Error::Model`] naming the file and the key otherwise.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        foreign::folder::check_holds_config(folder)?;
        let path = folder.join("config.json");
        let mut config = LlamaConfig::parse(&path, &foreign::read_text(&path, "the model's config")?)?;
        for warning in &config.warnings {
            tracing::warn!("{}: {warning}", path.display());
        }
        let path = folder.join("generation_config.json");
        match foreign::read_text(&path, "the generation config") {
            Ok(text) => config.add_generation_config(&path, &text),
            Err(Error::Io { cause, .. }) if cause.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        Ok(config)
    }

    /// Parses the text of a `config.json`; `path` is for messages.
    ///
    /// # Errors
    /// [`Error::Model`] naming the file and the key that is missing, wrong or not supported.
    pub fn parse(path: &Path, text: &str) -> Result<Self> {
        let keys = Keys::parse(path, text)?;
        keys.check_architecture()?;
        keys.check_unsupported()?;
        let family = keys.family.get();
        let Defaults { kv_heads: default_kv_heads, .. } = family.defaults;
        let vocab_size = keys.size("vocab_size", MAX_SIZE, family.defaults.vocab_size)?;
        let hidden_size = keys.size("hidden_size", MAX_SIZE, 4096)?;
        let heads = keys.size("num_attention_heads", MAX_SIZE, 32)?;
        let head_size = keys.head_size(hidden_size, heads)?;
        let layers = keys.size("num_hidden_layers", MAX_LAYERS, 32)?;
        let max_position_embeddings = keys
            .optional_size("max_position_embeddings", 1 << 53)?
            .unwrap_or(family.defaults.max_position_embeddings);
        family.check_window(&keys, layers, max_position_embeddings)?;
        let eos_token_ids = keys.token_ids("eos_token_id", family.defaults.eos_token_ids, vocab_size)?;
        let bos_token_ids = keys.token_ids("bos_token_id", family.defaults.bos_token_ids, vocab_size)?;
        let [attention_bias, mlp_bias] = match family.attention_bias {
            AttentionBias::Keys => [keys.flag("attention_bias")?, keys.flag("mlp_bias")?],
            AttentionBias::Never | AttentionBias::QueryKeyValue => [false, false],
        };
        // `null` asks for as many as there are query heads; an absent key has the family's number.
        let kv_heads = match keys.map.get("num_key_value_heads") {
            None => default_kv_heads,
            Some(_) => keys.optional_size("num_key_value_heads", MAX_SIZE)?,
        };
        let (rope, unread_rope) = rope_keys::parse(&keys, max_position_embeddings, head_size)?;
        let mut config = LlamaConfig {
            family,
            vocab_size,
            hidden_size,
            intermediate_size: keys.size("intermediate_size", MAX_SIZE, family.defaults.intermediate_size)?,
            layers,
            heads,
            kv_heads: kv_heads.unwrap_or(heads),
            head_size,
            rms_norm_eps: keys.positive("rms_norm_eps", 1e-6)? as f32,
            tie_word_embeddings: keys.flag("tie_word_embeddings")?,
            qkv_bias: attention_bias || family.attention_bias == AttentionBias::QueryKeyValue,
            attention_out_bias: attention_bias,
            mlp_bias,
            attention_dropout: keys.rate("attention_dropout")?,
            max_position_embeddings,
            rope,
            bos_token_id: bos_token_ids.first().copied(),
            stop_token_ids: eos_token_ids.clone(),
            eos_token_ids,
            pad_token_id: keys.pad_token_id(vocab_size)?,
            dtype: keys.dtype()?,
            warnings: Vec::new(),
            original: keys.map.clone(),
        };
        config.check_heads(&keys)?;
        keys.warn_of_unread(&unread_rope);
        config.warnings = keys.take_warnings();
        Ok(config)
    }

    /// Adds the end tokens of a `generation_config.json` to [`LlamaConfig::stop_token_ids`]. What is wrong with the
    /// file is only warned of: transformers does without a generation config that it cannot read.
    pub fn add_generation_config(&mut self, path: &Path, text: &str) {
        let added = Keys::parse(path, text).and_then(|keys| {
            let ids = keys.token_ids("eos_token_id", &[], self.vocab_size)?;
            Ok((ids, keys.take_warnings()))
        });
        match added {
            Ok((ids, warnings)) => {
                for id in ids {
                    if !self.stop_token_ids.contains(&id) {
                        self.stop_token_ids.push(id);
                    }
                }
                warnings.iter().for_each(|warning| tracing::warn!("{}: {warning}", path.display()));
            }
            Err(error) => tracing::warn!("{error}; the end tokens of config.json hold alone"),
        }
    }

    /// The file of the folder that holds the weights or their index, where the config names one.
    ///
    /// # Errors
    /// The key's value where that is not a string.
    pub fn weights_file(&self) -> std::result::Result<Option<&str>, &Value> {
        match self.value(WEIGHTS_FILE) {
            None => Ok(None),
            Some(Value::String(name)) => Ok(Some(name)),
            Some(other) => Err(other),
        }
    }

    /// A key as `config.json` has it; `null` is absent.
    pub(crate) fn value(&self, key: &str) -> Option<&Value> {
        self.original.get(key).filter(|value| !value.is_null())
    }

    /// Unties the head from the embedding, where the weights show that the config is wrong about it.
    pub(crate) fn untie(&mut self) {
        self.tie_word_embeddings = false;
        self.original.insert("tie_word_embeddings".into(), false.into());
    }

    /// The text of the saved folder's `config.json`: the original with its dtype set to bfloat16.
    pub fn to_saved_json(&self) -> String {
        let mut map = self.original.clone();
        // transformers before 4.56 knows only the old name.
        if map.contains_key("torch_dtype") {
            map.insert("torch_dtype".into(), "bfloat16".into());
        }
        map.insert("dtype".into(), "bfloat16".into());
        // This key names the file of the weights, which are saved under the usual name.
        map.shift_remove(WEIGHTS_FILE);
        json::write(&Value::Object(map)) + "\n"
    }

    /// All that the results depend on beside weights and tokens, as text.
    pub fn arithmetic(&self) -> String {
        let LlamaConfig { heads, kv_heads, head_size, rms_norm_eps, pad_token_id, rope, .. } = self;
        format!(
            "heads {heads} {kv_heads} {head_size}, rms_norm_eps {rms_norm_eps:?}, pad {pad_token_id:?}, {rope:?}"
        )
    }

    /// Number of positions that the model was trained for, or fewer where the angles of its rope would depend on other
    /// sequences beyond them.
    pub fn context(&self) -> usize {
        self.max_position_embeddings.min(self.rope.positions().unwrap_or(usize::MAX))
    }

    /// `H`, `K` and `E`.
    pub fn attention_shape(&self) -> AttentionShape {
        AttentionShape { heads: self.heads, kv_heads: self.kv_heads, head_size: self.head_size }
    }

    /// `[positions, E]`: for each position `E/2` cosines, then `E/2` sines, as transformers computes them in f32.
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
            linear("self_attn.q_proj", query, hidden, self.qkv_bias);
            linear("self_attn.k_proj", key, hidden, self.qkv_bias);
            linear("self_attn.v_proj", key, hidden, self.qkv_bias);
            linear("self_attn.o_proj", hidden, query, self.attention_out_bias);
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
}

#[cfg(test)]
mod tests;
