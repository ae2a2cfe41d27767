//! Warnings that teach: numbers that can be meant and rarely are, each with what to try.

use crate::harness::{TRAIN, Workplace};

#[test]
fn numbers_that_are_far_from_what_is_usual_are_warned_about() {
    let work = Workplace::new();
    let said = |rate: &str, flags: &str, output: &str| {
        let run = TRAIN.replace("1e-3", rate);
        work.run(&format!("{run} --max-steps 4 --output {output} {flags}")).stderr
    };
    let far = said("0.5", "", "above");
    assert!(far.contains("the learning rate 5.0e-1 is far above the 1.0e-4 that is usual for mmpo"), "{far}");
    assert!(far.contains("try --learning-rate 1e-3"), "{far}");
    let near = said("1e-3", "", "near");
    assert!(!near.contains("that is usual for") && !near.contains("are warm-up"), "{near}");
    let below = said("1e-7", "--objective dpo", "below");
    assert!(
        below.contains("is far below the 1.0e-5 that is usual for dpo: 4 steps may train next to nothing"),
        "{below}"
    );
    let warmup = said("1e-3", "--warmup-steps 3", "warmup");
    assert!(warmup.contains("3 of the 4 steps are warm-up"), "{warmup}");
}

#[test]
fn a_policy_that_is_the_reference_still_is_said_to_be() {
    let work = Workplace::new();
    let run = TRAIN.replace("1e-3", "1e-6");
    let flags = "--max-steps 1 --objective simpo --warmup-steps 0 --eval-data pairs.jsonl";
    let finished = work.succeed(&format!("{run} {flags} --output still"));
    assert!(
        finished.stderr.contains("The policy hardly differs from the reference after step 1"),
        "{}",
        finished.stderr
    );
    let moved = work.succeed(&format!("{TRAIN} {flags} --output moved"));
    assert!(!moved.stderr.contains("hardly differs"), "{}", moved.stderr);
}
