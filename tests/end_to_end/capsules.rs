//! A step with a number that is not finite leaves a capsule, and the capsule shows where the number comes from.

use serde_json::Value;

use crate::harness::{TRAIN, Workplace};

const CONFIG: i32 = 2;
const NUMERICS: i32 = 7;

/// A run whose first update leaves weights that are finite, and a model that is broken.
fn diverging() -> String {
    format!("{} --warmup-steps 0 --max-steps 5", TRAIN.replace("1e-3", "1e8"))
}

/// Where a replay found the first number that is not finite.
#[track_caller]
fn first(text: &str) -> &str {
    text.lines().find(|line| line.starts_with("first ")).unwrap_or_else(|| panic!("{text}"))
}

impl Workplace {
    /// The folder of a run's only capsule.
    #[track_caller]
    fn only_capsule(&self, run: &str) -> String {
        let capsules: Vec<_> = std::fs::read_dir(self.path(&format!("{run}/capsules"))).unwrap().collect();
        assert_eq!(capsules.len(), 1, "{run}");
        format!("{run}/capsules/{}", capsules[0].as_ref().unwrap().file_name().into_string().unwrap())
    }
}

#[test]
fn a_step_that_fails_is_repeated_from_its_capsule() {
    let work = Workplace::new();
    let parts = ["not a number to train on", "mmpo-fast train --replay run/capsules/step-000002"];
    work.refuse(&format!("{} --output run", diverging()), NUMERICS, &parts);
    assert!(!work.path("run/model").exists() && !work.path("run/checkpoints").exists());
    let before = work.contents("run");
    let text = work.succeed("train --replay run/capsules/step-000002").stdout;
    for part in [
        "step 2 of 5",
        "from     the starting model, 1 steps taken again",
        "NaN",
        "repeated the step failed again, with the same log-probs and losses",
    ] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    // The last layer's gradients are the first ones of the backward.
    assert!(first(&text).contains("the gradient of `model.layers.2."), "{text}");
    assert!(work.contents("run") == before, "the replay changed the run");
    // Weights so large that attention has no finite scores.
    let run = diverging().replace("1e8", "1e13");
    work.refuse(&format!("{run} --output larger"), NUMERICS, &["loss NaN", "--replay"]);
    let larger = work.succeed("train --replay larger/capsules/step-000002").stdout;
    for part in ["the residual stream after the attention of layer 0", "is NaN, in record 1 of the data"] {
        assert!(first(&larger).contains(part), "no {part:?} in {larger}");
    }
    // A checkpoint of other pairs in the run's folder is not what the step began with.
    let elsewhere = String::from_utf8(work.read("pairs.jsonl")).unwrap().replace("Paris", "Rome");
    work.write("elsewhere.jsonl", elsewhere);
    let short = TRAIN.replace("pairs.jsonl", "elsewhere.jsonl");
    work.succeed(&format!("{short} --max-steps 1 --output elsewhere"));
    std::fs::rename(work.path("elsewhere/checkpoints"), work.path("run/checkpoints")).unwrap();
    let text = work.succeed("train --replay run/capsules/step-000002").stdout;
    assert!(text.contains("from     the starting model, 1 steps taken again"), "{text}");
    std::fs::remove_dir_all(work.path("run/checkpoints")).unwrap();
    // What an older capsule of the step left goes when the step fails again.
    work.write("run/capsules/step-000002/old", "");
    // Where the run is elsewhere now, its capsules are with it.
    std::fs::rename(work.path("run"), work.path("moved")).unwrap();
    work.succeed("train --replay moved/capsules/step-000002");
    // The same command fails in the same way, and leaves its capsule anew.
    work.refuse(&format!("{} --output moved --resume", diverging()), NUMERICS, &["--replay moved/capsules"]);
    assert!(!work.path("moved/capsules/step-000002/old").exists());
    // Other pairs would make it another step.
    let pairs = String::from_utf8(work.read("pairs.jsonl")).unwrap();
    work.write("pairs.jsonl", pairs.replace("Paris", "Rome"));
    work.refuse(
        "train --replay moved/capsules/step-000002",
        CONFIG,
        &["cannot be repeated: the pairs changed since"],
    );
}

#[test]
fn a_capsule_takes_its_weights_along_where_it_is_asked_to() {
    let work = Workplace::new();
    let run = format!("{} --capsule-weights --output run", diverging());
    work.refuse(&run, NUMERICS, &["--replay run/capsules/step-000002"]);
    let copy = "run/capsules/step-000002/checkpoints/step-000001";
    assert!(work.path(&format!("{copy}/state.safetensors")).is_file());
    let text = work.succeed("train --replay run/capsules/step-000002").stdout;
    assert!(text.contains("step-000001, 0 steps taken again"), "{text}");
    assert!(text.contains("with the same log-probs and losses"), "{text}");
    // Without it the step before is taken again, to the same bits.
    std::fs::remove_dir_all(work.path("run/capsules/step-000002/checkpoints")).unwrap();
    let again = work.succeed("train --replay run/capsules/step-000002").stdout;
    let table = |text: &str| text.split_once("\n\n").unwrap().1.to_string();
    assert_eq!(table(&text), table(&again));
}

#[test]
fn adapters_and_gradients_by_layer_leave_capsules_too() {
    let work = Workplace::new();
    // Norms take up whatever an adapter adds, until the product of its factors overflows.
    for (name, flags, rate) in [
        ("lora", "--lora all --lora-rank 4 --lora-alpha 1e18", "1e18"),
        ("layer", "--gradients layer --max-grad-norm 0", "1e8"),
    ] {
        let run = diverging().replace("1e8", rate);
        work.refuse(&format!("{run} {flags} --output {name}"), NUMERICS, &["--replay"]);
        let text = work.succeed(&format!("train --replay {}", work.only_capsule(name))).stdout;
        assert!(text.contains("the step failed again, with the same"), "{name}: {text}");
    }
}

/// A replay drops what the step dropped. With a beta this large a pair's loss is 0 or far too large, as the mask of a step decides.
#[test]
fn a_replay_drops_what_the_step_dropped() {
    let work = Workplace::new();
    work.succeed(&format!(
        "{TRAIN} --max-steps 1 --lora all --lora-rank 4 --lora-alpha 8 --lora-dropout 0.3 --output lora"
    ));
    let first = String::from_utf8(work.read("pairs.jsonl")).unwrap().lines().next().unwrap().to_string();
    work.write("pairs.jsonl", first);
    let run = |seed: usize, more: &str, output: &str| {
        let options = "--adapter lora/adapter --objective dpo --beta 1e38 --max-steps 6";
        let finished = work.run(&format!("{TRAIN} {options} --seed {seed} {more} --output {output}"));
        assert_eq!(finished.code, Some(NUMERICS), "{}", finished.stderr);
        let capsules = std::fs::read_dir(work.path(&format!("{output}/capsules"))).ok()?;
        let names = capsules.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter_map(|name| name.strip_prefix("step-")?.parse::<usize>().ok()).next()
    };
    let failing = (1..40).find_map(|seed| {
        let step = run(seed, "", &format!("seed-{seed}"))?;
        (step > 1).then_some((seed, step))
    });
    let (seed, step) = failing.expect("a seed whose first mask does no harm, and a later one does");
    let check = |output: &str| {
        let folder = format!("{output}/capsules/step-{step:06}");
        let capsule: Value = serde_json::from_slice(&work.read(&format!("{folder}/capsule.json"))).unwrap();
        let logps = capsule["pairs"][0]["logps"].as_array().unwrap();
        let are_finite = logps.iter().all(|logp| logp.as_str().unwrap().parse::<f32>().unwrap().is_finite());
        assert!(are_finite, "every mask gives these log-probs: {capsule}");
        let text = work.succeed(&format!("train --replay {folder}")).stdout;
        assert!(text.contains("the step failed again, with the same log-probs"), "{output}: {text}");
    };
    check(&format!("seed-{seed}"));
    // Weights that a checkpoint does not take leave the capsule of the step after it, which has that step's mask.
    assert_eq!(run(seed, &format!("--save-steps {}", step - 1), "probe"), Some(step));
    assert!(!work.path("probe/checkpoints").exists());
    check("probe");
}

#[test]
fn weights_that_a_checkpoint_would_not_take_leave_a_capsule() {
    let work = Workplace::new();
    let run = format!("{} --save-steps 1 --output run", diverging());
    work.refuse(&run, NUMERICS, &["not a number to train on", "--replay run/capsules/step-000002"]);
    let text = work.succeed("train --replay run/capsules/step-000002").stdout;
    assert!(text.contains("repeated the step failed again"), "{text}");
}

#[test]
fn what_is_no_capsule_is_refused() {
    let work = Workplace::new();
    work.refuse("train --replay base", 5, &["resolved.toml"]);
    work.refuse(&format!("{} --output run", diverging()), NUMERICS, &["--replay"]);
    let replay = "train --replay run/capsules/step-000002";
    work.refuse(
        &format!("{replay} --learning-rate 1e-5"),
        CONFIG,
        &["cannot be given together with `--replay`"],
    );
    let capsule = String::from_utf8(work.read("run/capsules/step-000002/capsule.json")).unwrap();
    let mut altered: Value = serde_json::from_str(&capsule).unwrap();
    let token = &mut altered["pairs"][0]["tokens"][1][0];
    *token = (token.as_u64().unwrap() + 1).into();
    work.write("run/capsules/step-000002/capsule.json", altered.to_string());
    work.refuse(replay, CONFIG, &["cannot be repeated: the tokens of the step's pairs changed since"]);
    work.write("run/capsules/step-000002/capsule.json", &capsule[..capsule.len() / 2]);
    work.refuse(replay, CONFIG, &["not a capsule"]);
    work.write("run/capsules/step-000002/capsule.json", capsule.replace("\"format\": 1", "\"format\": 9"));
    work.refuse(replay, CONFIG, &["has format 9"]);
}
