//! What is read, what is refused and what is warned of.

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
    assert_eq!(LlamaConfig { warnings: Vec::new(), original: expected.original.clone(), ..read }, expected);
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    refused("model_type", json!("qwen3"), "qwen3");
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
    nameless["architectures"] = json!(["GemmaForCausalLM"]);
    assert!(parse(&nameless).unwrap_err().to_string().contains("GemmaForCausalLM"));
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
    read_alike("architectures", json!(["LlamaForSequenceClassification"]), "LlamaForSequenceClassification");
    read_alike("rope_scaling", json!({"type": "default", "factor": 2.0}), &ignored("rope_scaling.factor"));
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
    assert_eq!(parse(&json).unwrap().rope, Rope { theta: 7.0, scaling: RopeScaling::Linear { factor: 3.0 } });
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

/// A config with the keys that every published one has, of another family.
fn of_family(model_type: &str, class: &str, keys: Value) -> Result<LlamaConfig> {
    let mut config = smollm2();
    config["model_type"] = model_type.into();
    config["architectures"] = json!([class]);
    for (key, value) in keys.as_object().unwrap() {
        config[key] = value.clone();
    }
    parse(&config)
}

#[test]
fn mistral_is_a_llama_without_biases() {
    let mistral = |keys| of_family("mistral", "MistralForCausalLM", keys);
    let config = mistral(json!({"sliding_window": null, "attention_bias": true})).unwrap();
    assert_eq!(config.family.model_type, "mistral");
    assert_eq!(config.tensors(), parse(&smollm2()).unwrap().tensors());
    assert!(
        config.warnings[0].contains("Mistral does not read this key: `attention_bias`"),
        "{:?}",
        config.warnings
    );
    // Its number of key/value heads where the key is absent, and where it is null.
    let mut absent = smollm2();
    absent["model_type"] = "mistral".into();
    absent["num_attention_heads"] = 16.into();
    absent["sliding_window"] = Value::Null;
    absent.as_object_mut().unwrap().remove("num_key_value_heads");
    assert_eq!(parse(&absent).unwrap().kv_heads, 8);
    absent["num_key_value_heads"] = Value::Null;
    assert_eq!(parse(&absent).unwrap().kv_heads, 16);
}

#[test]
fn a_sliding_window_is_refused_where_it_can_matter() {
    let mistral = |keys| of_family("mistral", "MistralForCausalLM", keys);
    let error = mistral(json!({"sliding_window": 4096})).unwrap_err().to_string();
    assert!(
        error.contains("`sliding_window` is 4096: a token of this model sees only the 4096 before it"),
        "{error}"
    );
    let error = mistral(json!({})).unwrap_err().to_string();
    assert!(error.contains("4096 (the default of transformers' MistralConfig"), "{error}");
    assert!(mistral(json!({"sliding_window": 8192})).is_ok());
    assert!(mistral(json!({"sliding_window": "wide"})).is_err());

    let qwen2 = |keys| of_family("qwen2", "Qwen2ForCausalLM", keys);
    let slides =
        |first: usize| json!({"use_sliding_window": true, "sliding_window": 64, "max_window_layers": first});
    assert!(qwen2(slides(29)).unwrap_err().to_string().contains("`sliding_window` is 64"));
    assert!(qwen2(slides(30)).is_ok());
    assert!(qwen2(json!({"use_sliding_window": false, "sliding_window": 64})).is_ok());
    let types = |kind: &str| json!({"layer_types": ["full_attention", kind], "sliding_window": 64});
    assert!(qwen2(types("full_attention")).is_ok());
    assert!(qwen2(types("sliding_attention")).is_err());
}

#[test]
fn qwen2_has_biases_on_queries_keys_and_values() {
    let config =
        of_family("qwen2", "Qwen2ForCausalLM", json!({"attention_bias": false, "bos_token_id": 1})).unwrap();
    let tensors = config.tensors();
    assert_eq!(tensors.len(), 30 * (9 + 3) + 2);
    assert!(tensors.contains(&TensorSpec::new("model.layers.3.self_attn.v_proj.bias", &[3 * 64])));
    assert!(!tensors.iter().any(|tensor| tensor.name.ends_with("o_proj.bias")));
    let bare = LlamaConfig::parse(Path::new("config.json"), r#"{"model_type": "qwen2"}"#).unwrap();
    assert_eq!((bare.vocab_size, bare.kv_heads, bare.bos_token_id), (151_936, 32, None));
    assert!(bare.stop_token_ids.is_empty());
    assert!(bare.warnings.iter().any(|warning| warning.contains("the default of transformers' Qwen2Config")));
    // A saved folder stays of its family.
    assert!(config.to_saved_json().contains("Qwen2ForCausalLM"));
}

#[test]
fn a_family_is_known_by_its_class_where_the_model_type_is_absent() {
    for (class, model_type) in
        [("MistralModel", "mistral"), ("Qwen2ForCausalLM", "qwen2"), ("LlamaModel", "llama")]
    {
        let config = of_family("", class, json!({"model_type": null, "sliding_window": null})).unwrap();
        assert_eq!(config.family.model_type, model_type);
    }
}
