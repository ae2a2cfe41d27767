//! The first steps of the demo on the emulated GPU: as on the CPU within what bf16 allows, and to the bit in a second run,
//! which is killed and goes on.

use crate::harness::{Workplace, assert_close};
use crate::resume::wait_for_lines;

const STEPS: usize = 3;
/// The demo's.
const PAIRS_PER_STEP: usize = 16;

#[test]
fn the_demos_first_steps() {
    let work = Workplace::new();
    let pairs =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/demo/pairs.jsonl")).unwrap();
    work.write("demo.jsonl", pairs.lines().take(STEPS * PAIRS_PER_STEP).collect::<Vec<_>>().join("\n"));
    let run = format!(
        "train --model builtin:demo --data demo.jsonl --learning-rate 6.6e-4 --pairs-per-step {PAIRS_PER_STEP} \
         --max-steps {STEPS} --save-steps 1"
    );
    let whole = work.succeed(&format!("{run} --device emulated --output whole"));
    assert!(whole.stderr.contains("device: cuda (emulated"), "{}", whole.stderr);

    work.succeed(&format!("{run} --device cpu --output cpu"));
    for (name, tolerance) in [
        ("loss", 5e-3),
        ("logps/chosen", 5e-3),
        ("logps/rejected", 5e-3),
        ("weights/chosen", 1e-2),
        ("grad_norm", 2e-2),
    ] {
        let (emulated, cpu) = (work.series("whole", name), work.series("cpu", name));
        assert_eq!((emulated.len(), cpu.len()), (STEPS, STEPS), "{name}");
        for (step, (&emulated, &cpu)) in emulated.iter().zip(&cpu).enumerate() {
            assert_close(emulated, cpu, tolerance, &format!("{name} of step {}", step + 1));
        }
    }

    // The other run keeps its optimiser states in the host's memory.
    let cut = format!("{run} --device emulated --offload states --output cut");
    let mut child = work.command(&cut).spawn().unwrap();
    wait_for_lines(&work.path("cut/metrics.jsonl"), 1, &mut child);
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!work.path("cut/model").exists(), "the run was over");
    work.succeed("train --resume --output cut");
    work.assert_same_bits("whole", "cut", STEPS);
}
