//! README's first command for one's own data, on the same conversations in five kinds of files that people have: none
//! needs an edit, and all train on the same tokens.

use std::io::Write as _;

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};

use crate::harness::Workplace;

const SYSTEM: &str = "Answer in one line.";

/// Question, chosen and rejected answer.
fn conversations() -> Vec<[String; 3]> {
    let question = |n: usize| format!("What is {n} plus {}?", n + 3);
    let right = |n: usize| format!("It is {}. Happy to help!", 2 * n + 3);
    let wrong = |n: usize| format!("{}.\nEveryone knows that.", 2 * n + 4);
    (1..=12).map(|n| [question(n), right(n), wrong(n)]).collect()
}

fn records(of: impl Fn(&str, &str, &str) -> Value) -> Vec<Value> {
    conversations().iter().map(|[question, chosen, rejected]| of(question, chosen, rejected)).collect()
}

fn lines(records: &[Value], end: &str) -> String {
    records.iter().map(|record| format!("{record}{end}")).collect()
}

/// LLaMA-Factory's ShareGPT pairs: a list, printed over many lines.
fn sharegpt() -> Vec<u8> {
    let records = records(|question, chosen, rejected| {
        json!({
            "conversations": [{"from": "system", "value": SYSTEM}, {"from": "human", "value": question}],
            "chosen": {"from": "gpt", "value": chosen},
            "rejected": {"from": "gpt", "value": rejected},
        })
    });
    serde_json::to_vec_pretty(&records).unwrap()
}

/// UltraFeedback's binarised layout: the prompt once more as text, whole conversations, and scores.
fn ultrafeedback() -> Vec<u8> {
    let records = records(|question, chosen, rejected| {
        let conversation = |answer: &str| {
            json!([
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ])
        };
        json!({
            "prompt": question,
            "prompt_id": "0a1b",
            "chosen": conversation(chosen),
            "rejected": conversation(rejected),
            "score_chosen": 8.5,
            "score_rejected": 3.0,
        })
    });
    lines(&records, "\n").into_bytes()
}

/// Orca's columns, saved by a program for Windows.
fn orca() -> Vec<u8> {
    let records = records(
        |question, chosen, rejected| json!({"system": SYSTEM, "question": question, "chosen": chosen, "rejected": rejected}),
    );
    ["\u{feff}", &lines(&records, "\r\n")].concat().into_bytes()
}

/// Alpaca pairs with an empty `input`.
fn alpaca() -> Vec<u8> {
    let records = records(
        |question, chosen, rejected| json!({"instruction": question, "input": "", "system": SYSTEM, "chosen": chosen, "rejected": rejected}),
    );
    serde_json::to_vec(&json!({ "train": records })).unwrap()
}

/// ms-swift's messages, under gzip.
fn swift() -> Vec<u8> {
    let records = records(|question, chosen, rejected| {
        json!({
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": question},
                {"role": "assistant", "content": chosen},
            ],
            "rejected_response": rejected,
        })
    });
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(lines(&records, "\n").as_bytes()).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn files_of_five_kinds_train_as_they_are() {
    let work = Workplace::new();
    let files: [(&str, Vec<u8>); 5] = [
        ("sharegpt.json", sharegpt()),
        ("ultrafeedback.jsonl", ultrafeedback()),
        ("orca.jsonl", orca()),
        ("alpaca.json", alpaca()),
        ("swift.jsonl.gz", swift()),
    ];
    let mut metrics = Vec::new();
    for (name, content) in &files {
        work.write(name, content);
        let finished = work.succeed(&format!(
            "train --model base --data {name} --output run-{name} --device cpu --threads 1 --max-steps 2"
        ));
        assert!(!finished.stderr.contains("WARN"), "{name}: {}", finished.stderr);
        metrics.push(work.metrics(&format!("run-{name}")));
    }
    assert_eq!(metrics[0].len(), 2);
    for ((name, _), found) in files.iter().zip(&metrics) {
        assert_eq!(found, &metrics[0], "{name} trains otherwise than {}", files[0].0);
    }
}
