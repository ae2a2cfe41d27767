//! `train --gpus N`: the same run on more ranks.

use serde_json::Value;

use crate::harness::{TRAIN, Workplace, assert_close};
use crate::processes::{command, succeed};

/// Rounding of f32 sums that are formed in another order, over a few steps.
const ROUNDING: f64 = 1e-4;

#[track_caller]
fn assert_same_run(work: &Workplace, one: &str, other: &str) {
    for name in ["loss", "grad_norm", "eval_loss", "logps/chosen", "eval_implicit/margins"] {
        let (one, other) = (work.series(one, name), work.series(other, name));
        assert!(!one.is_empty() && one.len() == other.len(), "{name}: {one:?} and {other:?}");
        for (step, (one, other)) in one.iter().zip(&other).enumerate() {
            assert_close(*other, *one, ROUNDING, &format!("{name} of line {step}"));
        }
    }
}

/// Where weights are sharded, the model and another reference are loaded part by part, and score the pairs to the bits of one rank. The
/// run takes what the plan says, which makes the buffers in the same way.
#[test]
fn ranks_that_hold_parts_of_two_models_score_as_one_does() {
    let work = Workplace::new();
    work.bring("tied");
    // Several micro-batches, and not as many on each rank.
    let run = format!(
        "{TRAIN} --max-steps 2 --eval-data pairs.jsonl --objective dpo --reference tied --tokens-per-micro-batch 150"
    );
    succeed(&work, &format!("{run} --output one"));
    let scored = work.references();
    assert!(!scored.is_empty());
    std::fs::remove_dir_all(work.path("cache")).unwrap();
    let parts = format!("--verbose {run} --gpus 3 --shard weights");
    let finished = succeed(&work, &format!("{parts} --output parts"));
    assert_same_run(&work, "one", "parts");
    assert_eq!(work.references(), scored);
    let lines: Vec<&str> = finished.stderr.lines().filter(|line| line.contains("at the peak, ")).collect();
    assert_eq!(lines.len(), 3, "{lines:?}");
    for line in lines {
        let (_, told) = line.split_once("memory: ").unwrap();
        let bytes: Vec<u64> = told.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        assert!(bytes.len() == 2 && bytes[0] == bytes[1], "taken and planned: {line}");
    }
    // From the cache: a few pairs are scored again, to see that it is this reference's.
    let again = succeed(&work, &format!("{parts} --output again"));
    assert!(again.stderr.contains("pairs from "), "{}", again.stderr);
    assert_same_run(&work, "parts", "again");
}

#[test]
fn ranks_do_what_one_process_does() {
    let work = Workplace::new();
    let run = format!("{TRAIN} --max-steps 5 --eval-data pairs.jsonl --eval-steps 2 --save-steps 3");
    succeed(&work, &format!("{run} --output one"));
    let scored = work.references();
    for (ranks, shard) in [(2, "none"), (3, "states"), (2, "gradients"), (3, "weights")] {
        let output = format!("ranks-{ranks}-{shard}");
        std::fs::remove_dir_all(work.path("cache")).unwrap();
        let finished = succeed(&work, &format!("{run} --output {output} --gpus {ranks} --shard {shard}"));
        assert_same_run(&work, "one", &output);
        // Scored by all ranks, to the bits of one.
        assert_eq!(work.references(), scored, "{output}: references");
        // Rank 0 alone speaks, writes and shows progress.
        assert!(!finished.stderr.contains("rank 1 ("), "{output}: {}", finished.stderr);
        assert_eq!(finished.stderr.matches("device: ").count(), 1, "{output}: {}", finished.stderr);
        assert_eq!(finished.stdout.matches("report  ").count(), 1, "{output}: {}", finished.stdout);
        let facts: Value = serde_json::from_slice(&work.read(&format!("{output}/report.json"))).unwrap();
        assert_eq!(facts["ranks"].as_array().map(Vec::len), Some(ranks), "{output}: {facts}");
        let page = String::from_utf8(work.read(&format!("{output}/report.html"))).unwrap();
        assert!(page.contains("<h2>Ranks</h2>"), "{output}");
        let waited = work.series(&output, "ranks/waited");
        assert!(waited.len() == 5 && waited.iter().all(|share| (0.0..=1.0).contains(share)), "{waited:?}");
        let verified = work.run(&format!("verify {output}"));
        assert_eq!(verified.code, Some(0), "{output}: {}", verified.stdout);
        let left: Vec<_> = std::fs::read_dir(work.path(&output)).unwrap().flatten().collect();
        assert!(left.iter().all(|entry| !entry.file_name().to_string_lossy().starts_with('.')), "{left:?}");
    }
}

#[test]
fn a_run_goes_on_with_another_number_of_ranks() {
    let work = Workplace::new();
    let run = format!("{TRAIN} --eval-data pairs.jsonl --save-steps 3");
    succeed(
        &work,
        &format!("{run} --output parts --max-steps 3 --gpus 3 --shard states --schedule constant"),
    );
    let refused = command(&work, &format!("{run} --output parts --max-steps 6 --resume --gpus 2"));
    let finished = crate::harness::finish(refused);
    // The schedule differs: rank 0 alone tells it, and the launcher ends with its code.
    assert_eq!(finished.code, Some(2), "{}", finished.stderr);
    assert!(finished.stderr.contains("schedule"), "{}", finished.stderr);
    let longer = format!("{run} --output parts --max-steps 6 --resume --gpus 2 --schedule constant");
    let finished = succeed(&work, &longer);
    assert!(finished.stderr.contains("resuming after step 3 of 6"), "{}", finished.stderr);
    assert_eq!(work.series("parts", "loss").len(), 6);
    // Finished already: every rank says nothing and ends well.
    let again = succeed(&work, &longer);
    assert!(again.stderr.contains("is finished"), "{}", again.stderr);
}

#[test]
fn one_gpu_is_an_ordinary_run() {
    let work = Workplace::new();
    let run = format!("{TRAIN} --max-steps 3");
    work.succeed(&format!("{run} --output plain"));
    work.succeed(&format!("{run} --output one --gpus 1"));
    work.assert_same_bits("plain", "one", 3);
}

#[test]
fn what_cannot_be_started_is_refused_at_once() {
    let work = Workplace::new();
    let run = format!("{TRAIN} --output run --gpus 2");
    work.refuse(&run.replace("--device cpu", "--device cuda:1"), 2, &["--gpus", "cuda:1"]);
    work.refuse(&run.replace("--gpus 2", "--gpus 0"), 2, &["--gpus", "at least 1"]);
    let mut inside = work.command(&run);
    let torchrun = [
        ("RANK", "0"),
        ("WORLD_SIZE", "2"),
        ("LOCAL_RANK", "0"),
        ("LOCAL_WORLD_SIZE", "2"),
        ("MASTER_ADDR", "localhost"),
        ("MASTER_PORT", "29500"),
    ];
    inside.envs(torchrun);
    let finished = crate::harness::finish(inside);
    assert_eq!(finished.code, Some(2), "{}", finished.stderr);
    assert!(finished.stderr.contains("torchrun has started this one already"), "{}", finished.stderr);
    assert!(!work.path("run").exists());
}

/// An error of the inputs is told once, by rank 0, and is the exit code of the launcher.
#[test]
fn a_mistake_of_the_user_is_told_once() {
    let work = Workplace::new();
    work.write("broken.jsonl", "{\"prompt\": \"a\", \"chosen\": \"b\"}\n");
    let run = format!("{TRAIN} --output run --gpus 3").replace("pairs.jsonl", "broken.jsonl");
    let finished = crate::harness::finish(command(&work, &run));
    assert_eq!(finished.code, Some(3), "{}", finished.stderr);
    assert_eq!(finished.stderr.matches("broken.jsonl:1").count(), 1, "{}", finished.stderr);
    assert!(!finished.stderr.contains("panicked"), "{}", finished.stderr);
}

/// A rank that begins when its launcher is gone would run without anybody who ends it.
#[test]
fn a_rank_whose_launcher_has_ended_does_not_begin() {
    let work = Workplace::new();
    let mut late = command(&work, &format!("{TRAIN} --output run"));
    let other = std::process::id() + 1;
    late.env("MMPO_FAST_RANK", "0").env("MMPO_FAST_RANKS", "2").env("MMPO_FAST_PORT", "1");
    late.env("MMPO_FAST_LAUNCHER", other.to_string()).env("MMPO_FAST_JOIN_SECONDS", "1");
    let finished = crate::harness::finish(late);
    assert_eq!(finished.code, Some(9), "{}", finished.stderr);
    let expected = format!("the launcher of this rank, process {other}, has ended");
    assert!(finished.stderr.contains(&expected), "{}", finished.stderr);
    assert!(!work.path("run").exists());
}
