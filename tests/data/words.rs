//! Tokenising word by word against the library, which gets each text as a whole.

use mmpo_fast::config::LengthLimits;
use mmpo_fast::data::{SegmentCache, TextEncoder, Tokenizer, load_pairs};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::*;

/// A folder with the committed byte-level tokenizer, changed.
fn changed(change: impl FnOnce(&mut Value)) -> (tempfile::TempDir, Tokenizer) {
    let mut tokenizer = json(&file("chatml/tokenizer.json"));
    change(&mut tokenizer);
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(folder.path().join("tokenizer_config.json"), r#"{"eos_token": "<|im_end|>"}"#).unwrap();
    let (tokenizer, _) = Tokenizer::load(folder.path()).unwrap();
    (folder, tokenizer)
}

fn split(pattern: &str) -> Value {
    json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
}

fn bytes(add_prefix_space: bool, use_regex: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": true, "use_regex": use_regex})
}

const LLAMA3_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Tokenizers of every layout that is understood.
fn tokenizers() -> Vec<(&'static str, Tokenizer)> {
    let pre = |steps: Value| {
        changed(|tokenizer| tokenizer["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": steps}))
            .1
    };
    let digits = |each: bool| json!({"type": "Digits", "individual_digits": each});
    let mut list = vec![
        ("GPT-2", changed(|_| ()).1),
        (
            "GPT-2 with a space in front",
            changed(|tokenizer| tokenizer["pre_tokenizer"] = bytes(true, true)).1,
        ),
        ("SmolLM2", pre(json!([digits(true), bytes(false, true)]))),
        ("runs of digits", pre(json!([digits(false), bytes(true, true)]))),
        ("Llama 3", pre(json!([split(LLAMA3_WORDS), bytes(false, false)]))),
        (
            "several patterns",
            pre(json!([
                split(r"\p{N}{1,3}"),
                split("[\u{4e00}-\u{9fa5}]+"),
                split(LLAMA3_WORDS),
                bytes(false, false)
            ])),
        ),
        (
            "whole words, NFC, tokens that strip",
            changed(|tokenizer| {
                tokenizer["normalizer"] = json!({"type": "NFC"});
                tokenizer["model"]["ignore_merges"] = json!(true);
                tokenizer["added_tokens"][1]["rstrip"] = json!(true);
                tokenizer["added_tokens"][2]["lstrip"] = json!(true);
                tokenizer["added_tokens"][0]["normalized"] = json!(true);
            })
            .1,
        ),
    ];
    for (name, class, legacy, space) in [
        ("Llama 2", json!("LlamaTokenizer"), json!(false), Value::Null),
        ("Llama 2, legacy", json!("LlamaTokenizer"), json!(true), Value::Null),
        ("Llama 2 without a space", json!("LlamaTokenizer"), json!(true), json!(false)),
        ("Gemma", json!("GemmaTokenizer"), Value::Null, Value::Null),
        ("Llama 2 as written", json!("PreTrainedTokenizerFast"), Value::Null, Value::Null),
    ] {
        let folder = super::tokens::llama2_like(
            json!({"tokenizer_class": class, "legacy": legacy, "add_prefix_space": space}),
        );
        list.push((name, Tokenizer::load(folder.path()).unwrap().0));
    }
    list
}

/// Texts of pieces that tokenizers treat in many ways.
fn texts() -> impl Strategy<Value = String> {
    let pieces = prop::sample::select(vec![
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "\u{a0}",
        "\u{3000}",
        "▁",
        "a",
        "The",
        " Sa",
        "ing",
        "I'm",
        "'S",
        "'",
        "x's",
        "1",
        "234",
        "٣",
        "Ⅷ",
        "½",
        ".",
        ":",
        "A:",
        "-",
        "——",
        "é",
        "e\u{301}",
        "\u{301}",
        "ü",
        "月は",
        "大きい",
        "カ\u{3099}",
        "가",
        "\u{11a8}",
        "न\u{93c}",
        "🌕",
        "\u{200d}",
        "\u{0}",
        "\u{fffd}",
        "<s>",
        "</s>",
        "<unk>",
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|im",
        "|>",
        "[INST]",
    ]);
    prop_oneof![
        prop::collection::vec(pieces, 0..24).prop_map(|pieces| pieces.concat()),
        "\\PC{0,24}",
        "[ a-c\n]{0,24}"
    ]
}

#[test]
fn every_layout_of_a_llama_is_cut_into_words() {
    for (name, tokenizer) in tokenizers() {
        assert!(tokenizer.is_cut_into_words(), "{name}");
    }
    for (name, folder) in
        [("the demo's", "../../examples/demo/model"), ("the golden's", "../goldens/base/model")]
    {
        assert!(encoder(folder).tokenizer.is_cut_into_words(), "{name}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn words_have_the_ids_of_the_whole(texts in prop::collection::vec(texts(), 1..4)) {
        thread_local! {
            static TOKENIZERS: Vec<(&'static str, Tokenizer)> = tokenizers();
        }
        TOKENIZERS.with(|tokenizers| {
            for (name, tokenizer) in tokenizers {
                // The texts of a record share their segments.
                let mut cache = SegmentCache::default();
                for text in &texts {
                    prop_assert_eq!(
                        tokenizer.encode_with(text, &mut cache).unwrap(),
                        tokenizer.encode_whole(text).unwrap(),
                        "{}: {:?}", name, text
                    );
                }
            }
            Ok(())
        })?;
    }
}

#[test]
fn long_words_have_the_ids_of_the_whole() {
    let runs = ["a", "ab", "the", "=", "\n", " ", "月", "é", "xyzzy", "1"];
    for (name, tokenizer) in tokenizers() {
        for run in runs {
            for length in [4095, 4096, 9001] {
                let text = format!("x {} y", run.repeat(length / run.len() + 1));
                assert_eq!(
                    tokenizer.encode(&text).unwrap(),
                    tokenizer.encode_whole(&text).unwrap(),
                    "{name}: {run} {length}"
                );
            }
        }
    }
}

#[test]
fn a_tokenizer_of_another_layout_is_left_to_the_library() {
    let layouts = [
        json!({"type": "Whitespace"}),
        json!({"type": "Sequence", "pretokenizers": [split(r"\p{L}++"), bytes(false, false)]}),
        json!({"type": "Sequence", "pretokenizers": [bytes(false, true), split("x")]}),
    ];
    for layout in layouts {
        let (_folder, tokenizer) = changed(|tokenizer| tokenizer["pre_tokenizer"] = layout.clone());
        assert!(!tokenizer.is_cut_into_words(), "{layout}");
        let text = "Hello, world<|im_end|> x 12";
        assert_eq!(tokenizer.encode(text).unwrap(), tokenizer.encode_whole(text).unwrap(), "{layout}");
    }
    let (_folder, tokenizer) = changed(|tokenizer| tokenizer["added_tokens"][1]["single_word"] = json!(true));
    assert!(!tokenizer.is_cut_into_words());
}

#[test]
fn only_a_tokenizer_that_takes_texts_as_a_whole_refuses_a_long_one() {
    let limits = LengthLimits { max_length: 1 << 24, max_prompt_length: 100 };
    let long = "word ".repeat((4 << 20) / 5 + 1);
    let line = |chosen: &str| json!({"prompt": "p", "chosen": chosen, "rejected": "b"}).to_string();
    let (_folder, path) = temporary("pairs.jsonl", format!("{}\n{}\n", line("a"), line(&long)));
    let (folder, tokenizer) = changed(|_| ());
    let words = load_pairs(&path, &TextEncoder { tokenizer, template: None }, limits).unwrap();
    assert!(words.pairs[1].chosen.len() > 1 << 20, "{} tokens", words.pairs[1].chosen.len());
    drop(folder);
    let (_folder, tokenizer) =
        changed(|tokenizer| tokenizer["pre_tokenizer"] = json!({"type": "Whitespace"}));
    let error =
        load_pairs(&path, &TextEncoder { tokenizer, template: None }, limits).map(|_| ()).unwrap_err();
    assert_eq!(error.exit_code(), 3);
    let message = error.to_string();
    assert!(
        message.contains("pairs.jsonl:2: the text has 4194") && message.contains("more than 4 MiB"),
        "{message}"
    );
}
