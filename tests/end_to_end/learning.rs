//! Runs that learn: no step without a learning rate, small files at the default options, and a run that trains nothing
//! says so.

use std::path::PathBuf;

use mmpo_fast::objective::DESCRIPTORS;

use crate::harness::{TRAIN, Workplace};

const CONFIG: i32 = 2;
const NUMERICS: i32 = 7;

/// At the default options, but for what the golden pairs' lengths ask for.
const DEFAULTS: &str = "train --model base --data pairs.jsonl --device cpu --threads 1";

impl Workplace {
    /// A file of `count` pairs: the golden ones again and again.
    fn pairs(&self, name: &str, count: usize) {
        let text = String::from_utf8(self.read("pairs.jsonl")).unwrap();
        // The ninth has an empty response.
        let sound: Vec<&str> =
            text.lines().enumerate().filter(|(at, _)| *at != 8).map(|(_, line)| line).collect();
        let lines: Vec<&str> = sound.iter().copied().cycle().take(count).collect();
        self.write(name, lines.join("\n"));
    }

    /// Copies a run's folder as a process leaves it that is killed after step 2.
    pub fn cut_after_step_2(&self, whole: &str, cut: &str) {
        let root = self.path(whole);
        for (path, bytes) in self.contents(whole) {
            let inner = path.strip_prefix(&root).unwrap();
            let later = ["model", "report.html", "checkpoints/step-000004", "checkpoints/step-000006"];
            if !later.iter().any(|name| inner.starts_with(name)) {
                let copy = self.path(cut).join(inner);
                std::fs::create_dir_all(copy.parent().unwrap()).unwrap();
                std::fs::write(copy, bytes).unwrap();
            }
        }
    }
}

#[test]
fn small_files_learn_at_the_default_options() {
    let work = Workplace::new();
    for (pairs, per_step, tail) in [(20, 2, 2), (50, 2, 2), (121, 4, 1)] {
        let name = format!("pairs{pairs}.jsonl");
        work.pairs(&name, pairs);
        let output = format!("run{pairs}");
        let finished = work.succeed(&format!(
            "train --model base --data {name} --eval-data {name} --device cpu --output {output}"
        ));
        let steps = usize::div_ceil(pairs, per_step);
        let told =
            format!("{steps} steps of {per_step} pairs (chosen for {pairs} pairs; --pairs-per-step sets it)");
        assert!(finished.stderr.contains(&told), "no {told:?} in {}", finished.stderr);
        if tail < per_step {
            assert!(
                finished.stderr.contains(&format!("{tail} in the last of an epoch")),
                "{}",
                finished.stderr
            );
        }
        let resolved = String::from_utf8(work.read(&format!("{output}/resolved.toml"))).unwrap();
        assert!(resolved.contains(&format!("\npairs_per_step = {per_step}\n")), "{resolved}");
        let rates = work.series(&output, "learning_rate");
        assert_eq!(rates.len(), steps);
        assert!(rates.iter().all(|&rate| rate > 0.0), "{rates:?}");
        assert_eq!(work.series(&output, "epoch").last(), Some(&1.0), "the tail of an epoch is trained on");
        let losses = work.series(&output, "eval_loss");
        assert!(losses[1] < losses[0] - 0.01 * losses[0].abs(), "{pairs} pairs: {losses:?}");
    }
    // A number that is given holds.
    let finished = work.succeed(&format!("{DEFAULTS} --output given --pairs-per-step 128"));
    assert!(finished.stderr.contains(" 1 steps of 11 pairs: 1.00 epochs"), "{}", finished.stderr);
    assert!(finished.stderr.contains("WARN one optimiser step teaches little"), "{}", finished.stderr);
    assert!(work.series("given", "learning_rate")[0] > 0.0);
    work.succeed(&format!("{DEFAULTS} --output huge --pairs-per-step 2147483647"));
    work.assert_same_bits("given", "huge", 1);
}

/// The loss of the pairs that were trained on falls, and a run that is cut goes on with the same bits.
#[test]
fn every_objective_learns_and_resumes() {
    for objective in DESCRIPTORS {
        let (work, name) = (Workplace::new(), objective.name);
        let run = format!(
            "{TRAIN} --objective {name} --max-steps 6 --warmup-steps 0 --save-steps 2 --keep-checkpoints 9 \
             --eval-data pairs.jsonl --eval-steps 6"
        );
        work.succeed(&format!("{run} --output whole"));
        let losses = work.series("whole", "eval_loss");
        let (before, after) = (losses[0], losses[losses.len() - 1]);
        assert!(after < before - 0.01 * before.abs(), "{name}: {losses:?}");
        work.cut_after_step_2("whole", "cut");
        let finished = work.succeed(&format!("{run} --output cut --resume"));
        assert!(finished.stderr.contains("resuming after step 2"), "{name}: {}", finished.stderr);
        work.assert_same_bits("whole", "cut", 6);
    }
}

#[test]
fn one_step_and_a_warm_up_longer_than_the_run_train() {
    let work = Workplace::new();
    let before = work.read("base/model.safetensors");
    for flags in ["--max-steps 1", "--max-steps 3 --warmup-steps 50", "--max-steps 1 --warmup-steps 1"] {
        let output = flags.replace([' ', '-'], "");
        let finished = work.succeed(&format!("{TRAIN} --output {output} {flags}"));
        let warned = finished.stderr.contains("never reaches its peak");
        assert_eq!(warned, flags.contains("warmup"), "{flags}: {}", finished.stderr);
        assert!(
            work.read(&format!("{output}/model/model.safetensors")) != before,
            "{flags}: nothing changed"
        );
    }
}

#[test]
fn numbers_that_train_nothing_are_refused_before_any_work() {
    let work = Workplace::new();
    for (flags, code, parts) in [
        (
            "--learning-rate 1e-50",
            CONFIG,
            ["`--learning-rate` = 0.0000", "greater than 0 (in single precision)"],
        ),
        (
            "--learning-rate 1e38",
            NUMERICS,
            ["a learning rate of up to 1e38 moves a weight by up to", "--learning-rate"],
        ),
        ("--max-grad-norm 1e-60", NUMERICS, ["`max_grad_norm` = 1e-60 is 0 in f32", "--max-grad-norm"]),
        (
            "--adam-epsilon 1e-60",
            CONFIG,
            ["`--adam-epsilon` = 0.0000", "greater than 0 (in single precision)"],
        ),
        ("--adam-beta2 0.9999999999", CONFIG, ["`--adam-beta2` = ", "less than 1 (in single precision)"]),
        ("--adam-beta1 0.9999999999", CONFIG, ["`--adam-beta1` = ", "less than 1 (in single precision)"]),
    ] {
        let run = TRAIN.replace(
            "--learning-rate 1e-3",
            if flags.contains("rate") { "" } else { "--learning-rate 1e-3" },
        );
        work.refuse(&format!("{run} --output new {flags}"), code, &parts);
        let has_scored = !work.references().is_empty();
        assert!(!work.path("new").exists() && !has_scored, "{flags}: found only after work");
    }
}

#[test]
fn a_run_that_changed_no_weight_is_no_success() {
    let work = Workplace::new();
    let run = TRAIN.replace("1e-3", "1e-12");
    work.refuse(
        &format!("{run} --max-steps 2 --output small"),
        NUMERICS,
        &["after 2 steps with learning rates of up to 1.000e-12 no weight differs", "raise --learning-rate"],
    );
    assert!(!work.path("small/model").exists() && !work.path("small/report.html").exists());
    // Gradients that are clipped to nothing.
    work.refuse(
        &format!("{TRAIN} --max-steps 2 --max-grad-norm 1e-44 --output clipped"),
        NUMERICS,
        &["no weight differs from the starting model's"],
    );
    // Decay alone moves weights, but teaches nothing.
    let line = r#"{"prompt":"a","chosen":"b","rejected":"b"}"#;
    work.write("same.jsonl", [line, line].join("\n"));
    let dpo =
        "train --model base --data same.jsonl --objective dpo --beta 1e-45 --device cpu --weight-decay 0.5";
    work.refuse(
        &format!("{dpo} --learning-rate 0.1 --output still"),
        NUMERICS,
        &["the gradient was 0 in each of the 1 steps", "look at the pairs"],
    );
    assert!(!work.path("still/model").exists());
}

#[test]
fn a_run_that_diverges_keeps_only_what_is_sound() {
    let work = Workplace::new();
    let run = |output: &str, rate: &str, flags: &str, parts: &[&str]| {
        let run = TRAIN.replace("1e-3", rate);
        let parts = [&["not a number to train on", "--learning-rate"], parts].concat();
        work.refuse(&format!("{run} --warmup-steps 0 --output {output} {flags}"), NUMERICS, &parts);
        assert!(!work.path(output).join("model").exists());
    };
    // The first update leaves weights that are finite, and a model that is broken: it is not kept.
    for rate in ["1e5", "1e8", "1e10"] {
        let none = "no checkpoint was saved before that";
        run(&format!("first{rate}"), rate, "--max-steps 5 --save-steps 1", &["NaN", none]);
        assert!(!work.path(&format!("first{rate}/checkpoints")).exists());
        run(&format!("last{rate}"), rate, "--max-steps 1", &["NaN", none]);
        run(&format!("evaluated{rate}"), rate, "--max-steps 1 --eval-data pairs.jsonl", &["NaN", none]);
        assert!(!work.path(&format!("last{rate}/checkpoints")).exists());
    }
    // One that was sound stays, and is named.
    work.succeed(&format!("{TRAIN} --max-steps 4 --save-steps 1 --output sound"));
    let earlier = work.contents("sound/checkpoints");
    let names: Vec<PathBuf> = earlier.keys().cloned().collect();
    assert!(names.iter().any(|name| name.ends_with("step-000003/state.safetensors")), "{names:?}");
}

/// Every choice of what is kept learns; a run that is cut goes on with the same bits, and only with the choice it began with
/// where that changes a number.
#[test]
fn every_choice_of_memory_learns_and_resumes() {
    for flags in [
        "--optimizer-states bf16",
        "--optimizer-states 8bit --master-weights none",
        "--precision bf16 --master-weights split",
        "--recompute layer",
        "--recompute selective",
        "--gradients layer --max-grad-norm 0",
    ] {
        let work = Workplace::new();
        let run = format!(
            "{TRAIN} --max-steps 4 --warmup-steps 0 --save-steps 2 --keep-checkpoints 9 --eval-data pairs.jsonl \
             --eval-steps 4 {flags}"
        );
        work.succeed(&format!("{run} --output whole"));
        let losses = work.series("whole", "eval_loss");
        assert!(losses[losses.len() - 1] < losses[0], "{flags}: {losses:?}");
        work.cut_after_step_2("whole", "cut");
        let finished = work.succeed(&format!("{run} --output cut --resume"));
        assert!(finished.stderr.contains("resuming after step 2"), "{flags}: {}", finished.stderr);
        work.assert_same_bits("whole", "cut", 4);
        if flags.contains("8bit") {
            work.cut_after_step_2("whole", "other");
            let other = run.replace("8bit", "bf16");
            let parts = [
                "`optimizer_states` was \"8bit\" and is \"bf16\"",
                "resume with the settings the run began with",
            ];
            work.refuse(&format!("{other} --output other --resume"), CONFIG, &parts);
        }
    }
}

#[test]
fn gradients_by_layer_say_what_they_need() {
    let work = Workplace::new();
    let run = format!("{TRAIN} --gradients layer --output new --max-steps 2");
    let parts = ["`gradients` = layer updates a layer before", "`max_grad_norm` = 1", "--max-grad-norm 0"];
    work.refuse(&run, CONFIG, &parts);
    let parts = ["needs every step in one micro-batch", "step 1 has", "--tokens-per-micro-batch"];
    work.refuse(&format!("{run} --max-grad-norm 0 --tokens-per-micro-batch 40"), CONFIG, &parts);
    assert!(!work.path("new").exists(), "found only after work");
}

#[test]
fn the_cpu_has_no_memory_to_offload_from() {
    let work = Workplace::new();
    let parts = ["`offload` = states", "on the CPU they are there already", "leave --offload out"];
    work.refuse(&format!("{TRAIN} --offload states --output new --max-steps 2"), CONFIG, &parts);
}
