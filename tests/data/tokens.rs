//! The boundary between prompt and response, and what a template leaves out.

use std::path::PathBuf;

use mmpo_fast::config::LengthLimits;
use mmpo_fast::data::{Cause, Message, PairDataset, TextEncoder, Tokenizer, load_pairs};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::*;

const WIDE: LengthLimits = LengthLimits { max_length: 10_000, max_prompt_length: 5_000 };

/// A folder with a small tokenizer of Llama 2's kind: spaces are part of words, every text begins with one, and
/// `config` says how transformers reads the file.
pub(super) fn llama2_like(config: Value) -> tempfile::TempDir {
    let merges =
        [("▁", "S"), ("▁S", "a"), ("▁", "T"), ("▁T", "h"), ("▁Th", "e"), ("A", ":"), ("▁", "A"), ("▁A", ":")];
    let letters = "▁ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789:.,?!<>/|[]\n";
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_string).to_vec();
    tokens.extend((0..=255u8).map(|byte| format!("<0x{byte:02X}>")));
    tokens.extend(letters.chars().map(String::from));
    tokens.extend(merges.iter().map(|(left, right)| format!("{left}{right}")));
    let vocabulary: serde_json::Map<String, Value> =
        tokens.into_iter().enumerate().map(|(id, token)| (token, json!(id))).collect();
    let special = |id: u32, content: &str| json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    let bos = json!({"SpecialToken": {"id": "<s>", "type_id": 0}});
    let text = json!({"Sequence": {"id": "A", "type_id": 0}});
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing", "single": [bos, text], "pair": [bos, text],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true,
            "vocab": vocabulary, "merges": merges.map(|(left, right)| format!("{left} {right}"))},
    });
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let mut whole = json!({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"});
    whole.as_object_mut().unwrap().extend(config.as_object().unwrap().clone());
    std::fs::write(folder.path().join("tokenizer_config.json"), whole.to_string()).unwrap();
    folder
}

fn load(folder: &tempfile::TempDir, template: Option<&str>, record: Value) -> (TextEncoder, PairDataset) {
    let (_pairs_folder, pairs) = temporary("pairs.jsonl", record.to_string());
    let written = template.map(|text| temporary("t.jinja", text));
    let template: Option<PathBuf> = written.as_ref().map(|(_, path)| path.clone());
    let encoder = TextEncoder::load(folder.path(), template.as_deref()).unwrap();
    let dataset = load_pairs(&pairs, &encoder, WIDE).unwrap();
    (encoder, dataset)
}

fn conversation(chosen: &str, rejected: &str) -> Value {
    json!({
        "prompt": [{"role": "user", "content": "Q?"}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    })
}

#[test]
fn a_response_begins_with_the_token_that_the_model_would_give() {
    let folder = llama2_like(json!({"tokenizer_class": "LlamaTokenizer", "legacy": false}));
    // The space before the answer stands in the response, in the prompt, and in neither.
    for (prompt, space, crossings) in [("Q?\nA:", " ", 0), ("Q?\nA: ", "", 1)] {
        let record = json!({"prompt": prompt, "chosen": format!("{space}Saturn"), "rejected": format!("{space}The moon")});
        let (encoder, dataset) = load(&folder, None, record);
        let pair = &dataset.pairs[0];
        assert_eq!(pair.prompt[0], 1, "plain text has the post-processor's BOS");
        assert_eq!(pair.prompt.last().copied(), encoder.tokenizer.token_id("A:"));
        assert_eq!(Some(pair.chosen[0]), encoder.tokenizer.token_id("▁Sa"), "{prompt:?}");
        assert_eq!(Some(pair.rejected[0]), encoder.tokenizer.token_id("▁The"), "{prompt:?}");
        assert_eq!(pair.chosen.last(), Some(&2));
        assert_eq!(dataset.report.tally(Cause::BoundaryToken).count, crossings);
        let shown = "at 1, the prompt's end \" \" is left out, and the responses begin with the tokens \" Sa\" and \" The\"";
        assert_eq!(dataset.report.to_string().contains(shown), crossings == 1, "{}", dataset.report);
    }
}

#[test]
fn legacy_and_add_prefix_space_say_where_a_space_is_put() {
    let ids = |config: Value| {
        let folder = llama2_like(config);
        let (tokenizer, _) = Tokenizer::load(folder.path()).unwrap();
        let space = tokenizer.token_id("▁");
        let ids = tokenizer.encode("x</s>y").unwrap();
        ids.into_iter()
            .map(|id| {
                if Some(id) == space {
                    '_'
                } else if id == 2 {
                    'E'
                } else {
                    'a'
                }
            })
            .collect::<String>()
    };
    let llama = |legacy: Value, space: Value| {
        ids(json!({"tokenizer_class": "LlamaTokenizerFast", "legacy": legacy, "add_prefix_space": space}))
    };
    assert_eq!(llama(json!(true), Value::Null), "_aE_a");
    assert_eq!(llama(json!(false), Value::Null), "_aEa");
    assert_eq!(llama(Value::Null, json!(true)), "_aEa");
    assert_eq!(llama(json!(true), json!(false)), "aEa");
    assert_eq!(ids(json!({"tokenizer_class": "LlamaTokenizer"})), "_aEa", "legacy is off unless it is named");
    assert_eq!(ids(json!({"tokenizer_class": "PreTrainedTokenizerFast", "legacy": false})), "_aE_a");
    assert_eq!(ids(json!({"legacy": false})), "_aE_a", "without a class the file stands");
    let split = json!({"tokenizer_class": "LlamaTokenizer", "split_special_tokens": true});
    assert_eq!(ids(split), "_aaaaaa", "an end token in a text is letters then");
}

#[test]
fn no_bos_is_added_that_the_template_did_not_write() {
    let folder = llama2_like(json!({"tokenizer_class": "LlamaTokenizer", "legacy": false}));
    let body = "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}";
    for (template, bos) in [(body.to_string(), 0), (format!("{{{{ bos_token }}}}{body}"), 1)] {
        let (encoder, dataset) = load(&folder, Some(&template), conversation("yes", "no"));
        let pair = &dataset.pairs[0];
        assert_eq!(pair.prompt.iter().filter(|&&id| id == 1).count(), bos);
        let prompt = encoder.encode_chat_prompt(&[Message::new("user", "Q?")]).unwrap();
        assert_eq!(prompt, pair.prompt, "generate sees the ids of training");
        assert_eq!(dataset.report.tally(Cause::NoEndToken).count, 0);
    }
}

#[test]
fn text_that_the_template_leaves_out_is_counted_and_shown() {
    let folder = llama2_like(json!({}));
    let template = "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}</s>{% endfor %}{% if add_generation_prompt %}<assistant><think>{% endif %}";
    let (_, dataset) = load(&folder, Some(template), conversation("<think>so it is </think> yes", "no"));
    let text = dataset.report.to_string();
    assert_eq!(dataset.report.tally(Cause::ResponseTextLost).first, [1]);
    assert_eq!(dataset.report.tally(Cause::PromptTextLost).count, 0);
    let shown =
        "at 1, chosen response: 24 characters of the assistant message, from \"<think>so it is </think>\"";
    assert!(text.contains(shown), "{text}");
    assert_eq!(dataset.report.tally(Cause::PromptShortened).count, 1, "{text}");

    let silent = "{% for m in messages %}{% if m.role != 'system' %}<{{ m.role }}>{{ m.content }}</s>{% endif %}{% endfor %}";
    let mut record = conversation("yes", "no");
    record["prompt"] = json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Q?"}]);
    let (_, dataset) = load(&folder, Some(silent), record);
    let text = dataset.report.to_string();
    assert!(text.contains("at 1, 9 characters of the system message, from \"Be brief.\""), "{text}");
}

#[test]
fn a_template_that_closes_the_last_turn_otherwise_gives_the_common_beginning() {
    let template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if not loop.last %}{{ '\n' }}{% endif %}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
    let folder = llama2_like(json!({"tokenizer_class": "LlamaTokenizer"}));
    let (encoder, dataset) = load(&folder, Some(template), conversation("yes", "no"));
    let pair = &dataset.pairs[0];
    assert_eq!(encoder.tokenizer.decode(&pair.prompt, false).unwrap(), "<user>Q?");
    assert_eq!(encoder.tokenizer.decode(&pair.chosen, false).unwrap(), "\n</s><assistant>yes</s>");
    assert!(
        dataset.report.to_string().contains("the prompt loses its end \"</s><assistant>\""),
        "{}",
        dataset.report
    );
}

#[test]
fn a_broken_part_of_the_tokenizer_is_an_error_and_no_panic() {
    let parts = ["normalizer", "pre_tokenizer", "post_processor", "decoder", "model", "added_tokens"];
    let broken = [
        json!(3),
        json!("x"),
        json!([]),
        json!({}),
        json!({"type": "Nothing"}),
        json!({"type": "Sequence"}),
        json!({"type": "Sequence", "decoders": [3]}),
        json!({"type": "ByteFallback", "x": []}),
        json!([{"id": "x"}]),
    ];
    let whole = json(&file("chatml/tokenizer.json"));
    for part in parts {
        for value in &broken {
            let mut tokenizer = whole.clone();
            tokenizer[part] = value.clone();
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
            if let Err(error) = Tokenizer::load(folder.path()) {
                assert_eq!(error.exit_code(), 4, "{part} {value}: {error}");
            }
        }
    }
}

/// Any letters, and words that the tokenizer has tokens for, which cross most cuts.
fn any_text() -> impl Strategy<Value = String> {
    let words = ["the", " sky", " is", " blue", " what", " color", " quick", "brown", ".", "\n"];
    let known = prop::collection::vec(prop::sample::select(words.to_vec()), 2..8);
    prop_oneof!["[a-zA-Z .\nü🌍]{2,40}", known.prop_map(|words| words.concat())]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Wherever a text is cut into prompt and response, the tokens of both are the text, and they are the same
    /// tokens for every cut.
    #[test]
    fn the_whole_is_the_text_wherever_it_is_cut(text in any_text(), cut in 0usize..40, other in "[a-z]{1,8}") {
        let encoder = encoder("chatml");
        let cut = text.char_indices().map(|(start, _)| start).nth(cut).unwrap_or(0);
        let (prompt, response) = text.split_at(cut);
        prop_assume!(!response.trim().is_empty());
        let record = json!({"prompt": prompt, "chosen": response, "rejected": other}).to_string();
        let (_folder, path) = temporary("pairs.jsonl", record);
        let Ok(dataset) = load_pairs(&path, &encoder, WIDE) else { return Ok(()) };
        let pair = &dataset.pairs[0];
        let whole = [pair.prompt.as_slice(), &pair.chosen].concat();
        let ended = format!("{text}<|im_end|>");
        prop_assert_eq!(&whole, &encoder.tokenizer.encode(&ended).unwrap());
        prop_assert_eq!(encoder.tokenizer.decode(&whole, false).unwrap(), ended);
        let rejected = [pair.prompt.as_slice(), &pair.rejected].concat();
        prop_assert_eq!(encoder.tokenizer.decode(&rejected, false).unwrap(), format!("{prompt}{other}<|im_end|>"));
        prop_assert_eq!(
            dataset.report.tally(Cause::BoundaryToken).count == 1,
            pair.prompt.len() < encoder.tokenizer.encode(prompt).unwrap().len()
        );
    }
}
