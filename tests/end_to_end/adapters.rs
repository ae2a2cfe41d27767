//! `train --lora`, `train --adapter`, `score --adapter`, `generate --adapter` and `merge`: what they write, that a run cut in
//! two gives the bits of one in one piece, and what they refuse. tests/reference/check_adapters.sh compares with PEFT.

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use crate::harness::{TRAIN, Workplace, assert_close, number};
use crate::resume::wait_for_lines;

const LORA: &str = "--lora all --lora-rank 4 --lora-alpha 8 --lora-dropout 0.1";

/// A step's worth of training, into `run`.
fn train(work: &Workplace, options: &str, run: &str) {
    work.succeed(&format!("{TRAIN} --max-steps 3 {options} --output {run}"));
}

fn scores(work: &Workplace, options: &str) -> Vec<[f64; 2]> {
    work.succeed(&format!(
        "score {options} --data pairs.jsonl --output scores.jsonl --max-length 160 --max-prompt-length 64 --device cpu"
    ));
    let lines = work.lines("scores.jsonl");
    lines.iter().map(|line| [number(&line["logp_chosen"]), number(&line["logp_rejected"])]).collect()
}

#[track_caller]
fn assert_same_scores(ours: &[[f64; 2]], theirs: &[[f64; 2]], tolerance: f64) {
    assert_eq!(ours.len(), theirs.len());
    for (ours, theirs) in ours.iter().flatten().zip(theirs.iter().flatten()) {
        assert_close(*ours, *theirs, tolerance, "log-prob");
    }
}

fn config(work: &Workplace, folder: &str) -> Value {
    serde_json::from_slice(&work.read(&format!("{folder}/adapter_config.json"))).unwrap()
}

#[test]
fn a_trained_adapter_is_scored_continued_and_merged() {
    let work = Workplace::new();
    let base = scores(&work, "--model base");
    train(&work, LORA, "run");
    assert!(!work.path("run/model").exists(), "the weights were not trained");
    let config = config(&work, "run/adapter");
    for (key, wanted) in [
        ("peft_type", json!("LORA")),
        ("r", json!(4)),
        ("lora_alpha", json!(8)),
        ("lora_dropout", json!(0.1)),
        ("use_rslora", json!(false)),
        ("bias", json!("none")),
        (
            "target_modules",
            json!(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
        ),
    ] {
        assert_eq!(config[key], wanted, "{key}");
    }
    assert!(work.path("run/adapter/tokenizer.json").is_file());
    assert!(!work.path("run/adapter/config.json").exists());

    let adapted = scores(&work, "--model base --adapter run/adapter");
    let moved = adapted.iter().flatten().zip(base.iter().flatten());
    assert!(
        moved.map(|(adapted, base)| (adapted - base).abs()).fold(0.0, f64::max) >= 1e-2,
        "nothing was trained"
    );

    work.succeed("merge --model base --adapter run/adapter --output merged");
    // The merged weights are rounded to bf16.
    assert_same_scores(&scores(&work, "--model merged"), &adapted, 1e-2);
    let answer = |model: &str| {
        work.succeed(&format!("generate {model} --prompt hello --max-new-tokens 8 --device cpu")).stdout
    };
    answer("--model base --adapter run/adapter");
    answer("--model merged");

    // Its own log-probs are where the next run begins; a step of a tiny learning rate hardly moves them.
    let slow = TRAIN.replace("--learning-rate 1e-3", "--learning-rate 1e-6");
    work.succeed(&format!("{slow} --max-steps 1 --adapter run/adapter --output more"));
    assert_same_scores(&scores(&work, "--model base --adapter more/adapter"), &adapted, 1e-3);
    let resolved = String::from_utf8(work.read("more/resolved.toml")).unwrap();
    assert!(resolved.contains("adapter = \"") && !resolved.contains("lora"), "{resolved}");
}

/// Modules with ranks and scales of their own, as PEFT's patterns make them: scored, merged and trained further, an adapter is the
/// same one.
#[test]
fn an_adapter_with_patterns_is_scored_merged_and_continued() {
    let work = Workplace::new();
    train(&work, LORA, "run");
    let plain = scores(&work, "--model base --adapter run/adapter");
    let weights = work.read("run/adapter/adapter_model.safetensors");
    work.write("run/adapter/adapter_model.safetensors", narrowed(&weights, "layers.1.self_attn.q_proj", 2));
    let patterns = [
        ("rank_pattern", json!({"layers.1.self_attn.q_proj": 2})),
        ("alpha_pattern", json!({r"layers\.[02]\..*down_proj": 400, "q_proj": 100})),
    ];
    let mut with_patterns = config(&work, "run/adapter");
    for (key, value) in &patterns {
        with_patterns[key] = value.clone();
    }
    work.write("run/adapter/adapter_config.json", with_patterns.to_string());
    let adapted = scores(&work, "--model base --adapter run/adapter");
    let moved = adapted.iter().flatten().zip(plain.iter().flatten());
    let moved = moved.map(|(adapted, plain)| ((adapted - plain) / plain).abs()).fold(0.0, f64::max);
    assert!(moved >= 0.05, "the patterns move log-probs by {moved}");

    work.succeed("merge --model base --adapter run/adapter --output merged");
    assert_same_scores(&scores(&work, "--model merged"), &adapted, 1e-2);

    let slow = TRAIN.replace("--learning-rate 1e-3", "--learning-rate 1e-7");
    work.succeed(&format!("{slow} --max-steps 1 --adapter run/adapter --output more"));
    let kept = config(&work, "more/adapter");
    for (key, value) in &patterns {
        assert_eq!(kept[key], *value, "{key}");
    }
    assert_same_scores(&scores(&work, "--model base --adapter more/adapter"), &adapted, 1e-3);
    work.succeed("merge --model base --adapter more/adapter --output merged-more");
    assert_same_scores(&scores(&work, "--model merged-more"), &adapted, 1e-2);
    // With another scale it is another model to begin with.
    with_patterns["alpha_pattern"] = json!({"q_proj": 100});
    work.write("run/adapter/adapter_config.json", with_patterns.to_string());
    work.refuse("train --resume --output more", 2, &["cannot be resumed", "model"]);
}

/// The seed of a run is that of its masks too: of one pair and one adapter there is no other chance.
#[test]
fn dropout_follows_the_seed_of_the_run() {
    let work = Workplace::new();
    train(&work, &LORA.replace("0.1", "0.5"), "run");
    let first = String::from_utf8(work.read("pairs.jsonl")).unwrap().lines().next().unwrap().to_string();
    work.write("pairs.jsonl", first);
    let losses = ["1", "1", "2"].map(|seed| {
        work.succeed(&format!(
            "{TRAIN} --objective sft --max-steps 1 --adapter run/adapter --seed {seed} --output more"
        ));
        let loss = work.series("more", "loss")[0];
        std::fs::remove_dir_all(work.path("more")).unwrap();
        loss
    });
    assert_eq!(losses[0], losses[1], "the same seed");
    assert_ne!(losses[0], losses[2], "another seed");
}

/// An adapter's file in which a module has the first `rank` rows of `A` and columns of `B` alone.
fn narrowed(file: &[u8], module: &str, rank: usize) -> Vec<u8> {
    let tensors = SafeTensors::deserialize(file).unwrap();
    let narrow = |name: &str, view: &TensorView<'_>| -> (Vec<usize>, Vec<u8>) {
        let (&[rows, columns], bytes) = (view.shape(), view.data()) else { panic!("{name}") };
        assert_eq!(view.dtype(), Dtype::F32, "{name}");
        match (name.contains(module), name.contains("lora_A")) {
            (false, _) => (vec![rows, columns], bytes.to_vec()),
            (true, true) => (vec![rank, columns], bytes[..4 * rank * columns].to_vec()),
            (true, false) => (
                vec![rows, rank],
                bytes.chunks(4 * columns).flat_map(|row| &row[..4 * rank]).copied().collect(),
            ),
        }
    };
    let changed: Vec<_> =
        tensors.tensors().into_iter().map(|(name, view)| (narrow(&name, &view), name)).collect();
    let views = changed.iter().map(|((shape, bytes), name)| {
        (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize(views, Some([("format".to_string(), "pt".to_string())].into())).unwrap()
}

/// References are the base's own log-probs, whatever the adapter: their cache is shared with a run that trains the weights.
#[test]
fn the_reference_is_the_base_without_the_adapter() {
    let work = Workplace::new();
    let dpo = "--objective dpo --max-steps 1";
    let full = work.succeed(&format!("{TRAIN} {dpo} --output full"));
    assert!(!full.stderr.contains("pairs from"), "{}", full.stderr);
    let lora = work.succeed(&format!("{TRAIN} {dpo} {LORA} --output lora"));
    assert!(lora.stderr.contains("pairs from"), "{}", lora.stderr);
    // At the first step policy and reference are the same model: DPO's loss is ln 2 for both.
    for run in ["full", "lora"] {
        assert_close(work.series(run, "loss")[0], 2f64.ln(), 1e-6, run);
    }
    let more = work.succeed(&format!("{TRAIN} {dpo} --adapter lora/adapter --output more"));
    assert!(more.stderr.contains("pairs from"), "{}", more.stderr);
    assert!(
        (work.series("more", "loss")[0] - 2f64.ln()).abs() >= 1e-6,
        "the policy has the adapter from the first step"
    );
}

#[test]
fn a_run_cut_in_two_gives_the_bits_of_one_in_one_piece() {
    // Enough that a run is still under way when a busy machine comes to kill it.
    const STEPS: usize = 200;
    let work = Workplace::new();
    let run = format!("{TRAIN} {LORA} --max-steps {STEPS} --save-steps 20 --weight-decay 0.01");
    work.succeed(&format!("{run} --output whole"));
    let mut child = work.command(&format!("{run} --output cut")).spawn().unwrap();
    wait_for_lines(&work.path("cut/metrics.jsonl"), 25, &mut child);
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!work.path("cut/adapter").exists(), "the run was over");
    let resumed = work.succeed("train --resume --output cut");
    assert!(resumed.stderr.contains("resuming after step"), "{}", resumed.stderr);
    for file in
        ["adapter/adapter_model.safetensors", &format!("checkpoints/step-{STEPS:06}/state.safetensors")]
    {
        assert!(work.read(&format!("whole/{file}")) == work.read(&format!("cut/{file}")), "{file} differs");
    }
    assert_eq!(work.metrics("whole"), work.metrics("cut"));
    let finished = work.succeed("train --resume --output cut");
    assert!(
        finished.stderr.contains("is finished") && finished.stdout.contains("cut/adapter"),
        "{}",
        finished.stdout
    );
    // Frozen weights have no place in a checkpoint.
    let bytes = work.read(&format!("cut/checkpoints/step-{STEPS:06}/state.safetensors")).len();
    assert!(bytes < work.read("base/model.safetensors").len(), "{bytes} bytes");
}

#[test]
fn options_that_contradict_each_other_are_refused() {
    let work = Workplace::new();
    train(&work, LORA, "run");
    let train = format!("{TRAIN} --output other");
    for (options, part) in [
        ("--lora-rank 8", "`--lora-rank` has no effect without `lora`"),
        ("--lora-dropout 0.1", "`--lora-dropout` has no effect without `lora`"),
        ("--lora q,x", "`x` is none of them"),
        ("--lora q,q", "names `q` twice"),
        ("--lora all --lora-rank 0", "must be at least 1"),
        ("--lora all --lora-dropout 1", "must be at least 0 and less than 1"),
        ("--adapter run/adapter --lora all", "`--lora` cannot be given together with `adapter`"),
        ("--adapter run/adapter --lora-alpha 3", "`--lora-alpha` cannot be given together with `adapter`"),
    ] {
        work.refuse(&format!("{train} {options}"), 2, &[part]);
    }
    for (options, part) in [
        ("--adapter base", "the folder of a whole model"),
        ("--adapter cache", "not the folder of an adapter"),
        ("--adapter pairs.jsonl", "this is a file"),
    ] {
        work.refuse(&format!("{train} {options}"), 4, &[part]);
    }
    work.refuse(
        &format!("{TRAIN} --output run/adapter --adapter run/adapter"),
        2,
        &["would write where `--adapter`"],
    );
    work.refuse(
        "merge --model base --adapter run/adapter --output base",
        2,
        &["the folder that `--model` names"],
    );
    work.refuse("score --model run --data pairs.jsonl --output x.jsonl", 4, &["the run trained an adapter"]);
    work.bring("tied");
    work.refuse("merge --model tied --adapter run/adapter --output x", 4, &["shape", "another model"]);
}

/// Everything that PEFT may save otherwise is named.
#[test]
fn adapters_of_other_kinds_are_refused_by_name() {
    let work = Workplace::new();
    train(&work, LORA, "run");
    let sound = config(&work, "run/adapter");
    let weights = work.read("run/adapter/adapter_model.safetensors");
    std::fs::create_dir(work.path("changed")).unwrap();
    work.write("changed/adapter_model.safetensors", &weights);
    let merge = "merge --model base --adapter changed --output merged";
    for (key, value, part) in [
        ("peft_type", json!("IA3"), "only LoRA"),
        ("use_dora", json!(true), "DoRA"),
        ("modules_to_save", json!(["lm_head"]), "whole modules"),
        ("rank_pattern", json!({"q_proj": 8}), "(or `rank_pattern`) ask for [8, "),
        ("rank_pattern", json!({"q_proj": -1}), "whole number from 1"),
        ("alpha_pattern", json!({"q_(proj": 8}), "no regular expression"),
        ("alpha_pattern", json!([8]), "must be an object"),
        ("bias", json!("all"), "biases were trained"),
        ("lora_bias", json!(true), "biases of the adapter's own"),
        ("layers_to_transform", json!([0]), "some layers only"),
        ("layer_replication", json!([[0, 2]]), "layers that are used several times"),
        ("init_lora_weights", json!("pissa"), "base weights that were changed"),
        ("trainable_token_indices", json!([3]), "rows of the embedding"),
        ("use_next_years_lora", json!(true), "is not a key of LoRA that is known here"),
        ("r", json!(5), "shape"),
        ("r", json!(-1), "a whole number"),
        ("lora_alpha", json!(0), "greater than 0"),
        ("lora_dropout", json!(1.5), "less than 1"),
    ] {
        let mut config = sound.clone();
        config[key] = value;
        work.write("changed/adapter_config.json", config.to_string());
        work.refuse(merge, 4, &[part]);
    }
    work.write("changed/adapter_config.json", sound.to_string());
    work.write("changed/adapter_model.safetensors", &weights[..weights.len() / 2]);
    work.refuse(merge, 4, &["adapter_model.safetensors"]);
    work.write(
        "changed/adapter_model.safetensors",
        with_name(&weights, "self_attn.q_proj.lora_A", "self_attn.x_proj.lora_A"),
    );
    work.refuse(merge, 4, &["x_proj", "under PEFT's name"]);
    std::fs::remove_file(work.path("changed/adapter_model.safetensors")).unwrap();
    work.refuse(merge, 4, &["adapter_model.safetensors is missing"]);
    work.write("changed/adapter_model.bin", "x");
    work.refuse(merge, 4, &["pickle"]);
    assert!(!work.path("merged").exists());
}

/// A safetensors file whose header has one text of the same length in the place of another.
fn with_name(file: &[u8], name: &str, other: &str) -> Vec<u8> {
    assert_eq!(name.len(), other.len());
    let length = 8 + u64::from_le_bytes(*file.first_chunk().unwrap()) as usize;
    let header = std::str::from_utf8(&file[8..length]).unwrap().replacen(name, other, 1);
    [&file[..8], header.as_bytes(), &file[length..]].concat()
}
