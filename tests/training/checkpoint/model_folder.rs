//! Reading model folders, sound and broken.

use mmpo_fast::checkpoint::ModelFolder;
use proptest::prelude::*;
use safetensors::tensor::Dtype;
use serde_json::{Value, json};

use super::small_model::*;

const NORM: &str = "model.norm.weight";
const HEAD: &str = "lm_head.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";

fn folder_with(change: impl FnOnce(&mut Tensors)) -> Folder {
    let mut tensors = tensors(&config(), Dtype::F32);
    change(&mut tensors);
    Folder::with(&config(), &tensors)
}

fn with_key(key: &str, value: Value) -> Value {
    let mut config = config();
    config[key] = value;
    config
}

#[track_caller]
fn expect_values(folder: &ModelFolder, dtype: Dtype) {
    for spec in folder.config().tensors() {
        let values = folder.tensor(&spec.name, &spec.shape).unwrap();
        let expected: Vec<u8> = (0..spec.values()).flat_map(|i| encode(dtype, value(&spec, i))).collect();
        assert_eq!(values.len(), spec.values());
        assert!(values.bytes == expected, "{}: other bytes", spec.name);
    }
}

#[test]
fn every_dtype_and_sharding_is_read_in_place() {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
        let tensors = tensors(&config(), dtype);
        let single = Folder::with(&config(), &tensors);
        let sharded = Folder::sharded(&config(), &tensors);
        let (single, sharded) = (single.open().unwrap(), sharded.open().unwrap());
        expect_values(&single, dtype);
        expect_values(&sharded, dtype);
        single.check_finite().unwrap();
        assert_eq!(single.fingerprint(), sharded.fingerprint());
        assert_eq!(single.total_bytes(), single.config().parameters() * dtype.bitsize() / 8);
    }
}

#[test]
fn the_fingerprint_sees_every_bit_and_place() {
    let fingerprint = |folder: Folder| folder.open().unwrap().fingerprint();
    let original = fingerprint(Folder::sound());
    assert_eq!(original, fingerprint(Folder::sound()));
    for at in [0, 5, 40 * 16 * 4 - 1] {
        let one_bit = folder_with(|tensors| tensors.get_mut(HEAD).unwrap().2[at] ^= 1);
        assert_ne!(original, fingerprint(one_bit), "byte {at}");
    }
    let exchanged = folder_with(|tensors| {
        let (head, embedding) = (tensors[HEAD].clone(), tensors[EMBEDDING].clone());
        tensors.insert(HEAD.into(), embedding);
        tensors.insert(EMBEDDING.into(), head);
    });
    assert_ne!(original, fingerprint(exchanged));
}

#[test]
fn the_fingerprint_sees_what_the_config_makes_of_the_weights() {
    let tensors = tensors(&config(), Dtype::F32);
    let fingerprint =
        |key: &str, value: Value| Folder::with(&with_key(key, value), &tensors).open().unwrap().fingerprint();
    let original = Folder::sound().open().unwrap().fingerprint();
    for (key, value) in [
        ("rope_theta", json!(500_000.0)),
        ("rope_scaling", json!({"rope_type": "linear", "factor": 2.0})),
        ("rms_norm_eps", json!(1e-6)),
        ("pad_token_id", json!(3)),
    ] {
        assert_ne!(original, fingerprint(key, value), "{key}");
    }
    assert_eq!(original, fingerprint("transformers_version", json!("5.0.0")));
}

#[test]
fn biases_are_read_where_the_config_has_them() {
    let config = with_key("attention_bias", true.into());
    let folder = Folder::with(&config, &tensors(&config, Dtype::F32));
    expect_values(&folder.open().unwrap(), Dtype::F32);
    folder.write("config.json", super::small_model::config().to_string());
    folder.refused("model.safetensors", "8 unexpected tensors (`model.layers.0.self_attn.k_proj.bias`");
}

#[test]
fn missing_and_wrong_tensors_are_named() {
    folder_with(|tensors| _ = tensors.remove(NORM)).refused("", "tensor `model.norm.weight` is missing");
    folder_with(|tensors| _ = tensors.remove(HEAD)).refused("", "tensor `lm_head.weight` is missing");
    let layerless = folder_with(|tensors| tensors.retain(|name, _| !name.starts_with("model.layers.1.")));
    layerless.refused("model.safetensors", "9 tensors (`model.layers.1.self_attn.q_proj.weight`, ");
    layerless.refused("model.safetensors", " and 6 more) are missing");
    let shape = folder_with(|tensors| tensors.get_mut(HEAD).unwrap().1 = vec![16, 40]);
    shape.refused("model.safetensors", "`lm_head.weight` has shape [16, 40]; config.json asks for [40, 16]");
    let integers = folder_with(|tensors| tensors.get_mut(NORM).unwrap().0 = Dtype::I32);
    integers.refused("model.safetensors", "`model.norm.weight` is stored as I32");
    let eight_bits = folder_with(|tensors| {
        let norm = tensors.get_mut(NORM).unwrap();
        (norm.0, norm.2) = (Dtype::F8_E4M3, vec![0; 16]);
    });
    eight_bits.refused("model.safetensors", "`model.norm.weight` is stored as F8_E4M3");
    let doubles = folder_with(|tensors| {
        let norm = tensors.get_mut(NORM).unwrap();
        (norm.0, norm.2) = (Dtype::F64, vec![0; 16 * 8]);
    });
    doubles.refused("model.safetensors", "`model.norm.weight` is stored as F64");
    let folder = Folder::sound();
    let folder = folder.open().unwrap();
    assert!(folder.tensor("model.layers.7.mlp.up_proj.weight", &[24, 16]).is_err());
    assert!(folder.tensor(HEAD, &[16, 40]).is_err());
}

#[test]
fn extra_tensors_are_refused_unless_harmless() {
    let add = |name: &str| {
        let name = name.to_string();
        folder_with(|tensors| _ = tensors.insert(name, (Dtype::F32, vec![2], vec![0; 8])))
    };
    add("model.layers.0.self_attn.rotary_emb.inv_freq").open().unwrap();
    add("model.layers.0.self_attn.q_proj.lora_A.weight").refused("model.safetensors", "lora_A.weight");
    add("base_model.model.lm_head.weight").refused("model.safetensors", "`base_model.model.lm_head.weight`");
    add("model.layers.2.mlp.up_proj.weight")
        .refused("model.safetensors", "`model.layers.2.mlp.up_proj.weight`");
}

#[test]
fn heads_of_other_tasks_and_rotary_tables_are_harmless() {
    let folder = folder_with(|tensors| {
        for name in
            ["score.weight", "v_head.summary.weight", "model.layers.1.self_attn.rotary_emb.cos_cached"]
        {
            tensors.insert(name.into(), (Dtype::F32, vec![2], vec![0; 8]));
        }
    });
    expect_values(&folder.open().unwrap(), Dtype::F32);
    let classifier = folder_with(|tensors| {
        tensors.remove(HEAD);
        tensors.insert("score.weight".into(), (Dtype::F32, vec![2], vec![0; 8]));
    });
    classifier.refused("model.safetensors", "tensor `lm_head.weight` is missing");
}

/// The tensors of a sound folder under other names.
fn renamed(config: &Value, rename: impl Fn(&str) -> Option<String>) -> Folder {
    let tensors = tensors(config, Dtype::F32)
        .into_iter()
        .filter_map(|(name, tensor)| Some((rename(&name)?, tensor)))
        .collect();
    Folder::with(config, &tensors)
}

#[test]
fn names_are_taken_as_transformers_takes_them() {
    let sound = Folder::sound().open().unwrap().fingerprint();
    let bare = |name: &str| name.strip_prefix("model.").unwrap_or(name).to_string();
    for folder in [
        renamed(&config(), |name| Some(bare(name))),
        renamed(&config(), |name| Some(format!("model.{name}"))),
        renamed(&config(), |name| Some(if name.contains("mlp") { bare(name) } else { name.to_string() })),
    ] {
        let opened = folder.open().unwrap();
        expect_values(&opened, Dtype::F32);
        assert_eq!(opened.fingerprint(), sound);
    }
    let base = renamed(&config(), |name| (name != HEAD).then(|| bare(name)));
    base.refused("model.safetensors", "tensor `lm_head.weight` is missing");
    let tied = with_key("tie_word_embeddings", true.into());
    expect_values(&renamed(&tied, |name| Some(bare(name))).open().unwrap(), Dtype::F32);
    let head_alone =
        renamed(&tied, |name| Some(if name == EMBEDDING { HEAD.to_string() } else { name.to_string() }));
    expect_values(&head_alone.open().unwrap(), Dtype::F32);
    let mut twice = tensors(&config(), Dtype::F32);
    twice.insert("norm.weight".into(), twice[NORM].clone());
    Folder::with(&config(), &twice).refused("model.safetensors", "`model.norm.weight` is there twice");
}

#[test]
fn parts_that_wrappers_left_in_the_names_are_said() {
    for (part, program) in [("module", "DataParallel"), ("_orig_mod", "torch.compile")] {
        let folder = renamed(&config(), |name| Some(format!("{part}.{name}")));
        folder.refused("model.safetensors", &format!("`{part}.lm_head.weight`: {program}"));
    }
    let nested =
        renamed(&config(), |name| Some(name.replace("model.layers.0.", "model.layers.0._orig_mod.")));
    nested.refused("model.safetensors", "torch.compile left the part `_orig_mod.` in them");
    let both = renamed(&config(), |name| Some(format!("module._orig_mod.{name}")));
    both.refused("model.safetensors", "left the part `module.`");
    let other = renamed(&config(), |name| Some(format!("language_model.{name}")));
    other.refused("model.safetensors", "found instead 21 tensors (`language_model.lm_head.weight`, ");
    let quantised = folder_with(|tensors| {
        let weights = tensors.remove("model.layers.0.mlp.up_proj.weight").unwrap();
        tensors.insert("model.layers.0.mlp.up_proj.qweight".into(), weights);
    });
    quantised.refused("model.safetensors", "these weights are quantised");
}

#[test]
fn a_tied_head_may_be_stored_if_it_is_the_embedding() {
    let config = with_key("tie_word_embeddings", true.into());
    let mut tensors = tensors(&config, Dtype::F32);
    Folder::with(&config, &tensors).open().unwrap();
    tensors.insert(HEAD.into(), tensors[EMBEDDING].clone());
    let folder = Folder::with(&config, &tensors);
    let opened = folder.open().unwrap();
    assert!(opened.tensor(HEAD, &[40, 16]).is_err(), "a tied head is no tensor of its own");
    // The values of the small model are exact in every dtype.
    for dtype in [Dtype::F16, Dtype::BF16] {
        let head = super::small_model::tensors(&config, dtype)[EMBEDDING].clone();
        tensors.insert(HEAD.into(), head);
        Folder::with(&config, &tensors).open().unwrap();
    }
}

#[test]
fn a_head_that_differs_from_the_embedding_unties_the_model() {
    let config = with_key("tie_word_embeddings", true.into());
    for dtype in [Dtype::F32, Dtype::BF16] {
        let mut tensors = tensors(&config, Dtype::F32);
        let head = super::small_model::tensors(&config, dtype)[EMBEDDING].clone();
        tensors.insert(HEAD.into(), head);
        tensors.get_mut(HEAD).unwrap().2[0] ^= 1;
        let folder = Folder::with(&config, &tensors);
        let opened = folder.open().unwrap();
        assert!(!opened.config().tie_word_embeddings);
        assert!(opened.tensor(HEAD, &[40, 16]).unwrap().bytes == tensors[HEAD].2, "the head is its own");
        assert!(opened.tensor(EMBEDDING, &[40, 16]).unwrap().bytes == tensors[EMBEDDING].2);
        assert!(opened.config().to_saved_json().contains("\"tie_word_embeddings\": false"));
    }
    // Another shape is no head of this model.
    let mut tensors = tensors(&config, Dtype::F32);
    let (dtype, shape, bytes) = tensors[EMBEDDING].clone();
    tensors.insert(HEAD.into(), (dtype, vec![shape[1], shape[0]], bytes));
    Folder::with(&config, &tensors).refused("model.safetensors", "`lm_head.weight` has shape [16, 40]");
}

#[test]
fn the_config_may_name_the_file_of_weights() {
    let named = |name: &str| with_key("transformers_weights", name.into());
    let tensors = tensors(&config(), Dtype::F32);
    let folder = Folder::with(&named("other.safetensors"), &tensors);
    // A file under the usual name is not looked at then.
    std::fs::rename(folder.path().join("model.safetensors"), folder.path().join("other.safetensors"))
        .unwrap();
    std::fs::write(folder.path().join("model.safetensors"), "something else").unwrap();
    expect_values(&folder.open().unwrap(), Dtype::F32);

    let folder = Folder::sharded(&named("other.safetensors.index.json"), &tensors);
    let usual = folder.path().join("model.safetensors.index.json");
    std::fs::rename(usual, folder.path().join("other.safetensors.index.json")).unwrap();
    expect_values(&folder.open().unwrap(), Dtype::F32);

    for name in ["absent.safetensors", "../model.safetensors", "config.json", "/model.safetensors", ""] {
        let message = format!("`transformers_weights` is {name:?}, which is no file of the folder");
        Folder::with(&named(name), &tensors).refused("config.json", &message);
    }
}

#[test]
fn nan_and_infinity_are_found() {
    for (dtype, bad) in
        [(Dtype::F32, f32::NAN), (Dtype::F16, f32::INFINITY), (Dtype::BF16, f32::NEG_INFINITY)]
    {
        let mut tensors = tensors(&config(), dtype);
        let bad = encode(dtype, bad);
        tensors.get_mut(HEAD).unwrap().2[bad.len() * 37..][..bad.len()].copy_from_slice(&bad);
        let folder = Folder::with(&config(), &tensors);
        let error = folder.open().unwrap().check_finite().unwrap_err();
        expect_message(
            &error,
            &folder.file("model.safetensors"),
            "`lm_head.weight` holds NaN or infinity at index 37",
        );
    }
}

#[test]
fn a_folder_that_is_no_model_is_refused() {
    let empty = tempfile::tempdir().unwrap();
    let error = ModelFolder::open(empty.path()).unwrap_err();
    expect_message(&error, empty.path(), "no config.json");
    let error = ModelFolder::open(&empty.path().join("absent")).unwrap_err();
    expect_message(&error, &empty.path().join("absent"), "cannot read");
    assert_eq!(error.exit_code(), 5);

    let folder = Folder::sound();
    std::fs::rename(folder.file("model.safetensors"), folder.file("pytorch_model.bin")).unwrap();
    folder.refused("", "the weights are in pytorch_model.bin");
    std::fs::remove_file(folder.file("pytorch_model.bin")).unwrap();
    folder.refused("", "neither model.safetensors nor model.safetensors.index.json");
}

#[test]
fn a_bad_config_is_refused() {
    let folder = Folder::sound();
    folder.write("config.json", with_key("model_type", json!("gpt2")).to_string());
    folder.refused("config.json", "unknown architecture: `model_type` is \"gpt2\"");
    folder.write("config.json", "{\"vocab_size\": 40,\n \"hidden_size\": }");
    folder.refused("config.json", "line 2");
    folder.write("config.json", [0xff, 0xfe]);
    folder.refused("config.json", "text in UTF-16");
    folder.write("config.json", [b'{', 0xc3, b'}']);
    folder.refused("config.json", "not UTF-8 at byte 1");
    folder.write("config.json", format!("\u{feff}{}", config()));
    folder.write("generation_config.json", "[");
    folder.open().unwrap();
    folder.write("generation_config.json", "{\"eos_token_id\": [2, 5]}");
    assert_eq!(folder.open().unwrap().config().stop_token_ids, [2, 5]);
}

#[test]
fn truncated_files_are_refused_at_every_kind_of_length() {
    let folder = Folder::sound();
    let whole = std::fs::read(folder.file("model.safetensors")).unwrap();
    let header = u64::from_le_bytes(*whole.first_chunk().unwrap()) as usize;
    for (length, part) in [
        (0, "truncated: 0 bytes"),
        (7, "truncated: 7 bytes"),
        (8, "claims a header of"),
        (8 + header / 2, "claims a header of"),
        (8 + header, "not what its header adds up to"),
        (whole.len() / 2, "not what its header adds up to"),
        (whole.len() - 1, "not what its header adds up to"),
    ] {
        folder.write("model.safetensors", &whole[..length]);
        folder.refused("model.safetensors", part);
    }
    folder.write("model.safetensors", [&whole[..], &[0]].concat());
    folder.refused("model.safetensors", "not what its header adds up to");
}

#[test]
fn damaged_headers_are_refused() {
    let folder = Folder::sound();
    let file = |header: &str, data: usize| {
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat()
    };
    let refused = |bytes: Vec<u8>, part: &str| {
        folder.write("model.safetensors", bytes);
        folder.refused("model.safetensors", part);
    };
    refused(u64::MAX.to_le_bytes().to_vec(), "claims a header of 18446744073709551615 bytes");
    refused(file("{\"a\": 3}", 0), "damaged header");
    refused(file("not json", 0), "damaged header");
    folder.write("model.safetensors", file("{}", 0));
    folder.refused("", "21 tensors (`model.embed_tokens.weight`, ");
    let two = |a: &str, b: &str| {
        format!(
            r#"{{"a":{{"dtype":"F32","shape":[2],"data_offsets":{a}}},"b":{{"dtype":"F32","shape":[2],"data_offsets":{b}}}}}"#
        )
    };
    refused(file(&two("[0,8]", "[4,12]"), 12), "the data of tensor `b` overlap");
    refused(file(&two("[0,8]", "[12,20]"), 20), "leave a gap");
    refused(file(&two("[0,8]", "[16,8]"), 16), "leave a gap");
    refused(file(&two("[0,8]", "[8,12]"), 12), "do not fit its bytes");
    let huge = r#"{"a":{"dtype":"F32","shape":[9223372036854775807,8],"data_offsets":[0,8]}}"#;
    refused(file(huge, 8), "damaged header");
}

#[test]
fn broken_shards_are_named() {
    let tensors = tensors(&config(), Dtype::BF16);
    let folder = Folder::sharded(&config(), &tensors);
    let index = "model.safetensors.index.json";
    let json: Value = serde_json::from_slice(&std::fs::read(folder.file(index)).unwrap()).unwrap();

    let mut absent = json.clone();
    absent["weight_map"]["model.extra.weight"] = shard_name(1).into();
    folder.write(index, absent.to_string());
    folder.refused(&shard_name(1), "places `model.extra.weight` here");
    for outside in [json!("../model.safetensors"), json!("/etc/passwd"), json!(""), json!(".."), json!(3)] {
        let mut elsewhere = json.clone();
        elsewhere["weight_map"][NORM] = outside;
        folder.write(index, elsewhere.to_string());
        folder.refused(index, "not a file name");
    }
    folder.write(index, "{\"weight_map\": 3}");
    folder.refused(index, "no object `weight_map`");
    folder.write(index, "{");
    folder.refused(index, "not valid JSON");

    folder.write(index, json.to_string());
    folder.open().unwrap();
    let shard = std::fs::read(folder.file(&shard_name(1))).unwrap();
    folder.write(&shard_name(1), &shard[..shard.len() - 4]);
    folder.refused(&shard_name(1), "not what its header adds up to");
    folder.write(&shard_name(1), serialize(&tensors));
    folder.refused(&shard_name(1), "is also in");
    std::fs::remove_file(folder.file(&shard_name(1))).unwrap();
    folder.refused(&shard_name(1), "this shard is missing");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever the damage, opening and reading ends in a value or an error.
    #[test]
    fn no_damage_makes_it_panic(
        length in 0usize..1 << 14,
        damage in prop::collection::vec((0usize..3000, any::<u8>()), 0..6),
    ) {
        let folder = Folder::sound();
        let mut bytes = std::fs::read(folder.file("model.safetensors")).unwrap();
        for (at, byte) in damage {
            bytes[at] = byte;
        }
        // Half of the cases are not cut: their damage must be met by the header's checks alone.
        if length % 2 == 0 {
            bytes.truncate(length);
        }
        folder.write("model.safetensors", &bytes);
        if let Ok(opened) = folder.open() {
            let _ = opened.check_finite();
            opened.fingerprint();
            for spec in opened.config().tensors() {
                opened.tensor(&spec.name, &spec.shape).unwrap();
            }
        }
    }
}
