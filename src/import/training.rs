//! The keys of transformers' `TrainingArguments`, which TRL, the alignment handbook and LLaMA-Factory share.

use std::path::PathBuf;

use super::draft::Draft;
use super::machines;
use super::yaml::Node;
use crate::model::AdaptedModules;
use crate::optimizer::{MomentFormat, Schedule};

/// What holds where a file does not say it.
pub(super) struct Defaults {
    pub learning_rate: f64,
    pub per_device_batch: usize,
    pub epochs: f64,
    pub schedule: Schedule,
}

/// How often a run is evaluated.
pub(super) enum Evaluation {
    Never,
    EachEpoch,
    /// After so many steps; `None` as often as it logs.
    Steps(Option<(Node, usize)>),
}

/// Reads what all such programs have but the model, the data and the loss. `devices` is how many processes trained.
pub(super) fn read(draft: &mut Draft, defaults: &Defaults, devices: usize) {
    optimizer(draft, defaults);
    schedule(draft, defaults);
    batch(
        draft,
        ["per_device_train_batch_size", "gradient_accumulation_steps"],
        defaults.per_device_batch,
        devices,
    );
    output(draft, "trainer_output");
    saving(draft);
    recomputation(draft, "gradient_checkpointing");
    precision(draft);
    match draft.count("seed") {
        Some((node, seed)) => {
            draft.map("seed", &node, "seed", &(seed as u64), "it draws another order of pairs")
        }
        None => draft.default("seed", "seed", &42u64),
    }
    draft.only(&[
        ("label_smoothing_factor", &["0"], "labels of the next token are not smoothed here"),
        ("neftune_noise_alpha", &["0"], "no noise is added to embeddings here"),
        ("dataloader_drop_last", &["false"], "no pair is dropped here: the last step of an epoch is smaller"),
        ("group_by_length", &["false"], "pairs are in random order here"),
        ("train_sampling_strategy", &["random"], "pairs are in random order here"),
        ("auto_find_batch_size", &["false"], "the size of a step is fixed here"),
        (
            "resume_from_checkpoint",
            &["false"],
            "a run of another program is not resumed: name its model as --model",
        ),
        ("load_best_model_at_end", &["false"], "it chooses another model at the end than the last one"),
        ("data_seed", &["42"], "there is one seed here, for the order of pairs and all else"),
        ("lr_scheduler_kwargs", &[], "schedules have no such numbers here"),
        ("optim_args", &[], "AdamW has no such options here"),
        ("torchdistx_path", &[], "AdamW has no such options here"),
    ]);
}

/// Accounts for what only logs, saves, publishes or spreads a run over machines. Called last.
pub(super) fn read_idle(draft: &mut Draft) {
    const IDLE: [&str; 59] = [
        "overwrite_output_dir",
        "do_train",
        "do_eval",
        "do_predict",
        "prediction_loss_only",
        "per_device_eval_batch_size",
        "eval_accumulation_steps",
        "eval_delay",
        "eval_on_start",
        "eval_do_concat_batches",
        "batch_eval_metrics",
        "log_level",
        "log_level_replica",
        "log_on_each_node",
        "report_to",
        "run_name",
        "project",
        "push_to_hub",
        "save_safetensors",
        "save_on_each_node",
        "save_only_model",
        "disable_tqdm",
        "local_rank",
        "accelerator_config",
        "bf16_full_eval",
        "fp16_full_eval",
        "torch_compile",
        "torch_compile_backend",
        "torch_compile_mode",
        "torch_empty_cache_steps",
        "use_cpu",
        "skip_memory_metrics",
        "include_num_input_tokens_seen",
        "include_tokens_per_second",
        "gradient_checkpointing_kwargs",
        "length_column_name",
        "remove_unused_columns",
        "label_names",
        "dataset_num_proc",
        "preprocessing_num_workers",
        "trust_remote_code",
        "attn_implementation",
        "use_flash_attention_2",
        "use_liger_kernel",
        "liger_kernel_config",
        "use_cache",
        "padding_free",
        "pad_to_multiple_of",
        "precompute_ref_log_probs",
        "precompute_ref_batch_size",
        "activation_offloading",
        "full_determinism",
        "disable_dropout",
        "average_tokens_across_devices",
        "metric_for_best_model",
        "greater_is_better",
        "ignore_data_skip",
        "env",
        "debug",
    ];
    const PREFIXES: [&str; 9] =
        ["hub_", "wandb_", "swanlab_", "trackio_", "ddp_", "logging_", "mlflow_", "comet_", "dataloader_"];
    const WHY: &str = "it concerns logs, files, speed or machines";
    machines::read(draft);
    draft.idle(&IDLE, WHY);
    for (key, node) in draft.take_rest() {
        match (node.says_nothing(), PREFIXES.iter().any(|prefix| key.starts_with(prefix))) {
            (true, _) => draft.no_effect(&key, &node, "it says nothing"),
            (false, true) => draft.no_effect(&key, &node, WHY),
            (false, false) => {
                draft.refuse(&key, &node, "this key is not known, and it may change what is trained")
            }
        }
    }
}

fn optimizer(draft: &mut Draft, defaults: &Defaults) {
    draft.keep_number("learning_rate", "learning_rate", Some(defaults.learning_rate));
    draft.keep_number("adam_beta1", "adam_beta1", Some(0.9));
    draft.keep_number("adam_beta2", "adam_beta2", Some(0.999));
    draft.keep_number("adam_epsilon", "adam_epsilon", Some(1e-8));
    draft.keep_number("weight_decay", "weight_decay", Some(0.0));
    draft.keep_number("max_grad_norm", "max_grad_norm", Some(1.0));
    optimizer_name(draft, "optim");
}

/// AdamW under one of its names.
pub(super) fn optimizer_name(draft: &mut Draft, key: &str) {
    let Some(node) = draft.take(key) else { return };
    const PLAIN: [&str; 7] = [
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_hf",
        "adamw_apex_fused",
        "adamw_torch_xla",
        "paged_adamw",
        "paged_adamw_32bit",
    ];
    const EIGHT_BITS: [&str; 4] = ["adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "adamw_torch_8bit"];
    match node.text() {
        Some(name) if PLAIN.contains(&name) => draft.say(key, &node, "AdamW, as here"),
        Some(name) if EIGHT_BITS.contains(&name) => {
            draft.map(key, &node, "optimizer_states", &MomentFormat::EightBit, "AdamW with states of 8 bits");
        }
        _ => draft.refuse(key, &node, "only AdamW is here"),
    }
}

fn schedule(draft: &mut Draft, defaults: &Defaults) {
    let kind = schedule_name(draft, "lr_scheduler_type");
    if kind.is_none() && !draft.rows.iter().any(|row| row.key == "lr_scheduler_type") {
        draft.default("lr_scheduler_type", "schedule", &defaults.schedule);
    }
    warmup(draft, kind == Some("constant"), None);
    length(draft, "num_train_epochs", Some(defaults.epochs));
}

/// Which schedule a key names, if it is one that is here.
pub(super) fn schedule_name(draft: &mut Draft, key: &str) -> Option<&'static str> {
    let node = draft.take(key)?;
    let (name, schedule, why) = match node.text() {
        Some("linear") => ("linear", Schedule::Linear, None),
        Some("cosine") => ("cosine", Schedule::Cosine, None),
        Some("constant") => ("constant", Schedule::Constant, None),
        Some("constant_with_warmup") => {
            ("constant_with_warmup", Schedule::Constant, Some("constant after its warm-up"))
        }
        _ => {
            draft.refuse(key, &node, "the schedules here are cosine, linear and constant");
            return None;
        }
    };
    match why {
        None => draft.keep(key, &node, "schedule", &schedule),
        Some(why) => draft.map(key, &node, "schedule", &schedule, why),
    }
    Some(name)
}

/// The warm-up. A plainly constant schedule has none in transformers, whatever its keys say.
pub(super) fn warmup(draft: &mut Draft, none: bool, default_ratio: Option<f64>) {
    let steps = draft.number("warmup_steps").filter(|(node, steps)| {
        let is_set = *steps > 0.0;
        if !is_set {
            draft.no_effect("warmup_steps", node, "no warm-up in steps");
        }
        is_set
    });
    let ratio = draft.number("warmup_ratio");
    if none {
        for (key, given) in [("warmup_steps", &steps), ("warmup_ratio", &ratio)] {
            if let Some((node, _)) = given {
                draft.no_effect(key, node, "a constant schedule has no warm-up there");
            }
        }
        draft.default("warm-up", "warmup_steps", &0usize);
        return;
    }
    match (steps, ratio) {
        (Some((node, steps)), ratio) => {
            if let Some((node, _)) = ratio {
                draft.no_effect("warmup_ratio", &node, "warmup_steps goes before it");
            }
            match steps < 1.0 {
                true => draft.map("warmup_steps", &node, "warmup_ratio", &steps, "less than 1 is a share"),
                false => draft.keep("warmup_steps", &node, "warmup_steps", &(steps.ceil() as usize)),
            }
        }
        (None, Some((node, ratio))) => draft.keep("warmup_ratio", &node, "warmup_ratio", &ratio),
        (None, None) => match default_ratio {
            Some(ratio) => draft.default("warmup_ratio", "warmup_ratio", &ratio),
            None => draft.default("warmup_steps", "warmup_steps", &0usize),
        },
    }
}

/// Epochs or steps; a number of steps goes before one of epochs.
pub(super) fn length(draft: &mut Draft, epochs: &'static str, default: Option<f64>) {
    if let Some((node, steps)) = draft.number("max_steps") {
        if steps >= 1.0 && steps.fract() == 0.0 {
            draft.keep("max_steps", &node, "max_steps", &(steps as usize));
            if let Some(node) = draft.take(epochs) {
                draft.no_effect(epochs, &node, "max_steps goes before it");
            }
            return;
        }
        match steps <= 0.0 {
            true => draft.no_effect("max_steps", &node, "it sets no limit"),
            false => draft.refuse("max_steps", &node, "it is no count"),
        }
    }
    draft.keep_number(epochs, "epochs", default);
}

/// Pairs of a step: those of a device at a time, times accumulation, times devices.
pub(super) fn batch(
    draft: &mut Draft,
    [size, accumulation]: [&'static str; 2],
    default: usize,
    devices: usize,
) {
    let (size_node, accumulation_node) = (draft.count(size), draft.count(accumulation));
    let count = |given: &Option<(Node, usize)>, default| given.as_ref().map_or(default, |(_, count)| *count);
    let (at_once, times) = (count(&size_node, default), count(&accumulation_node, 1));
    // TOML's integers are signed; such a number of pairs is refused either way.
    let pairs = at_once.saturating_mul(times).saturating_mul(devices).min(i64::MAX as usize);
    let why = format!(
        "pairs of a step: {size} {at_once} x {accumulation} {times} x {devices} device(s) (--devices)"
    );
    let sum = format!("in pairs_per_step; micro-batches are packed by tokens, see {size}");
    match (&size_node, &accumulation_node) {
        // The key that makes it 0 is the one to mend.
        (Some((node, at_once)), Some((cause, 0))) if *at_once > 0 => {
            draft.say(size, node, sum);
            draft.map(accumulation, cause, "pairs_per_step", &pairs, &why);
        }
        (Some((node, _)), other) => {
            draft.map(size, node, "pairs_per_step", &pairs, &why);
            if let Some((node, _)) = other {
                draft.say(accumulation, node, sum);
            }
        }
        (None, Some((node, _))) => draft.map(accumulation, node, "pairs_per_step", &pairs, &why),
        (None, None) => draft.default(size, "pairs_per_step", &pairs),
    }
}

/// The folder of the run; `default` is where the other program writes without one.
pub(super) fn output(draft: &mut Draft, default: &str) {
    const KEY: &str = "output_dir";
    match draft.take(KEY) {
        None => draft.default(KEY, "output", &PathBuf::from(default)),
        Some(node) => match node.text() {
            Some(text) => draft.keep(KEY, &node, "output", &PathBuf::from(text)),
            None => draft.refuse(KEY, &node, "it is no folder"),
        },
    }
}

/// When checkpoints are written, which no result depends on.
pub(super) fn saving(draft: &mut Draft) {
    let strategy = draft.take("save_strategy");
    let by_steps = strategy.as_ref().is_none_or(|node| node.text() == Some("steps"));
    if let Some(node) = strategy {
        draft.no_effect("save_strategy", &node, "checkpoints are written every save_steps, and at the end");
    }
    if let Some((node, steps)) = draft.number("save_steps") {
        match by_steps && steps >= 1.0 && steps.fract() == 0.0 {
            true => draft.keep("save_steps", &node, "save_steps", &(steps as usize)),
            false => draft.no_effect("save_steps", &node, "no whole number of steps: saved at the end only"),
        }
    }
    if let Some((node, kept)) = draft.count("save_total_limit") {
        draft.map("save_total_limit", &node, "keep_checkpoints", &kept.max(1), "checkpoints that are kept");
    }
}

/// Whether activations are computed again in the backward, to the same bits.
pub(super) fn recomputation(draft: &mut Draft, key: &str) {
    let Some(node) = draft.take(key) else { return };
    match node.truth() {
        Some(false) => draft.no_effect(key, &node, "as here by default"),
        // Axolotl has `unsloth` and `offload` besides.
        _ => draft.map(key, &node, "recompute", &crate::model::Recompute::Layer, "it only saves memory"),
    }
}

/// Formats of numbers, which follow from the device here.
pub(super) fn precision(draft: &mut Draft) {
    for key in ["bf16", "fp16", "tf32", "torch_dtype", "dtype", "pure_bf16", "bfloat16", "float16"] {
        if let Some(node) = draft.take(key) {
            draft.say(key, &node, "weights and activations are bf16 on a GPU and f32 on the CPU, sums f32");
        }
    }
}

/// When to evaluate, under either of the two names that transformers has had.
pub(super) fn evaluation(draft: &mut Draft) -> Evaluation {
    let Some((key, node)) = draft.take_any(&["eval_strategy", "evaluation_strategy"]) else {
        return Evaluation::Never;
    };
    let found = match (node.text(), node.truth()) {
        (_, Some(false)) => Evaluation::Never,
        (Some("steps"), _) => Evaluation::Steps(draft.count("eval_steps")),
        (Some("epoch"), _) => Evaluation::EachEpoch,
        _ => {
            draft.refuse(key, &node, "it is none of no, steps and epoch");
            return Evaluation::Never;
        }
    };
    draft.say(key, &node, "evaluation where there are pairs for it");
    found
}

/// Writes how often is evaluated, once it is known that there are pairs for it.
pub(super) fn write_evaluation(draft: &mut Draft, evaluation: Evaluation, has_pairs: bool) {
    if let Evaluation::Steps(Some((node, steps))) = evaluation {
        match has_pairs && steps > 0 {
            true => draft.keep("eval_steps", &node, "eval_steps", &steps),
            false => draft.no_effect("eval_steps", &node, "there are no pairs to evaluate on"),
        }
    }
    if let Some(node) = draft.take("eval_steps") {
        draft.no_effect("eval_steps", &node, "evaluation is not by steps");
    }
}

/// The modules of adapters from PEFT's names, `all-linear` and `all`.
pub(super) fn modules(draft: &mut Draft, key: &str, node: &Node) {
    use crate::config::value::OptionValue;
    let names: Vec<String> = node
        .list()
        .into_iter()
        .filter_map(Node::text)
        .flat_map(|text| text.split(',').map(|name| name.trim().to_string()).collect::<Vec<_>>())
        .collect();
    let text = match names.iter().any(|name| name == "all-linear" || name == "all") {
        true => "all".to_string(),
        false => names.join(","),
    };
    match AdaptedModules::from_text(&text) {
        Ok(modules) => draft.map(key, node, "lora", &modules, "modules with adapters"),
        Err(problem) => draft.refuse(key, node, format!("it {problem}")),
    }
}
