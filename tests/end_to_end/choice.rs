//! Choosing a model: the best checkpoint, the end of a run that no longer helps, and a run that is made longer.

use serde_json::Value;

use crate::harness::{TRAIN, Workplace};
use crate::reliability::{signal, wait_until};
use crate::resume::wait_for_lines;

const CONFIG: i32 = 2;
/// Evaluated on pairs with their responses exchanged, which training makes worse from the first step on.
const WORSE: &str = "--eval-data turned.jsonl --eval-steps 2 --keep-best loss";

impl Workplace {
    /// `turned.jsonl`: the pairs with chosen and rejected responses exchanged.
    fn turn_pairs(&self) {
        let text = String::from_utf8(self.read("pairs.jsonl")).unwrap();
        let turned = text.replace("\"chosen\"", "\"other\"").replace("\"rejected\"", "\"chosen\"");
        self.write("turned.jsonl", turned.replace("\"other\"", "\"rejected\""));
    }

    fn record(&self, run: &str) -> Value {
        serde_json::from_slice(&self.read(&format!("{run}/run.json"))).unwrap()
    }

    fn checkpoints(&self, run: &str) -> Vec<String> {
        let folder = std::fs::read_dir(self.path(&format!("{run}/checkpoints"))).unwrap();
        let mut names: Vec<String> =
            folder.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Step and value of each evaluation.
    fn evaluations(&self, run: &str, name: &str) -> Vec<(u64, f64)> {
        let lines = self.lines(&format!("{run}/metrics.jsonl"));
        lines.iter().filter_map(|line| Some((line["step"].as_u64()?, line.get(name)?.as_f64()?))).collect()
    }
}

#[test]
fn the_best_checkpoint_is_kept_beside_the_newest_ones() {
    let work = Workplace::new();
    work.turn_pairs();
    let run = format!("{TRAIN} --save-steps 1 --keep-checkpoints 2 {WORSE} --objective dpo");
    let finished = work.succeed(&format!("{run} --max-steps 8 --output run"));
    let losses = work.evaluations("run", "eval_loss");
    assert_eq!(losses.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [0, 2, 4, 6, 8]);
    assert!(losses.is_sorted_by(|one, other| one.1 < other.1), "training does harm here: {losses:?}");
    assert_eq!(work.checkpoints("run"), ["step-000002", "step-000007", "step-000008"]);
    let best = work.record("run")["best"].clone();
    assert_eq!((best["metric"].as_str(), best["step"].as_u64()), (Some("eval_loss"), Some(2)));
    assert_eq!(best["value"].as_f64(), Some(losses[1].1));
    for part in
        ["The best checkpoint by eval_loss is that of step 2", "The last one is that of step 8", "did harm"]
    {
        assert!(finished.stdout.contains(part), "no {part:?} in {}", finished.stdout);
        let page = String::from_utf8(work.read("run/report.html")).unwrap();
        assert!(page.contains(part), "no {part:?} in the report");
    }
    assert!(finished.stdout.contains("best    run/best\n"), "{}", finished.stdout);
    // Its model is that of a run that ended there.
    work.succeed(&format!("{run} --output cut --max-steps 2 --schedule constant --warmup-steps 0"));
    work.succeed(&format!("{run} --output whole --max-steps 8 --schedule constant --warmup-steps 0"));
    assert!(work.read("whole/best/model.safetensors") == work.read("cut/model/model.safetensors"));
    assert!(work.read("whole/best/model.safetensors") != work.read("whole/model/model.safetensors"));
    work.succeed("score --model run/best --data pairs.jsonl --output scores.jsonl --device cpu");
    let verified = work.succeed("verify run").stdout;
    assert!(verified.contains("matches    best/model.safetensors\n"), "{verified}");
    // Where the last is the best, there is no second model.
    let run =
        format!("{TRAIN} --max-steps 4 --eval-data pairs.jsonl --eval-steps 2 --keep-best logps/chosen");
    let finished = work.succeed(&format!("{run} --objective sft --output last"));
    assert!(
        finished.stdout.contains("The best checkpoint by eval_logps/chosen is the last one"),
        "{}",
        finished.stdout
    );
    assert!(!work.path("last/best").exists());
}

/// A best checkpoint that is gone is not the best one of a run that goes on: the best of those that are there is.
#[test]
fn a_best_checkpoint_that_is_gone_is_not_named() {
    let work = Workplace::new();
    work.turn_pairs();
    let run = format!("{TRAIN} --max-steps 6 --save-steps 2 --keep-checkpoints 9 {WORSE} --objective dpo");
    work.succeed(&format!("{run} --output run"));
    assert_eq!(work.record("run")["best"]["step"].as_u64(), Some(2));
    for gone in ["checkpoints/step-000002", "checkpoints/step-000006", "model", "best"] {
        std::fs::remove_dir_all(work.path(&format!("run/{gone}"))).unwrap();
    }
    std::fs::remove_file(work.path("run/report.html")).unwrap();
    let finished = work.succeed("train --resume --output run");
    assert!(finished.stderr.contains("resuming after step 4 of 6"), "{}", finished.stderr);
    assert_eq!(work.record("run")["best"]["step"].as_u64(), Some(4));
    assert!(
        finished.stdout.contains("The best checkpoint by eval_loss is that of step 4"),
        "{}",
        finished.stdout
    );
    assert!(work.path("run/best/model.safetensors").exists());
}

/// A checkpoint is saved beside the steps after it. `run.json` names it as the best one as soon as it is on the disk, not when
/// the next one is saved.
#[test]
fn the_record_names_the_best_checkpoint_that_is_on_the_disk() {
    let work = Workplace::new();
    work.turn_pairs();
    let run = format!("{TRAIN} --max-steps 4000 {WORSE} --objective dpo --output run");
    let mut child = work.command(&run).spawn().unwrap();
    // The first evaluation is the best one, and no other checkpoint is due.
    wait_until("the best checkpoint", || {
        assert!(child.try_wait().unwrap().is_none(), "the run ended");
        work.path("run/checkpoints/step-000002").is_dir()
    });
    let lines = work.lines("run/metrics.jsonl").len();
    wait_for_lines(&work.path("run/metrics.jsonl"), lines + 4, &mut child);
    let best = work.record("run")["best"]["step"].as_u64();
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(work.checkpoints("run"), ["step-000002"]);
    assert_eq!(best, Some(2));

    // Here each evaluation is the best so far, also that of the step after which a signal ends the run.
    let run = format!(
        "{TRAIN} --max-steps 4000 --eval-data pairs.jsonl --eval-steps 1 --keep-best logps/chosen --objective sft --output cut"
    );
    let mut child = work.command(&run.replace("1e-3", "1e-5")).spawn().unwrap();
    wait_for_lines(&work.path("cut/metrics.jsonl"), 7, &mut child);
    signal(&child, "TERM");
    assert_eq!(child.wait().unwrap().code(), Some(143));
    let values = work.evaluations("cut", "eval_logps/chosen");
    assert!(values.is_sorted_by(|one, other| one.1 < other.1), "training helps here: {values:?}");
    let best = work.record("cut")["best"].clone();
    assert_eq!(best["step"].as_u64(), values.last().map(|(step, _)| *step));
    assert_eq!(best["value"].as_f64(), values.last().map(|(_, value)| *value));
}

#[test]
fn a_run_that_no_longer_helps_ends_early_and_may_go_on() {
    let work = Workplace::new();
    work.turn_pairs();
    let run = format!("{TRAIN} --max-steps 20 {WORSE} --objective dpo --early-stopping 2 --output run");
    let finished = work.succeed(&run);
    assert!(
        finished.stdout.contains("Early stopping ended the run after step 4 of 20"),
        "{}",
        finished.stdout
    );
    assert_eq!(work.checkpoints("run"), ["step-000002", "step-000004"]);
    let ended = work.record("run")["ended"].clone();
    assert_eq!(ended["step"].as_u64(), Some(4));
    assert!(ended["reason"].as_str().unwrap().contains("did not become better in 2 evaluations"), "{ended}");
    let before = work.contents("run");
    let finished = work.succeed("train --resume --output run");
    assert!(finished.stderr.contains("early stopping ended it after step 4 of 20"), "{}", finished.stderr);
    assert!(work.contents("run") == before, "a finished run was changed");
    // An end that was cut before the model was written is made up for.
    std::fs::remove_dir_all(work.path("run/model")).unwrap();
    std::fs::remove_file(work.path("run/report.html")).unwrap();
    work.succeed("train --resume --output run");
    assert!(work.read("run/model/model.safetensors") == before[&work.path("run/model/model.safetensors")]);
    let finished = work.succeed("train --resume --output run --early-stopping 0");
    assert!(finished.stderr.contains("resuming after step 4 of 20"), "{}", finished.stderr);
    assert_eq!(work.series("run", "loss").len(), 20);
    work.succeed(&format!("{TRAIN} --max-steps 20 {WORSE} --objective dpo --output whole"));
    work.assert_same_bits("whole", "run", 20);
    assert!(work.read("run/best/model.safetensors") == work.read("whole/best/model.safetensors"));
    // A delta that no change reaches.
    let wide = run.replace("--output run", "--output wide --early-stopping-delta 1000");
    assert!(work.succeed(&wide).stdout.contains("by more than 1000"));
}

#[test]
fn a_run_is_made_longer_and_what_that_does_is_said() {
    let work = Workplace::new();
    let run = format!("{TRAIN} --max-steps 4 --warmup-steps 1");
    work.succeed(&format!("{run} --output run"));
    let long = format!("{TRAIN} --max-steps 9 --warmup-steps 1");
    work.succeed(&format!("{long} --output nine"));
    let finished = work.succeed("train --resume --output run --epochs 3");
    let message = &finished.stderr;
    for part in [
        "the run is made longer, from 4 steps to 9",
        "each step from here has that of a run of 9 steps from its start, with 1 steps of warm-up",
        "the shorter run ended with 2.500e-4",
    ] {
        assert!(message.contains(part), "no {part:?} in {message}");
    }
    let rates = work.series("run", "learning_rate");
    let (short, whole) = (work.series("run", "loss"), work.series("nine", "learning_rate"));
    assert_eq!((rates.len(), short.len()), (9, 9));
    assert_eq!(rates[4..], whole[4..]);
    assert_ne!(rates[2..4], whole[2..4]);
    let lengthened = work.record("run")["lengthened"].clone();
    let only = &lengthened.as_array().unwrap()[..];
    assert_eq!(only.len(), 1, "{lengthened}");
    assert_eq!((only[0]["after_step"].as_u64(), only[0]["to_steps"].as_u64()), (Some(4), Some(9)));
    assert!(String::from_utf8(work.read("run/resolved.toml")).unwrap().contains("epochs = 3.0"));
    work.succeed("verify run");
    // The longer run is the one that is resumed from now on, to the bit.
    work.succeed(&format!("{run} --output again"));
    work.succeed(&format!("{long} --output again --resume --save-steps 6"));
    work.assert_same_bits("run", "again", 9);
    for (name, step) in [("model", None), ("checkpoints", Some("step-000009"))] {
        std::fs::remove_dir_all(work.path(&format!("again/{name}/{}", step.unwrap_or_default()))).unwrap();
    }
    std::fs::remove_file(work.path("again/report.html")).unwrap();
    let finished = work.succeed("train --resume --output again");
    assert!(finished.stderr.contains("resuming after step 6 of 9"), "{}", finished.stderr);
    assert!(!finished.stderr.contains("made longer"), "{}", finished.stderr);
    work.assert_same_bits("run", "again", 9);
    // It cannot be made shorter, nor changed in another way at the same time.
    work.refuse("train --resume --output run --max-steps 5", CONFIG, &["cannot be resumed", "max_steps"]);
    work.refuse(
        "train --resume --output run --max-steps 12 --learning-rate 1e-4",
        CONFIG,
        &["`learning_rate` was"],
    );
}

#[test]
fn the_evaluation_before_the_first_step_can_be_left_out() {
    let work = Workplace::new();
    let run = format!("{TRAIN} --max-steps 2 --eval-data pairs.jsonl --eval-on-start false --output run");
    let finished = work.succeed(&run);
    assert_eq!(work.evaluations("run", "eval_loss").len(), 1);
    assert!(!finished.stdout.contains("before"), "{}", finished.stdout);
    work.succeed("train --resume --output run");
}

#[test]
fn choices_that_cannot_be_made_are_refused() {
    let work = Workplace::new();
    let run = format!("{TRAIN} --max-steps 2 --output new");
    for (flags, parts) in [
        ("--keep-best loss", ["`--keep-best` has no effect without", "--eval-split"]),
        ("--early-stopping 3", ["`--early-stopping` has no effect without", "--eval-data"]),
        ("--eval-on-start false", ["`--eval-on-start` has no effect without", "--eval-data"]),
        (
            "--eval-data pairs.jsonl --early-stopping-delta 1",
            ["no effect without `early_stopping`", "--early-stopping 3"],
        ),
        ("--eval-data pairs.jsonl --keep-best margins", ["must be one of loss", "did you mean"]),
        (
            "--eval-data pairs.jsonl --objective sft --keep-best rewards/margins",
            ["needs rejected responses, which sft does not look at", "logps/chosen"],
        ),
    ] {
        work.refuse(&format!("{run} {flags}"), CONFIG, &parts);
    }
    assert!(!work.path("new").exists());
}
