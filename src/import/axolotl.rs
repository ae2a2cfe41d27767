//! Axolotl's `axolotl train FILE`, with `rl` of dpo, ipo, orpo or simpo.

use super::draft::Draft;
use super::llama_factory::all_modules;
use super::pairs::{Listed, put};
use super::training::{self, Evaluation};
use super::trl::split_size;
use super::yaml::{Node, Value};
use crate::config::{ColumnNames, ObjectiveKind};
use crate::optimizer::Schedule;

/// The warm-up where neither steps nor a ratio are given; Axolotl takes at most 100 steps of it.
const WARMUP: f64 = 0.03;

pub(super) fn read(draft: &mut Draft, devices: usize) {
    match draft.take("base_model") {
        Some(node) => super::pairs::source(draft, "base_model", &node, "model"),
        None => draft.lack("base_model", "no model is named"),
    }
    objective(draft);
    data(draft);
    match draft.count("sequence_len") {
        Some((node, length)) => draft.keep("sequence_len", &node, "max_length", &length),
        None => draft.default("sequence_len", "max_length", &512usize),
    }
    adapters(draft);
    schedule(draft, devices);
    refused(draft);
    idle(draft);
    training::read_idle(draft);
}

fn objective(draft: &mut Draft) {
    let named = draft.take("rl");
    let known = match named.as_ref().and_then(Node::text) {
        Some("dpo") => Some(ObjectiveKind::Dpo),
        Some("ipo") => Some(ObjectiveKind::Ipo),
        Some("orpo") => Some(ObjectiveKind::Orpo),
        Some("simpo") => Some(ObjectiveKind::Simpo),
        _ => None,
    };
    match (&named, known) {
        (Some(node), Some(kind)) => draft.map("rl", node, "objective", &kind, "the same loss"),
        (Some(node), None) => draft.refuse("rl", node, "of these, dpo, ipo, orpo and simpo are here"),
        (None, _) => {
            draft.lack("rl", "without `rl` Axolotl trains on single texts, and pairs are trained on here")
        }
    }
    let names: &[&'static str] = if known == Some(ObjectiveKind::Orpo) {
        &["orpo_alpha", "rl_beta"]
    } else {
        &["rl_beta", "dpo_beta"]
    };
    let beta = match draft.take_any(names) {
        Some((key, node)) => match node.number() {
            Some(beta) => {
                draft.keep(key, &node, "beta", &beta);
                // A beta that is refused is no reason to refuse SimPO's margin as well.
                if beta > 0.0 { beta } else { 0.1 }
            }
            None => {
                draft.refuse(key, &node, "it is no number");
                0.1
            }
        },
        None => {
            draft.default(names[0], "beta", &0.1);
            0.1
        }
    };
    match (known == Some(ObjectiveKind::Simpo), draft.number("simpo_gamma")) {
        (true, Some((node, gamma))) => {
            draft.map("simpo_gamma", &node, "gamma_beta_ratio", &(gamma / beta), "divided by beta");
        }
        (true, None) => draft.default("simpo_gamma", "gamma_beta_ratio", &(0.5 / beta)),
        (false, Some((node, _))) => draft.no_effect("simpo_gamma", &node, "it belongs to simpo"),
        (false, None) => {}
    }
    match draft.number("dpo_label_smoothing") {
        Some((node, 0.0)) => draft.no_effect("dpo_label_smoothing", &node, "as here by default"),
        Some((node, share)) => draft.keep("dpo_label_smoothing", &node, "label_smoothing", &share),
        None => {}
    }
    draft.only(&[
        ("cpo_alpha", &["0"], "no NLL term is added to SimPO here"),
        ("rpo_alpha", &[], "no NLL term is added here"),
        ("dpo_use_weighting", &["false"], "pairs are not weighted by their probability here"),
        ("dpo_norm_loss", &["false"], "the loss is summed over tokens here, as in DPO's paper"),
        ("dpo_loss_type", &["sigmoid"], "the loss is that of `rl`"),
    ]);
}

fn data(draft: &mut Draft) {
    let mut columns = Vec::new();
    if let Some(node) = draft.take("datasets") {
        let listed =
            node.list().into_iter().map(|entry| dataset(draft, "datasets", entry, &mut columns)).collect();
        put(draft, "datasets", &node, "data", listed);
        if !columns.is_empty() {
            draft.map("datasets", &node, "columns", &ColumnNames(columns), "the fields of the data set");
        }
    } else if !draft.lines.iter().any(|(name, _)| *name == "data") {
        draft.lack("datasets", "no pairs are named; `--data FILE` of this command names them");
    }
    let mut has_pairs = false;
    if let Some(node) = draft.take("test_datasets") {
        let mut unused = Vec::new();
        let listed = node
            .list()
            .into_iter()
            .map(|entry| dataset(draft, "test_datasets", entry, &mut unused))
            .collect();
        put(draft, "test_datasets", &node, "eval_data", listed);
        has_pairs = true;
    }
    if let Some(node) = draft.take("val_set_size") {
        has_pairs |= split_size(draft, "val_set_size", &node, true);
    }
    let steps = draft.count("eval_steps");
    training::write_evaluation(draft, Evaluation::Steps(steps), has_pairs);
    if let Some(node) = draft.take("chat_template") {
        match node.text() {
            Some("tokenizer_default") => draft.no_effect("chat_template", &node, "the model's own, as here"),
            _ => draft.say(
                "chat_template",
                &node,
                "the model's own chat template is used: `mmpo-fast check` shows its text; --chat-template FILE gives another",
            ),
        }
    }
    draft.only(&[
        ("chat_template_jinja", &[], "write the template to a file and give it as --chat-template"),
        ("sample_packing", &["false"], "responses of different pairs never see each other here"),
        ("train_on_inputs", &["false"], "prompts are not trained on here"),
        ("shuffle_merged_datasets", &["true"], "pairs are shuffled here"),
        ("streaming", &["false"], "files are read whole here, whatever their size"),
        ("skip_prepare_dataset", &["false"], "pairs are read as text here"),
    ]);
    if let Some((node, dropped)) = draft.truth("dataset_exact_deduplication") {
        use crate::config::Policy;
        match dropped {
            true => draft.map(
                "dataset_exact_deduplication",
                &node,
                "on_duplicate",
                &Policy::Drop,
                "pairs that came before are left out",
            ),
            false => draft.no_effect("dataset_exact_deduplication", &node, "as here by default"),
        }
    }
    special_tokens(draft);
}

/// One entry of `datasets`, and its fields as names of columns.
fn dataset(draft: &mut Draft, under: &str, entry: &Node, columns: &mut Vec<(String, String)>) -> Listed {
    let mut listed = Listed { path: String::new(), split: None, weight: 1.0 };
    let Value::Mapping(members) = &entry.value else {
        listed.path = entry.text().unwrap_or_default().to_string();
        return listed;
    };
    // A file of a loader such as `json` goes before the loader's name.
    let files = members.iter().find(|(name, node)| name == "data_files" && !node.is_null());
    for (name, node) in members {
        let key = format!("{under}.{name}");
        let text = node.text().unwrap_or_default().to_string();
        match name.as_str() {
            _ if node.is_null() => draft.no_effect(&key, node, "it says nothing"),
            "path" if files.is_none() => listed.path = text,
            "path" => draft.say(&key, node, "data_files names the file"),
            "data_files" => match node.list().as_slice() {
                [file] => listed.path = file.text().unwrap_or_default().to_string(),
                _ => draft.refuse(&key, node, "name several files with `--data FILE,FILE` of this command"),
            },
            "split" if files.is_some() => draft.no_effect(&key, node, "a file is read whole"),
            "split" => listed.split = Some(text),
            "ds_type" | "trust_remote_code" | "revision" => {
                draft.no_effect(&key, node, "what a file is follows from its bytes");
            }
            "name" if text == "default" => draft.no_effect(&key, node, "the configuration that is read"),
            "field_messages" | "field_chosen" | "field_rejected" | "field_prompt" | "field_system"
            | "field_tools" => column(draft, &key, node, columns),
            "type" => kind(draft, &key, node, columns),
            "message_property_mappings" | "roles" | "message_field_role" | "message_field_content" => draft.say(
                &key,
                node,
                "roles and texts of messages are found by the names in docs/data.md; others are refused there",
            ),
            _ => draft.refuse(&key, node, "this key is not known, and it may change what is trained"),
        }
    }
    listed
}

/// `field_chosen: better` as a name of a column.
fn column(draft: &mut Draft, key: &str, node: &Node, columns: &mut Vec<(String, String)>) {
    let ours = key.rsplit('.').next().unwrap_or_default().trim_start_matches("field_").to_string();
    let theirs = node.text().unwrap_or_default();
    let is_known = crate::data::unknown_column(theirs).is_none();
    let is_found = ours == theirs || (ours == "messages" && is_known);
    match is_found || columns.iter().any(|(name, _)| *name == ours) {
        true => draft.no_effect(key, node, "this column is found by its name"),
        false => {
            draft.say(key, node, "in columns");
            columns.push((ours, theirs.to_string()));
        }
    }
}

/// The type of a data set: a name, or fields of a type of one's own.
fn kind(draft: &mut Draft, key: &str, node: &Node, columns: &mut Vec<(String, String)>) {
    match &node.value {
        Value::Mapping(members) => {
            for (name, node) in members {
                let key = format!("{key}.{name}");
                match name.as_str() {
                    "field_prompt" | "field_chosen" | "field_rejected" | "field_system" => {
                        column(draft, &key, node, columns);
                    }
                    _ => draft.refuse(&key, node, "texts are put together by the model's chat template here"),
                }
            }
        }
        _ => draft.say(
            key,
            node,
            "columns are found by their names, and texts are put together by the model's chat template",
        ),
    }
}

fn special_tokens(draft: &mut Draft) {
    let Some(node) = draft.take("special_tokens") else { return };
    let Value::Mapping(members) = &node.value else {
        draft.refuse("special_tokens", &node, "it is no mapping of names to tokens");
        return;
    };
    for (name, node) in members {
        let key = format!("special_tokens.{name}");
        match name.as_str() {
            "pad_token" | "unk_token" => draft.no_effect(&key, node, "nothing is padded here"),
            _ => draft.refuse(&key, node, "name the token in the model's tokenizer_config.json"),
        }
    }
}

fn adapters(draft: &mut Draft) {
    const REST: [&str; 9] = [
        "lora_r",
        "lora_alpha",
        "lora_dropout",
        "lora_target_modules",
        "lora_target_linear",
        "lora_fan_in_fan_out",
        "peft_use_rslora",
        "lora_modules_to_save",
        "peft_use_dora",
    ];
    let kind = draft.take("adapter");
    match kind.as_ref().map(|node| (node, node.text())) {
        None => draft.idle(&REST, "there is no adapter"),
        Some((node, Some("lora"))) => {
            draft.say("adapter", node, "adapters in place of the weights");
            lora(draft);
        }
        Some((node, _)) => {
            draft.refuse(
                "adapter",
                node,
                "adapters of weights that are not quantised (lora) are trained here",
            );
            lora(draft);
        }
    }
    if let Some(node) = draft.take("lora_model_dir") {
        draft.refuse(
            "lora_model_dir",
            &node,
            "give the folder as --adapter and leave out the numbers of new adapters",
        );
    }
}

fn lora(draft: &mut Draft) {
    let linear = draft.truth("lora_target_linear").filter(|(node, linear)| {
        if !linear {
            draft.no_effect("lora_target_linear", node, "lora_target_modules names them");
        }
        *linear
    });
    let named = draft.take("lora_target_modules");
    match (linear, named) {
        (Some((node, _)), named) => {
            draft.map("lora_target_linear", &node, "lora", &all_modules(), "all projections");
            if let Some(node) = named {
                draft.no_effect("lora_target_modules", &node, "all projections hold these");
            }
        }
        (None, Some(node)) => training::modules(draft, "lora_target_modules", &node),
        (None, None) => draft.lack("lora_target_modules", "no modules are named that get adapters"),
    }
    for (key, name) in [("lora_alpha", "lora_alpha"), ("lora_dropout", "lora_dropout")] {
        draft.keep_number(key, name, None);
    }
    match draft.count("lora_r") {
        Some((node, rank)) => draft.keep("lora_r", &node, "lora_rank", &rank),
        None => draft.lack("lora_r", "no rank is given"),
    }
    if let Some((node, rslora)) = draft.truth("peft_use_rslora") {
        draft.keep("peft_use_rslora", &node, "lora_rslora", &rslora);
    }
    draft.only(&[
        ("lora_modules_to_save", &[], "no whole module is trained beside adapters here"),
        ("peft_use_dora", &["false"], "adapters are plain LoRA here"),
        ("lora_fan_in_fan_out", &["false"], "a Llama's projections are plain linear layers"),
        ("loraplus_lr_ratio", &["1"], "both factors of an adapter have one learning rate here"),
    ]);
}

fn schedule(draft: &mut Draft, devices: usize) {
    match draft.number("learning_rate") {
        Some((node, rate)) => draft.keep("learning_rate", &node, "learning_rate", &rate),
        None => draft.lack("learning_rate", "Axolotl has no default for it"),
    }
    for (key, name) in
        [("adam_beta1", "adam_beta1"), ("adam_beta2", "adam_beta2"), ("adam_epsilon", "adam_epsilon")]
    {
        draft.keep_number(key, name, None);
    }
    draft.keep_number("weight_decay", "weight_decay", Some(0.0));
    draft.keep_number("max_grad_norm", "max_grad_norm", Some(1.0));
    training::optimizer_name(draft, "optimizer");
    let kind = training::schedule_name(draft, "lr_scheduler");
    if kind.is_none() && !draft.rows.iter().any(|row| row.key == "lr_scheduler") {
        draft.default("lr_scheduler", "schedule", &Schedule::Cosine);
    }
    training::warmup(draft, kind == Some("constant"), Some(WARMUP));
    training::length(draft, "num_epochs", Some(1.0));
    training::batch(draft, ["micro_batch_size", "gradient_accumulation_steps"], 1, devices);
    training::output(draft, "./model-out");
    training::saving(draft);
    training::recomputation(draft, "gradient_checkpointing");
    training::precision(draft);
    match draft.count("seed") {
        Some((node, seed)) => {
            draft.map("seed", &node, "seed", &(seed as u64), "it draws another order of pairs")
        }
        None => draft.default("seed", "seed", &42u64),
    }
}

fn refused(draft: &mut Draft) {
    draft.only(&[
        ("load_in_8bit", &["false"], "no quantised weights are trained here"),
        ("load_in_4bit", &["false"], "no quantised weights are trained here"),
        ("gptq", &["false"], "no quantised weights are trained here"),
        ("tokenizer_config", &[], "the tokenizer is the model's: copy the other one into the model's folder"),
        ("revision_of_model", &["main"], "the Hub's cache gives its main revision"),
        ("unfrozen_parameters", &[], "all weights are trained here, or adapters"),
        ("lr_groups", &[], "all tensors have one learning rate here"),
        ("embedding_lr", &[], "all tensors have one learning rate here"),
        ("cosine_min_lr_ratio", &["0"], "a cosine ends at 0 here"),
        ("lr_scheduler_kwargs", &[], "schedules have no such numbers here"),
        ("noisy_embedding_alpha", &["0"], "no noise is added to embeddings here"),
        ("neftune_noise_alpha", &["0"], "no noise is added to embeddings here"),
        ("relora_steps", &["0"], "adapters are not merged while they are trained"),
        (
            "resume_from_checkpoint",
            &["false"],
            "a run of another program is not resumed: name its model as --model",
        ),
        ("early_stopping_patience", &["0"], "a run is not ended early by this key"),
        ("curriculum_sampling", &["false"], "pairs are in random order here"),
        ("group_by_length", &["false"], "pairs are in random order here"),
        ("overrides_of_model_config", &[], "models are read as their config.json says"),
        ("tokens", &[], "the vocabulary stays as it is here"),
        ("added_tokens_overrides", &[], "the vocabulary stays as it is here"),
        ("sequence_parallel_degree", &["1"], "a sequence lies on one device here"),
        ("context_parallel_size", &["1"], "a sequence lies on one device here"),
    ]);
}

fn idle(draft: &mut Draft) {
    draft.idle(
        &[
            "rl_adapter_ref_model",
            "remove_unused_columns",
            "model_type",
            "tokenizer_type",
            "tokenizer_use_fast",
            "is_llama_derived_model",
            "strict",
            "use_wandb",
            "dataset_prepared_path",
            "dataset_processes",
            "pad_to_sequence_len",
            "eval_sample_packing",
            "evals_per_epoch",
            "saves_per_epoch",
            "flash_attention",
            "xformers_attention",
            "sdp_attention",
            "eager_attention",
            "flex_attention",
            "s2_attention",
            "attn_implementation",
            "gradient_checkpointing_kwargs",
            "early_stopping",
            "local_rank",
            "plugins",
            "liger_rope",
            "liger_rms_norm",
            "liger_glu_activation",
            "liger_fused_linear_cross_entropy",
            "liger_layer_norm",
            "torch_compile",
            "ddp",
            "auto_resume_from_checkpoints",
            "low_cpu_mem_usage",
            "eval_table_size",
            "eval_max_new_tokens",
            "eval_batch_size",
            "eval_causal_lm_metrics",
            "loss_watchdog_threshold",
            "loss_watchdog_patience",
            "lora_mlp_kernel",
            "lora_qkv_kernel",
            "lora_o_kernel",
            "save_first_step",
            "precompute_ref_log_probs",
            "dpo_padding_free",
            "hf_use_auth_token",
            "debug",
            "group_by_modality",
        ],
        "it concerns speed, logs, files or machines",
    );
}
