//! Configuration files of other trainers as recipes: the shapes of their published examples, and what each key becomes.

use std::path::PathBuf;

use mmpo_fast::config::options::Options;
use mmpo_fast::config::value::OptionValue;
use mmpo_fast::config::{self, PairData, RunConfig};
use mmpo_fast::import::{Dialect, Fate, ImportConfig, Imported, convert};

use crate::file;

fn asked(name: &str) -> ImportConfig {
    ImportConfig {
        file: file("imports").join(name),
        from: None,
        output: None,
        data: None,
        devices: 1,
        without: Vec::new(),
    }
}

#[track_caller]
fn import(config: &ImportConfig) -> Imported {
    let text = std::fs::read_to_string(&config.file).expect("a committed file");
    convert(&text, config).unwrap_or_else(|error| panic!("{}: {error}", config.file.display()))
}

fn refused(imported: &Imported) -> Vec<&str> {
    let rows = imported.rows.iter().filter(|row| row.fate == Fate::Refused);
    rows.map(|row| row.key.as_str()).collect()
}

/// The run that `train --recipe` makes of the recipe.
#[track_caller]
fn loaded(imported: &Imported) -> RunConfig {
    let recipe = imported.recipe.as_ref().unwrap_or_else(|| panic!("refused: {:?}", refused(imported)));
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("recipe.toml");
    std::fs::write(&path, recipe).expect("a recipe");
    config::resolve(Options::default(), Some(&path), false)
        .unwrap_or_else(|error| panic!("{error}\n{recipe}"))
}

/// The recipe's lines but for comments.
fn lines(imported: &Imported) -> Vec<&str> {
    let recipe = imported.recipe.as_deref().unwrap_or_default();
    recipe.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).collect()
}

#[track_caller]
fn assert_lines(imported: &Imported, expected: &[&str]) {
    let found = lines(imported);
    for line in expected {
        assert!(found.contains(line), "no `{line}` in {found:#?}");
    }
}

#[test]
fn a_file_of_trl_becomes_its_run_with_the_defaults_of_trl() {
    let imported = import(&asked("trl_dpo.yaml"));
    assert_eq!(imported.dialect, Dialect::Trl);
    assert_lines(
        &imported,
        &[
            "model = \"example/chat-0.5b\"",
            "data = \"example/preference-pairs:train\"",
            "eval_data = \"example/preference-pairs:test\"",
            "output = \"chat-0.5b-dpo\"",
            "objective = \"dpo\"",
            "beta = 0.1",
            "learning_rate = 0.0000005",
            "schedule = \"linear\"",
            "warmup_steps = 0",
            "max_steps = 1000",
            "pairs_per_step = 16",
            "max_length = 1024",
            "max_prompt_length = 1023",
            "eval_steps = 50",
            "recompute = \"layer\"",
            "seed = 42",
        ],
    );
    let run = loaded(&imported);
    assert_eq!((run.schedule.max_steps, run.batch.pairs_per_step), (Some(1000), Some(16)));
    let eight = import(&ImportConfig { devices: 8, ..asked("trl_dpo.yaml") });
    assert_lines(&eight, &["pairs_per_step = 128"]);
    let fate = |key: &str| imported.rows.iter().find(|row| row.key == key).map(|row| (row.fate, row.line));
    assert_eq!(fate("learning_rate"), Some((Fate::Kept, Some(7))));
    assert_eq!(fate("num_train_epochs"), Some((Fate::NoEffect, Some(8))), "max_steps goes before it");
    assert_eq!(fate("logging_steps"), Some((Fate::NoEffect, Some(16))));
    assert_eq!(fate("beta"), Some((Fate::Default, None)));
}

#[test]
fn adapters_and_losses_of_trl_are_mapped() {
    let imported = import(&asked("trl_lora.yaml"));
    assert_lines(
        &imported,
        &[
            "objective = \"ipo\"",
            "beta = 0.05",
            "lora = \"q,v\"",
            "lora_rank = 32",
            "lora_alpha = 16.0",
            "lora_dropout = 0.05",
            "optimizer_states = \"8bit\"",
            "warmup_ratio = 0.1",
            "epochs = 3.0",
            "pairs_per_step = 8",
        ],
    );
    let run = loaded(&imported);
    assert_eq!(run.lora.map(|lora| lora.rank), Some(32));
}

#[test]
fn recipes_of_the_alignment_handbook_name_what_cannot_be_done() {
    let full = asked("handbook_full.yaml");
    let imported = import(&full);
    assert_eq!(imported.dialect, Dialect::AlignmentHandbook);
    assert_eq!(refused(&imported), ["dataset_mixture.test_split_size"]);
    assert_eq!(imported.recipe, None);
    let without = vec!["dataset_mixture.test_split_size".to_string()];
    let imported = import(&ImportConfig { without, devices: 8, ..full });
    assert_lines(
        &imported,
        &[
            "data = [\"example/feedback-binarized:train_prefs\", { path = \"example/more-pairs:train\", weight = 0.25 }]",
            "pairs_per_step = 128",
            "max_prompt_length = 512",
            "keep_checkpoints = 1",
            "save_steps = 100",
            "warmup_ratio = 0.1",
        ],
    );
    let run = loaded(&imported);
    assert_eq!(run.data.map(|data| data.0.len()), Some(2));
    let left_out = imported.rows.iter().filter(|row| row.fate == Fate::LeftOut).count();
    assert_eq!(left_out, 1);

    let mixer = asked("handbook_mixer.yaml");
    assert_eq!(refused(&import(&mixer)), ["load_in_4bit"]);
    let imported = import(&ImportConfig { without: vec!["load_in_4bit".to_string()], ..mixer });
    assert_lines(
        &imported,
        &[
            "data = [{ path = \"example/feedback-binarized:train_prefs\", weight = 0.5 }]",
            "eval_data = \"example/feedback-binarized:test_prefs\"",
            "eval_steps = 100",
            "lora = \"q,k,v,o,gate,up,down\"",
        ],
    );
    loaded(&imported);

    let mut found = import(&asked("handbook_apo.yaml"));
    found.rows.sort_by(|one, other| one.key.cmp(&other.key));
    assert_eq!(
        refused(&found),
        [
            "dataset_mixture.datasets.config",
            "loss_type",
            "lr_scheduler_kwargs",
            "lr_scheduler_type",
            "model_revision",
        ]
    );
}

#[test]
fn files_of_llama_factory_need_their_pairs_named() {
    let lora = asked("llama_factory_lora.yaml");
    let imported = import(&lora);
    assert_eq!(imported.dialect, Dialect::LlamaFactory);
    assert_eq!(refused(&imported), ["dataset", "max_samples"]);
    let why = imported
        .rows
        .iter()
        .find(|row| row.key == "dataset")
        .map(|row| row.outcome.clone())
        .unwrap_or_default();
    assert!(why.contains("dataset_info.json") && why.contains("--data"), "{why}");
    let data = Some(PairData::from_text("pairs.jsonl").expect("a name"));
    let imported =
        import(&ImportConfig { data: data.clone(), without: vec!["max_samples".to_string()], ..lora });
    assert_lines(
        &imported,
        &[
            "data = \"pairs.jsonl\"",
            "max_length = 2048",
            "lora = \"q,k,v,o,gate,up,down\"",
            "lora_rank = 8",
            "lora_alpha = 16.0",
            "lora_dropout = 0.0",
            "pairs_per_step = 8",
            "eval_split = 0.1",
            "eval_steps = 500",
            "epochs = 3.0",
        ],
    );
    loaded(&imported);

    let imported = import(&ImportConfig { data, ..asked("llama_factory_simpo.yaml") });
    assert_lines(
        &imported,
        &[
            "objective = \"simpo\"",
            "beta = 2.0",
            "gamma_beta_ratio = 0.8",
            "learning_rate = 0.00005",
            "max_length = 2048",
            "pairs_per_step = 8",
        ],
    );
    assert_eq!(loaded(&imported).lora, None);
}

#[test]
fn llama_factorys_list_of_data_sets_is_read_where_it_is() {
    let folder = tempfile::tempdir().expect("a folder");
    let info = r#"{"mine": {"file_name": "mine.json", "ranking": true, "columns": {"prompt": "ask", "chosen": "good", "rejected": "bad"}},
                   "hub": {"hf_hub_url": "example/pairs", "ranking": true}}"#;
    std::fs::write(folder.path().join("dataset_info.json"), info).expect("written");
    let text = format!(
        "model_name_or_path: m\nstage: dpo\nfinetuning_type: full\ndataset: mine, hub\ndataset_dir: {}\noutput_dir: o\n",
        folder.path().display()
    );
    let imported = convert(&text, &asked("inline.yaml")).expect("a recipe");
    let mine = folder.path().join("mine.json").display().to_string();
    assert_lines(
        &imported,
        &[
            &format!("data = [\"{mine}\", \"example/pairs\"]"),
            "columns = { instruction = \"ask\", chosen = \"good\", rejected = \"bad\" }",
        ],
    );
    loaded(&imported);
}

#[test]
fn files_of_axolotl_are_mapped_field_by_field() {
    let lora = asked("axolotl_lora.yml");
    let imported = import(&lora);
    assert_eq!(imported.dialect, Dialect::Axolotl);
    assert_eq!(refused(&imported), ["special_tokens.eos_token", "load_in_8bit"]);
    let without = ["special_tokens.eos_token", "load_in_8bit"].map(str::to_string).to_vec();
    let imported = import(&ImportConfig { without, ..lora });
    assert_lines(
        &imported,
        &[
            "model = \"example/Meta-8B-Instruct\"",
            "data = \"example/alpaca_messages_2k\"",
            "columns = { chosen = \"better\" }",
            "eval_split = 0.05",
            "max_length = 4096",
            "lora = \"q,k,v,o,gate,up,down\"",
            "lora_rank = 32",
            "pairs_per_step = 8",
            "epochs = 4.0",
            "optimizer_states = \"8bit\"",
            "learning_rate = 0.0002",
            "warmup_steps = 10",
        ],
    );
    loaded(&imported);
    let imported = import(&asked("axolotl_simpo.yml"));
    assert_lines(
        &imported,
        &[
            "data = \"pairs.jsonl\"",
            "output = \"./model-out\"",
            "objective = \"simpo\"",
            "gamma_beta_ratio = 0.5",
            "schedule = \"cosine\"",
            "warmup_ratio = 0.03",
            "pairs_per_step = 4",
        ],
    );
    loaded(&imported);
}

const LEAST: &str = "model_name_or_path: m\ndataset_name: d\noutput_dir: o\n";

fn inline(text: &str) -> mmpo_fast::Result<Imported> {
    convert(text, &ImportConfig { file: PathBuf::from("c.yaml"), ..asked("c.yaml") })
}

#[test]
fn no_key_is_passed_over_in_silence() {
    let account = |more: &str| inline(&format!("{LEAST}{more}")).expect("an account");
    for (more, key) in [
        ("loss_typ: ipo\n", "loss_typ"),
        ("rpo_alpha: 0.5\n", "rpo_alpha"),
        ("f_divergence_type: js_divergence\n", "f_divergence_type"),
        ("truncation_mode: keep_end\n", "truncation_mode"),
        ("learning_rate: fast\n", "learning_rate"),
        ("per_device_train_batch_size: 1.5\n", "per_device_train_batch_size"),
        ("optim: rmsprop\n", "optim"),
        ("lr_scheduler_type: polynomial\n", "lr_scheduler_type"),
        ("dataset_config: french\n", "dataset_config"),
        ("neftune_noise_alpha: 5\n", "neftune_noise_alpha"),
        ("loss_type: [sigmoid, ipo]\n", "loss_type"),
        ("use_peft: true\n", "lora_target_modules"),
        ("use_peft: true\nlora_target_modules: [wings]\n", "lora_target_modules"),
        ("use_peft: perhaps\n", "use_peft"),
        ("max_steps: 1.5\n", "max_steps"),
        ("eval_strategy: sometimes\n", "eval_strategy"),
        ("dataset_train_split: 'train[:10%]'\n", "dataset_name"),
    ] {
        let imported = account(more);
        assert_eq!(refused(&imported), [key], "{more}");
        assert_eq!(imported.recipe, None);
    }
    let no_folder = LEAST.replace("output_dir: o", "output_dir: [o]");
    assert_eq!(refused(&inline(&no_folder).expect("an account")), ["output_dir"]);
    for more in
        ["truncation_mode: keep_start\n", "neftune_noise_alpha:\n", "label_smoothing: 0\n", "hub_token: x\n"]
    {
        assert!(account(more).recipe.is_some(), "{more}");
    }
    let every_key = account("beta: 0.2\nseed: 3\nfp16: false\nreport_to: [wandb]\n");
    let known = ["model_name_or_path", "dataset_name", "output_dir", "beta", "seed", "fp16", "report_to"];
    for key in known {
        assert!(every_key.rows.iter().any(|row| row.key == key && row.line.is_some()), "{key}");
    }
}

/// A file has no splits; what a recipe names must be what `train` finds.
#[test]
fn a_file_of_pairs_is_named_without_a_split() {
    let least = "model_name_or_path: m\noutput_dir: o\n";
    let imported = inline(&format!("{least}dataset_name: mine/pairs.jsonl\n")).expect("a recipe");
    assert_lines(&imported, &["data = \"mine/pairs.jsonl\""]);
    let evaluated =
        inline(&format!("{least}dataset_name: pairs.parquet\neval_strategy: steps\neval_steps: 5\n"));
    let evaluated = evaluated.expect("a recipe");
    assert_lines(&evaluated, &["data = \"pairs.parquet\""]);
    assert!(!lines(&evaluated).iter().any(|line| line.starts_with("eval")), "{:?}", lines(&evaluated));
    let why =
        evaluated.rows.iter().find(|row| row.key == "dataset_test_split").map(|row| row.outcome.as_str());
    assert!(why.is_some_and(|why| why.contains("--eval-data FILE")), "{why:?}");
    loaded(&evaluated);
    let mixer = format!(
        "{least}dataset_mixer: {{pairs.csv.gz: 1.0}}\ndataset_splits: [train, test]\neval_strategy: epoch\n"
    );
    assert_eq!(refused(&inline(&mixer).expect("an account")), ["dataset_mixer"]);
    let folder = inline(&format!("{least}dataset_name: org/pairs\n")).expect("a recipe");
    assert_lines(&folder, &["data = \"org/pairs:train\""]);
}

/// How a model is cut among devices changes nothing of what is trained; the account names the flags that do the same.
#[test]
fn keys_of_deepspeed_and_fsdp_point_to_the_flags_that_do_the_same() {
    let axolotl = "base_model: m\ndatasets: [{path: d}]\nrl: dpo\nlearning_rate: 1e-6\n";
    for (more, key, expected) in [
        (
            "deepspeed: examples/deepspeed/ds_z3_config.json\n",
            "deepspeed",
            "ZeRO stage 3 is `--gpus N --shard weights`",
        ),
        (
            "deepspeed: deepspeed_configs/zero2.json\n",
            "deepspeed",
            "ZeRO stage 2 is `--gpus N --shard gradients`",
        ),
        (
            "deepspeed: conf/zero_stage1_config.json\n",
            "deepspeed",
            "ZeRO stage 1 is `--gpus N --shard states`",
        ),
        (
            "deepspeed:\n  zero_optimization:\n    stage: 1\n",
            "deepspeed",
            "ZeRO stage 1 is `--gpus N --shard states`",
        ),
        ("deepspeed: ds.json\n", "deepspeed", "see `--gpus` and `--shard`"),
        ("deepspeed: {zero_optimization: {stage: 7}}\n", "deepspeed", "see `--gpus` and `--shard`"),
        ("fsdp: full_shard auto_wrap\n", "fsdp", "FULL_SHARD is `--gpus N --shard weights`"),
        ("fsdp: [shard_grad_op, auto_wrap]\n", "fsdp", "SHARD_GRAD_OP is `--gpus N --shard gradients`"),
        ("fsdp: [no_shard]\n", "fsdp", "NO_SHARD is `--gpus N --shard none`"),
        ("fsdp: true\n", "fsdp", "see `--gpus` and `--shard`"),
        ("fsdp_version: 2\n", "fsdp_version", "see `--gpus` and `--shard`"),
        (
            "fsdp_config: {fsdp_sharding_strategy: 2}\n",
            "fsdp_config",
            "SHARD_GRAD_OP is `--gpus N --shard gradients`",
        ),
        (
            "fsdp_config:\n  reshard_after_forward: true\n",
            "fsdp_config",
            "FULL_SHARD is `--gpus N --shard weights`",
        ),
        ("dp_shard_size: 4\n", "dp_shard_size", "see `--gpus` and `--shard`"),
        ("fsdp_config: {min_num_params: 0}\n", "fsdp_config", "see `--gpus` and `--shard`"),
    ] {
        for least in [LEAST, axolotl] {
            let imported = inline(&format!("{least}{more}")).expect("an account");
            let row = imported.rows.iter().find(|row| row.key == key).expect(key);
            assert_eq!(row.fate, Fate::NoEffect, "{more}");
            assert!(row.outcome.contains(expected), "{more}{}", row.outcome);
            assert!(imported.recipe.is_some(), "{more}");
        }
    }
}

/// What `train` says of a recipe with these lines, without the place in it.
#[track_caller]
fn refusal_by_train(lines: &str) -> String {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("recipe.toml");
    let least = "model = \"m\"\ndata = \"d\"\noutput = \"o\"\nobjective = \"dpo\"\n";
    std::fs::write(&path, format!("{least}{lines}")).expect("a recipe");
    let error = config::resolve(Options::default(), Some(&path), false).expect_err(lines).to_string();
    let place = format!("{}:", path.display());
    match error.strip_prefix(&place).and_then(|rest| rest.split_once(": ")) {
        Some((_, reason)) => reason.to_string(),
        None => error,
    }
}

/// Keys of a file, the one of them that is refused, and lines of a recipe that `train` refuses for the same reason.
const REFUSED_BY_TRAIN: [(&str, &str, &str); 16] = [
    ("beta: -1\n", "beta", "beta = -1.0"),
    ("learning_rate: -1\n", "learning_rate", "learning_rate = -1.0"),
    ("learning_rate: 1e-60\n", "learning_rate", "learning_rate = 1e-60"),
    ("weight_decay: -0.1\n", "weight_decay", "weight_decay = -0.1"),
    ("adam_beta1: 1\n", "adam_beta1", "adam_beta1 = 1.0"),
    ("label_smoothing: 0.5\n", "label_smoothing", "label_smoothing = 0.5"),
    ("num_train_epochs: 0\n", "num_train_epochs", "epochs = 0.0"),
    ("warmup_ratio: 1.5\n", "warmup_ratio", "warmup_ratio = 1.5"),
    ("max_length: 1\n", "max_length", "max_length = 1"),
    ("max_prompt_length: 0\n", "max_prompt_length", "max_prompt_length = 0"),
    ("per_device_train_batch_size: 0\n", "per_device_train_batch_size", "pairs_per_step = 0"),
    ("gradient_accumulation_steps: 0\n", "gradient_accumulation_steps", "pairs_per_step = 0"),
    (
        "per_device_train_batch_size: 4\ngradient_accumulation_steps: 0\n",
        "gradient_accumulation_steps",
        "pairs_per_step = 0",
    ),
    (
        "per_device_train_batch_size: 2147483647\ngradient_accumulation_steps: 2147483647\n",
        "per_device_train_batch_size",
        "pairs_per_step = 4611686014132420609",
    ),
    // Rules between options.
    (
        "max_length: 512\nmax_prompt_length: 600\n",
        "max_prompt_length",
        "max_length = 512\nmax_prompt_length = 600",
    ),
    ("max_prompt_length: 2000\n", "max_prompt_length", "max_length = 1024\nmax_prompt_length = 2000"),
];

#[test]
fn values_that_train_refuses_are_refused_with_its_reason() {
    for (more, key, lines) in REFUSED_BY_TRAIN {
        let imported = inline(&format!("{LEAST}{more}")).expect("an account");
        assert_eq!(refused(&imported), [key], "{more}");
        assert_eq!(imported.recipe, None, "{more}");
        let row = imported.rows.iter().find(|row| row.key == key).expect(key);
        let reason = refusal_by_train(lines);
        assert!(row.outcome.starts_with(&reason), "{more}`{}` is not train's `{reason}`", row.outcome);
        assert!(!row.outcome.contains("recipe:"), "a place in a file that is not there: {}", row.outcome);
    }
    let adapters = "use_peft: true\nlora_target_modules: [q_proj]\nlora_r: 0\n";
    assert_eq!(refused(&inline(&format!("{LEAST}{adapters}")).expect("an account")), ["lora_r"]);
}

#[test]
fn values_that_train_refuses_may_be_left_out() {
    let without = |key: &str, more: &str| {
        let asked = ImportConfig { without: vec![key.to_string()], ..asked("c.yaml") };
        convert(&format!("{LEAST}{more}"), &asked).expect("a recipe")
    };
    let imported = without("beta", "beta: -1\n");
    assert_lines(&imported, &["beta = 0.1"]);
    loaded(&imported);
    let imported = without("max_prompt_length", "max_length: 512\nmax_prompt_length: 600\n");
    assert!(!lines(&imported).iter().any(|line| line.starts_with("max_prompt_length")));
    assert_eq!(loaded(&imported).limits.max_length, 512);
    let fates: Vec<Fate> = imported.rows.iter().map(|row| row.fate).collect();
    assert_eq!(fates.iter().filter(|fate| **fate == Fate::LeftOut).count(), 1);
}

#[test]
fn one_number_that_is_refused_refuses_no_other() {
    let simpo = "base_model: m\ndatasets: [{path: d}]\nrl: simpo\nlearning_rate: 1e-6\nrl_beta: -1\n";
    let axolotl = inline(&format!("{simpo}simpo_gamma: 0.5\n")).expect("an account");
    assert_eq!(refused(&axolotl), ["rl_beta"]);
    let factory = "model_name_or_path: m\nstage: dpo\npref_loss: simpo\npref_beta: 0\nfinetuning_type: lora\nlora_rank: 0\n";
    let data = Some(PairData::from_text("mine.jsonl").expect("a name"));
    let factory = convert(factory, &ImportConfig { data, ..asked("c.yaml") }).expect("an account");
    assert_eq!(refused(&factory), ["pref_beta", "lora_rank"]);
}

#[test]
fn what_cannot_be_told_or_run_is_an_error() {
    let error = |text: &str| inline(text).expect_err("an error").to_string();
    assert!(error("a: 1\n").contains("no key tells which program"));
    assert!(error("- a\n").contains("c.yaml:1:"));
    let idle = ImportConfig { without: vec!["beta".to_string()], ..asked("c.yaml") };
    let message = convert(LEAST, &idle).expect_err("an error").to_string();
    assert!(message.contains("--without beta: no such key is refused"), "{message}");
    let bare = "model_name_or_path: m\noutput_dir: o\nloss_type: sigmoid\n";
    assert_eq!(refused(&inline(bare).expect("an account")), ["dataset_name"]);
    let data = Some(PairData::from_text("mine.jsonl").expect("a name"));
    let imported = convert(bare, &ImportConfig { data, ..asked("c.yaml") }).expect("a recipe");
    assert_lines(&imported, &["data = \"mine.jsonl\""]);
    let forced = ImportConfig { from: Some(Dialect::Axolotl), ..asked("c.yaml") };
    let imported = convert("rl: dpo\n", &forced).expect("an account");
    assert!(refused(&imported).contains(&"base_model"), "{:?}", refused(&imported));
}
