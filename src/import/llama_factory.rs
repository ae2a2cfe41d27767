//! LLaMA-Factory's `llamafactory-cli train FILE`, stages `dpo` and `sft`.

use std::path::{Path, PathBuf};

use serde_json::Value as Json;

use super::draft::{Draft, Fate};
use super::pairs::{Listed, put};
use super::training::{self, Defaults};
use super::trl::split_size;
use super::yaml::Node;
use crate::config::{ColumnNames, ObjectiveKind};
use crate::optimizer::Schedule;

/// Those of transformers.
const DEFAULTS: Defaults =
    Defaults { learning_rate: 5e-5, per_device_batch: 8, epochs: 3.0, schedule: Schedule::Linear };

pub(super) fn read(draft: &mut Draft, devices: usize) {
    match draft.take("model_name_or_path") {
        Some(node) => super::pairs::source(draft, "model_name_or_path", &node, "model"),
        None => draft.lack("model_name_or_path", "no model is named"),
    }
    objective(draft);
    data(draft);
    match draft.count("cutoff_len") {
        Some((node, length)) => draft.map(
            "cutoff_len",
            &node,
            "max_length",
            &length,
            "prompts are cut on the left first; LLaMA-Factory cuts prompt and response in proportion",
        ),
        None => draft.default("cutoff_len", "max_length", &2048usize),
    }
    adapters(draft);
    unused(draft);
    training::read(draft, &DEFAULTS, devices);
    training::read_idle(draft);
}

fn objective(draft: &mut Draft) {
    let stage = draft.take("stage");
    let loss = draft.take("pref_loss");
    let is_sft = match &stage {
        Some(node) if node.text() == Some("dpo") => {
            draft.say("stage", node, "pairs; pref_loss says which loss");
            false
        }
        Some(node) if node.text() == Some("sft") => {
            draft.map(
                "stage",
                node,
                "objective",
                &ObjectiveKind::Sft,
                "trains on the chosen responses of pairs",
            );
            true
        }
        Some(node) => {
            draft.refuse("stage", node, "of the stages, dpo and sft are here");
            false
        }
        None => {
            draft.lack("stage", "the file does not say what is trained: LLaMA-Factory's default is sft");
            false
        }
    };
    if is_sft {
        let rest = ["pref_beta", "pref_ftx", "dpo_label_smoothing", "simpo_gamma"];
        draft.idle(&rest, "it belongs to the stage dpo");
        if let Some(node) = loss {
            draft.no_effect("pref_loss", &node, "it belongs to the stage dpo");
        }
        return;
    }
    let known = match loss.as_ref().and_then(Node::text) {
        None | Some("sigmoid") => Some(ObjectiveKind::Dpo),
        Some("ipo") => Some(ObjectiveKind::Ipo),
        Some("hinge") => Some(ObjectiveKind::Hinge),
        Some("orpo") => Some(ObjectiveKind::Orpo),
        Some("simpo") => Some(ObjectiveKind::Simpo),
        Some(_) => None,
    };
    let kind = known.unwrap_or(ObjectiveKind::Dpo);
    match (&loss, known) {
        (Some(node), None) => {
            draft.refuse("pref_loss", node, "of these losses, sigmoid, ipo, hinge, orpo and simpo are here");
        }
        (Some(node), Some(kind)) => draft.map("pref_loss", node, "objective", &kind, "the same loss"),
        (None, _) => draft.default("pref_loss", "objective", &kind),
    }
    numbers(draft, kind);
}

/// The numbers of the loss.
fn numbers(draft: &mut Draft, kind: ObjectiveKind) {
    let beta = draft.number("pref_beta");
    match &beta {
        Some((node, beta)) => draft.keep("pref_beta", node, "beta", beta),
        None => draft.default("pref_beta", "beta", &0.1),
    }
    let gamma = draft.number("simpo_gamma");
    match (kind == ObjectiveKind::Simpo, gamma) {
        (true, gamma) => {
            // A beta that is refused is no reason to refuse the margin as well.
            let beta = beta.filter(|(_, beta)| *beta > 0.0).map_or(0.1, |(_, beta)| beta);
            let ratio = gamma.as_ref().map_or(0.5, |(_, gamma)| *gamma) / beta;
            match gamma {
                Some((node, _)) => {
                    draft.map("simpo_gamma", &node, "gamma_beta_ratio", &ratio, "divided by beta")
                }
                None => draft.default("simpo_gamma", "gamma_beta_ratio", &ratio),
            }
        }
        (false, Some((node, _))) => draft.no_effect("simpo_gamma", &node, "it belongs to the loss simpo"),
        (false, None) => {}
    }
    match draft.number("dpo_label_smoothing") {
        Some((node, 0.0)) => draft.no_effect("dpo_label_smoothing", &node, "as here by default"),
        Some((node, share)) if kind == ObjectiveKind::Dpo => {
            draft.keep("dpo_label_smoothing", &node, "label_smoothing", &share);
        }
        Some((node, _)) => draft.refuse("dpo_label_smoothing", &node, "it belongs to the loss sigmoid"),
        None => {}
    }
    if let Some(node) = draft.take("ref_model") {
        match node.text() {
            Some(text) => draft.keep("ref_model", &node, "reference", &PathBuf::from(text)),
            None => draft.refuse("ref_model", &node, "it is no name of a model"),
        }
    }
}

fn data(draft: &mut Draft) {
    let folder = draft.take("dataset_dir");
    let folder_name = folder.as_ref().and_then(Node::text).unwrap_or("data").to_string();
    if let Some(node) = &folder {
        draft.say("dataset_dir", node, "where dataset_info.json is looked for, from the current folder");
    }
    let given = draft.lines.iter().any(|(name, _)| *name == "data");
    match draft.take("dataset") {
        Some(node) => named(draft, "dataset", &node, "data", &folder_name),
        None if given => {}
        None => draft.lack("dataset", "no pairs are named; `--data FILE` of this command names them"),
    }
    let evaluates = training::evaluation(draft);
    let mut has_pairs = false;
    if let Some(node) = draft.take("eval_dataset") {
        named(draft, "eval_dataset", &node, "eval_data", &folder_name);
        has_pairs = true;
    }
    if let Some(node) = draft.take("val_size") {
        has_pairs |= split_size(draft, "val_size", &node, true);
    }
    training::write_evaluation(draft, evaluates, has_pairs);
    if let Some(node) = draft.take("template") {
        draft.say(
            "template",
            &node,
            "the model's own chat template is used: `mmpo-fast check` shows its text; --chat-template FILE gives another",
        );
    }
    draft.only(&[
        ("max_samples", &[], "all pairs are trained on: cut the file, or give its weight, FILE=0.1"),
        ("packing", &["false"], "responses of different pairs never see each other here"),
        ("neat_packing", &["false"], "responses of different pairs never see each other here"),
        ("train_on_prompt", &["false"], "prompts are not trained on here"),
        ("streaming", &["false"], "files are read whole here, whatever their size"),
        ("mix_strategy", &["concat"], "files are read one after the other and shuffled"),
        ("tool_format", &[], "tools are written by the model's chat template"),
        ("tokenized_path", &[], "pairs are read as text; tokens are cached by --data-cache"),
        ("interleave_probs", &[], "weights of files are given with --data FILE=WEIGHT"),
        ("default_system", &[], "no message is added to conversations here"),
        ("enable_thinking", &["true"], "give the template's variables in the column chat_template_kwargs"),
    ]);
    draft.idle(
        &[
            "mask_history",
            "overwrite_cache",
            "preprocessing_batch_size",
            "buffer_size",
            "media_dir",
            "eval_num_beams",
            "ignore_pad_token_for_loss",
            "eval_on_each_dataset",
            "plot_loss",
            "data_shared_file_system",
        ],
        "it concerns speed, files or evaluation",
    );
}

/// Data sets by their names in dataset_info.json.
fn named(draft: &mut Draft, key: &str, node: &Node, name: &'static str, folder: &str) {
    if draft.lines.iter().any(|(other, _)| *other == name) {
        draft.say(key, node, format!("--{} goes before it", name.replace('_', "-")));
        return;
    }
    let names: Vec<&str> = node
        .list()
        .into_iter()
        .filter_map(Node::text)
        .flat_map(|text| text.split(',').map(str::trim))
        .collect();
    let info = Path::new(folder).join("dataset_info.json");
    let described: Option<Json> = crate::foreign::read_text(&info, "the list of data sets")
        .ok()
        .and_then(|text| serde_json::from_str(&text).ok());
    let mut listed = Vec::new();
    let mut columns = None;
    for dataset in names {
        let entry = described.as_ref().and_then(|described| described.get(dataset));
        let text = |field: &str| entry.and_then(|entry| entry.get(field)).and_then(Json::as_str);
        let file = text("file_name").map(|file| Path::new(folder).join(file).display().to_string());
        let Some(path) = file.or_else(|| text("hf_hub_url").map(str::to_string)) else {
            draft.refuse(
                key,
                node,
                format!(
                    "`{dataset}` is a name in LLaMA-Factory's dataset_info.json, which {} is not or does not explain: name \
                     the file with `--data FILE` of this command",
                    info.display()
                ),
            );
            return;
        };
        listed.push(Listed { path, split: text("split").map(str::to_string), weight: 1.0 });
        columns = columns.or_else(|| renamed(entry?.get("columns")?));
    }
    put(draft, key, node, name, listed);
    if let (Some(columns), "data") = (columns, name) {
        draft.map(key, node, "columns", &columns, "the columns of dataset_info.json");
    }
}

/// Columns that have other names than those that are found by themselves.
fn renamed(columns: &Json) -> Option<ColumnNames> {
    const OURS: [(&str, &str); 6] = [
        ("prompt", "instruction"),
        ("query", "input"),
        ("system", "system"),
        ("messages", "conversations"),
        ("chosen", "chosen"),
        ("rejected", "rejected"),
    ];
    let names = OURS.iter().filter_map(|(role, ours)| {
        let theirs = columns.get(role)?.as_str()?;
        (theirs != *ours).then(|| (ours.to_string(), theirs.to_string()))
    });
    let names: Vec<_> = names.collect();
    (!names.is_empty()).then_some(ColumnNames(names))
}

fn adapters(draft: &mut Draft) {
    let kind = draft.take("finetuning_type");
    match kind.as_ref().map(|node| (node, node.text())) {
        Some((node, Some("full"))) => {
            draft.no_effect("finetuning_type", node, "all weights are trained, as here by default");
            draft.idle(
                &["lora_rank", "lora_alpha", "lora_dropout", "lora_target", "use_rslora"],
                "finetuning_type is full",
            );
        }
        Some((node, text)) if text != Some("lora") => {
            draft.refuse("finetuning_type", node, "all weights (full) or adapters (lora) are trained here");
        }
        other => {
            if let Some((node, _)) = other {
                draft.say("finetuning_type", node, "adapters in place of the weights");
            }
            match draft.take("lora_target") {
                Some(node) => training::modules(draft, "lora_target", &node),
                None => draft.default("lora_target", "lora", &all_modules()),
            }
            let rank = draft.count("lora_rank");
            match &rank {
                Some((node, rank)) => draft.keep("lora_rank", node, "lora_rank", rank),
                None => draft.default("lora_rank", "lora_rank", &8usize),
            }
            let twice = 2.0 * rank.map_or(8.0, |(_, rank)| rank.max(1) as f64);
            draft.keep_number("lora_alpha", "lora_alpha", Some(twice));
            draft.keep_number("lora_dropout", "lora_dropout", Some(0.0));
            if let Some((node, rslora)) = draft.truth("use_rslora") {
                draft.keep("use_rslora", &node, "lora_rslora", &rslora);
            }
        }
    }
    if let Some(node) = draft.take("adapter_name_or_path") {
        match node.text() {
            Some(text) if !text.contains(',') => {
                for name in ["lora", "lora_rank", "lora_alpha", "lora_dropout", "lora_rslora"] {
                    draft.lines.retain(|(other, _)| *other != name);
                }
                draft.rows.retain(|row| !(row.fate == Fate::Default && row.key.starts_with("lora_")));
                draft.keep("adapter_name_or_path", &node, "adapter", &PathBuf::from(text));
            }
            _ => draft.refuse(
                "adapter_name_or_path",
                &node,
                "one adapter is trained further here: merge the others first",
            ),
        }
    }
}

pub(super) fn all_modules() -> crate::model::AdaptedModules {
    crate::model::AdaptedModules::of(crate::model::AdaptedModule::ALL)
}

/// Refuses what is not here, where it is switched on.
fn unused(draft: &mut Draft) {
    draft.only(&[
        ("pref_ftx", &["0"], "no SFT term is added here but by ORPO and MMPO"),
        ("pref_bco_weight", &["0"], "no BCO term is added here"),
        ("ld_alpha", &["1"], "all tokens of a response count alike here"),
        ("ref_model_adapters", &[], "merge the adapter into its model and name that as ref_model"),
        ("ref_model_quantization_bit", &[], "no quantised weights are read here"),
        ("quantization_bit", &[], "no quantised weights are trained here"),
        ("loraplus_lr_ratio", &["1"], "both factors of an adapter have one learning rate here"),
        ("use_dora", &["false"], "adapters are plain LoRA here"),
        ("pissa_init", &["false"], "adapters begin as PEFT's do by default"),
        ("additional_target", &[], "no whole module is trained beside adapters here"),
        ("use_galore", &["false"], "only AdamW is here"),
        ("use_apollo", &["false"], "only AdamW is here"),
        ("use_badam", &["false"], "only AdamW is here"),
        ("use_muon", &["false"], "only AdamW is here"),
        ("use_adam_mini", &["false"], "only AdamW is here"),
        ("use_llama_pro", &["false"], "all layers are trained here"),
        ("use_dft_loss", &["false"], "the losses here are those of docs/objectives.md"),
        ("rope_scaling", &[], "the model's config.json says how its rope is scaled"),
        ("shift_attn", &["false"], "attention sees all of its sequence here"),
        ("mixture_of_depths", &[], "all layers see all tokens here"),
        ("resize_vocab", &["false"], "the vocabulary stays as it is here"),
        ("add_tokens", &[], "the vocabulary stays as it is here"),
        ("add_special_tokens", &[], "the vocabulary stays as it is here"),
        ("new_special_tokens", &[], "the vocabulary stays as it is here"),
        ("model_revision", &["main"], "the Hub's cache gives its main revision"),
        ("disable_shuffling", &["false"], "pairs are shuffled here"),
        ("create_new_adapter", &["false"], "an adapter is trained further, or made anew"),
    ]);
    draft.idle(
        &[
            "flash_attn",
            "use_unsloth",
            "use_unsloth_gc",
            "enable_liger_kernel",
            "disable_gradient_checkpointing",
            "use_reentrant_gc",
            "upcast_layernorm",
            "upcast_lmhead_output",
            "low_cpu_mem_usage",
            "use_fast_tokenizer",
            "split_special_tokens",
            "cache_dir",
            "compute_accuracy",
            "include_effective_tokens_per_second",
            "use_swanlab",
            "ray_run_name",
            "ray_storage_path",
            "ray_num_workers",
            "print_param_status",
            "infer_backend",
        ],
        "it concerns speed, logs or machines",
    );
}
