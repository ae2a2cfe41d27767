//! What looks wrong in a file that can be read: counted once for each kind, with an example.

use mmpo_fast::data::{Cause, PairDataset, load_pairs};
use serde_json::{Value, json};

use crate::*;

fn load(values: &[Value]) -> PairDataset {
    let lines: Vec<String> = values.iter().map(Value::to_string).collect();
    let (_folder, path) = temporary("pairs.jsonl", lines.join("\n"));
    load_pairs(&path, &encoder("chatml"), golden_limits()).unwrap()
}

/// One warning, at these lines and with these words; and none for the good pair.
#[track_caller]
fn assert_warned(values: &[Value], cause: Cause, lines: &[usize], words: &[&str]) {
    let dataset = load(values);
    assert_eq!(dataset.report.tally(cause).first, lines);
    let warnings = dataset.report.warnings();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    for word in words {
        assert!(warnings[0].contains(word), "{word:?} is not in {:?}", warnings[0]);
    }
}

fn text(prompt: &str, chosen: &str, rejected: &str) -> Value {
    json!({"prompt": prompt, "chosen": chosen, "rejected": rejected})
}

fn good() -> Value {
    text("Name a tree, please:", " An oak.", " A sofa.")
}

#[test]
fn a_good_file_has_no_warning() {
    let values = [good(), text("Hi", "Hi there", "Hi you"), text("List?", "[1, 2]", "['a'] or so")];
    assert_eq!(load(&values).report.warnings(), [""; 0]);
    let limits = golden_limits();
    // Their last pair has two equal responses.
    for name in ["conversational.jsonl", "sharegpt.json", "orca.jsonl", "ultrafeedback.jsonl"] {
        let dataset = load_pairs(&file("pairs").join(name), &encoder("chatml"), limits).unwrap();
        let warnings = dataset.report.warnings();
        assert!(warnings.len() == 1 && warnings[0].contains("identical"), "{name}: {warnings:?}");
    }
}

#[test]
fn prompts_repeated_in_responses_are_shown() {
    let prompt = "\n\nHuman: Name a tree.\n\nAssistant:";
    let repeated = text(prompt, &format!("{prompt} An oak."), &format!("{prompt} A sofa."));
    let once = text("Name a tree.", "Name a tree. An oak.", "A sofa.");
    assert_warned(
        &[good(), repeated, once],
        Cause::PromptRepeated,
        &[2, 3],
        &[
            "2 with a response that begins with the text of its prompt (at 2, 3), such as `",
            "Human: Name a tree.",
            "scored a second time",
        ],
    );
    let conversation =
        json!({"question": "Name a tree.", "chosen": "Name a tree. An oak.", "rejected": "A sofa."});
    assert_warned(&[conversation], Cause::PromptRepeated, &[1], &["`Name a tree. An oak.`"]);
}

#[test]
fn messages_of_the_prompt_in_the_responses_are_taken_off_and_counted() {
    let (ask, oak, sofa) = (
        json!({"role": "user", "content": "Name a tree."}),
        json!({"role": "assistant", "content": "An oak."}),
        json!({"role": "assistant", "content": "A sofa."}),
    );
    let repeated = json!({"prompt": [ask], "chosen": [ask, oak], "rejected": [ask, sofa]});
    let clean = json!({"prompt": [ask], "chosen": [oak], "rejected": [sofa]});
    let dataset = load(&[repeated, clean]);
    assert_eq!(parts(&dataset.pairs[0]), parts(&dataset.pairs[1]), "scored once");
    assert_eq!(dataset.report.tally(Cause::PromptTakenOff).first, [1]);
    assert!(dataset.report.to_string().contains("1 with the prompt's messages in a response too"));
}

#[test]
fn lists_written_as_text_are_shown() {
    let list = |answer: &str| {
        format!(
            "[{{'role': 'user', 'content': 'Name a tree.'}}, {{'role': 'assistant', 'content': '{answer}'}}]"
        )
    };
    let written = text("Name a tree.", &list("An oak."), &list("A sofa."));
    let prompt = text("[{\"role\": \"user\", \"content\": \"Hi\"}]", "a", "b");
    let strings = text("Name a tree.", "['An oak.']", "['A sofa.']");
    assert_warned(
        &[good(), written, prompt, strings],
        Cause::ListAsText,
        &[2, 3, 4],
        &["3 with a list written as text (at 2, 3, 4), such as `[{'role': 'user'", "ast.literal_eval"],
    );
}

#[test]
fn turns_of_the_user_in_responses_are_shown() {
    for turn in [
        "\nHuman:",
        "\nUser:",
        "<|im_start|>user\n",
        "<|user|>\n",
        "[INST]",
        "### Instruction:\n",
        "<start_of_turn>user",
    ] {
        let response = format!(" An oak.{turn} And another?");
        assert_warned(
            &[good(), text("Name a tree:", &response, " A sofa.")],
            Cause::UserTurnInResponse,
            &[2],
            &["1 with a turn of the user inside a response (at 2), such as `", "And another?"],
        );
    }
    let message = |role: &str, content: &str| json!({"role": role, "content": content});
    let record = json!({"prompt": [message("user", "a")], "chosen": [message("assistant", "b"), message("user", "c d"), message("assistant", "e")],
        "rejected": [message("assistant", "f")]});
    assert_warned(&[record], Cause::UserTurnInResponse, &[1], &["`c d`"]);
}

#[test]
fn pairs_that_come_again_are_shown() {
    assert_warned(&[good(), text("x", "a", "b"), good()], Cause::Repeated, &[3], &["1 repeated"]);
    let exchanged = text("Name a tree, please:", " A sofa.", " An oak.");
    assert_warned(&[good(), exchanged], Cause::Opposite, &[2], &["1 contradicted", "teach nothing"]);
    let same = text("x", "a", "a");
    assert_warned(&[good(), same], Cause::Identical, &[2], &["identical", "such as `a`", "prefer nothing"]);
}

#[test]
fn other_oddities_are_shown() {
    let message = |role: &str, content: &str| json!({"role": role, "content": content});
    let answered = json!({"prompt": [message("user", "a"), message("assistant", "Oak.")], "chosen": "b", "rejected": "c"});
    assert_warned(&[answered], Cause::PromptEndsWithAssistant, &[1], &["`Oak.`"]);
    let implicit = |more: Value| {
        let mut record = json!({"chosen": "The sun is hot", "rejected": "The sun is cold"});
        record.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        record
    };
    assert_warned(
        &[implicit(json!({"title": "Sun"}))],
        Cause::ImplicitPromptBesideText,
        &[1],
        &["`The sun is, and column title`", "rename it to `prompt`"],
    );
    let report = load(&[implicit(json!({"margin": 1.5}))]).report;
    assert_eq!(report.warnings(), [""; 0]);
    assert!(report.to_string().contains("1 without a prompt column"), "{report}");
    let twice = r#"{"prompt":"a b c","chosen":"x","chosen":"z","rejected":"y"}"#;
    let (_folder, path) = temporary("pairs.jsonl", twice);
    let dataset = load_pairs(&path, &encoder("chatml"), golden_limits()).unwrap();
    assert_eq!(dataset.report.tally(Cause::RepeatedKey).example.as_deref(), Some("chosen"));
    assert_eq!(
        encoder("chatml").tokenizer.decode(&dataset.pairs[0].chosen, true).unwrap(),
        "z",
        "as Python's json"
    );
}
