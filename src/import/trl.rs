//! TRL's `trl dpo --config FILE` (names and defaults of TRL 1.16, and the keys that earlier versions had), and the
//! recipes of the alignment handbook, which are the same but for where the pairs come from.

use std::path::PathBuf;

use super::draft::Draft;
use super::pairs::{self, Listed, put};
use super::training::{self, Defaults, Evaluation};
use super::yaml::{Node, Value};
use crate::config::ObjectiveKind;
use crate::optimizer::Schedule;

/// TRL's own defaults, where they differ from those of transformers.
const TRL: Defaults =
    Defaults { learning_rate: 1e-6, per_device_batch: 8, epochs: 3.0, schedule: Schedule::Linear };

pub(super) fn read(draft: &mut Draft, devices: usize) {
    model(draft);
    let evaluation = training::evaluation(draft);
    let evaluates = !matches!(evaluation, Evaluation::Never);
    let has_pairs = data(draft, evaluates);
    training::write_evaluation(draft, evaluation, has_pairs);
    loss(draft);
    lengths(draft);
    adapters(draft);
    training::read(draft, &TRL, devices);
    training::read_idle(draft);
}

fn model(draft: &mut Draft) {
    match draft.take("model_name_or_path") {
        Some(node) => super::pairs::source(draft, "model_name_or_path", &node, "model"),
        None => draft.lack("model_name_or_path", "no model is named"),
    }
    draft.only(&[
        (
            "model_revision",
            &["main"],
            "the Hub's cache gives its main revision: fetch this one and name its folder",
        ),
        ("model_code_revision", &["main"], "no code of a model is run here"),
        ("base_model_revision", &["main"], "the Hub's cache gives its main revision"),
        (
            "tokenizer_name_or_path",
            &[],
            "the tokenizer is the model's: copy the other one into the model's folder",
        ),
        ("chat_template", &[], "write the template to a file and give it as --chat-template"),
        ("chat_template_path", &[], "give the template's file as --chat-template"),
        ("model_init_kwargs", &[], "models are read as their config.json says"),
        ("load_in_8bit", &["false"], "no quantised weights are trained here"),
        ("load_in_4bit", &["false"], "no quantised weights are trained here"),
        ("router_aux_loss_coef", &["0"], "mixtures of experts are not trained here"),
    ]);
    draft.idle(
        &["bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage", "ignore_bias_buffers"],
        "it belongs to quantised weights or to machines",
    );
}

/// The pairs; whether there are any to evaluate on.
fn data(draft: &mut Draft, evaluates: bool) -> bool {
    draft.only(&[
        ("dataset_streaming", &["false"], "files are read whole here, whatever their size"),
        ("dataset_configs", &[], "name the files of that configuration with --data"),
        ("auto_insert_empty_system_msg", &["false"], "no message is added to conversations here"),
        ("truncation_side", &["right"], "prompts are cut on the left here and responses on the right"),
    ]);
    for key in ["text_column", "dataset_text_field"] {
        draft.idle(&[key], "it is for plain texts without pairs");
    }
    if let Some((key, node)) = draft.take_any(&["dataset_mixture", "dataset_mixer"]) {
        return match key {
            "dataset_mixture" => mixture(draft, &node, evaluates),
            _ => mixer(draft, &node, evaluates),
        };
    }
    if let Some(node) = draft.take("datasets") {
        let listed = node.list().into_iter().map(|entry| listed(draft, "datasets", entry)).collect();
        put(draft, "datasets", &node, "data", listed);
        return test_split(draft, evaluates);
    }
    let Some(node) = draft.take("dataset_name") else {
        if !draft.lines.iter().any(|(name, _)| *name == "data") {
            draft.lack("dataset_name", "no pairs are named; `--data FILE` of this command names them");
        }
        return false;
    };
    if let Some(config) = draft.take("dataset_config") {
        match config.text() {
            Some("default") => draft.no_effect("dataset_config", &config, "the configuration that is read"),
            _ => draft.refuse("dataset_config", &config, "name the files of that configuration with --data"),
        }
    }
    let name = node.text().unwrap_or_default().to_string();
    let split = draft.take("dataset_train_split");
    if let Some(split) = &split {
        draft.say("dataset_train_split", split, "after the colon in data");
    }
    let of = |split: Option<&Node>, usual: &str| Listed {
        path: name.clone(),
        split: Some(split.and_then(Node::text).unwrap_or(usual).to_string()),
        weight: 1.0,
    };
    put(draft, "dataset_name", &node, "data", vec![of(split.as_ref(), "train")]);
    let test = draft.take("dataset_test_split");
    match (evaluates, test) {
        (true, Some(test)) => {
            put(draft, "dataset_test_split", &test, "eval_data", vec![of(Some(&test), "test")])
        }
        (true, None) if pairs::is_file(&name) => {
            let why =
                "one file has no split to evaluate on: give `train` --eval-data FILE or --eval-split SHARE";
            draft.no_effect("dataset_test_split", &node, why);
            return false;
        }
        (true, None) => put(draft, "dataset_name", &node, "eval_data", vec![of(None, "test")]),
        (false, Some(test)) => draft.no_effect("dataset_test_split", &test, "nothing is evaluated"),
        (false, None) => {}
    }
    evaluates
}

/// One entry of a mixture: where it comes from and how much of it is taken.
fn listed(draft: &mut Draft, under: &str, entry: &Node) -> Listed {
    let mut listed = Listed { path: String::new(), split: None, weight: 1.0 };
    let Value::Mapping(members) = &entry.value else {
        listed.path = entry.text().unwrap_or_default().to_string();
        return listed;
    };
    for (name, node) in members {
        let key = format!("{under}.{name}");
        match name.as_str() {
            _ if node.is_null() => draft.no_effect(&key, node, "it says nothing"),
            "id" | "path" => listed.path = node.text().unwrap_or_default().to_string(),
            "split" => listed.split = node.text().map(str::to_string),
            "weight" => match node.number() {
                Some(weight) => listed.weight = weight,
                None => draft.refuse(&key, node, "it is no number"),
            },
            "config" | "name" if node.text() == Some("default") => {
                draft.no_effect(&key, node, "the configuration that is read");
            }
            "config" | "name" => draft.refuse(&key, node, "name the files of that configuration with --data"),
            "columns" => {
                draft.no_effect(&key, node, "columns are found by their names, and others are not read")
            }
            _ => draft.refuse(&key, node, "this key is not known, and it may change what is trained"),
        }
    }
    listed
}

fn mixture(draft: &mut Draft, node: &Node, evaluates: bool) -> bool {
    let Value::Mapping(members) = &node.value else {
        draft.refuse("dataset_mixture", node, "it is no mapping with `datasets`");
        return false;
    };
    let mut has_split = false;
    for (name, value) in members {
        let key = format!("dataset_mixture.{name}");
        match name.as_str() {
            "datasets" => {
                let found = value.list().into_iter().map(|entry| listed(draft, &key, entry)).collect();
                put(draft, &key, value, "data", found);
            }
            "seed" => draft.say(&key, value, "shares are chosen by what the pairs say, without a seed"),
            "test_split_size" => has_split = split_size(draft, &key, value, evaluates),
            _ => draft.refuse(&key, value, "this key is not known, and it may change what is trained"),
        }
    }
    has_split || test_split(draft, evaluates)
}

/// A part of the pairs that is held out. A number of them would need a count that is not known here.
pub(super) fn split_size(draft: &mut Draft, key: &str, node: &Node, evaluates: bool) -> bool {
    match node.number() {
        Some(0.0) => draft.no_effect(key, node, "nothing is held out"),
        Some(share) if share > 0.0 && share < 1.0 => {
            let why = match evaluates {
                true => "held out by a hash of the prompts",
                false => "held out by a hash of the prompts, and evaluated on",
            };
            draft.map(key, node, "eval_split", &share, why);
            return true;
        }
        _ => draft.refuse(
            key,
            node,
            "a number of pairs is not held out here, a share is: leave this out and give `train --eval-split SHARE`",
        ),
    }
    false
}

/// A test split where pairs do not come from one named data set.
fn test_split(draft: &mut Draft, evaluates: bool) -> bool {
    for key in ["dataset_test_split", "dataset_train_split"] {
        if let Some(node) = draft.take(key) {
            match evaluates {
                true => draft.refuse(key, &node, "splits of a mixture are named in its entries"),
                false => draft.no_effect(key, &node, "nothing is evaluated"),
            }
        }
    }
    false
}

/// The handbook's earlier form: names with shares, and splits for all of them.
fn mixer(draft: &mut Draft, node: &Node, evaluates: bool) -> bool {
    let Value::Mapping(members) = &node.value else {
        draft.refuse("dataset_mixer", node, "it is no mapping of names to shares");
        return false;
    };
    let splits = draft.take("dataset_splits");
    let names: Vec<String> = match &splits {
        Some(splits) => splits.list().into_iter().filter_map(Node::text).map(str::to_string).collect(),
        None => vec!["train".to_string(), "test".to_string()],
    };
    if let Some(splits) = &splits {
        draft.say("dataset_splits", splits, "after the colons in data and eval_data");
    }
    let of = |word: &str, weighted: bool| -> Vec<Listed> {
        let named = names.iter().filter(|name| name.contains(word));
        named
            .flat_map(|split| {
                members.iter().map(move |(path, share)| Listed {
                    path: path.clone(),
                    split: Some(split.clone()),
                    weight: if weighted { share.number().unwrap_or(f64::NAN) } else { 1.0 },
                })
            })
            .collect()
    };
    put(draft, "dataset_mixer", node, "data", of("train", true));
    let tests = of("test", false);
    let has_pairs = evaluates && !tests.is_empty();
    if has_pairs {
        put(draft, "dataset_mixer", node, "eval_data", tests);
    }
    has_pairs
}

fn loss(draft: &mut Draft) {
    let loss = draft.take("loss_type");
    let names: Vec<&str> = loss.iter().flat_map(Node::list).filter_map(Node::text).collect();
    let kind = match names.as_slice() {
        [] | ["sigmoid"] => ObjectiveKind::Dpo,
        ["ipo"] => ObjectiveKind::Ipo,
        ["hinge"] => ObjectiveKind::Hinge,
        _ => ObjectiveKind::Dpo,
    };
    match &loss {
        None => draft.default("loss_type", "objective", &kind),
        Some(node) if matches!(names.as_slice(), ["sigmoid" | "ipo" | "hinge"]) => {
            draft.map("loss_type", node, "objective", &kind, "the same loss");
        }
        Some(node) => draft.refuse("loss_type", node, "of TRL's losses, sigmoid, ipo and hinge are here"),
    }
    draft.keep_number("beta", "beta", Some(0.1));
    match draft.number("label_smoothing") {
        Some((node, 0.0)) => draft.no_effect("label_smoothing", &node, "as here by default"),
        Some((node, share)) if kind == ObjectiveKind::Dpo => {
            draft.keep("label_smoothing", &node, "label_smoothing", &share);
        }
        Some((node, _)) => draft.refuse("label_smoothing", &node, "it belongs to the loss sigmoid"),
        None => {}
    }
    draft.only(&[
        ("loss_weights", &["1"], "losses are not mixed here"),
        ("f_divergence_type", &["reverse_kl"], "the divergence here is the reverse KL"),
        ("use_weighting", &["false"], "pairs are not weighted by their probability here"),
        ("reference_free", &["false"], "the objectives with a reference have one; simpo and orpo have none"),
        ("sync_ref_model", &["false"], "the reference stays as it is here"),
        ("rpo_alpha", &[], "no NLL term is added here"),
        ("ld_alpha", &["1"], "all tokens of a response count alike here"),
        ("generate_during_eval", &["false"], "the report shows samples at the end instead"),
        ("is_encoder_decoder", &["false"], "Llamas have no encoder"),
    ]);
    draft.idle(
        &[
            "f_alpha_divergence_coef",
            "discopop_tau",
            "ref_model_mixup_alpha",
            "ref_model_sync_steps",
            "pad_token",
            "label_pad_token_id",
            "padding_value",
            "force_use_ref_model",
        ],
        "it belongs to something that is not used",
    );
    if let Some((key, node)) = draft.take_any(&["ref_model_name_or_path", "ref_model"]) {
        match node.text() {
            Some(text) => draft.keep(key, &node, "reference", &PathBuf::from(text)),
            None => draft.refuse(key, &node, "it is no name of a model"),
        }
    }
}

/// TRL cuts a whole sequence to `max_length`; earlier versions cut prompts first.
fn lengths(draft: &mut Draft) {
    let length = match draft.count("max_length") {
        Some((node, length)) => {
            draft.keep("max_length", &node, "max_length", &length);
            length
        }
        None => {
            draft.default("max_length", "max_length", &1024usize);
            1024
        }
    };
    let prompt = draft.count("max_prompt_length");
    let cuts_prompts = prompt.is_some();
    match prompt {
        Some((node, length)) => draft.keep("max_prompt_length", &node, "max_prompt_length", &length),
        // A prompt that leaves no room is cut here, where TRL would train on no response at all.
        None => draft.default("max_prompt_length", "max_prompt_length", &length.saturating_sub(1).max(1)),
    }
    draft.only(&[("max_completion_length", &[], "responses have no limit of their own here")]);
    if let Some(node) = draft.take("truncation_mode") {
        match (node.text(), cuts_prompts) {
            (Some("keep_start"), false) => {
                draft.no_effect("truncation_mode", &node, "responses are cut on the right here");
            }
            (Some("keep_end"), true) => {
                draft.no_effect("truncation_mode", &node, "prompts are cut on the left here");
            }
            _ => draft.refuse(
                "truncation_mode",
                &node,
                "prompts are cut on the left here (to max_prompt_length), and responses on the right",
            ),
        }
    }
}

fn adapters(draft: &mut Draft) {
    const NUMBERS: [&str; 4] = ["lora_r", "lora_alpha", "lora_dropout", "use_rslora"];
    let used = draft.truth("use_peft");
    draft.only(&[
        ("use_dora", &["false"], "adapters are plain LoRA here"),
        ("lora_modules_to_save", &[], "no whole module is trained beside adapters here"),
        ("lora_target_parameters", &[], "adapters are on projections here"),
        ("lora_task_type", &["CAUSAL_LM"], "only language models are trained here"),
    ]);
    match used {
        Some((node, true)) => {
            draft.say("use_peft", &node, "adapters in place of the weights");
            match draft.take("lora_target_modules") {
                Some(node) => training::modules(draft, "lora_target_modules", &node),
                None => draft.lack(
                    "lora_target_modules",
                    "which modules PEFT adapts then depends on the model: name them, q_proj and v_proj for a Llama",
                ),
            }
            match draft.count("lora_r") {
                Some((node, rank)) => draft.keep("lora_r", &node, "lora_rank", &rank),
                None => draft.default("lora_r", "lora_rank", &16usize),
            }
            draft.keep_number("lora_alpha", "lora_alpha", Some(32.0));
            draft.keep_number("lora_dropout", "lora_dropout", Some(0.05));
            if let Some((node, rslora)) = draft.truth("use_rslora") {
                draft.keep("use_rslora", &node, "lora_rslora", &rslora);
            }
        }
        other => {
            if let Some((node, _)) = other {
                draft.no_effect("use_peft", &node, "all weights are trained, as here by default");
            }
            draft.idle(&NUMBERS, "use_peft is not true");
            draft.idle(&["lora_target_modules"], "use_peft is not true");
        }
    }
}
