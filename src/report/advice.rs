//! What a user should know of a run beyond its numbers, and what to try: each sentence from the metrics alone.

use super::history::History;

/// A margin over the reference of fewer nats than this is as good as none.
const MOVED: f64 = 0.01;
/// Evaluations in a row that make a trend.
const TREND: usize = 3;
/// A loss is lower than another where it is lower by this share of it.
const LOWER: f64 = 0.02;

/// Sentences about what the metrics of a run show, most important first; `learning_rate` is its peak.
pub fn advice(history: &History, learning_rate: f64) -> Vec<String> {
    let all = [
        rejected_gained(history),
        loss_rose(history, learning_rate),
        best_was_earlier(history),
        chosen_falls(history),
        saturated(history),
        barely_moved(history, learning_rate),
    ];
    all.into_iter().flatten().collect()
}

/// The values of a metric, oldest first.
fn values(history: &History, name: &str) -> Vec<f64> {
    history.series(name).into_iter().map(|(_, value)| value).collect()
}

fn rejected_gained(history: &History) -> Option<String> {
    let share = *values(history, "eval_implicit/accuracies").last()?;
    (share < 0.4).then(|| {
        format!(
            "In only {:.0} % of the evaluation pairs did the chosen response gain more than the rejected one. Look at a few \
             pairs: `chosen` and `rejected` may have changed places. Otherwise the training pairs prefer something else.",
            100.0 * share
        )
    })
}

fn loss_rose(history: &History, learning_rate: f64) -> Option<String> {
    let losses = values(history, "eval_loss");
    let (first, last) = (*losses.first()?, *losses.last()?);
    (losses.len() > 1 && last - first > LOWER * first.abs()).then(|| {
        format!(
            "The evaluation loss rose from {first:.4} to {last:.4}. Try a tenth of the learning rate, which was \
             {learning_rate:.1e}, or fewer epochs."
        )
    })
}

fn best_was_earlier(history: &History) -> Option<String> {
    let losses = history.series("eval_loss");
    let (_, last) = *losses.last()?;
    let (step, best) = losses.iter().copied().min_by(|one, other| one.1.total_cmp(&other.1))?;
    // The first is the model before training: `loss_rose` speaks of it.
    (step > 0.0 && last - best > LOWER * best.abs()).then(|| {
        format!(
            "The evaluation loss was lowest after step {step}, {best:.4}, and is {last:.4} at the end: the run went on for too \
             long. Train for {step} steps (`--max-steps`), or lower the learning rate."
        )
    })
}

fn chosen_falls(history: &History) -> Option<String> {
    let logps = values(history, "eval_logps/chosen");
    let last = logps.get(logps.len().checked_sub(TREND + 1)?..)?;
    let fell = last[0] - last[TREND];
    (last.is_sorted_by(|before, after| before > after) && fell > 1.0).then(|| {
        format!(
            "The chosen responses became less likely at each of the last {TREND} evaluations, by {fell:.1} nats in all. The \
             preference is learned by making both responses unlikely, which can harm the answers. Try a larger beta, a lower \
             learning rate, or an objective that also raises the chosen response (mmpo, orpo)."
        )
    })
}

fn saturated(history: &History) -> Option<String> {
    let share = *values(history, "eval_weights/saturated").last()?;
    (share > 0.5).then(|| {
        format!(
            "{:.0} % of the pairs train on one response alone: their softmax weights are above 0.99. Log-probs of \
             long responses differ by tens of nats; `length_normalize = true` compares means instead.",
            100.0 * share
        )
    })
}

/// The policy is the reference still, or nearly so.
fn barely_moved(history: &History, learning_rate: f64) -> Option<String> {
    let margins = history.series("eval_implicit/margins");
    let (step, margin) = *margins.last().filter(|(step, _)| *step > 0.0)?;
    (margin.abs() < MOVED).then(|| {
        format!(
            "The policy hardly differs from the reference after step {step}: the chosen responses gained {margin:+.4} nats on the \
             rejected ones. The learning rate, {learning_rate:.1e} at most, is too small for so few steps. Try ten times as \
             much, or more `epochs`."
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::METRICS_FILE;

    /// What is said of evaluations with these values, one after the other.
    fn said(name: &str, values: &[f64]) -> String {
        let folder = tempfile::tempdir().unwrap();
        let lines = values
            .iter()
            .enumerate()
            .map(|(step, value)| format!("{{\"step\":{step},\"{name}\":{value}}}\n"));
        std::fs::write(folder.path().join(METRICS_FILE), lines.collect::<String>()).unwrap();
        advice(&History::read(folder.path()).unwrap(), 5e-5).join("\n")
    }

    #[test]
    fn a_run_that_goes_well_needs_no_advice() {
        assert_eq!(said("eval_loss", &[]), "");
        assert_eq!(said("eval_loss", &[0.7]), "");
        assert_eq!(said("eval_loss", &[0.7, 0.6, 0.5, 0.505]), "");
        assert_eq!(said("eval_implicit/accuracies", &[0.5, 0.7]), "");
        assert_eq!(said("eval_logps/chosen", &[-100.0, -110.0, -120.0]), "", "too few for a trend");
        assert_eq!(said("eval_logps/chosen", &[-100.0, -103.0, -102.0, -104.0]), "");
        assert_eq!(said("eval_weights/saturated", &[0.9, 0.1]), "");
        assert_eq!(said("eval_implicit/margins", &[0.0]), "", "before the first step");
        assert_eq!(said("eval_implicit/margins", &[0.0, 0.4]), "");
    }

    #[test]
    fn each_trouble_has_its_sentence() {
        assert!(said("eval_loss", &[0.7, 0.9]).starts_with("The evaluation loss rose from 0.7000 to 0.9000"));
        let long = said("eval_loss", &[0.7, 0.5, 0.6]);
        assert!(
            long.starts_with("The evaluation loss was lowest after step 1, 0.5000, and is 0.6000"),
            "{long}"
        );
        let turned = said("eval_implicit/accuracies", &[0.5, 0.2]);
        assert!(turned.contains("only 20 %") && turned.contains("changed places"), "{turned}");
        let falls = said("eval_logps/chosen", &[-90.0, -100.0, -101.0, -105.5]);
        assert!(falls.contains("each of the last 3 evaluations, by 15.5 nats"), "{falls}");
        let same = said("eval_implicit/margins", &[0.0, 0.002]);
        assert!(same.contains("gained +0.0020 nats") && same.contains("ten times"), "{same}");
        assert!(said("eval_weights/saturated", &[0.1, 0.9]).starts_with("90 % of the pairs"));
    }
}
