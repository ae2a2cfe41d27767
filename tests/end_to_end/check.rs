//! `check`: an account of pairs with neither weights nor a device.

use serde_json::Value;

use crate::harness::*;

fn account(workplace: &Workplace, arguments: &str) -> Value {
    let finished = workplace.succeed(arguments);
    serde_json::from_str(&finished.stdout).unwrap_or_else(|error| panic!("{error}: {}", finished.stdout))
}

/// The golden model without its weights.
fn without_weights() -> Workplace {
    let workplace = Workplace::new();
    std::fs::remove_file(workplace.path("base/model.safetensors")).unwrap();
    workplace
}

#[test]
fn the_account_needs_no_weights_and_agrees_with_a_training_run() {
    let workplace = without_weights();
    let limits = "--max-length 160 --max-prompt-length 64";
    let account = account(&workplace, &format!("check --model base --data pairs.jsonl {limits} --json"));
    assert_eq!(account["usable"], true);
    assert_eq!(account["limits"]["max_length"], 160);
    assert_eq!(account["kept"], 11, "as many as the training tests have");
    let sum = |part: &str| account[part].as_u64().unwrap();
    assert_eq!(sum("records"), sum("kept") + sum("dropped"));
    let problem =
        |name: &str| account["problems"].as_array().unwrap().iter().find(|row| row["name"] == name).cloned();
    let dropped: u64 =
        account["problems"].as_array().unwrap().iter().map(|row| row["dropped"].as_u64().unwrap()).sum();
    assert_eq!(dropped, sum("dropped"));
    assert!(problem("prompt_cut").is_some(), "{account:#}");
    let bins = account["lengths"]["histogram"].as_array().unwrap();
    let in_bins: u64 = bins.iter().map(|bin| bin["count"].as_u64().unwrap()).sum();
    assert!(in_bins >= sum("kept") && in_bins <= sum("records"));
    let budget =
        account["budgets"].as_array().unwrap().iter().find(|row| row["holds"] == true).unwrap().clone();
    assert_eq!(budget["tokens"], 4096);
    assert_eq!(account["pairs"].as_array().unwrap().len(), 2);
}

#[test]
fn the_text_names_problems_places_and_flags_and_shows_pairs() {
    let workplace = without_weights();
    let account = "check --model base --data pairs.jsonl --max-length 160 --max-prompt-length 64 --show 1";
    let plain = workplace.succeed(account).stdout;
    for part in [
        "records are kept",
        "Problems",
        "--on-long-prompt decides",
        "median",
        "<- max_length 160",
        "4096",
        "usable",
    ] {
        assert!(plain.contains(part), "no {part:?} in {plain}");
    }
    assert!(!plain.contains('\u{1b}'), "no colours where standard output is no terminal");
    let colored = workplace.succeed(&format!("{account} --color always")).stdout;
    assert!(colored.contains("\u{1b}[36m"), "special tokens have a colour");
    assert!(colored.contains("\u{1b}[1;35m|"), "the boundary has a colour");
    let mut without = String::new();
    let mut rest = colored.as_str();
    while let Some((before, code)) = rest.split_once("\u{1b}[") {
        without.push_str(before);
        rest = code.split_once('m').unwrap().1;
    }
    assert_eq!(without + rest, plain, "colours are all that differs");
}

#[test]
fn what_would_end_a_training_run_has_the_exit_code_of_data() {
    let workplace = without_weights();
    let good = r#"{"prompt": "one", "chosen": " yes", "rejected": " no"}"#;
    let lines =
        [good, r#"{"prompt": "two", "chosen": 3, "rejected": " no"}"#, r#"{"question": "three"}"#, good];
    workplace.write("mixed.jsonl", lines.join("\n"));
    let finished = workplace.run("check --model base --data mixed.jsonl");
    assert_eq!(finished.code, Some(3), "{}", finished.stderr);
    for part in ["mixed.jsonl:2: ", "mixed.jsonl:3: ", "2 of 4 records are kept", "not usable"] {
        assert!(finished.stdout.contains(part), "no {part:?} in {}", finished.stdout);
    }
    assert!(finished.stderr.contains("a training run would end at 2 records"), "{}", finished.stderr);
    // The same policies that let a training run go on.
    let dropped = account(&workplace, "check --model base --data mixed.jsonl --on-refused drop --json");
    assert_eq!(
        (&dropped["kept"], &dropped["dropped"], &dropped["errors"]),
        (&2.into(), &2.into(), &0.into())
    );
    let strict =
        workplace.run("check --model base --data mixed.jsonl --on-refused drop --on-duplicate error");
    assert_eq!(strict.code, Some(3));
    workplace.write("empty.jsonl", r#"{"prompt": "one", "chosen": "", "rejected": " no"}"#);
    let none = workplace.run("check --model base --data empty.jsonl");
    assert_eq!(none.code, Some(3));
    assert!(none.stderr.contains("no usable pair in 1 records"), "{}", none.stderr);
    workplace.write("nothing.jsonl", "");
    let nothing = workplace.run("check --model base --data nothing.jsonl");
    assert_eq!(nothing.code, Some(3));
    assert!(nothing.stderr.contains("no record can be read"), "{}", nothing.stderr);
    workplace.refuse("check --model none --data mixed.jsonl", 5, &["none"]);
    workplace.refuse(
        "check --model base --data mixed.jsonl --html mixed.jsonl",
        2,
        &["does not end in .html"],
    );
    workplace.refuse("check --model base --data mixed.jsonl --on-empty keep", 2, &["must be drop or error"]);
}

#[test]
fn the_page_fetches_nothing_and_shows_hostile_text_as_text() {
    let workplace = without_weights();
    let hostile = "<script>alert(1)</script>\u{1b}[2J{{ 7 * 7 }}\u{202e}";
    let record = serde_json::json!({"prompt": hostile, "chosen": " yes", "rejected": hostile});
    workplace.write("pairs.jsonl", record.to_string());
    let finished =
        workplace.succeed("check --model base --data pairs.jsonl --html check.html --color always");
    assert!(finished.stdout.contains("check.html"));
    assert!(!finished.stdout.contains("\u{1b}[2J"), "a record cannot command the terminal");
    assert!(finished.stdout.contains("\\u{1b}[2J"), "{}", finished.stdout);
    let page = String::from_utf8(workplace.read("check.html")).unwrap();
    assert!(page.contains("&lt;script&gt;alert(1)"), "{page}");
    for never in ["<script", "http://", "https://", "src=", "@import", "\u{1b}", "\u{202e}"] {
        assert!(!page.contains(never), "{never:?} is in the page");
    }
    assert!(page.contains("{{ 7 * 7 }}"), "text of a record is no template");
    assert!(page.contains("prefers-color-scheme: dark") && page.contains("default-src 'none'"));
    assert!(page.contains("class=\"boundary\""));
}

#[test]
fn policies_of_a_training_run_are_in_its_record() {
    let workplace = Workplace::new();
    let lines = String::from_utf8(workplace.read("pairs.jsonl")).unwrap();
    let first = lines.lines().next().unwrap();
    workplace.write("pairs.jsonl", format!("{lines}{first}\n{{\"prompt\": 1}}\n"));
    workplace.refuse(&format!("{TRAIN} --output refused --max-steps 1"), 3, &["pairs.jsonl:"]);
    workplace.succeed(&format!("{TRAIN} --output run --max-steps 1 --on-refused drop --on-duplicate drop"));
    let resolved = String::from_utf8(workplace.read("run/resolved.toml")).unwrap();
    assert!(
        resolved.contains("on_refused = \"drop\"\n") && resolved.contains("on_empty = \"drop\"\n"),
        "{resolved}"
    );
    let report = String::from_utf8(workplace.read("run/report.html")).unwrap();
    for part in ["no pair can be read from the record", "repeated: the same as an earlier record"] {
        assert!(report.contains(part), "no {part:?} in the report");
    }
}
