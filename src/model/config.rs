//! `config.json` of a Hugging Face Llama folder, as one checked value.
//!
//! The meaning of each key is that of `LlamaConfig` in transformers. A key that transformers acts on and this program
//! does not compute is refused by name; a key that its Llama does not read is ignored with a warning.
//! `known_keys.rs` has the lists.

use std::path::Path;

use serde_json::{Map, Value};

use crate::device::{AttentionShape, StorageType};
use crate::error::{Error, Result};
use crate::foreign::{self, json};
use crate::model::config_keys::{Keys, MAX_LAYERS, MAX_SIZE};
use crate::model::rope::Rope;
use crate::model::rope_keys;

/// The key that names the file of weights.
const WEIGHTS_FILE: &str = "transformers_weights";

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
    /// Added to the mean square before its root.
    pub rms_norm_eps: f32,
    /// Whether the output head is the embedding table.
    pub tie_word_embeddings: bool,
    /// Whether q, k, v and o have biases.
    pub attention_bias: bool,
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
        let vocab_size = keys.size("vocab_size", MAX_SIZE, 32_000)?;
        let hidden_size = keys.size("hidden_size", MAX_SIZE, 4096)?;
        let heads = keys.size("num_attention_heads", MAX_SIZE, 32)?;
        let head_size = keys.head_size(hidden_size, heads)?;
        let max_position_embeddings = keys.optional_size("max_position_embeddings", 1 << 53)?.unwrap_or(2048);
        let eos_token_ids = keys.token_ids("eos_token_id", &[2], vocab_size)?;
        let (rope, unread_rope) = rope_keys::parse(&keys, max_position_embeddings, head_size)?;
        let mut config = LlamaConfig {
            vocab_size,
            hidden_size,
            intermediate_size: keys.size("intermediate_size", MAX_SIZE, 11_008)?,
            layers: keys.size("num_hidden_layers", MAX_LAYERS, 32)?,
            heads,
            kv_heads: keys.optional_size("num_key_value_heads", MAX_SIZE)?.unwrap_or(heads),
            head_size,
            rms_norm_eps: keys.positive("rms_norm_eps", 1e-6)? as f32,
            tie_word_embeddings: keys.flag("tie_word_embeddings")?,
            attention_bias: keys.flag("attention_bias")?,
            mlp_bias: keys.flag("mlp_bias")?,
            attention_dropout: keys.rate("attention_dropout")?,
            max_position_embeddings,
            rope,
            bos_token_id: keys.token_ids("bos_token_id", &[1], vocab_size)?.first().copied(),
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
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::rope::RopeScaling;

    fn smollm2() -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": 576,
            "intermediate_size": 1536,
            "is_llama_config": true,
            "max_position_embeddings": 8192,
            "model_type": "llama",
            "num_attention_heads": 9,
            "num_hidden_layers": 30,
            "num_key_value_heads": 3,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_interleaved": false,
            "rope_scaling": null,
            "rope_theta": 100000,
            "tie_word_embeddings": true,
            "torch_dtype": "float32",
            "vocab_size": 49152
        })
    }

    fn parse(config: &Value) -> Result<LlamaConfig> {
        LlamaConfig::parse(Path::new("m/config.json"), &config.to_string())
    }

    /// The config above with one key changed, which must be refused with a message that contains `part`.
    #[track_caller]
    fn refused(key: &str, value: Value, part: &str) {
        let mut config = smollm2();
        config[key] = value;
        let error = parse(&config).expect_err(key);
        let message = error.to_string();
        assert!(matches!(error, Error::Model { .. }), "{error:?}");
        assert!(message.contains(part) && message.starts_with("m/config.json: "), "{key}: {message}");
    }

    #[test]
    fn smollm2_135m_has_its_shapes() {
        let config = parse(&smollm2()).unwrap();
        assert_eq!((config.head_size, config.kv_heads, config.layers), (64, 3, 30));
        assert_eq!(config.parameters(), 134_515_008);
        assert_eq!(config.rope, Rope { theta: 1e5, scaling: RopeScaling::Default });
        assert_eq!(config.dtype, Some(StorageType::F32));
        assert_eq!(config.pad_token_id, None);
        assert_eq!(config.tensors().len(), 30 * 9 + 2);
    }

    #[test]
    fn biases_and_an_untied_head_are_tensors_too() {
        let mut json = smollm2();
        json["attention_bias"] = true.into();
        json["mlp_bias"] = true.into();
        json["tie_word_embeddings"] = false.into();
        json["head_dim"] = 32.into();
        let config = parse(&json).unwrap();
        let tensors = config.tensors();
        assert_eq!(tensors.len(), 30 * (9 + 7) + 3);
        assert!(tensors.contains(&TensorSpec::new("model.layers.3.self_attn.k_proj.bias", &[3 * 32])));
        assert!(tensors.contains(&TensorSpec::new("model.layers.29.self_attn.o_proj.weight", &[576, 288])));
        assert!(tensors.contains(&TensorSpec::new("model.layers.0.mlp.down_proj.bias", &[576])));
        assert_eq!(tensors.last(), Some(&TensorSpec::new("lm_head.weight", &[49152, 576])));
    }

    /// The config above with one key changed, which must be read as the one above, with these warnings.
    #[track_caller]
    fn read_alike(key: &str, value: Value, warning: &str) {
        let mut config = smollm2();
        config[key] = value.clone();
        let read = parse(&config).unwrap_or_else(|error| panic!("{key} = {value}: {error}"));
        let warnings = read.warnings.join("; ");
        match warning {
            "" => assert_eq!(warnings, "", "{key} = {value}"),
            part => assert!(warnings.contains(part), "{key} = {value}: {warnings}"),
        }
        let expected = parse(&smollm2()).unwrap();
        assert_eq!(
            LlamaConfig { warnings: Vec::new(), original: expected.original.clone(), ..read },
            expected
        );
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        refused("model_type", json!("qwen2"), "qwen2");
        refused("hidden_act", json!("gelu"), "`hidden_act` is \"gelu\"");
        refused(
            "quantization_config",
            json!({"quant_method": "gptq"}),
            "`quantization_config` (method \"gptq\")",
        );
        refused("is_causal", json!(false), "`is_causal` is false");
        refused("per_layer_config", json!({"0": {"head_dim": 8}}), "`per_layer_config`");
        refused("dtype", json!("float8"), "`dtype` is \"float8\"");
        let mut nameless = smollm2();
        nameless["model_type"] = Value::Null;
        nameless["architectures"] = json!(["MistralForCausalLM"]);
        assert!(parse(&nameless).unwrap_err().to_string().contains("MistralForCausalLM"));
        nameless["architectures"] = Value::Null;
        assert!(parse(&nameless).unwrap_err().to_string().contains("neither"));
    }

    #[test]
    fn what_a_llama_does_not_read_is_ignored() {
        for (key, value) in [
            ("pretraining_tp", json!(2)),
            ("hidden_act", json!("swish")),
            ("architectures", json!(["LLaMAForCausalLM"])),
            ("architectures", Value::Null),
            ("max_sequence_length", json!(2048)),
            ("_commit_hash", json!("0123abc")),
            ("unk_token_id", json!(0)),
            ("rope_interleaved", json!(true)),
            ("rope_scaling", json!({})),
            ("chunk_size_feed_forward", json!(4)),
            ("quantization_config", Value::Null),
            ("is_causal", json!(true)),
            ("torch_dtype", json!("torch.float32")),
            ("vocab_size", json!(49152.0)),
            ("head_dim", json!(64)),
            ("head_dim", Value::Null),
            ("made_up_flag", json!(false)),
        ] {
            read_alike(key, value, "");
        }
        let ignored = |key: &str| format!("this key: `{key}`");
        for (key, value) in [
            ("sliding_window", json!(4096)),
            ("logits_scaling", json!(8.0)),
            ("partial_rotary_factor", json!(0.5)),
            ("auto_map", json!({"AutoModel": "x.Y"})),
            ("layer_types", json!(["full_attention"])),
        ] {
            read_alike(key, value, &ignored(key));
        }
        read_alike(
            "architectures",
            json!(["LlamaForSequenceClassification"]),
            "LlamaForSequenceClassification",
        );
        read_alike(
            "rope_scaling",
            json!({"type": "default", "factor": 2.0}),
            &ignored("rope_scaling.factor"),
        );
        read_alike(
            "rope_parameters",
            json!({"partial_rotary_factor": 0.25}),
            "rope_parameters.partial_rotary_factor",
        );
    }

    #[test]
    fn many_unread_keys_are_one_short_warning() {
        let mut config = smollm2();
        for number in 0..1000 {
            config[format!("unknown_{number}")] = 1.into();
        }
        let warnings = parse(&config).unwrap().warnings;
        assert_eq!(warnings.len(), 1);
        assert!(warnings[0].ends_with("`unknown_19` and 980 more"), "{warnings:?}");
    }

    #[test]
    fn absent_keys_have_the_values_of_llama_config() {
        let config = LlamaConfig::parse(Path::new("config.json"), r#"{"model_type": "llama"}"#).unwrap();
        assert_eq!((config.vocab_size, config.hidden_size, config.intermediate_size), (32_000, 4096, 11_008));
        assert_eq!((config.layers, config.heads, config.kv_heads, config.head_size), (32, 32, 32, 128));
        assert_eq!((config.max_position_embeddings, config.rms_norm_eps), (2048, 1e-6));
        assert!(config.warnings.iter().any(|warning| warning.contains("`hidden_size` is missing; 4096")));
    }

    #[test]
    fn ids_beyond_the_vocabulary_are_left_out() {
        let mut json = smollm2();
        json["eos_token_id"] = json!([2, 49152]);
        json["bos_token_id"] = json!(128_000);
        let config = parse(&json).unwrap();
        assert_eq!((config.bos_token_id, &config.eos_token_ids[..]), (None, &[2][..]));
        assert!(config.warnings.iter().any(|warning| warning.contains("token id 49152 lies outside")));
        refused("pad_token_id", json!(49152), "token id 49152 lies outside the vocabulary");
        refused("pad_token_id", json!(-49153), "token id -49153 lies outside the vocabulary");
        refused("pad_token_id", json!(1.5), "`pad_token_id` is 1.5, not a token id");
    }

    #[test]
    fn bad_sizes_are_refused_by_name() {
        refused("num_key_value_heads", json!(2), "num_attention_heads = 9 is not a multiple");
        refused("num_key_value_heads", json!(0), "`num_key_value_heads` is 0");
        refused("head_dim", json!(63), "head size 63 is odd");
        refused(
            "num_attention_heads",
            json!(7),
            "hidden_size = 576 is not a multiple of num_attention_heads = 7",
        );
        refused("vocab_size", json!(0), "`vocab_size` is 0");
        refused("vocab_size", json!(-5), "`vocab_size` is -5");
        refused("vocab_size", json!(1u64 << 40), "`vocab_size` is 1099511627776");
        refused("hidden_size", json!("576"), "`hidden_size` is \"576\"");
        refused("intermediate_size", Value::Null, "`intermediate_size` is null, not a whole number");
        refused("vocab_size", json!(49152.5), "`vocab_size` is 49152.5");
        refused("num_hidden_layers", json!(1e6), "`num_hidden_layers`");
        refused("rms_norm_eps", json!(0), "`rms_norm_eps` is 0");
        refused("tie_word_embeddings", json!("yes"), "`tie_word_embeddings` is \"yes\"");
        refused("attention_dropout", json!(2), "`attention_dropout` is 2");
        refused("eos_token_id", json!("</s>"), "`eos_token_id` is \"</s>\"");
    }

    #[test]
    fn bad_rope_is_refused_by_name() {
        refused("rope_scaling", json!({"type": "su", "factor": 2.0}), "unknown rope type \"su\"");
        refused("rope_scaling", json!({"type": "linear"}), "`rope_scaling.factor` is null");
        refused("rope_scaling", json!({"type": "linear", "factor": 0}), "`rope_scaling.factor` is 0");
        refused("rope_scaling", json!("linear"), "`rope_scaling` is \"linear\"");
        let partial = json!({"type": "linear", "factor": 2, "partial_rotary_factor": 0.25});
        refused("rope_parameters", partial, "`partial_rotary_factor` is 0.25");
        refused("rope_parameters", json!({"rope_theta": 0.0}), "`rope_parameters.rope_theta` is 0.0");
        refused("rope_theta", json!(-1.0), "`rope_theta` is -1.0");
        refused("rope_theta", json!("10000"), "`rope_theta` is \"10000\"");
        let long = json!({"type": "longrope", "factor": 2, "short_factor": [1.0], "long_factor": [1.0]});
        refused("rope_scaling", long, "`rope_scaling.long_factor` is not a list of 32");
        refused("rope_parameters", json!({"full_attention": {"rope_type": "default"}}), "full_attention");
    }

    #[test]
    fn the_old_rope_section_goes_before_the_new_one() {
        let mut json = smollm2();
        json["rope_parameters"] = json!({"rope_type": "linear", "factor": 3.0, "rope_theta": 7.0});
        assert_eq!(
            parse(&json).unwrap().rope,
            Rope { theta: 7.0, scaling: RopeScaling::Linear { factor: 3.0 } }
        );
        json["rope_scaling"] = json!({"type": "linear", "factor": 2});
        let config = parse(&json).unwrap();
        assert_eq!(config.rope, Rope { theta: 1e5, scaling: RopeScaling::Linear { factor: 2.0 } });
        assert!(config.warnings[0].contains("`rope_scaling` is read"), "{:?}", config.warnings);
    }

    #[test]
    fn a_negative_padding_token_counts_from_the_end() {
        let mut json = smollm2();
        for (id, row) in [(-1, 49151), (-49152, 0), (7, 7)] {
            json["pad_token_id"] = id.into();
            assert_eq!(parse(&json).unwrap().pad_token_id, Some(row), "{id}");
        }
    }

    #[test]
    fn pythons_nan_is_an_error_only_where_it_is_read() {
        let mut json = smollm2();
        json["initializer_range"] = "NaN".into();
        let text = json.to_string().replace("\"NaN\"", "NaN");
        let config = LlamaConfig::parse(Path::new("config.json"), &text).unwrap();
        assert!(config.to_saved_json().contains("\"initializer_range\": NaN"), "{}", config.to_saved_json());
        json["rms_norm_eps"] = "NaN".into();
        let text = json.to_string().replace("\"NaN\"", "NaN");
        let error = LlamaConfig::parse(Path::new("config.json"), &text).unwrap_err();
        assert!(error.to_string().contains("`rms_norm_eps` is NaN, not a positive number"), "{error}");
    }

    #[test]
    fn the_file_of_weights_is_named_and_not_saved() {
        let mut json = smollm2();
        assert_eq!(parse(&json).unwrap().weights_file().unwrap(), None);
        json["transformers_weights"] = "other.safetensors".into();
        let config = parse(&json).unwrap();
        assert_eq!(config.weights_file().unwrap(), Some("other.safetensors"));
        assert!(!config.to_saved_json().contains("other.safetensors"));
        assert!(config.warnings.iter().all(|warning| !warning.contains("transformers_weights")));
        json["transformers_weights"] = 3.into();
        assert!(parse(&json).unwrap().weights_file().is_err());
    }

    #[test]
    fn broken_json_names_the_line() {
        let error = LlamaConfig::parse(Path::new("config.json"), "{\n  \"vocab_size\": 3,\n").unwrap_err();
        assert!(error.to_string().contains("line 3"), "{error}");
        assert!(LlamaConfig::parse(Path::new("config.json"), "[]").is_err());
    }

    #[test]
    fn end_tokens_are_merged_for_generation() {
        let mut json = smollm2();
        json["eos_token_id"] = json!([2, 7]);
        let mut config = parse(&json).unwrap();
        let path = Path::new("generation_config.json");
        config.add_generation_config(path, r#"{"eos_token_id": [9, 2], "temperature": 0.6}"#);
        assert_eq!(config.eos_token_ids, [2, 7]);
        assert_eq!(config.stop_token_ids, [2, 7, 9]);
        for text in [
            r#"{"eos_token_id": null}"#,
            r#"{"eos_token_id": 1000000}"#,
            r#"{"eos_token_id": "</s>"}"#,
            r#"{"transformers_version": "4.31.0"}"#,
            "{",
        ] {
            config.add_generation_config(path, text);
            assert_eq!(config.stop_token_ids, [2, 7, 9], "{text}");
        }
        config.add_generation_config(path, r#"{"eos_token_id": 11}"#);
        assert_eq!(config.stop_token_ids, [2, 7, 9, 11]);
    }

    #[test]
    fn the_saved_config_is_the_original_in_bfloat16() {
        let saved: Value = serde_json::from_str(&parse(&smollm2()).unwrap().to_saved_json()).unwrap();
        let mut expected = smollm2();
        expected["torch_dtype"] = "bfloat16".into();
        expected["dtype"] = "bfloat16".into();
        assert_eq!(saved, expected);
    }
}
