//! `--precision` as a user meets it: f32 unless asked otherwise, bf16 near to it, and a refusal where a device has no f32.

use crate::harness::{TRAIN, Workplace, assert_close, golden, number};

const SCORE: &str =
    "score --model base --data pairs.jsonl --max-length 160 --max-prompt-length 64 --device cpu";

#[test]
fn scores_in_bf16_are_near_those_of_transformers_and_f32_is_the_default() {
    let work = Workplace::new();
    let golden = golden("base");
    work.succeed(&format!("{SCORE} --output default.jsonl"));
    work.succeed(&format!("{SCORE} --precision f32 --output f32.jsonl"));
    let finished = work.succeed(&format!("{SCORE} --precision bf16 --output bf16.jsonl"));
    assert!(finished.stderr.contains("bf16): asked for"), "{}", finished.stderr);
    assert_eq!(work.lines("default.jsonl"), work.lines("f32.jsonl"));
    let mut differ = 0;
    for (line, exact) in work.lines("bf16.jsonl").iter().zip(work.lines("f32.jsonl")) {
        let pair = &golden["pairs"][line["record"].as_u64().unwrap() as usize - 1];
        for field in ["logp_chosen", "logp_rejected", "entropy_chosen", "entropy_rejected"] {
            let (got, wanted) = (number(&line[field]), number(&pair[field]));
            // The bound of tests/cuda_training.rs for bf16 storage.
            assert!((got - wanted).abs() <= 5e-3 * wanted.abs(), "{field}: {got}, wanted {wanted}");
            differ += usize::from(line[field] != exact[field]);
        }
    }
    assert!(differ > 0, "bf16 changed nothing");
}

#[test]
fn a_precision_that_is_not_there_is_refused() {
    let work = Workplace::new();
    let refused = format!("{SCORE} --precision f16 --output never.jsonl");
    work.refuse(&refused, 2, &["--precision", "f32 or bf16"]);
    let emulated = SCORE.replace("--device cpu", "--device emulated");
    let refused = format!("{emulated} --precision f32 --output never.jsonl");
    work.refuse(&refused, 2, &["--precision", "store bf16 alone", "--device cpu"]);
}

/// The same losses but for what bf16 rounds, and the model that is saved is the one that was trained.
#[test]
fn a_run_in_bf16_learns_as_one_in_f32() {
    let work = Workplace::new();
    for precision in ["f32", "bf16"] {
        work.succeed(&format!("{TRAIN} --precision {precision} --output {precision} --epochs 2"));
    }
    let losses = ["f32", "bf16"].map(|run| work.series(run, "loss"));
    assert!(losses[0].len() > 2 && losses[0].len() == losses[1].len(), "{losses:?}");
    for (wide, narrow) in losses[0].iter().zip(&losses[1]) {
        assert_close(*narrow, *wide, 2e-2, "loss");
    }
    assert_ne!(losses[0], losses[1]);
    let files = ["f32", "bf16"].map(|run| {
        let folder = work.path(&format!("{run}/model"));
        let paths = work.contents(&format!("{run}/model")).into_keys();
        paths.map(|path| path.strip_prefix(&folder).unwrap().to_path_buf()).collect::<Vec<_>>()
    });
    assert_eq!(files[0], files[1]);
}
