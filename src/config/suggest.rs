//! "Did you mean": the nearest known name, also for the names that other trainers use for the same thing.

/// Names that users bring from TRL, transformers, axolotl and LLaMA-Factory, each with ours.
const ELSEWHERE: &[(&str, &str)] = &[
    ("adam_eps", "adam_epsilon"),
    ("base_model", "model"),
    ("batch_size", "pairs_per_step"),
    ("clip_grad_norm", "max_grad_norm"),
    ("cutoff_len", "max_length"),
    ("dataset", "data"),
    ("dataset_name", "data"),
    ("datasets", "data"),
    ("eval_dataset", "eval_data"),
    ("gradient_accumulation_steps", "pairs_per_step"),
    ("gradient_clipping", "max_grad_norm"),
    ("label_smoothing_factor", "label_smoothing"),
    ("loss_type", "objective"),
    ("lr", "learning_rate"),
    ("lr_scheduler", "schedule"),
    ("lr_scheduler_type", "schedule"),
    ("micro_batch_size", "tokens_per_micro_batch"),
    ("model_name_or_path", "model"),
    ("num_epochs", "epochs"),
    ("num_train_epochs", "epochs"),
    ("output_dir", "output"),
    ("per_device_train_batch_size", "tokens_per_micro_batch"),
    ("pref_beta", "beta"),
    ("pref_loss", "objective"),
    ("ref_model", "reference"),
    ("resume_from_checkpoint", "resume"),
    ("rl", "objective"),
    ("rl_beta", "beta"),
    ("save_total_limit", "keep_checkpoints"),
    ("sequence_len", "max_length"),
    ("simpo_gamma", "gamma_beta_ratio"),
    ("train_batch_size", "pairs_per_step"),
];

/// The known name nearest to `unknown`; `None` only where nothing is known. Hyphens and underscores count as the same.
pub fn nearest<'a>(unknown: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let plain = |name: &str| name.trim_start_matches('-').replace('-', "_").to_lowercase();
    let unknown = plain(unknown);
    let known: Vec<&str> = known.collect();
    let elsewhere = ELSEWHERE.iter().find(|(theirs, _)| *theirs == unknown).map(|(_, ours)| *ours);
    if let Some(name) = known.iter().find(|name| Some(plain(name).as_str()) == elsewhere) {
        return Some(name);
    }
    known.into_iter().max_by(|a, b| likeness(&unknown, &plain(a)).total_cmp(&likeness(&unknown, &plain(b))))
}

/// 1 for equal names. Edits count first; the shared beginning, which people seldom mistype, breaks ties.
fn likeness(a: &str, b: &str) -> f64 {
    strsim::normalized_damerau_levenshtein(a, b) + 0.5 * strsim::jaro_winkler(a, b)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: [&str; 6] = ["learning_rate", "beta", "adam_beta1", "epochs", "max_length", "schedule"];

    #[test]
    fn typing_errors_and_other_trainers_names() {
        for (unknown, expected) in [
            ("leraning_rate", "learning_rate"),
            ("--learning_rates", "learning_rate"),
            ("Beta", "beta"),
            ("max-len", "max_length"),
            ("lr", "learning_rate"),
            ("num_train_epochs", "epochs"),
            ("lr_scheduler_type", "schedule"),
        ] {
            assert_eq!(nearest(unknown, KNOWN.into_iter()), Some(expected), "{unknown}");
        }
    }

    #[test]
    fn every_foreign_name_leads_to_an_option() {
        let known: Vec<&str> = crate::config::options::rows().iter().map(|row| row.name).collect();
        for (theirs, ours) in ELSEWHERE {
            assert!(
                known.contains(ours) || *ours == "resume",
                "{theirs} leads to {ours}, which is no option"
            );
            assert!(!known.contains(theirs), "{theirs} is an option itself");
        }
    }

    #[test]
    fn nothing_known_nothing_near() {
        assert_eq!(nearest("x", std::iter::empty()), None);
    }
}
