//! The metric of an evaluation by which a checkpoint is chosen, and whether a larger or a smaller value is better.

use super::suggest;
use super::value::OptionValue;

/// A metric that says how good a model is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EvalMetric {
    name: &'static str,
    higher_is_better: bool,
    /// Whether the rejected response is looked at.
    needs_both: bool,
}

const fn metric(name: &'static str, higher_is_better: bool, needs_both: bool) -> EvalMetric {
    EvalMetric { name, higher_is_better, needs_both }
}

/// Every such metric, under the name that `metrics.jsonl` has with `eval_` before it. Those that training may move in either
/// direction (weights, log-probs of rejected responses) are not among them.
const METRICS: [EvalMetric; 9] = [
    EvalMetric::LOSS,
    metric("implicit/accuracies", true, true),
    metric("implicit/margins", true, true),
    metric("rewards/accuracies", true, true),
    metric("rewards/margins", true, true),
    metric("rewards/chosen", true, true),
    metric("logps/accuracies", true, true),
    metric("logps/margins", true, true),
    metric("logps/chosen", true, false),
];

impl EvalMetric {
    /// The evaluation's loss, which every objective has.
    pub const LOSS: EvalMetric = metric("loss", false, false);

    /// Its name in `metrics.jsonl`: `eval_loss`.
    pub fn recorded_name(self) -> String {
        format!("eval_{}", self.name)
    }

    /// Whether more of it is better.
    pub fn higher_is_better(self) -> bool {
        self.higher_is_better
    }

    /// Whether only objectives that look at the rejected response have it.
    pub fn needs_both(self) -> bool {
        self.needs_both
    }

    /// Whether `value` is better than `other` by more than `delta`.
    pub fn is_better(self, value: f64, other: f64, delta: f64) -> bool {
        match self.higher_is_better {
            true => value - other > delta,
            false => other - value > delta,
        }
    }
}

impl OptionValue for EvalMetric {
    const PLACEHOLDER: &'static str = "METRIC";

    fn from_text(text: &str) -> Result<Self, String> {
        let wanted = text.strip_prefix("eval_").unwrap_or(text);
        METRICS.into_iter().find(|metric| metric.name == wanted).ok_or_else(|| {
            let names = METRICS.map(|metric| metric.name);
            let nearest = suggest::nearest(wanted, names.into_iter()).unwrap_or_default();
            format!("must be one of {}, not `{text}` (did you mean `{nearest}`?)", names.join(", "))
        })
    }

    fn from_toml(value: &toml::de::DeValue<'_>) -> Result<Self, String> {
        let text = value.as_str().ok_or("must be the name of a metric in quotes, such as \"loss\"")?;
        Self::from_text(text)
    }

    fn to_toml(&self) -> String {
        format!("\"{}\"", self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_better_direction_follows_from_the_name() {
        let named = |text| EvalMetric::from_text(text).unwrap();
        assert!(named("loss").is_better(0.5, 0.6, 0.0) && !named("eval_loss").is_better(0.6, 0.5, 0.0));
        assert!(named("implicit/margins").is_better(0.6, 0.5, 0.0));
        assert!(!named("rewards/margins").is_better(0.6, 0.6, 0.0), "the same is not better");
        assert!(!named("loss").is_better(0.5, 0.55, 0.1), "by no more than delta");
        assert_eq!(named("logps/chosen").recorded_name(), "eval_logps/chosen");
        let problem = EvalMetric::from_text("margins").unwrap_err();
        assert!(problem.contains("must be one of loss, implicit/accuracies"), "{problem}");
        assert!(EvalMetric::from_text("grad_norm").is_err());
    }
}
