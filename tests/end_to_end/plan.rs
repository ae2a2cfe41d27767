//! `plan`, and what `train` does with the same account: it says what a run takes, refuses what cannot fit, and chooses.

use serde_json::Value;

use crate::harness::*;

/// The options of [`TRAIN`] that a plan has too.
fn planned(options: &str) -> String {
    format!("plan {} {options}", TRAIN.strip_prefix("train ").unwrap())
}

fn account(workplace: &Workplace, arguments: &str) -> Value {
    let finished = workplace.succeed(&format!("{arguments} --json"));
    serde_json::from_str(&finished.stdout).unwrap_or_else(|error| panic!("{error}: {}", finished.stdout))
}

fn bytes(account: &Value) -> u64 {
    account["memory"]["peak_bytes"].as_u64().unwrap()
}

/// What `train --verbose` says of its memory: bytes taken, and planned.
fn taken(stderr: &str) -> [u64; 2] {
    let line =
        stderr.lines().find(|line| line.contains("at the peak, ")).unwrap_or_else(|| panic!("{stderr}"));
    let numbers: Vec<u64> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    numbers.try_into().unwrap_or_else(|numbers| panic!("{line}: {numbers:?}"))
}

/// The plan needs no weights, and states to the byte what the run takes.
#[test]
fn a_plan_states_what_training_takes() {
    let bare = Workplace::new();
    std::fs::remove_file(bare.path("base/model.safetensors")).unwrap();
    for options in [
        "",
        "--optimizer-states 8bit --recompute layer",
        "--lora q,v --lora-rank 4 --lora-dropout 0.1",
        "--objective sft --eval-split 0.3",
        "--tokens-per-micro-batch 64 --recompute selective --head-mode recompute",
        "--gradients layer --max-grad-norm 0 --eval-data pairs.jsonl",
    ] {
        // A cache of its own, for what is in the cache is not scored again.
        let workplace = Workplace::new();
        let account = account(&bare, &planned(options));
        let train = format!("--verbose {TRAIN} --max-steps 1 --output run {options}");
        let [measured, in_training] = taken(&workplace.succeed(&train).stderr);
        assert_eq!(bytes(&account), measured, "{options}");
        assert_eq!(in_training, measured, "{options}");
        let parts = account["memory"]["parts"].as_object().unwrap();
        let sum: u64 = parts.values().map(|part| part.as_u64().unwrap()).sum();
        assert_eq!(sum, measured, "{options}: {parts:?}");
    }
}

#[test]
fn a_plan_shows_memory_work_time_and_what_takes_less() {
    let workplace = Workplace::new();
    workplace.bring("bias");
    let text = workplace.succeed(&planned("--gpu h200").replace("--model base", "--model bias")).stdout;
    for part in [
        "on H200",
        "optimiser states",
        "f32 master weights",
        "at the peak",
        "gemms",
        "attention",
        "computed again",
        "MFU",
        "taken in the driver's pieces",
        "H200 has 141.0 GB: it fits",
    ] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    let text = workplace.succeed(&planned("--memory 1MB")).stdout;
    assert!(text.contains("no expected time") && !text.contains("MFU"), "{text}");
    assert!(text.contains("within 1.0 MB") && text.contains("nothing fits"), "{text}");
    let limit = bytes(&account(&workplace, &planned(""))) - 1;
    let text = workplace.succeed(&planned(&format!("--memory {limit}B"))).stdout;
    for part in ["as asked", "too much", "--optimizer-states 8bit", "fits"] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    let account = account(&workplace, &planned("--tflops 1 --bandwidth 100"));
    let step = &account["step"];
    let flops: f64 = step["flops"].as_object().unwrap().values().map(|part| part.as_f64().unwrap()).sum();
    let seconds = step["seconds"].as_f64().unwrap();
    assert!(seconds > flops / 1e12, "no machine is faster than its peak: {step}");
    let mfu = step["mfu"].as_f64().unwrap();
    assert!((mfu - step["model_flops"].as_f64().unwrap() / 1e12 / seconds).abs() <= 1e-9, "{step}");
    assert_eq!(account["steps"], 3);
}

/// Whether the bus hides offloaded states: a slow one is waited for, and the step takes as much longer.
#[test]
fn a_plan_tells_what_the_bus_adds() {
    let workplace = Workplace::new();
    workplace.bring("bias");
    let planned = |options: &str| planned(options).replace("--model base", "--model bias");
    let text = workplace.succeed(&planned("--gpu h200 --offload states --bus-bandwidth 0.001")).stdout;
    for part in ["offloaded states: ", "of pinned host memory", "the update of", "are waited for"] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    let step = |options: &str| account(&workplace, &planned(options))["step"].clone();
    let (plain, slow) = (step("--gpu h200"), step("--gpu h200 --offload states --bus-bandwidth 0.001"));
    assert!(plain["offload"].is_null(), "{plain}");
    let [copying, beside, exposed] = ["copy_seconds", "beside_seconds", "exposed_seconds"]
        .map(|key| slow["offload"][key].as_f64().unwrap_or_else(|| panic!("{key}: {slow}")));
    let bytes = slow["offload"]["host_bytes"].as_f64().unwrap();
    assert!((copying - bytes / (0.8 * 1e6)).abs() <= 1e-9 * copying, "{slow}");
    assert!((exposed - (copying - beside)).abs() <= 1e-9 * copying && exposed > 0.0, "{slow}");
    let [before, after] = [&plain, &slow].map(|step| step["seconds"].as_f64().unwrap());
    assert!((after - before - exposed).abs() <= 1e-9 * after, "{plain} {slow}");
    workplace.refuse(&planned("--gpu h200 --bus-bandwidth 0"), 2, &["--bus-bandwidth", "greater than 0"]);
}

#[test]
fn a_plan_without_pairs_bounds_every_plan_with_them() {
    let workplace = Workplace::new();
    let with_pairs = bytes(&account(&workplace, &planned("")));
    let without = "plan --model base --device cpu --threads 1 --largest-pair 64/96/96 --pairs-per-step 4";
    let bound = account(&workplace, without);
    assert!(bytes(&bound) >= with_pairs, "{} and {with_pairs}", bytes(&bound));
    assert!(bound["step"].is_null(), "no mean step is known: {bound}");
    let longer = without.replace("64/96/96", "640/960/960");
    assert!(bytes(&account(&workplace, &longer)) > bytes(&bound));
}

#[test]
fn a_run_that_cannot_fit_is_refused_with_what_makes_it_fit() {
    let workplace = Workplace::new();
    let asked = bytes(&account(&workplace, &planned("")));
    let saved = bytes(&account(&workplace, &planned("--optimizer-states 8bit")));
    let between = (asked + saved) / 2;
    let refused = workplace.refuse(
        &format!("{TRAIN} --output run --memory {between}B"),
        6,
        &["this run takes", "`--memory` allows", "too much", "optimiser states", "--memory auto chooses"],
    );
    assert!(refused.stderr.contains("--optimizer-states 8bit"), "{}", refused.stderr);
    assert!(!workplace.path("run/model").exists(), "nothing was trained");
    workplace.refuse(&format!("{TRAIN} --output none --memory 1MB"), 6, &["even with", "--lora all"]);
    workplace
        .succeed(&format!("{TRAIN} --max-steps 1 --output fits --memory {between}B --optimizer-states 8bit"));
}

/// What auto chose stands in the run's recipe, so that the run can go on.
#[test]
fn auto_writes_down_what_it_chose() {
    let workplace = Workplace::new();
    let train = format!("{TRAIN} --max-steps 2 --save-steps 1 --memory auto --output run");
    let stderr = workplace.succeed(&train).stderr;
    assert!(stderr.contains("--memory auto: "), "{stderr}");
    let resolved = String::from_utf8(workplace.read("run/resolved.toml")).unwrap();
    assert!(!resolved.contains("memory = "), "{resolved}");
    for line in ["optimizer_states = ", "recompute = ", "gradients = ", "tokens_per_micro_batch = "] {
        assert!(resolved.contains(line), "no {line} in {resolved}");
    }
    std::fs::remove_file(workplace.path("run/report.html")).unwrap();
    std::fs::remove_dir_all(workplace.path("run/checkpoints/step-000002")).unwrap();
    let resumed = workplace.succeed(&format!("{train} --resume"));
    assert!(resumed.stderr.contains("resuming after step 1"), "{}", resumed.stderr);
}

/// A run goes on with what an earlier part of it has, whatever is free now: what auto would choose here is another run.
#[test]
fn auto_goes_on_with_what_the_run_had() {
    let workplace = Workplace::new();
    let run = format!("{TRAIN} --max-steps 4 --save-steps 2");
    // As auto writes it down where memory is scarce.
    let chosen =
        "--optimizer-states 8bit --gradients bf16 --recompute selective --tokens-per-micro-batch 300";
    workplace.succeed(&format!("{run} {chosen} --output whole"));
    workplace.cut_after_step_2("whole", "cut");
    let resumed = workplace.succeed(&format!("{run} --memory auto --output cut --resume"));
    assert!(resumed.stderr.contains("resuming after step 2"), "{}", resumed.stderr);
    workplace.assert_same_bits("whole", "cut", 4);
    let resolved = |run: &str| String::from_utf8(workplace.read(&format!("{run}/resolved.toml"))).unwrap();
    assert_eq!(resolved("cut").replace("/cut\"", "/whole\""), resolved("whole"));
    // What a flag asks for is no choice of auto's, and goes before what the run had: where it is free to change, and where not.
    workplace.cut_after_step_2("whole", "less");
    workplace.succeed("train --resume --output less --memory auto --recompute layer");
    assert!(resolved("less").contains("recompute = \"layer\""), "{}", resolved("less"));
    workplace.assert_same_bits("whole", "less", 4);
    workplace.refuse(
        &format!("{run} --memory auto --output cut --resume --tokens-per-micro-batch 200"),
        2,
        &["cannot be resumed", "tokens_per_micro_batch"],
    );
}

#[test]
fn what_makes_no_plan_is_refused() {
    let workplace = Workplace::new();
    for (options, code, parts) in [
        ("--memory 24", 2, &["--memory", "24GB", "`24`"][..]),
        ("--memory 0GB", 2, &["--memory", "at least 1 byte"]),
        ("--gpu GTX1080", 2, &["`--gpu` = GTX1080", "H200"]),
        ("--bandwidth 0", 2, &["--bandwidth", "greater than 0"]),
        ("--tflops -1", 2, &["--tflops", "greater than 0"]),
        ("--largest-pair 1/2/3", 2, &["--data", "--largest-pair"]),
        ("--gradients layer", 2, &["max_grad_norm"]),
    ] {
        workplace.refuse(&planned(options), code, parts);
    }
    for pair in ["1/2", "0/1/1", "a/b/c", "1/1/99999999"] {
        let arguments = format!("plan --model base --largest-pair {pair}");
        workplace.refuse(&arguments, 2, &["--largest-pair", pair]);
    }
    workplace.refuse("plan --data pairs.jsonl", 2, &["--model"]);
}

/// MFU is logged where the peak is known, and it is the operations of the step over what the peak allows.
#[test]
fn mfu_is_logged_where_the_peak_is_known() {
    let workplace = Workplace::new();
    workplace.succeed(&format!("{TRAIN} --max-steps 1 --output known --tflops 0.5"));
    let line = &workplace.lines("known/metrics.jsonl")[0];
    let mfu = line["mfu"].as_f64().unwrap();
    assert!(mfu > 0.0 && mfu < 5.0, "{mfu}");
    workplace.succeed(&format!("{TRAIN} --max-steps 1 --output unknown"));
    assert!(workplace.lines("unknown/metrics.jsonl")[0].get("mfu").is_none());
}

/// What ranks send each other follows the formulas of `docs/scale.md`.
#[test]
fn a_plan_for_several_ranks_shows_what_they_send() {
    let workplace = Workplace::new();
    let asked = planned("--tflops 1 --bandwidth 50 --ranks 8 --shard states");
    let account = account(&workplace, &asked);
    let trained = account["trained_parameters"].as_f64().unwrap();
    let shardings = account["ranks"]["shardings"].as_array().unwrap();
    let sent = |index: usize| {
        let number = |key: &str| shardings[index][key].as_f64().unwrap();
        (number("reduced") + number("gathered")) / (trained * 7.0 / 8.0)
    };
    // Pairs of a step are fewer than 8 ranks, so that each has one micro-batch; a weight has four bytes here.
    for (index, name) in ["none", "states", "gradients"].into_iter().enumerate() {
        assert_eq!(shardings[index]["shard"], name);
        assert!((sent(index) - 8.0).abs() <= 1e-9, "{name}: {}", sent(index));
    }
    // Some layers are gathered once, some twice.
    assert!(shardings[3]["shard"] == "weights" && sent(3) > 8.0 && sent(3) < 12.0, "{}", sent(3));
    let text = workplace.succeed(&asked).stdout;
    assert!(text.contains("a step on 8 ranks") && text.contains("as asked"), "{text}");

    // States that are offloaded are not sharded, so that there is one way alone.
    workplace.bring("tied");
    let offloaded = planned("--gpu H100 --ranks 8 --offload states").replace("--model base", "--model tied");
    let ways = self::account(&workplace, &offloaded)["ranks"]["shardings"].clone();
    let ways: Vec<_> = ways.as_array().unwrap().iter().map(|way| way["shard"].clone()).collect();
    assert_eq!(ways, ["none"]);
    let text = workplace.succeed(&offloaded).stdout;
    assert!(text.contains("every other --shard needs --offload none"), "{text}");

    // Without the machine's rates there is nothing to tell of the exchange, which is said.
    let text = workplace.succeed(&planned("--ranks 8")).stdout;
    assert!(text.contains("a step on 8 ranks: give the machine's rates"), "{text}");

    workplace.refuse(&planned("--network-bandwidth 25"), 2, &["--ranks"]);
}
