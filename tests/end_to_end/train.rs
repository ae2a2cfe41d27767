//! What a training run does and leaves.

use std::path::PathBuf;

use mmpo_fast::data::Sides;
use mmpo_fast::objective::DESCRIPTORS;

use crate::harness::{CommandLine, TRAIN, Workplace, assert_close};

const STEP_NAMES: &str = "step loss rewards/chosen rewards/rejected rewards/accuracies rewards/margins logps/chosen \
                          logps/rejected logps/accuracies logps/margins implicit/accuracies implicit/margins \
                          grad_norm learning_rate epoch weights/chosen weights/saturated tokens_per_second \
                          pairs_per_second memory/peak_gib";
const EVALUATION_NAMES: &str = "step eval_loss eval_rewards/chosen eval_rewards/rejected eval_rewards/accuracies \
                                eval_rewards/margins eval_logps/chosen eval_logps/rejected eval_logps/accuracies \
                                eval_logps/margins eval_implicit/accuracies eval_implicit/margins epoch \
                                eval_weights/chosen eval_weights/saturated";

#[test]
fn a_run_leaves_model_metrics_report_and_checkpoints() {
    let work = Workplace::new();
    let finished = work.succeed(&format!(
        "{TRAIN} --output deep/run --epochs 3 --save-steps 2 --eval-data pairs.jsonl --eval-steps 4"
    ));
    for part in ["before", "after", "prompt", "deep/run/model", "deep/run/report.html"] {
        assert!(finished.stdout.contains(part), "no {part:?} in: {}", finished.stdout);
    }

    let files: Vec<PathBuf> = work.contents("deep/run").into_keys().collect();
    let mut names: Vec<&str> = files
        .iter()
        .map(|path| path.strip_prefix(work.path("deep/run")).unwrap().to_str().unwrap())
        .collect();
    let events = names.iter().position(|name| name.starts_with("tensorboard/events.out.tfevents."));
    names.remove(events.expect("TensorBoard events"));
    assert_eq!(
        names,
        [
            "B3SUMS",
            "checkpoints/step-000008/B3SUMS",
            "checkpoints/step-000008/state.json",
            "checkpoints/step-000008/state.safetensors",
            "checkpoints/step-000009/B3SUMS",
            "checkpoints/step-000009/state.json",
            "checkpoints/step-000009/state.safetensors",
            "metrics.jsonl",
            "model/chat_template.jinja",
            "model/config.json",
            "model/generation_config.json",
            "model/model.safetensors",
            "model/tokenizer.json",
            "model/tokenizer_config.json",
            "report.html",
            "report.json",
            "resolved.toml",
            "run.json",
        ]
    );
    let page = String::from_utf8(work.read("deep/run/report.html")).unwrap();
    assert!(page.contains("<svg") && page.contains("learning_rate") && page.trim_end().ends_with("</html>"));

    // The resolved recipe is the whole run: it makes the same bits again.
    work.succeed("train --recipe deep/run/resolved.toml --output again");
    work.assert_same_bits("deep/run", "again", 9);
}

#[test]
fn metrics_have_the_documented_names() {
    let work = Workplace::new();
    work.succeed(&format!("{TRAIN} --output run --epochs 2 --eval-data pairs.jsonl --eval-steps 4"));
    let lines = work.lines("run/metrics.jsonl");
    let steps: Vec<(u64, bool)> =
        lines.iter().map(|line| (line["step"].as_u64().unwrap(), line.contains_key("eval_loss"))).collect();
    // Before the first step, every fourth, and at the end.
    let expected = [0, 1, 2, 3, 4, 4, 5, 6, 6].into_iter();
    let evaluations = [true, false, false, false, false, true, false, false, true];
    assert_eq!(steps, expected.zip(evaluations).collect::<Vec<_>>());
    for line in &lines {
        let names: Vec<&str> = line.keys().map(String::as_str).collect();
        let documented = if line.contains_key("eval_loss") { EVALUATION_NAMES } else { STEP_NAMES };
        assert_eq!(names, documented.split_whitespace().collect::<Vec<_>>());
        assert!(line.values().all(|value| value.as_f64().is_some_and(f64::is_finite)), "{line:?}");
    }
    let epochs: Vec<f64> = work.series("run", "epoch");
    assert_eq!(epochs.last(), Some(&2.0));
    // 4 of 11 pairs after the first step.
    assert_close(epochs[1], 4.0 / 11.0, 1e-12, "epoch of step 1");
}

#[test]
fn two_runs_and_any_number_of_threads_give_the_same_bits() {
    let work = Workplace::new();
    let run = format!("{TRAIN} --epochs 3 --eval-data pairs.jsonl");
    work.succeed(&format!("{run} --output one"));
    work.succeed(&format!("{run} --output two"));
    work.assert_same_bits("one", "two", 9);
    let threads = CommandLine::new(&run).set("--threads", 3);
    work.succeed(&format!("{threads} --output threads"));
    work.assert_same_bits("one", "threads", 9);
    work.succeed(&format!("{run} --seed 7 --output seed"));
    assert_ne!(work.series("one", "loss"), work.series("seed", "loss"), "the seed orders the pairs");
}

#[test]
fn the_loss_does_not_depend_on_the_micro_batches() {
    let work = Workplace::new();
    let every = DESCRIPTORS.iter().map(|objective| objective.name);
    for objective in every.chain(["mmpo --length-normalize --entropy-weight beta --preference-weight 0.5"]) {
        let name = objective.replace(' ', "_");
        let run = |budget: usize| {
            let output = format!("{name}-{budget}");
            let train = CommandLine::new(TRAIN).set("--learning-rate", 1e-4);
            work.succeed(&format!(
                "{train} --objective {objective} --warmup-steps 0 --epochs 2 --tokens-per-micro-batch {budget} \
                 --output {output}",
            ));
            (work.series(&output, "loss"), work.series(&output, "grad_norm"))
        };
        let (small, large) = (run(64), run(4096));
        assert_eq!(small.0.len(), 6);
        for (what, small, large) in [("loss", small.0, large.0), ("grad_norm", small.1, large.1)] {
            for (step, (small, large)) in small.iter().zip(&large).enumerate() {
                let error = (small - large).abs() / large.abs();
                assert!(error <= 1e-5, "{objective}: {what} of step {step}: {small} against {large}");
            }
        }
    }
}

#[test]
fn both_modes_of_the_head_give_the_same_run() {
    let work = Workplace::new();
    let run = |mode: &str, output: &str| {
        let finished = work.succeed(&format!("{TRAIN} --head-mode {mode} --epochs 2 --output {output}"));
        (finished.stderr, work.series(output, "loss"), work.series(output, "grad_norm"))
    };
    let (printed, losses, norms) = run("main", "main");
    assert!(
        printed.contains("log-prob head: main mode") && printed.contains("MiB of workspace"),
        "{printed}"
    );
    let (printed, ..) = run("auto", "auto");
    assert!(printed.contains("log-prob head: main mode"), "{printed}");
    work.assert_same_bits("main", "auto", 6);

    let (printed, recomputed_losses, recomputed_norms) = run("recompute", "recompute");
    assert!(printed.contains("log-prob head: recompute mode"), "{printed}");
    for (what, got, wanted) in [("loss", recomputed_losses, losses), ("grad_norm", recomputed_norms, norms)] {
        assert_eq!((got.len(), wanted.len()), (6, 6));
        for (step, (&got, &wanted)) in got.iter().zip(&wanted).enumerate() {
            assert_close(got, wanted, 1e-5, &format!("{what} of step {}", step + 1));
        }
    }
    run("recompute", "again");
    work.assert_same_bits("recompute", "again", 6);
}

#[test]
fn only_objectives_with_a_reference_score_one_and_the_first_loss_of_dpo_is_ln_2() {
    for objective in DESCRIPTORS {
        let work = Workplace::new();
        let name = objective.name;
        let finished = work.succeed(&format!("{TRAIN} --objective {name} --output run --epochs 1"));
        let scored = finished.stderr.contains("reference log-probs");
        assert_eq!(scored, objective.needs_reference, "{name}: {}", finished.stderr);
        assert_eq!(!work.references().is_empty(), objective.needs_reference, "{name}: the reference cache");
        let has = |series: &str| !work.series("run", series).is_empty();
        // SFT looks at no rejected response, and the weights are MMPO's.
        assert_eq!(has("rewards/chosen"), objective.sides == Sides::Both, "{name}");
        assert_eq!(has("weights/chosen"), objective.has_weights, "{name}");
        if name == "dpo" {
            assert_close(work.series("run", "loss")[0], std::f64::consts::LN_2, 1e-5, "first loss");
        }
    }
}

#[test]
fn a_reference_of_its_own_changes_the_rewards() {
    let work = Workplace::new();
    work.bring("tied");
    work.succeed(&format!("{TRAIN} --objective dpo --reference tied --output run --epochs 1"));
    assert!(work.series("run", "rewards/chosen")[0].abs() > 0.1, "rewards are against another model");
}

#[test]
fn the_reference_is_scored_once_and_a_damaged_cache_is_replaced() {
    let work = Workplace::new();
    let run = |output: &str| work.succeed(&format!("{TRAIN} --epochs 1 --output {output}")).stderr;
    assert!(run("first").contains("reference log-probs 11/11 pairs"));
    let cached = work.references();
    assert_eq!(cached.len(), 1);
    let (path, bytes) = cached.iter().next().unwrap();
    assert!(run("second").contains("reference log-probs: 11 pairs from"));

    let mut damaged = bytes.clone();
    let middle = damaged.len() - 80;
    damaged[middle] ^= 1;
    std::fs::write(path, damaged).unwrap();
    let log = run("third");
    // The pairs have two warnings of their own, for equal responses and a repeated prompt, in every run.
    let of_the_cache = |line: &&str| line.contains("WARN") && !line.contains("WARN pairs.jsonl: ");
    let warnings: Vec<&str> = log.lines().filter(of_the_cache).collect();
    assert_eq!(warnings.len(), 1, "{log}");
    assert!(warnings[0].contains("checksum") && warnings[0].contains(path.to_str().unwrap()), "{log}");
    assert!(log.contains("reference log-probs 11/11 pairs"), "{log}");
    assert_eq!(&work.references(), &cached);
    for other in ["second", "third"] {
        work.assert_same_bits("first", other, 3);
    }
    // Other limits are other data.
    work.succeed(&format!("{TRAIN} --epochs 1 --output fourth").replace("160", "128"));
    assert_eq!(work.references().len(), 2);
}

#[test]
fn epochs_steps_and_schedules() {
    let work = Workplace::new();
    for (name, flags, steps, factors) in [
        ("half", "--epochs 0.5", 2, &[][..]),
        ("more", "--epochs 2.4", 8, &[]),
        (
            "linear",
            "--max-steps 6 --schedule linear --warmup-steps 2",
            6,
            &[1.0 / 3.0, 2.0 / 3.0, 1.0, 0.75, 0.5, 0.25],
        ),
        ("cosine", "--max-steps 4 --schedule cosine --warmup-ratio 0", 4, &[1.0, 0.853_553, 0.5, 0.146_447]),
        ("constant", "--max-steps 3 --schedule constant --warmup-ratio 0.33", 3, &[0.5, 1.0, 1.0]),
        ("long", "--max-steps 3 --warmup-steps 9", 3, &[0.1, 0.2, 0.3]),
        ("one", "--max-steps 1", 1, &[1.0]),
        ("all", "--max-steps 3 --warmup-ratio 1", 3, &[1.0 / 3.0, 2.0 / 3.0, 1.0]),
    ] {
        work.succeed(&format!("{TRAIN} {flags} --output {name}"));
        let rates = work.series(name, "learning_rate");
        assert_eq!(rates.len(), steps, "{name}");
        for (rate, factor) in rates.iter().zip(factors) {
            assert_close(rate * 1e3, *factor, 1e-5, name);
        }
    }
}

#[test]
fn a_folder_that_holds_a_run_is_refused_and_stays_as_it_is() {
    let work = Workplace::new();
    work.succeed(&format!("{TRAIN} --output run --epochs 1"));
    let before = work.contents("run");
    work.refuse(&format!("{TRAIN} --output run --epochs 2"), 2, &["run holds a run already", "--resume"]);
    // The demo may replace itself alone.
    work.refuse("train --output run", 2, &["run holds a run already"]);
    // Other settings are another run.
    work.refuse(
        &format!("{} --output run --epochs 1 --resume", TRAIN.replace("1e-3", "2e-3")),
        2,
        &["cannot be resumed", "`learning_rate` was 0.001 and is 0.002"],
    );
    assert_eq!(work.contents("run"), before);
}
