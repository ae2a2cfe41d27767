//! Before and after: what a run did to the preferences, for the terminal and the report.

use serde::{Deserialize, Serialize};

use super::metrics::{EvalMetrics, ImplicitMetrics, PreferenceMetrics, ROUNDING, WeightMetrics};

/// What the model answers before and after training.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// The prompt.
    pub prompt: String,
    /// The answer before training.
    pub before: String,
    /// The answer after training.
    pub after: String,
}

/// A line of the before-and-after table.
#[derive(Clone, Debug, PartialEq)]
pub struct ComparisonRow {
    /// What the row is about.
    pub label: &'static str,
    /// Its value before training.
    pub before: String,
    /// Its value after training.
    pub after: String,
    /// The difference, with its sign.
    pub change: String,
    /// `None` where neither direction is the better one.
    pub better: Option<bool>,
}

/// Columns that answers are wrapped to.
const ANSWER_WIDTH: usize = 88;

/// The rows that two evaluations of the same pairs have in common.
pub fn compare(before: &EvalMetrics, after: &EvalMetrics) -> Vec<ComparisonRow> {
    let preference = |value: fn(&PreferenceMetrics) -> f64| {
        Some((value(&before.pairs.preference?), value(&after.pairs.preference?)))
    };
    let implicit = |value: fn(&ImplicitMetrics) -> f64| {
        Some((value(&before.pairs.implicit?), value(&after.pairs.implicit?)))
    };
    let weights = |value: fn(&WeightMetrics) -> f64| {
        Some((value(&before.pairs.weights?), value(&after.pairs.weights?)))
    };
    let margin =
        |metrics: &EvalMetrics| Some(metrics.pairs.logps_chosen - metrics.pairs.preference?.logps_rejected);
    let margins = margin(before).zip(margin(after));
    [
        implicit(|i| i.accuracy).map(|pair| row("chosen gained more", pair, true, Some(1.0))),
        implicit(|i| i.margin).map(|pair| row("gain of chosen over rejected", pair, false, Some(1.0))),
        preference(|p| p.likelier).map(|pair| row("chosen is the likelier", pair, true, Some(1.0))),
        margins.map(|pair| row("log-prob margin", pair, false, Some(1.0))),
        reward_accuracy(before)
            .zip(reward_accuracy(after))
            .map(|pair| row("reward accuracy", pair, true, Some(1.0))),
        preference(PreferenceMetrics::margin).map(|pair| row("reward margin", pair, false, Some(1.0))),
        Some(row("loss", (before.pairs.loss, after.pairs.loss), false, Some(-1.0))),
        Some(row(
            "log-prob of chosen",
            (before.pairs.logps_chosen, after.pairs.logps_chosen),
            false,
            Some(1.0),
        )),
        preference(|p| p.logps_rejected).map(|pair| row("log-prob of rejected", pair, false, None)),
        weights(|w| w.chosen).map(|pair| row("weight of chosen", pair, false, None)),
        weights(|w| w.saturated).map(|pair| row("pairs with a saturated weight", pair, true, None)),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// The share of pairs with a higher reward for the chosen response. Where both rewards are 0 but for rounding, as those of
/// DPO before training, every pair is a tie, and which reward is the higher is chance.
fn reward_accuracy(metrics: &EvalMetrics) -> Option<f64> {
    let preference = metrics.pairs.preference?;
    let is_rounding = |reward: f64, logp: f64| reward.abs() <= ROUNDING * logp.abs();
    let is_tied = is_rounding(preference.rewards_chosen, metrics.pairs.logps_chosen)
        && is_rounding(preference.rewards_rejected, preference.logps_rejected);
    Some(if is_tied { 0.5 } else { preference.accuracy })
}

/// Makes a row. `sign` is 1 where more is better, -1 where less is.
fn row(label: &'static str, (before, after): (f64, f64), share: bool, sign: Option<f64>) -> ComparisonRow {
    let text = |value: f64| if share { format!("{:.1} %", 100.0 * value) } else { format!("{value:.3}") };
    let change = after - before;
    let change_text = if share { format!("{:+.1} points", 100.0 * change) } else { format!("{change:+.3}") };
    let better = sign.filter(|_| change != 0.0).map(|sign| sign * change > 0.0);
    ComparisonRow { label, before: text(before), after: text(after), change: change_text, better }
}

/// The table and the answers as plain text, for the end of a run on the terminal.
pub fn summary(before: &EvalMetrics, after: &EvalMetrics, samples: &[Sample]) -> String {
    let mut text = format!("{:<30} {:>12} {:>12}   {}\n", "", "before", "after", "change");
    for row in compare(before, after) {
        text.push_str(&format!("{:<30} {:>12} {:>12}   {}\n", row.label, row.before, row.after, row.change));
    }
    for sample in samples {
        text.push_str(&format!("\nprompt  {}\n", indented(&sample.prompt)));
        text.push_str(&format!("before  {}\n", indented(&sample.before)));
        text.push_str(&format!("after   {}\n", indented(&sample.after)));
    }
    text
}

/// Wraps text at spaces and indents it under the column after its label. Control characters would reach the terminal as
/// commands, so they become spaces.
fn indented(text: &str) -> String {
    let mut lines: Vec<String> = Vec::new();
    for paragraph in text.trim().lines() {
        let mut line = String::new();
        for word in
            paragraph.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty())
        {
            if !line.is_empty() && line.chars().count() + 1 + word.chars().count() > ANSWER_WIDTH {
                lines.push(std::mem::take(&mut line));
            }
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
        lines.push(line);
    }
    lines.join("\n        ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::metrics::PairMetrics;

    fn evaluation(accuracy: f64, loss: f64) -> EvalMetrics {
        let preference = PreferenceMetrics {
            rewards_chosen: accuracy,
            rewards_rejected: 0.5,
            accuracy,
            logps_rejected: -5.0,
            likelier: accuracy / 2.0,
        };
        let implicit = Some(ImplicitMetrics { accuracy, margin: loss });
        let preference = Some(preference);
        let pairs = PairMetrics { loss, logps_chosen: -4.0, preference, implicit, weights: None };
        EvalMetrics { step: 0, epoch: 0.0, pairs }
    }

    #[test]
    fn the_table_says_what_became_better() {
        let rows = compare(&evaluation(0.5, 2.0), &evaluation(0.985, 2.5));
        let find = |label: &str| rows.iter().find(|row| row.label == label).unwrap();
        assert_eq!((rows[0].label, rows[0].before.as_str()), ("chosen gained more", "50.0 %"));
        assert_eq!((rows[1].label, rows[1].after.as_str()), ("gain of chosen over rejected", "2.500"));
        assert_eq!(rows[2].label, "chosen is the likelier");
        assert_eq!((rows[2].before.as_str(), rows[2].after.as_str()), ("25.0 %", "49.2 %"));
        let accuracy = find("reward accuracy");
        assert_eq!((accuracy.before.as_str(), accuracy.after.as_str()), ("50.0 %", "98.5 %"));
        assert_eq!((accuracy.change.as_str(), accuracy.better), ("+48.5 points", Some(true)));
        let loss = find("loss");
        assert_eq!((loss.change.as_str(), loss.better), ("+0.500", Some(false)));
        let chosen = find("log-prob of chosen");
        assert_eq!(chosen.better, None, "no change is neither");
        assert_eq!(rows.len(), 9, "no weights without MMPO");
    }

    #[test]
    fn rewards_that_are_rounding_are_ties() {
        let mut before = evaluation(0.8, 0.7);
        let rewards = |evaluation: &mut EvalMetrics, reward: f64| {
            let preference = evaluation.pairs.preference.as_mut().unwrap();
            (preference.rewards_chosen, preference.rewards_rejected) = (reward, -reward);
        };
        let shown = |before: &EvalMetrics| {
            let rows = compare(before, &evaluation(0.9, 0.6));
            rows.iter().find(|row| row.label == "reward accuracy").unwrap().before.clone()
        };
        rewards(&mut before, 1e-6);
        assert_eq!(shown(&before), "50.0 %");
        rewards(&mut before, 1e-4);
        assert_eq!(shown(&before), "80.0 %");
    }

    #[test]
    fn answers_stand_under_their_label_and_cannot_command_the_terminal() {
        let sample =
            Sample { prompt: "Say\nit".into(), before: "\u{1b}[31mred".into(), after: "word ".repeat(40) };
        let text = summary(&evaluation(0.5, 2.0), &evaluation(0.6, 1.0), &[sample]);
        assert!(text.contains("prompt  Say\n        it\nbefore  [31mred\nafter   word word"), "{text}");
        assert!(!text.contains('\u{1b}'));
        assert!(text.lines().all(|line| line.chars().count() <= ANSWER_WIDTH + 8), "{text}");
    }
}
