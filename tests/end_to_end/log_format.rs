//! Standard error for programs: with `--log-format json` each of its lines is a JSON object.

use serde_json::{Map, Value};

use crate::harness::{Finished, TRAIN, Workplace};

fn objects(finished: &Finished) -> Vec<Map<String, Value>> {
    let parse = |line: &str| {
        serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line:?} in {}", finished.stderr))
    };
    let lines: Vec<Map<String, Value>> = finished.stderr.lines().map(parse).collect();
    for line in &lines {
        assert!(line["timestamp"].as_str().is_some_and(|time| time.contains('T')), "{line:?}");
        assert!(line["level"].is_string(), "{line:?}");
    }
    lines
}

#[test]
fn log_and_progress_are_objects_and_the_metrics_are_the_same() {
    let work = Workplace::new();
    work.succeed(&format!("{TRAIN} --max-steps 3 --output text"));
    let finished = work.succeed(&format!("--log-format json {TRAIN} --max-steps 3 --output json"));
    let lines = objects(&finished);
    let last = |task: &str| lines.iter().rfind(|line| line.get("task").is_some_and(|found| found == task));
    let training = last("training").unwrap_or_else(|| panic!("{}", finished.stderr));
    for (name, value) in [("done", 3), ("total", 3)] {
        assert_eq!(training[name].as_u64(), Some(value), "{training:?}");
    }
    assert_eq!(training["unit"], "steps");
    assert!(training["message"].as_str().unwrap().starts_with("loss "), "{training:?}");
    assert!(training["seconds_left"].is_number(), "{training:?}");
    assert!(lines.iter().any(|line| line["level"] == "WARN"), "{}", finished.stderr);
    work.assert_same_bits("text", "json", 3);
    assert!(finished.stdout.contains("json/model"), "results are for people still: {}", finished.stdout);
    let quiet = work.succeed(&format!("{TRAIN} --max-steps 1 --output quiet --log-format=json --quiet"));
    assert!(objects(&quiet).iter().all(|line| line["level"] == "WARN"), "{}", quiet.stderr);
}

#[test]
fn errors_are_objects_too() {
    let work = Workplace::new();
    for (arguments, code, part) in [
        ("train --model absent --data pairs.jsonl --output new --log-format json", 5, "absent"),
        ("train --log-format json --no-such-flag", 2, "unknown flag"),
        ("train --log-format json --beta", 2, "a value is required"),
        ("--log-format=json --quiet train --model base --data absent --output new", 5, "absent"),
        ("score --model base --log-format json", 2, "--data"),
    ] {
        let finished = work.run(arguments);
        assert_eq!(finished.code, Some(code), "{arguments}: {}", finished.stderr);
        let lines = objects(&finished);
        let error = lines.last().unwrap();
        assert_eq!(
            (error["level"].as_str(), error["exit_code"].as_i64()),
            (Some("ERROR"), Some(code.into()))
        );
        assert!(error["message"].as_str().unwrap().contains(part), "{error:?}");
        assert!(error["code"].is_string(), "{error:?}");
    }
    let finished = work.run("train --log-format yaml");
    assert_eq!(finished.code, Some(2));
    assert!(finished.stderr.contains("json"), "{}", finished.stderr);
}
