//! `mmpo-fast bench` as a user meets it. Times are not looked at; results are.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

fn bench(arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_mmpo-fast"))
        .arg("bench")
        .args(arguments)
        .env_remove("RUST_LOG")
        .env("NO_COLOR", "1")
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

/// The one JSON object that a part prints.
fn json(arguments: &[&str]) -> Value {
    let (code, stdout, stderr) = bench(arguments);
    assert_eq!(code, Some(0), "{stderr}");
    serde_json::from_str(&stdout).unwrap_or_else(|error| panic!("{error}: {stdout}"))
}

/// Where this build can run kernels, as far as no GPU is needed.
const DEVICES: &[&str] = if cfg!(mmpo_emulated) { &["cpu", "emulated"] } else { &["cpu"] };

const SMALL: [&str; 8] = ["--shape", "tiny", "--profile", "tiny", "--pairs", "2", "--calls", "2"];

/// On the CPU, and on the emulated device, where every kernel must agree with the CPU before it is timed.
#[test]
fn kernels_are_checked_timed_and_written_down() {
    let folder = tempfile::tempdir().unwrap();
    let csv = folder.path().join("raw.csv");
    for &device in DEVICES {
        let arguments =
            [&["kernels", "--device", device, "--json", "--csv", csv.to_str().unwrap()][..], &SMALL].concat();
        let report = json(&arguments);
        let kernels = report["kernels"].as_array().unwrap();
        let names: Vec<&str> = kernels.iter().map(|kernel| kernel["op"].as_str().unwrap()).collect();
        for name in ["rope", "linear_forward gate_up", "attention_backward", "logp_head_forward", "adamw"] {
            assert!(names.contains(&name), "{name} is not among {names:?}");
        }
        let any_order = names.contains(&"attention_backward any order");
        assert_eq!(any_order, device != "cpu", "kernels alone have another order: {names:?}");
        for kernel in kernels {
            let number = |key: &str| kernel[key].as_f64().unwrap();
            let [low, median, high] = ["min_us", "median_us", "max_us"].map(number);
            assert!(0.0 < low && low <= median && median <= high, "{kernel}");
            assert!(number("bytes") > 0.0 && number("share_of_ceiling") > 0.0, "{kernel}");
            let product = kernel["op"].as_str().unwrap().starts_with("linear_");
            assert_eq!(product, product && number("flops") > 0.0, "{kernel}");
            assert_eq!(kernel["error"].is_null(), device == "cpu", "{kernel}");
        }
        assert!(report["copy_gb_per_s"].as_f64().unwrap() > 0.0, "{report}");
    }
    assert_csv(&csv);
}

/// Plain sequences and pairs in one run, beside the same ceilings.
#[test]
fn several_shapes_are_measured_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let csv = folder.path().join("raw.csv");
    let cases = ["--case", "tiny:40/0/0:3", "--case", "tiny-128:tiny", "--pairs", "2", "--calls", "1"];
    let only = ["--only", "attention_forward", "--only", "attention_backward", "--device", "cpu"];
    let (code, stdout, stderr) =
        bench(&[&["kernels", "--csv", csv.to_str().unwrap()], &cases[..], &only[..]].concat());
    assert_eq!(code, Some(0), "{stderr}");
    for shape in ["tiny 40/0/0 x3: 120 tokens, 0 scored", "tiny-128 tiny x2: 104 tokens, 56 scored"] {
        assert!(stdout.contains(shape), "{shape} is not in\n{stdout}");
    }
    let text = std::fs::read_to_string(&csv).unwrap();
    let rows: Vec<&str> = text.lines().map(|line| line.split(',').nth(3).unwrap()).collect();
    let (both, ceilings) = (["attention_forward", "attention_backward"], ["ceiling copy", "ceiling product"]);
    assert_eq!(rows, [&["op"], &ceilings[..], &both, &both, &ceilings].concat(), "{text}");
}

/// Time that is over ends the measurement and not the program: what is left out is named, and one step is timed in any case.
#[test]
fn nothing_begins_after_its_time() {
    let small = ["--shape", "tiny", "--profile", "tiny", "--pairs", "1", "--device", "cpu", "--seconds", "0"];
    let (code, stdout, stderr) = bench(&[&["kernels", "--only", "rope"], &small[..]].concat());
    assert_eq!(code, Some(0), "{stderr}");
    assert!(
        stdout.contains("of ceiling") && stderr.contains("rope of tiny tiny x1 is left out"),
        "{stdout}{stderr}"
    );
    let (code, stdout, stderr) = bench(&[&["step", "--calls", "5"], &small[..]].concat());
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stdout.contains("1 timed") && stderr.contains("only 1 of 5 steps"), "{stdout}{stderr}");
}

/// One header, and the columns that the peers write too.
fn assert_csv(path: &Path) {
    let text = std::fs::read_to_string(path).unwrap();
    let mut lines = text.lines();
    assert_eq!(
        lines.next(),
        Some("date,machine,peer,op,shape,median_us,min_us,max_us,flops,bytes,workspace")
    );
    for line in lines {
        assert_eq!(line.split(',').count(), 11, "{line}");
        assert_eq!(line.split(',').nth(2), Some("mmpo-fast"), "{line}");
    }
    assert!(text.contains(",ceiling copy,machine,") && text.contains(",tiny tiny x2,"), "{text}");
}

/// The losses that every engine comes to with these weights and pairs: `benches/peers/README.md`.
#[test]
fn the_measured_step_is_the_peers_step() {
    let report = json(&[
        "step",
        "--device",
        "cpu",
        "--shape",
        "tiny-5m",
        "--profile",
        "64/64/64",
        "--pairs",
        "2",
        "--warmups",
        "5",
        "--calls",
        "5",
        "--json",
    ]);
    let losses: Vec<f64> =
        report["losses"].as_array().unwrap().iter().map(|loss| loss.as_f64().unwrap()).collect();
    assert_eq!(losses.len(), 11, "warm-up, timed, and the traced one");
    for (step, wanted) in [(0, 7.07913), (10, 5.48552)] {
        assert!((losses[step] - wanted).abs() <= 2e-4, "{losses:?}");
    }
    let phases = report["phases"].as_array().unwrap();
    let seconds: f64 = phases.iter().map(|phase| phase["seconds"].as_f64().unwrap()).sum();
    let traced = report["traced_seconds"].as_f64().unwrap();
    assert!((seconds - traced).abs() <= 1e-6, "{phases:?} in {traced}");
    assert!(phases.iter().all(|phase| phase["phase"] != "other"), "{phases:?}");
    assert!(phases.iter().any(|phase| phase["phase"] == "log-prob head"), "{phases:?}");
}

#[test]
fn people_get_tables() {
    for &device in DEVICES {
        let (code, stdout, stderr) =
            bench(&[&["--device", device, "--only", "rope", "--quiet"][..], &SMALL].concat());
        assert_eq!(code, Some(0), "{stderr}");
        for text in ["of ceiling", "rope", "training step of tiny", "between operations", "adamw"] {
            assert!(stdout.contains(text), "{text} is not in\n{stdout}");
        }
        let (_, _, stderr) =
            bench(&[&["kernels", "--device", device, "--only", "rope"][..], &SMALL].concat());
        assert_eq!(stderr.contains("say nothing about a GPU"), device == "emulated", "{stderr}");
    }
}

#[test]
fn mistakes_are_named() {
    for (arguments, code, expected) in [
        (&["kernels", "--shape", "smolm2-135m"][..], 2, "did you mean `smollm2-135m`?"),
        (&["kernels", "--profile", "1/2"], 2, "`--profile` = 1/2 is not known"),
        (
            &["kernels", "--only", "nothing", "--shape", "tiny", "--device", "cpu"],
            2,
            "part of no kernel's name",
        ),
        (&["step", "--only", "rope"], 2, "a step has none to choose"),
        (&["step", "--calls", "0"], 2, "must be at least 1"),
        (&["step", "--case", "tiny:tiny"], 2, "for `bench kernels` alone"),
        (&["kernels", "--case", "tiny"], 2, "is not MODEL:PROFILE"),
        (&["kernels", "--seconds", "-1"], 2, "--seconds"),
        (&["kernels", "--seconds", "nan"], 2, "`--seconds`"),
        (&["kernels", "--case", "tiny:tiny:0"], 2, "is not MODEL:PROFILE"),
        (&["kernels", "--case", "tiny:9999999999/1/1"], 2, "a batch of more than 16777216 tokens"),
        (
            &["step", "--pairs", "99999999999999", "--device", "cpu"],
            2,
            "must be at least 1 and at most 16777216",
        ),
        (&["kernels", "--profile", "40/0/0", "--device", "cpu"], 2, "only attention has something to do"),
        (&["step", "--model", "no/such/folder", "--device", "cpu"], 5, "no/such/folder"),
        (&["step", "--shape", "tiny", "--layers", "0"], 2, "must be at least 1"),
        (&["kernles"], 2, "kernels, step, products"),
        (&["products", "--device", "emulated"], 2, "no cuBLASLt to compare with"),
        (&["products", "--tokens", "600"], 2, "`--tokens` does nothing in `bench products`"),
        (&["load"], 2, "give one with --model DIR"),
        (&["load", "--calls", "3"], 2, "`--calls` does nothing in `bench load`"),
        (&["counts", "--device", "cpu"], 2, "`--device` does nothing in `bench counts`"),
        #[cfg(mmpo_emulated)]
        (&["counts", "--only", "nothing"], 2, "part of no kernel's name"),
        #[cfg(not(mmpo_emulated))]
        (&["counts"], 6, "emulated"),
    ] {
        let (got, stdout, stderr) = bench(arguments);
        assert_eq!(got, Some(code), "{arguments:?}: {stderr}");
        assert!(stderr.contains(expected), "{arguments:?}: {stderr}");
        assert!(stdout.is_empty() && !stderr.contains("panicked"), "{stderr}");
    }
}

/// Rates of the disk, of the bus where there is one, and of loading, each with its share of the slower source.
#[test]
fn loading_is_timed_beside_disk_and_bus() {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/base/model");
    for &device in DEVICES {
        let report = json(&["load", "--json", "--model", model, "--device", device]);
        for name in ["bytes", "disk", "cache", "cold", "warm", "cold_share", "warm_share"] {
            assert!(report[name].as_f64().is_some_and(|value| value > 0.0), "{name}: {report}");
        }
        assert_eq!(report["bus"].is_null(), device == "cpu", "{report}");
    }
    let (code, stdout, stderr) = bench(&["load", "--model", model, "--device", "cpu"]);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(
        stdout.contains("weights from the disk") && stdout.contains("most of the host's memory"),
        "{stdout}"
    );
}

/// Both sets of kernels, with the least beside what they do.
#[cfg(mmpo_emulated)]
#[test]
fn kernels_are_counted_beside_the_least() {
    let profile = ["--profile", "150/75/75", "--pairs", "1"];
    let report = json(&[&["counts", "--json", "--only", "attention_forward"], &profile[..]].concat());
    for (path, launcher) in [("portable", "attention_forward"), ("hopper", "attention_forward_sm90")] {
        let rows = report["paths"][path].as_array().unwrap();
        assert_eq!(rows.len(), 1, "{rows:?}");
        assert_eq!(rows[0]["launcher"], launcher);
        let number = |value: &serde_json::Value| value.as_f64().unwrap();
        let (done, least) = (number(&rows[0]["mma_flops"]), number(&rows[0]["minimum"][0]));
        assert!(least > 0.0 && least <= done && done <= 2.0 * least, "{done} for {least}: {}", rows[0]);
        assert_eq!(number(&rows[0]["bank_conflicts"]), 0.0, "{}", rows[0]);
    }
}
