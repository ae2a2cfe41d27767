//! What ranks send each other: counted by the library that stands in for NCCL, beside what `plan` says.

use serde_json::Value;

use crate::harness::{TRAIN, Workplace};
use crate::processes::command;
use crate::support::nccl;

/// Bytes that rank 1 sends in a run of `steps` steps: a ring sends `(R - 1) / R` of a buffer to reduce or to gather it.
fn sent(work: &Workplace, options: &str, ranks: usize, steps: usize) -> f64 {
    // Both runs score references: with sharded weights that sends too.
    let _ = std::fs::remove_dir_all(work.path("cache"));
    let counts = work.path("counts");
    let mut command = command(
        work,
        &format!(
            "{TRAIN} {options} --gpus {ranks} --max-steps {steps} --save-steps 1000 --output run-{steps}"
        ),
    );
    command.env(nccl::COUNTS, &counts);
    let finished = crate::harness::finish(command);
    assert_eq!(finished.code, Some(0), "{options}: {}", finished.stderr);
    let lines = String::from_utf8(work.read("counts")).unwrap();
    std::fs::remove_file(counts).unwrap();
    let ranks_seen: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(ranks_seen.len(), ranks, "{lines}");
    let rank = ranks_seen.iter().find(|rank| rank["rank"] == 1).unwrap();
    let bytes = |kind: &str| rank[kind]["bytes"].as_f64().unwrap_or_else(|| panic!("{kind}: {rank}"));
    let once = bytes("reduce_scatter") + bytes("all_gather") + bytes("reduce") + bytes("broadcast");
    (2.0 * bytes("all_reduce") + once) * (ranks - 1) as f64 / ranks as f64
}

/// A step sends what `plan` says, but for the metrics, and for the blocks that a small tensor is not cut into.
#[test]
fn a_step_sends_what_the_plan_says() {
    for (ranks, options) in [
        (2, "--shard none"),
        (3, "--shard states"),
        (2, "--shard gradients"),
        (3, "--shard weights"),
        // Several micro-batches a rank.
        (2, "--shard gradients --tokens-per-micro-batch 8"),
        (2, "--shard weights --tokens-per-micro-batch 8"),
        (2, "--shard states --lora all --lora-rank 8"),
    ] {
        let work = Workplace::new();
        // Pairs of one size, so that every rank has as many micro-batches.
        let pair = |number: usize| {
            format!(
                r#"{{"prompt": "What is {number}?", "chosen": "It is {number}.", "rejected": "No {number}."}}"#
            )
        };
        work.write("pairs.jsonl", (10..26).map(|number| pair(number) + "\n").collect::<String>());
        let asked = TRAIN.strip_prefix("train ").unwrap();
        let planned = work.succeed(&format!(
            "plan {asked} {options} --max-steps 4 --tflops 1 --bandwidth 50 --ranks {ranks} --json"
        ));
        let planned: Value = serde_json::from_str(&planned.stdout).unwrap();
        let shard = options.split_whitespace().nth(1).unwrap();
        let all = planned["ranks"]["shardings"].as_array().unwrap();
        let of_shard = all.iter().find(|sharding| sharding["shard"] == shard).unwrap();
        let wanted = of_shard["reduced"].as_f64().unwrap() + of_shard["gathered"].as_f64().unwrap();
        // What a run sends once, before and after its steps, is left out.
        let counted = (sent(&work, options, ranks, 4) - sent(&work, options, ranks, 2)) / 2.0;
        let share = counted / wanted;
        assert!((0.99..=1.02).contains(&share), "{options}: {counted} bytes, planned {wanted}");
    }
}
