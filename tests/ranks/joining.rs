//! Ranks that do not fit together, or that are not all there.

use std::process::{Child, Command};

use crate::harness::{Finished, TRAIN, Workplace};
use crate::processes::{command, free_port};

/// One rank of two, as a launcher that is not ours starts it.
pub fn rank(work: &Workplace, rank: usize, port: u16, arguments: &str) -> Command {
    let mut command = command(work, arguments);
    command
        .env("RANK", rank.to_string())
        .env("WORLD_SIZE", "2")
        .env("LOCAL_RANK", rank.to_string())
        .env("LOCAL_WORLD_SIZE", "2")
        .env("MASTER_ADDR", "127.0.0.1")
        .env("MASTER_PORT", "29500")
        .env("MMPO_FAST_PORT", port.to_string());
    command
}

/// Runs two ranks with these arguments.
fn both(work: &Workplace, arguments: [&str; 2]) -> [Finished; 2] {
    let port = free_port();
    ended([0, 1].map(|number| rank(work, number, port, arguments[number]).spawn().unwrap()))
}

/// Waits for both ends.
pub fn ended(started: [Child; 2]) -> [Finished; 2] {
    started.map(|child| {
        let output = child.wait_with_output().unwrap();
        Finished {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    })
}

/// Each case: what the second rank has in place of what the first has, and what the message names.
#[test]
fn ranks_with_other_inputs_or_options_are_refused_by_name() {
    let work = Workplace::new();
    work.bring("tied");
    let text = String::from_utf8(work.read("pairs.jsonl")).unwrap();
    let fewer: Vec<&str> = text.lines().skip(1).collect();
    work.write("fewer.jsonl", fewer.join("\n"));
    let cases = [
        (("--seed 1", "--seed 2"), "different options: `seed` is 1 and 2"),
        (("--data pairs.jsonl", "--data fewer.jsonl"), "different training pairs"),
        (("--eval-data pairs.jsonl", "--eval-data fewer.jsonl"), "different evaluation pairs"),
        (("--model base", "--model tied"), "different model"),
        (("--reference base", "--reference tied"), "different reference"),
    ];
    for ((ours, theirs), expected) in cases {
        let first =
            format!("{TRAIN} --seed 1 --max-steps 3 --eval-data pairs.jsonl --reference base --output run");
        let finished = both(&work, [&first, &first.replace(ours, theirs)]);
        assert_eq!([finished[0].code, finished[1].code], [Some(2), Some(9)], "{}", finished[0].stderr);
        let message = &finished[0].stderr;
        assert!(message.contains("rank 0 on ") && message.contains("and rank 1 on "), "{message}");
        assert!(message.contains(expected), "no {expected:?} in: {message}");
        assert!(!work.path("run").exists(), "{expected}: something was written");
    }
}

/// Ranks choose their memory together, from the least that one of them has. One that was given its options takes part, so that what
/// differs is told as such and not as ranks that are at different places.
#[test]
fn ranks_choose_their_memory_together() {
    let work = Workplace::new();
    let run = format!("{TRAIN} --max-steps 2 --output");
    let finished = both(&work, [&format!("{run} run --memory auto"), &format!("{run} run")]);
    assert_eq!([finished[0].code, finished[1].code], [Some(0), Some(0)], "{}", finished[0].stderr);
    assert_eq!(finished[0].stderr.matches("--memory auto: ").count(), 1, "{}", finished[0].stderr);
    let finished =
        both(&work, [&format!("{run} other --memory auto"), &format!("{run} other --memory 1000GB")]);
    assert_eq!([finished[0].code, finished[1].code], [Some(2), Some(9)], "{}", finished[0].stderr);
    let message = &finished[0].stderr;
    assert!(message.contains("different options: `memory` is nothing and"), "{message}");
}

#[test]
fn a_rank_that_does_not_come_is_named() {
    let work = Workplace::new();
    let port = free_port();
    for (number, expected) in
        [(0, "rank 1 of 2 has not come to rank 0"), (1, "cannot reach rank 0 at 127.0.0.1")]
    {
        let mut alone = rank(&work, number, port, &format!("{TRAIN} --output run"));
        alone.env("MMPO_FAST_JOIN_SECONDS", "1");
        let finished = crate::harness::finish(alone);
        assert_eq!(finished.code, Some(9), "{}", finished.stderr);
        // The second rank of a machine leaves the telling to the first; its exit code says it all the same.
        let is_told = finished.stderr.contains(expected);
        assert_eq!(is_told, number == 0, "{}", finished.stderr);
    }
}

#[test]
fn a_half_set_environment_is_one_clear_message() {
    let work = Workplace::new();
    let mut half = command(&work, &format!("{TRAIN} --output run"));
    half.env("RANK", "1").env("WORLD_SIZE", "2");
    let finished = crate::harness::finish(half);
    assert_eq!(finished.code, Some(2), "{}", finished.stderr);
    for part in ["half set, without LOCAL_RANK", "RANK = 1", "help: start all ranks with torchrun"] {
        assert!(finished.stderr.contains(part), "no {part:?} in: {}", finished.stderr);
    }
}
