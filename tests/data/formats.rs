//! Every format gives the ids that Hugging Face gives the same pairs.

use std::path::PathBuf;

use mmpo_fast::data::{Body, Cause, Message, TextEncoder, load_pairs, read_records};

use crate::*;

/// Files that hold the same conversations in different words, and which of them each can say.
const CONVERSATIONS: [(&str, &[usize]); 14] = [
    ("conversational.jsonl", &[0, 1, 2, 3, 4]),
    ("conversational.jsonl.gz", &[0, 1, 2, 3, 4]),
    ("lines_named.json", &[0, 1, 2, 3, 4]),
    ("array.json", &[0, 1, 2, 3, 4]),
    ("columns.json", &[0, 1, 2, 3, 4]),
    ("rows_in_object.json", &[0, 1, 2, 3, 4]),
    ("one_record.json", &[0]),
    ("implicit.jsonl", &[0, 1, 2, 3, 4]),
    ("prompt_repeated.jsonl", &[0, 1, 2, 3, 4]),
    ("text_responses.jsonl", &[0, 1, 2, 3, 4]),
    ("sharegpt.json", &[0, 1, 2, 3, 4]),
    ("sharegpt_system.jsonl", &[0, 1, 2, 3, 4]),
    ("orca.jsonl", &[0, 1, 3, 4]),
    ("system_prompt.jsonl", &[0, 1, 3, 4]),
];

#[test]
fn conversations_have_the_ids_of_hugging_face_in_every_format() {
    for tokenizer in ["chatml", "llama3"] {
        let (encoder, golden) = (encoder(tokenizer), golden(tokenizer, "conversations"));
        for (name, pairs) in CONVERSATIONS {
            let dataset = load_pairs(&file("pairs").join(name), &encoder, golden_limits()).expect(name);
            let expected: Vec<_> = pairs.iter().map(|&pair| golden[pair].clone()).collect();
            assert_eq!(all_parts(&dataset), expected, "{tokenizer}, {name}");
            assert_eq!(dataset.report.tally(Cause::PromptColumnDiffers).count, 0, "{name}");
        }
    }
}

#[test]
fn a_prompt_string_beside_whole_conversations_is_compared_with_them() {
    let dataset =
        load_pairs(&file("pairs/ultrafeedback.jsonl"), &encoder("chatml"), golden_limits()).unwrap();
    assert_eq!(all_parts(&dataset), golden("chatml", "conversations"));
    assert_eq!(dataset.report.tally(Cause::PromptColumnDiffers).count, 0);
    let (_folder, path) = temporary(
        "pairs.jsonl",
        r#"{"prompt":"other","chosen":[{"role":"user","content":"Hi"},{"role":"assistant","content":"a"}],"rejected":[{"role":"user","content":"Hi"},{"role":"assistant","content":"b"}]}"#,
    );
    let dataset = load_pairs(&path, &encoder("chatml"), golden_limits()).unwrap();
    assert_eq!(dataset.report.tally(Cause::PromptColumnDiffers).first, [1]);
}

#[test]
fn plain_text_has_the_ids_of_hugging_face_with_one_bos_and_one_end_token() {
    for tokenizer in ["chatml", "llama3"] {
        let (encoder, golden) = (encoder(tokenizer), golden(tokenizer, "texts"));
        let dataset = load_pairs(&file("pairs/text.jsonl"), &encoder, golden_limits()).unwrap();
        assert_eq!(all_parts(&dataset), golden, "{tokenizer}");
        let dataset = load_pairs(&file("pairs/text_implicit.jsonl"), &encoder, golden_limits()).unwrap();
        assert_eq!(all_parts(&dataset), golden[..2], "{tokenizer}");
    }
}

#[test]
fn special_tokens_written_in_plain_text_are_what_trl_makes_of_them() {
    let encoder = encoder("llama3");
    let (bos, eos) = (encoder.tokenizer.bos().unwrap(), encoder.tokenizer.eos().unwrap());
    let texts = [
        r#"{"prompt":"Hi","chosen":" yes","rejected":" no"}"#,
        r#"{"prompt":"<|begin_of_text|>Hi","chosen":" yes<|eot_id|>","rejected":" no<|eot_id|><|eot_id|>"}"#,
    ];
    let (_folder, path) = temporary("pairs.jsonl", texts.join("\n"));
    let dataset = load_pairs(&path, &encoder, golden_limits()).unwrap();
    let [plain, written] = dataset.pairs.as_slice() else { panic!("{:?}", dataset.pairs) };
    assert_eq!(plain.prompt[0], bos);
    assert_eq!(written.prompt, [&[bos], plain.prompt.as_slice()].concat(), "one in the text, one in front");
    assert_eq!(written.chosen, plain.chosen, "an end token that is there is not added");
    assert_eq!(plain.rejected.iter().filter(|&&id| id == eos).count(), 1);
    assert_eq!(written.rejected, [plain.rejected.as_slice(), &[eos]].concat());
    assert_eq!(dataset.report.tally(Cause::BosTwice).first, [2], "the second BOS is counted and shown");
}

#[test]
fn nothing_is_added_to_what_a_template_writes_and_a_missing_end_token_is_counted() {
    let template = file("templates/raises.jinja");
    let encoder = TextEncoder::load(&file("llama3"), Some(&template)).unwrap();
    let dataset = load_pairs(&file("pairs/one_record.json"), &encoder, golden_limits()).unwrap();
    let pair = &dataset.pairs[0];
    assert_eq!(
        encoder.tokenizer.decode(&pair.prompt, false).unwrap(),
        "user: What color is the sky?\nassistant: ",
        "no BOS"
    );
    assert_eq!(encoder.tokenizer.decode(&pair.rejected, false).unwrap(), "It is green.\n");
    assert_eq!(dataset.report.tally(Cause::NoEndToken).count, 1);
    assert!(
        dataset.report.to_string().contains("1 have a response without an end token"),
        "{}",
        dataset.report
    );
}

#[test]
fn hh_text_is_split_after_the_last_shared_marker() {
    let records = read_records(&file("pairs/hh.jsonl")).unwrap();
    let Body::Text { prompt, chosen, rejected } = &records[0].body else { panic!("{records:?}") };
    assert!(prompt.ends_with("\n\nHuman: Just do.\n\nAssistant:"), "{prompt:?}");
    assert_eq!((chosen.as_str(), rejected.as_str()), (" I pick blue.", " I pick nothing."));
}

#[test]
fn a_prompt_string_stands_alone_where_responses_hold_no_prompt() {
    let (_folder, path) = temporary(
        "pairs.jsonl",
        r#"{"prompt":"Hi","chosen":[{"role":"assistant","content":"a"}],"rejected":[{"role":"assistant","content":"a"}]}"#,
    );
    let records = read_records(&path).unwrap();
    let Body::Conversation { prompt, chosen, .. } = &records[0].body else { panic!("{records:?}") };
    assert_eq!(prompt, &[Message::new("user", "Hi")]);
    assert_eq!(chosen, &[Message::new("assistant", "a")]);
}

#[test]
fn tools_and_reasoning_reach_the_template() {
    let record = r#"{"prompt":[{"role":"user","content":"x"}],"tools":"[{\"a\": 1.0}]","chat_template_kwargs":{"mood":"good"},
        "chosen":[{"role":"assistant","content":"y","reasoning":"why"}],"rejected":[{"role":"assistant","content":"z"}]}"#;
    let (_folder, path) = temporary("pairs.jsonl", record.replace('\n', " "));
    let (_template_folder, template) = temporary(
        "template.jinja",
        "{{ tools | tojson }} {{ mood }} {% for m in messages %}{{ m.reasoning_content }}{{ m.content }}<|im_end|>{% endfor %}",
    );
    let encoder = TextEncoder::load(&file("chatml"), Some(&template)).unwrap();
    let dataset = load_pairs(&path, &encoder, golden_limits()).unwrap();
    let text = |ids: &[u32]| encoder.tokenizer.decode(ids, false).unwrap();
    assert_eq!(text(&dataset.pairs[0].prompt), "[{\"a\": 1.0}] good x<|im_end|>");
    assert_eq!(text(&dataset.pairs[0].chosen), "whyy<|im_end|>");
}

#[test]
fn crlf_blank_lines_and_a_byte_order_mark_are_read() {
    let line = r#"{"prompt":"a","chosen":" b","rejected":" c"}"#;
    let (_folder, path) = temporary("pairs.jsonl", format!("\u{feff}\r\n{line}\r\n\r\n  \n{line}"));
    let records = read_records(&path).unwrap();
    assert_eq!(records.iter().map(|record| record.place).collect::<Vec<_>>(), [2, 5]);
    assert_eq!(records.iter().map(|record| record.index).collect::<Vec<_>>(), [0, 1]);
}

#[test]
fn gzip_is_known_by_its_bytes_whatever_the_name() {
    let gzip = std::fs::read(file("pairs/conversational.jsonl.gz")).unwrap();
    let plain = read_records(&file("pairs/conversational.jsonl")).unwrap();
    // Two gzip members in one file, as `cat a.gz b.gz` makes them.
    for (bytes, times) in [(gzip.clone(), 1), (gzip.repeat(2), 2)] {
        let (_folder, path) = temporary("pairs.jsonl", bytes);
        let records = read_records(&path).unwrap();
        assert_eq!(records.len(), times * plain.len());
        assert_eq!(records[..plain.len()], plain);
    }
}

#[test]
fn order_and_fingerprint_do_not_depend_on_threads_or_format() {
    let encoder = encoder("chatml");
    let lines: String = (0..2500)
        .map(|n| format!("{{\"prompt\":\"number {n}\",\"chosen\":\" yes {n}\",\"rejected\":\" no\"}}\n"))
        .collect();
    let (_folder, path) = temporary("pairs.jsonl", &lines);
    let array = format!("[{}]", lines.trim_end().replace('\n', ","));
    let (_array_folder, array_path) = temporary("pairs.json", array);
    let load = |path: &PathBuf, threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| load_pairs(path, &encoder, golden_limits()).unwrap())
    };
    let one = load(&path, 1);
    for other in [load(&path, 4), load(&array_path, 3)] {
        assert_eq!(one.pairs, other.pairs);
        assert_eq!(one.fingerprint, other.fingerprint);
    }
    assert!(one.pairs.iter().enumerate().all(|(n, pair)| pair.record == n));
    let (_changed_folder, changed) = temporary("pairs.jsonl", lines.replace("yes 2499", "yes 2498"));
    assert_ne!(load(&changed, 2).fingerprint, one.fingerprint);
}
