//! The tokenizer of a model folder: what loading must not obey, special tokens, and streamed text.

use mmpo_fast::data::{Message, TextEncoder, Tokenizer};
use serde_json::{Value, json};

use crate::*;

/// A copy of a committed tokenizer folder with a changed config.
fn with_config(
    name: &str,
    change: impl FnOnce(&mut Value),
) -> (tempfile::TempDir, mmpo_fast::Result<Tokenizer>) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(file(name).join("tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
    let mut config = json(&file(name).join("tokenizer_config.json"));
    change(&mut config);
    std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    let tokenizer = Tokenizer::load(folder.path()).map(|(tokenizer, _)| tokenizer);
    (folder, tokenizer)
}

#[test]
fn truncation_and_padding_left_in_the_file_are_not_obeyed() {
    let tokenizer = encoder("chatml").tokenizer;
    let saved = json(&file("chatml/tokenizer.json"));
    assert!(saved["truncation"].is_object() && saved["padding"].is_object(), "the file is there to tempt");
    let text = "the quick brown fox jumps over the lazy dog";
    let ids = tokenizer.encode(text).unwrap();
    assert!(ids.len() > 7, "{} tokens", ids.len());
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
    assert!(tokenizer.encode("").unwrap().is_empty());
}

#[test]
fn special_tokens_are_read_and_skipped() {
    let tokenizer = encoder("llama3").tokenizer;
    assert_eq!(tokenizer.bos(), tokenizer.token_id("<|begin_of_text|>"));
    assert_eq!(tokenizer.eos(), tokenizer.token_id("<|eot_id|>"));
    assert_eq!(tokenizer.prepended(), tokenizer.bos());
    let ids = tokenizer.encode("Hi<|eot_id|>").unwrap();
    assert!(tokenizer.is_special(*ids.last().unwrap()) && !tokenizer.is_special(ids[0]));
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "Hi");
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), "Hi<|eot_id|>");
    assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocabulary()));
    assert_eq!(tokenizer.special_tokens()["eos_token"], "<|eot_id|>");
    assert_eq!(encoder("chatml").tokenizer.prepended(), None);
}

#[test]
fn the_post_processor_alone_decides_what_stands_around_plain_text() {
    // As in transformers 5, which drops these two keys where there is a tokenizer.json.
    for (name, prepends) in [("llama3", true), ("chatml", false)] {
        for value in [true, false] {
            let (_folder, tokenizer) = with_config(name, |config| {
                config["add_bos_token"] = json!(value);
                config["add_eos_token"] = json!(value);
            });
            let tokenizer = tokenizer.unwrap();
            assert_eq!(tokenizer.prepended(), tokenizer.bos().filter(|_| prepends), "{name}, {value}");
        }
    }
}

#[test]
fn another_id_in_the_config_does_not_move_a_token() {
    let (_folder, tokenizer) = with_config("chatml", |config| {
        config["added_tokens_decoder"] = json!({"5": {"content": "<|im_end|>", "special": true}});
    });
    assert_eq!(tokenizer.unwrap().token_id("<|im_end|>"), encoder("chatml").tokenizer.token_id("<|im_end|>"));
}

#[test]
fn tokens_that_only_the_config_lists_are_added_under_their_ids() {
    let next = encoder("chatml").tokenizer.vocabulary();
    let (_folder, tokenizer) = with_config("chatml", |config| {
        config["added_tokens_decoder"] = json!({
            (next + 1).to_string(): {"content": "<|two|>", "special": true},
            next.to_string(): {"content": "<|one|>", "special": true},
        });
    });
    let tokenizer = tokenizer.unwrap();
    let ids = tokenizer.encode("a<|two|><|one|>").unwrap();
    assert_eq!(ids[ids.len() - 2..], [next as u32 + 1, next as u32]);
    assert!(tokenizer.is_special(next as u32));
}

#[test]
fn the_fingerprint_follows_what_changes_ids() {
    let original = encoder("chatml").tokenizer.fingerprint();
    let (_folder, same) = with_config("chatml", |config| config["model_max_length"] = json!(5));
    assert_eq!(same.unwrap().fingerprint(), original);
    for (key, value) in [("split_special_tokens", json!(true)), ("tokenizer_class", json!("GPT2Tokenizer"))] {
        let (_folder, other) = with_config("chatml", |config| config[key] = value);
        assert_ne!(other.unwrap().fingerprint(), original, "{key}");
    }
}

#[test]
fn the_older_special_tokens_map_is_read() {
    let (folder, _) = with_config("chatml", |config| *config = json!({}));
    std::fs::write(
        folder.path().join("special_tokens_map.json"),
        r#"{"eos_token":{"content":"<|im_end|>"}}"#,
    )
    .unwrap();
    let (tokenizer, _) = Tokenizer::load(folder.path()).unwrap();
    assert_eq!(tokenizer.eos(), tokenizer.token_id("<|im_end|>"));
}

#[test]
fn streamed_text_is_the_whole_text_and_never_half_a_character() {
    let tokenizer = encoder("chatml").tokenizer;
    let text = "Ünïcode 🌕🌖 月は大きい\n  indented — done";
    let ids = tokenizer.encode(text).unwrap();
    let mut stream = tokenizer.stream(true);
    let mut streamed = String::new();
    let mut pieces = 0;
    for &id in &ids {
        let piece = stream.push(id).unwrap();
        assert!(!piece.contains(char::REPLACEMENT_CHARACTER), "{piece:?}");
        pieces += usize::from(!piece.is_empty());
        streamed += &piece;
    }
    assert_eq!(streamed, text, "nothing waits for the end where the last token completes a character");
    assert!(pieces > 10, "{pieces} pieces");
    assert_eq!(stream.finish().unwrap(), "");
}

#[test]
fn a_character_cut_off_at_the_end_comes_out_on_finish() {
    let tokenizer = encoder("chatml").tokenizer;
    let ids = tokenizer.encode("a🌋").unwrap();
    let mut stream = tokenizer.stream(true);
    let text: String = ids[..ids.len() - 1].iter().map(|&id| stream.push(id).unwrap()).collect();
    assert_eq!(text, "a");
    assert!(stream.finish().unwrap().contains(char::REPLACEMENT_CHARACTER));
}

#[test]
fn special_tokens_are_silent_in_a_stream() {
    let tokenizer = encoder("chatml").tokenizer;
    let mut stream = tokenizer.stream(true);
    let ids = tokenizer.encode("Hi<|im_end|>\nyou").unwrap();
    let text: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    assert_eq!(text, "Hi\nyou");
}

#[test]
fn a_prompt_to_answer_has_the_ids_of_the_same_prompt_in_training() {
    for name in ["chatml", "llama3"] {
        let encoder = encoder(name);
        let ids = encoder.encode_chat_prompt(&[Message::new("user", "What color is the sky?")]).unwrap();
        assert_eq!(ids, golden(name, "conversations")[0][0]);
        let ids = encoder.encode_text_prompt("The sky is").unwrap();
        assert_eq!(ids, golden(name, "texts")[0][0]);
    }
    let encoder = TextEncoder::load(&file("chatml"), Some(&file("templates/raises.jinja"))).unwrap();
    let error = encoder.encode_chat_prompt(&[Message::new("system", "x")]).unwrap_err();
    assert!(error.to_string().contains("raises.jinja: the chat template refuses"), "{error}");
}

#[test]
fn a_tokenizer_that_draws_lots_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut tokenizer = json(&file("chatml/tokenizer.json"));
    tokenizer["model"]["dropout"] = json!(0.1);
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let error = Tokenizer::load(folder.path()).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("BPE dropout is on"), "{error}");
}
