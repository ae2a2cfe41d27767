//! Lengths against the context of a model: a default stays within it, and what goes beyond is said.

use serde_json::{Value, json};

use crate::harness::Workplace;

/// A response of far more tokens than the context of 512.
fn write_long_pair(work: &Workplace) {
    let numbers: Vec<String> = (0..900).map(|number| number.to_string()).collect();
    let pair = json!({"prompt": "Count.", "chosen": numbers.join(" "), "rejected": "No."});
    work.write("long.jsonl", format!("{pair}\n"));
}

fn change_config(work: &Workplace, key: &str, value: Value) {
    let mut config: Value = serde_json::from_slice(&work.read("base/config.json")).unwrap();
    config[key] = value;
    work.write("base/config.json", config.to_string());
}

/// Tokens of the long pair's prompt and chosen response that `score` reads with these options.
fn scored_tokens(work: &Workplace, options: &str) -> (u64, String) {
    let finished = work
        .succeed(&format!("score --model base --data long.jsonl --output s.jsonl --device cpu {options}"));
    (work.lines("s.jsonl")[0]["tokens_chosen"].as_u64().unwrap(), finished.stderr)
}

#[test]
fn a_default_length_stays_within_the_context() {
    let work = Workplace::new();
    write_long_pair(&work);
    let (tokens, log) = scored_tokens(&work, "");
    assert!(tokens < 512 && tokens > 400, "{tokens}");
    assert!(log.contains("max_length is 512, the context of base") && !log.contains("WARN"), "{log}");
    let (tokens, log) = scored_tokens(&work, "--max-length 600");
    assert!(tokens > 512, "{tokens}");
    assert!(log.contains("max_length 600 is beyond the context of base, 512 positions"), "{log}");

    work.succeed(
        "train --model base --data long.jsonl --output run --objective sft --device cpu --max-steps 1",
    );
    let resolved = String::from_utf8(work.read("run/resolved.toml")).unwrap();
    assert!(resolved.contains("max_length = 512\n"), "{resolved}");
    let log = work.succeed("generate --model base --prompt Hi --max-new-tokens 600 --device cpu").stderr;
    assert!(log.contains("--max-new-tokens 600 may pass the 512 positions"), "{log}");
}

#[test]
fn a_rope_that_depends_on_the_batch_is_refused_beyond_its_context() {
    let work = Workplace::new();
    write_long_pair(&work);
    change_config(&work, "rope_parameters", Value::Null);
    change_config(&work, "rope_scaling", json!({"type": "dynamic", "factor": 2.0}));
    scored_tokens(&work, "");
    let parts = ["the longest sequence has 600 positions", "--max-length 512 or less"];
    let score = "score --model base --data long.jsonl --output s.jsonl --device cpu --max-length 600";
    work.refuse(score, 4, &parts);
    let generate = "generate --model base --prompt Hi --max-new-tokens 600 --device cpu";
    work.refuse(generate, 4, &["beyond 512", "give --max-new-tokens "]);
}

#[test]
fn attention_dropout_is_refused_where_it_would_be_computed() {
    let work = Workplace::new();
    write_long_pair(&work);
    change_config(&work, "attention_dropout", json!(0.1));
    scored_tokens(&work, "");
    work.refuse("train --model base --data long.jsonl --output run", 4, &["`attention_dropout` is 0.1"]);
}

#[test]
fn unread_keys_are_one_warning() {
    let work = Workplace::new();
    write_long_pair(&work);
    let (tokens, log) = scored_tokens(&work, "");
    assert!(!log.contains("ignored"), "{log}");
    change_config(&work, "log_scale", json!(true));
    change_config(&work, "use_flashattn", json!(true));
    let (same, log) = scored_tokens(&work, "");
    assert_eq!(tokens, same);
    assert!(log.contains("does not read these keys: `log_scale`, `use_flashattn`"), "{log}");
}
