//! Properties of every record: its meaning is its own, and no text of a prompt is lost without a word.

use mmpo_fast::data::Body;
use proptest::prelude::*;
use proptest::sample::subsequence;
use serde_json::{Map, Value, json};

use crate::*;

/// Columns with a prompt or a part of one, each with a text that no other has.
fn columns() -> Vec<(&'static str, Value)> {
    let user = |text: &str| json!({"role": "user", "content": text});
    vec![
        ("prompt", json!("text-of-prompt")),
        ("prompt", json!([user("list-of-prompt")])),
        ("instruction", json!("text-of-instruction")),
        ("input", json!("text-of-input")),
        ("question", json!("text-of-question")),
        ("query", json!("text-of-query")),
        ("problem", json!("text-of-problem")),
        ("post", json!("text-of-post")),
        ("user", json!("text-of-user")),
        ("system", json!("text-of-system")),
        ("system_prompt", json!("text-of-system-prompt")),
        ("messages", json!([user("text-of-messages")])),
        ("conversations", json!([{"from": "human", "value": "text-of-conversations"}])),
        ("conversation", json!([user("text-of-conversation")])),
        ("dialogue", json!([user("text-of-dialogue")])),
        ("chat", json!([user("text-of-chat")])),
        ("context", json!("text-of-context")),
        ("history", json!([["text-of-history", "answer-of-history"]])),
        ("Prompt", json!("capital-of-prompt")),
        ("id", json!("not-a-prompt")),
    ]
}

/// The two responses: texts that begin alike, messages, and whole conversations.
fn responses() -> Vec<[Value; 2]> {
    let user = json!({"role": "user", "content": "shared-question"});
    let answer = |text: &str| json!({"role": "assistant", "content": text});
    vec![
        [json!("The same start: good"), json!("The same start: bad")],
        [json!([answer("good")]), json!([answer("bad")])],
        [json!([user, answer("good")]), json!([user, answer("bad")])],
        [answer("good"), answer("bad")],
    ]
}

/// All texts in a value, each with its words.
fn texts(value: &Value) -> Vec<&str> {
    match value {
        Value::String(text) => vec![text],
        Value::Array(items) => items.iter().flat_map(texts).collect(),
        Value::Object(members) => members
            .iter()
            .filter(|(key, _)| !["role", "from"].contains(&key.as_str()))
            .flat_map(|(_, v)| texts(v))
            .collect(),
        _ => Vec::new(),
    }
}

fn record(columns: &[(&'static str, Value)], [chosen, rejected]: [Value; 2]) -> Value {
    let mut record: Map<String, Value> =
        columns.iter().map(|(name, value)| (name.to_string(), value.clone())).collect();
    record.insert("chosen".to_string(), chosen);
    record.insert("rejected".to_string(), rejected);
    Value::Object(record)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Whatever columns stand together, every text is in the pair, or the record is refused by the name of one of its
    /// columns.
    #[test]
    fn no_text_of_a_prompt_is_lost_without_a_word(
        chosen in subsequence(columns(), 0..4), pair in 0..responses().len()
    ) {
        let record = record(&chosen, responses()[pair].clone());
        match read_values(std::slice::from_ref(&record)) {
            Ok(records) => {
                let found = match &records[0].body {
                    Body::Text { prompt, .. } => prompt.clone(),
                    Body::Conversation { prompt, .. } => json!(prompt).to_string(),
                };
                let noted = records[0].notes.iter().any(|note| note.cause == mmpo_fast::data::Cause::PromptColumnDiffers);
                for (name, value) in record.as_object().unwrap() {
                    if ["chosen", "rejected", "id"].contains(&name.as_str()) || (name == "prompt" && noted) {
                        continue;
                    }
                    for text in texts(value) {
                        prop_assert!(found.contains(text), "{} of {} is not in {}", text, record, found);
                    }
                }
            }
            Err(error) => {
                let message = error.to_string();
                let names = record.as_object().unwrap().keys().filter(|name| *name != "id");
                let named = names.into_iter().any(|name| message.contains(&format!("`{name}`"))) || message.contains("`prompt`");
                prop_assert!(named, "{}: {}", record, message);
            }
        }
    }

    /// The order of columns changes nothing.
    #[test]
    fn the_order_of_columns_changes_nothing(
        chosen in subsequence(columns(), 1..4).prop_shuffle(), pair in 0..responses().len()
    ) {
        let responses = responses()[pair].clone();
        let mut sorted = chosen.clone();
        sorted.sort_by_key(|(name, _)| *name);
        // Two values of one name are one column, the last.
        sorted.dedup_by_key(|(name, _)| *name);
        let shuffled: Vec<_> = chosen.into_iter().filter(|column| sorted.contains(column)).collect();
        let read = |columns: &[(&'static str, Value)]| {
            read_values(&[record(columns, responses.clone())]).map(|records| records[0].body.clone()).map_err(|error| error.exit_code())
        };
        prop_assert_eq!(read(&shuffled), read(&sorted));
    }

    /// Records in another order are the same records.
    #[test]
    fn shuffled_records_give_the_same_pairs(
        order in Just((0..12).collect::<Vec<usize>>()).prop_shuffle()
    ) {
        let message = |role: &str, text: String| json!({"role": role, "content": text});
        let lines: Vec<Value> = (0..12).map(|n| {
            let (ask, good, bad) = (message("user", format!("ask {n}")), message("assistant", format!("good {n}")), message("assistant", format!("bad {n}")));
            match n % 6 {
                0 => json!({"prompt": [ask], "chosen": [good], "rejected": [bad]}),
                1 => json!({"chosen": [ask, good], "rejected": [ask, bad]}),
                2 => json!({"system": format!("system {n}"), "chosen": [ask, good], "rejected": [ask, bad]}),
                3 => json!({"messages": [ask, good], "rejected_response": format!("bad {n}")}),
                4 => json!({"instruction": format!("ask {n}"), "input": "x", "chosen": "good", "rejected": "bad", "history": [["a", "b"]]}),
                _ => json!({"conversations": [{"from": "human", "value": format!("ask {n}")}], "chosen": good, "rejected": bad}),
            }
        }).collect();
        let straight = read_values(&lines).unwrap();
        let shuffled: Vec<Value> = order.iter().map(|&n| lines[n].clone()).collect();
        for (record, &n) in read_values(&shuffled).unwrap().iter().zip(&order) {
            prop_assert_eq!(&record.body, &straight[n].body);
        }
    }
}
