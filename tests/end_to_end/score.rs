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
    work.succeed(&format!("{SCORE} --model base --reference base --output same.jsonl"));
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
    let wins = margins.iter().filter(|&&margin| margin > 0.0).count() as f64 / 11.0;
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
