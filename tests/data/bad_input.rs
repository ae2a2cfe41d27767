//! Bad input: one clear error each, with the file, the line, and the column or key.

use std::path::Path;

use mmpo_fast::Error;
use mmpo_fast::data::{TextEncoder, load_pairs, read_records};

use crate::*;

const GOOD: &str = r#"{"prompt":"a","chosen":" b","rejected":" c"}"#;

/// The error of reading a file of this name and content, and where it points.
fn fault(name: &str, bytes: impl AsRef<[u8]>) -> (String, Option<usize>) {
    let (_folder, path) = temporary(name, bytes);
    match read_records(&path) {
        Err(Error::Data { path: named, line, message, help }) => {
            assert_eq!(named, path);
            assert!(!help.is_empty());
            (message, line)
        }
        other => panic!("no data error: {other:?}"),
    }
}

#[track_caller]
fn assert_fault(name: &str, bytes: impl AsRef<[u8]>, line: Option<usize>, words: &[&str]) {
    let (message, found) = fault(name, bytes);
    for word in words {
        assert!(message.contains(word), "{word:?} is not in {message:?}");
    }
    assert_eq!(found, line, "{message}");
}

fn conversation(message: &str) -> String {
    let response = r#"[{"role":"assistant","content":"x"}]"#;
    format!(r#"{{"prompt":[{message}],"chosen":{response},"rejected":{response}}}"#)
}

#[test]
fn broken_json_names_its_line() {
    assert_fault(
        "p.jsonl",
        format!("{GOOD}\n\n{{\"prompt\": oops}}\n{GOOD}"),
        Some(3),
        &["broken JSON", "column"],
    );
    assert_fault("p.jsonl", format!("{GOOD}\n{{\"prompt\": \"a"), Some(2), &["broken JSON"]);
    assert_fault("p.json", format!("[\n{GOOD},\n{GOOD}\n{GOOD}]"), Some(4), &["broken JSON", "record 3"]);
    assert_fault("p.json", format!("[{GOOD}] trailing"), Some(1), &["broken JSON", "trailing"]);
    assert_fault("p.json", format!("[{GOOD},"), Some(1), &["broken JSON", "EOF"]);
    assert_fault("p.json", "{\n\"chosen\": \"a\",\n\"rejected\" 3}", Some(3), &["broken JSON"]);
    assert_fault("p.jsonl", "prompt,chosen,rejected\n", None, &["the file holds no record"]);
    assert_fault("p.jsonl", "prompt: a\n", Some(1), &["neither `{` nor `[`", "`prompt: a`"]);
    assert_fault("p.jsonl", [GOOD.as_bytes(), b"\n{\"prompt\": \"\xff\"}"].concat(), Some(2), &["UTF-8"]);
}

#[test]
fn the_first_bad_record_of_an_array_comes_before_a_later_break() {
    assert_fault(
        "p.json",
        format!("[{GOOD}, {{\"prompt\": \"a\", \"chosen\": 1}}, oops]"),
        Some(2),
        &["`chosen` is a number"],
    );
}

#[test]
fn a_missing_column_names_the_nearest_present_one() {
    assert_fault(
        "p.jsonl",
        r#"{"prompt":"a","choosen":"b","rejected":"c"}"#,
        Some(1),
        &["no column `chosen`", "`choosen`"],
    );
    assert_fault(
        "p.jsonl",
        r#"{"prompt":"a","chosen":"b","Rejected":"c"}"#,
        Some(1),
        &["no column `rejected`", "`Rejected`"],
    );
    assert_fault(
        "p.json",
        format!("[{GOOD},{{\"prompt\":\"a\",\"chosen\":\"b\"}}]"),
        Some(2),
        &["no column `rejected` among `chosen`, `prompt`"],
    );
    // What is there is named, although it was read before the fault was found.
    assert_fault(
        "p.jsonl",
        r#"{"prompt":"a","response_chosen":"b","id":3}"#,
        Some(1),
        &["no column `response_rejected` among `response_chosen`, `prompt`, `id`"],
    );
    assert_fault(
        "p.jsonl",
        r#"{"chosen":"yes","rejected":"no"}"#,
        Some(1),
        &["no column `prompt` among `chosen`, `rejected`, and the two responses share no beginning"],
    );
    assert_fault("p.jsonl", r#"{"text":"a"}"#, Some(1), &["no column `chosen`", "among `text`"]);
    assert_fault("p.jsonl", "{}", Some(1), &["no column `chosen`", "empty"]);
    assert_fault(
        "p.jsonl",
        format!("{GOOD}\n{{\"prompt\":null,\"chosen\":\"b\",\"rejected\":\"c\"}}"),
        Some(2),
        &["`prompt` is null"],
    );
    assert_fault(
        "p.jsonl",
        r#"{"promt":"a","chosen":"yes","rejected":"no"}"#,
        Some(1),
        &["no column `prompt`", "nearest present column is `promt`", "share no beginning"],
    );
    assert_fault(
        "p.jsonl",
        r#"{"chosen":[{"role":"assistant","content":"x"}],"rejected":[{"role":"assistant","content":"y"}]}"#,
        Some(1),
        &["no column `prompt`", "share no message"],
    );
}

#[test]
fn a_wrong_type_is_an_error_and_an_unknown_column_is_not() {
    assert_fault(
        "p.jsonl",
        r#"{"prompt":"a","chosen":3,"rejected":"c"}"#,
        Some(1),
        &["`chosen` is a number"],
    );
    assert_fault(
        "p.jsonl",
        format!("{GOOD}\n{{\"prompt\":[\"a\"],\"chosen\":\"b\",\"rejected\":\"c\"}}"),
        Some(2),
        &["`prompt` is a list, not a string"],
    );
    assert_fault("p.jsonl", format!("{GOOD}\n[1]"), Some(2), &["the record is a list"]);
    assert_fault("p.json", "[1]", Some(1), &["the record is a number"]);
    assert_fault(
        "p.jsonl",
        r#"{"prompt":"q","chosen":[{"role":"assistant","content":"x"}],"rejected":"y"}"#,
        Some(1),
        &["`rejected` is a string, not a list of messages"],
    );
    assert_fault(
        "p.jsonl",
        r#"{"system":4,"question":"q","chosen":"a","rejected":"b"}"#,
        Some(1),
        &["`system` is a number"],
    );
    let (_folder, path) = temporary(
        "p.jsonl",
        r#"{"prompt":"a","chosen":" b","rejected":" c","margin":2.5,"id":[1],"x":null}"#,
    );
    assert_eq!(read_records(&path).unwrap().len(), 1);
}

#[test]
fn messages_are_validated() {
    assert_fault(
        "p.jsonl",
        conversation(r#"{"role":"asistant","content":"q"}"#),
        Some(1),
        &["unknown role `asistant`", "did you mean `assistant`?"],
    );
    assert_fault(
        "p.jsonl",
        conversation(r#"{"role":"user","content":[{"type":"text"}]}"#),
        Some(1),
        &["`user` message", "list of parts", "`content`"],
    );
    assert_fault(
        "p.jsonl",
        conversation(r#"{"role":"user","content":7}"#),
        Some(1),
        &["`content` is a number"],
    );
    assert_fault(
        "p.jsonl",
        conversation(r#"{"role":"user","contents":"q"}"#),
        Some(1),
        &["without `content`", "`contents`"],
    );
    assert_fault("p.jsonl", conversation(r#"{"content":"q"}"#), Some(1), &["without `role`"]);
    assert_fault("p.jsonl", conversation(r#""q""#), Some(1), &["a message that is a string"]);
    assert_fault(
        "p.jsonl",
        r#"{"prompt":[{"role":"user","content":"q"}],"chosen":[{"role":"user","content":"x"}],"rejected":[{"role":"assistant","content":"y"}]}"#,
        Some(1),
        &["response in column `chosen` begins with a `user` message"],
    );
    assert_fault(
        "p.json",
        r#"[{"conversations":[],"chosen":{"from":"gpt","value":"a"},"rejected":{"from":"gpt","value":"b"}}]"#,
        Some(1),
        &["`conversations` is an empty list"],
    );
    assert_fault(
        "p.json",
        r#"[{"conversations":[{"from":"robot","value":"q"}],"chosen":"a","rejected":"b"}]"#,
        Some(1),
        &["unknown role `robot`"],
    );
}

#[test]
fn files_that_hold_nothing_or_something_else_say_so() {
    assert_fault("p.jsonl", "", None, &["the file is empty"]);
    assert_fault("p.jsonl", "\n \n", None, &["the file is empty"]);
    assert_fault("p.json", "[]", None, &["no record"]);
    assert_fault("p.json", r#"{"prompt":[],"chosen":[],"rejected":[]}"#, None, &["no record"]);
    assert_fault("p.parquet", b"PAR1\x00\x00", None, &["Parquet"]);
    assert_fault(
        "p.json",
        r#"{"train":[{"chosen":"a"}],"test":[{"chosen":"b"}]}"#,
        None,
        &["several lists", "`train`, `test`"],
    );
    assert_fault(
        "p.json",
        r#"{"prompt":["a"],"chosen":["b","c"],"rejected":["d","e"]}"#,
        None,
        &["`prompt` has 1 values and `chosen` has 2"],
    );
    let gzip = std::fs::read(file("pairs/conversational.jsonl.gz")).unwrap();
    assert_fault("p.jsonl.gz", &gzip[..gzip.len() / 2], None, &["gzip stream is broken or cut short"]);
    let folder = tempfile::tempdir().unwrap();
    let error = read_records(folder.path()).unwrap_err();
    assert!(error.to_string().contains("this is a folder"), "{error}");
    let missing = read_records(&folder.path().join("none.jsonl")).unwrap_err();
    assert!(matches!(missing, Error::Io { .. }) && missing.to_string().contains("none.jsonl"), "{missing}");
}

#[test]
fn a_file_without_a_usable_pair_says_why() {
    let (_folder, path) =
        temporary("p.jsonl", format!("{}\n{}", GOOD.replace(" b", " "), GOOD.replace(" c", "")));
    let error = load_pairs(&path, &encoder("chatml"), golden_limits()).unwrap_err();
    let message = error.to_string();
    assert!(
        message.contains("no usable pair") && message.contains("2 dropped: a response is empty (at 1, 2)"),
        "{message}"
    );
    assert_eq!(error.exit_code(), 3);
}

#[test]
fn a_template_that_raises_names_the_record() {
    let encoder = TextEncoder::load(&file("chatml"), Some(&file("templates/raises.jinja"))).unwrap();
    let error = load_pairs(&file("pairs/conversational.jsonl"), &encoder, golden_limits()).unwrap_err();
    let message = error.to_string();
    assert!(
        message.ends_with(
            "conversational.jsonl:2: the chat template refuses this conversation: System role not supported \
             (line 1 of the template)"
        ),
        "{message}"
    );
}

#[test]
fn the_first_bad_record_in_file_order_is_the_one_reported() {
    let bad = "{\"prompt\":\"a\",\"chosen\":1,\"rejected\":2}\n";
    let (_folder, path) =
        temporary("p.jsonl", format!("{}{}", format!("{GOOD}\n").repeat(40), bad.repeat(400)));
    for _ in 0..5 {
        let error = load_pairs(&path, &encoder("chatml"), golden_limits()).unwrap_err();
        assert!(error.to_string().contains(":41: "), "{error}");
    }
}

#[test]
fn a_template_that_writes_the_prompt_otherwise_before_a_response_shortens_it() {
    let rewrites =
        "{% for m in messages %}{{ m.content if loop.last else 'old ' + m.content }}<|im_end|>{% endfor %}";
    let (_folder, template) = temporary("t.jinja", rewrites);
    let encoder = TextEncoder::load(&file("chatml"), Some(&template)).unwrap();
    let dataset = load_pairs(&file("pairs/one_record.json"), &encoder, golden_limits()).unwrap();
    assert!(dataset.pairs[0].prompt.is_empty(), "nothing is common from the first token on");
    let text = encoder.tokenizer.decode(&dataset.pairs[0].rejected, false).unwrap();
    assert_eq!(text, "old What color is the sky?<|im_end|>It is green.<|im_end|>");
    assert_eq!(dataset.report.tally(mmpo_fast::data::Cause::PromptShortened).count, 1);

    let thinks = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}";
    let (_folder, template) = temporary("t.jinja", thinks);
    let encoder = TextEncoder::load(&file("chatml"), Some(&template)).unwrap();
    let dataset = load_pairs(&file("pairs/one_record.json"), &encoder, golden_limits()).unwrap();
    let tally = dataset.report.tally(mmpo_fast::data::Cause::PromptShortened);
    assert_eq!((tally.count, tally.first.as_slice()), (1, [1].as_slice()));
    let text = encoder.tokenizer.decode(&dataset.pairs[0].prompt, false).unwrap();
    assert!(text.ends_with("<|im_start|>assistant\n"), "{text:?}");
}

#[test]
fn conversations_without_a_template_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(file("chatml").join(name), folder.path().join(name)).unwrap();
    }
    let encoder = TextEncoder::load(folder.path(), None).unwrap();
    let error = load_pairs(&file("pairs/one_record.json"), &encoder, golden_limits()).unwrap_err();
    assert!(
        matches!(error, Error::Model { .. }) && error.to_string().contains("no chat template"),
        "{error}"
    );
    assert!(load_pairs(&file("pairs/text.jsonl"), &encoder, golden_limits()).is_ok());
}

#[test]
fn a_folder_without_a_tokenizer_says_what_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    let load = |path: &Path| match TextEncoder::load(path, None) {
        Err(Error::Model { message, help, .. }) => format!("{message}; {help}"),
        other => panic!("no model error: {other:?}"),
    };
    assert!(load(folder.path()).contains("no tokenizer.json"));
    assert!(load(&folder.path().join("nowhere")).contains("check the path of the model folder"));
    std::fs::write(folder.path().join("tokenizer.model"), "x").unwrap();
    assert!(load(folder.path()).contains("sentencepiece"));
    std::fs::write(folder.path().join("tokenizer.json"), "{}").unwrap();
    assert!(load(folder.path()).contains("not a tokenizer"));
    std::fs::copy(file("chatml/tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
    for (config, words) in [
        ("{", "broken JSON"),
        (r#"{"eos_token":"<|nope|>"}"#, "`eos_token` is \"<|nope|>\", which is no token"),
        (r#"{"eos_token":3}"#, "`eos_token` is neither a string nor an object"),
        (r#"{"chat_template":3}"#, "`chat_template` is neither a string nor a list"),
        (r#"{"chat_template":"{% if %}"}"#, "does not compile"),
        (r#"{"added_tokens_decoder":{"5":{"contents":"<|im_end|>"}}}"#, "a broken entry `5`"),
    ] {
        std::fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
        let message = load(folder.path());
        assert!(message.contains(words), "{words:?} is not in {message:?}");
    }
}
