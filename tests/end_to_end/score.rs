//! `score` against numbers that transformers made.

use serde_json::Value;

use crate::harness::{Workplace, assert_close, golden, number};

const SCORE: &str = "score --data pairs.jsonl --max-length 160 --max-prompt-length 64 --device cpu";
const NAMES: &str =
    "record logp_chosen logp_rejected tokens_chosen tokens_rejected entropy_chosen entropy_rejected";

/// The golden numbers of a 1-based record.
fn of_record<'a>(golden: &'a Value, line: &serde_json::Map<String, Value>) -> &'a Value {
    &golden["pairs"][line["record"].as_u64().unwrap() as usize - 1]
}

#[test]
fn scores_agree_with_transformers_in_the_order_of_the_file() {
    let work = Workplace::new();
    for name in ["tied", "bias", "rope_linear", "rope_llama3", "qwen2", "mistral"] {
        work.bring(name);
    }
    for name in ["base", "tied", "bias", "rope_linear", "rope_llama3", "qwen2", "mistral"] {
        let golden = golden(name);
        let finished = work.succeed(&format!("{SCORE} --model {name} --output {name}.jsonl"));
        let lines = work.lines(&format!("{name}.jsonl"));
        // Record 9 has an empty response.
        let records: Vec<u64> = lines.iter().map(|line| line["record"].as_u64().unwrap()).collect();
        assert_eq!(records, [1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12]);
        assert!(finished.stderr.contains("1 dropped: a response is empty (at 9)"), "{}", finished.stderr);
        for line in &lines {
            assert_eq!(line.keys().cloned().collect::<Vec<_>>().join(" "), NAMES);
            let pair = of_record(&golden, line);
            for side in ["chosen", "rejected"] {
                for quantity in ["logp", "entropy"] {
                    let field = format!("{quantity}_{side}");
                    let what = format!("{name}, record {}, {field}", line["record"]);
                    assert_close(number(&line[&field]), number(&pair[&field]), 1e-3, &what);
                }
                let tokens = pair[format!("{side}_ids")].as_array().unwrap().len() as u64;
                assert_eq!(line[&format!("tokens_{side}")].as_u64(), Some(tokens));
            }
        }
    }
}

#[test]
fn rewards_are_against_the_reference() {
    let work = Workplace::new();
    work.bring("tied");
    let same = work.succeed(&format!("{SCORE} --model base --reference base --output same.jsonl")).stdout;
    let tied = same.lines().find(|line| line.starts_with("reward accuracy"));
    assert!(tied.is_some_and(|line| line.ends_with(" 50.0 %")), "ties count as half: {same}");
    for line in work.lines("same.jsonl") {
        for name in ["reward_chosen", "reward_rejected", "margin"] {
            assert_eq!(line[name].as_f64(), Some(0.0), "{line:?}");
        }
    }

    let (policy, reference) = (golden("base"), golden("tied"));
    let finished =
        work.succeed(&format!("{SCORE} --model base --reference tied --beta 0.5 --output other.jsonl"));
    let mut margins = Vec::new();
    for line in work.lines("other.jsonl") {
        let reward = |field: &str| {
            let logp = |golden: &Value| number(&of_record(golden, &line)[field]);
            0.5 * (logp(&policy) - logp(&reference))
        };
        let (chosen, rejected) = (reward("logp_chosen"), reward("logp_rejected"));
        assert_close(number(&line["reward_chosen"]), chosen, 1e-3, "reward_chosen");
        assert_close(number(&line["reward_rejected"]), rejected, 1e-3, "reward_rejected");
        assert_close(number(&line["margin"]), chosen - rejected, 1e-3, "margin");
        margins.push(number(&line["margin"]));
    }

    // The table at the end: a name, then the numbers of both sides.
    let row = |name: &str| -> Vec<String> {
        let line = finished.stdout.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("no {name} in {}", finished.stdout))
            .split_whitespace()
            .map(str::to_string)
            .collect()
    };
    assert_eq!(row("pairs "), ["11"]);
    let mean = margins.iter().sum::<f64>() / margins.len() as f64;
    assert_close(row("reward margin ")[0].parse().unwrap(), mean, 1e-4, "mean margin");
    // One pair has the same text twice: a tie.
    let half = |margin: &f64| if *margin == 0.0 { 0.5 } else { f64::from(u8::from(*margin > 0.0)) };
    let wins = margins.iter().map(half).sum::<f64>() / 11.0;
    assert_eq!(row("reward accuracy "), [format!("{:.1}", 100.0 * wins), "%".into()]);
    for name in ["log-prob ", "log-prob a token ", "entropy ", "tokens ", "reward "] {
        assert_eq!(
            row(name).iter().rev().take(2).filter(|text| text.parse::<f64>().is_ok()).count(),
            2,
            "{name}"
        );
    }
    assert_eq!(row("scores "), ["other.jsonl"]);
}

#[test]
fn the_micro_batches_do_not_change_a_score() {
    let work = Workplace::new();
    work.succeed(&format!("{SCORE} --model base --output large.jsonl"));
    work.succeed(&format!("{SCORE} --model base --tokens-per-micro-batch 1 --output small.jsonl"));
    for (large, small) in work.lines("large.jsonl").iter().zip(work.lines("small.jsonl")) {
        for (name, value) in large {
            assert_close(number(&small[name]), number(value), 1e-5, name);
        }
    }
}

/// The margin and the token changes of each pair on a page of `score --explain`: `[chosen, rejected]` sums.
fn explained(page: &str) -> Vec<(u64, f64, [f64; 2])> {
    let nats = |text: &str| text.split(" nats").next().unwrap().parse::<f64>().unwrap();
    let sum = |text: &str| text.split("title=\"").skip(1).map(nats).sum::<f64>();
    let pair = |text: &str| {
        let (record, rest) = text.split_once(": margin ").unwrap();
        let (chosen, rejected) = rest.split_once("<h4>rejected: ").unwrap();
        (record.parse().unwrap(), nats(rest), [sum(chosen), sum(rejected)])
    };
    page.split("<h3>record ").skip(1).map(pair).collect()
}

#[test]
fn the_changes_of_tokens_add_up_to_the_margin_of_their_pair() {
    let work = Workplace::new();
    work.bring("tied");
    let models = "--model base --reference tied";
    let finished = work.succeed(&format!(
        "{SCORE} {models} --beta 1 --output s.jsonl --explain --show 4 --html tokens.html"
    ));
    assert!(finished.stdout.contains("scores  s.jsonl\npage    tokens.html\n"), "{}", finished.stdout);
    let page = String::from_utf8(work.read("tokens.html")).unwrap();
    let pairs = explained(&page);
    assert_eq!(pairs.len(), 4);
    for ((record, margin, [chosen, rejected]), line) in pairs.iter().zip(work.lines("s.jsonl")) {
        assert_eq!(Some(*record), line["record"].as_u64());
        // A thousandth of a nat is what the page shows, of up to a hundred tokens.
        assert_close(*margin, number(&line["margin"]), 1e-3, "margin");
        assert_close(chosen - rejected, *margin, 0.06, "sum of the tokens");
        assert!(chosen.abs() > 0.5 || rejected.abs() > 0.5, "the models differ: {chosen} {rejected}");
    }

    // On the terminal, of the first three pairs, and with no file of scores.
    let plain = work.succeed(&format!("{SCORE} {models} --explain")).stdout;
    assert_eq!(plain.matches("\nrecord ").count(), 3);
    assert!(!plain.contains('\u{1b}') && plain.contains("["), "{plain}");
    let margin = format!("record {}: margin {:+.3} nats", pairs[0].0, pairs[0].1);
    assert!(plain.contains(&margin), "no {margin} in {plain}");
    let colored = work.succeed(&format!("{SCORE} {models} --explain --show 1 --color always")).stdout;
    assert!(colored.contains("\u{1b}[38;5;") && colored.matches("\nrecord ").count() == 1, "{colored}");
}

/// A response that is cut within a character ends in bytes that no token completes. They count all the same.
#[test]
fn the_bytes_of_a_character_that_is_cut_count() {
    let work = Workplace::new();
    work.bring("tied");
    let crabs = "\u{1f980}".repeat(3);
    work.write(
        "crabs.jsonl",
        format!("{{\"prompt\": \"one\", \"chosen\": \" {crabs}\", \"rejected\": \" no\"}}\n"),
    );
    for length in [8, 9, 10] {
        work.succeed(&format!(
            "score --model base --reference tied --data crabs.jsonl --max-length {length} --max-prompt-length 2 --beta 1 \
             --device cpu --output s.jsonl --explain --html tokens.html"
        ));
        let page = String::from_utf8(work.read("tokens.html")).unwrap();
        assert!(page.contains('\u{fffd}'), "no character is cut: {page}");
        assert_close(explained(&page)[0].1, number(&work.lines("s.jsonl")[0]["margin"]), 1e-3, "margin");
    }
}

#[test]
fn the_reference_of_an_adapter_is_its_model() {
    let work = Workplace::new();
    let train = crate::harness::TRAIN;
    work.succeed(&format!("{train} --lora all --lora-rank 4 --max-steps 2 --output run"));
    let adapted = format!("{SCORE} --model base --adapter run/adapter --explain --show 2");
    work.succeed(&format!("{adapted} --html off.html"));
    work.succeed(&format!("{adapted} --reference base --html base.html --output s.jsonl --beta 1"));
    assert_eq!(work.read("off.html"), work.read("base.html"));
    let pairs = explained(&String::from_utf8(work.read("off.html")).unwrap());
    for ((_, margin, _), line) in pairs.iter().zip(work.lines("s.jsonl")) {
        assert!(*margin != 0.0, "the adapter changes nothing");
        assert_close(*margin, number(&line["margin"]), 1e-3, "margin");
    }
}

#[test]
fn explaining_needs_a_reference_and_a_place() {
    let work = Workplace::new();
    let score = format!("{SCORE} --model base");
    work.refuse(&format!("{score} --explain"), 2, &["`--explain` needs a reference", "--adapter DIR"]);
    let both = format!("{score} --reference base --explain --output -");
    work.refuse(&both, 2, &["would both write to standard output", "--html FILE"]);
    let pairs = work.read("pairs.jsonl");
    let over = format!("{score} --explain --reference base --html pairs.jsonl");
    work.refuse(&over, 2, &["`--html` = pairs.jsonl does not end in .html"]);
    assert_eq!(work.read("pairs.jsonl"), pairs);
    work.refuse(&format!("{score} --reference base --explain --show 0"), 2, &["must be from 1 to 1000"]);
    let finished = work.run(&format!("{score} --output s.jsonl --html page.html"));
    assert!(finished.code == Some(2) && finished.stderr.contains("--explain"), "{}", finished.stderr);
}
