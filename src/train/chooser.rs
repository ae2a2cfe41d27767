//! Which checkpoint is the best one, and when a run ends because no better one comes.

use crate::config::{EvalMetric, EvaluationConfig};
use crate::error::{Error, Result};
use crate::report::{EvalMetrics, History};

/// A step and the value of the metric after it.
pub type Scored = (usize, f64);

/// What the evaluations so far say. It follows from the metrics alone, so that a resumed run chooses as one in one piece.
#[derive(Clone, Debug)]
pub struct Chooser {
    /// The metric of `--keep-best`, or the loss.
    metric: EvalMetric,
    keeps_best: bool,
    patience: Option<usize>,
    delta: f64,
    /// The best evaluation after a step whose checkpoint is kept.
    best: Option<Scored>,
    /// The evaluation before the first step.
    start: Option<f64>,
    /// The value at the last evaluation that counts as an improvement.
    improved: Option<f64>,
    /// Evaluations since then.
    without_improvement: usize,
}

impl Chooser {
    /// Before any evaluation.
    pub fn new(config: &EvaluationConfig) -> Self {
        Chooser {
            metric: config.keep_best.unwrap_or(EvalMetric::LOSS),
            keeps_best: config.keep_best.is_some(),
            patience: config.patience,
            delta: config.delta,
            best: None,
            start: None,
            improved: None,
            without_improvement: 0,
        }
    }

    /// After the evaluations that `history` has up to step `last`. `is_kept` says of a step whether its checkpoint is there:
    /// another one cannot be the best one that is kept.
    pub fn after(
        config: &EvaluationConfig,
        history: &History,
        last: usize,
        is_kept: impl Fn(usize) -> bool,
    ) -> Self {
        let mut choice = Chooser::new(config);
        let series = history.series(&choice.metric.recorded_name());
        for (step, value) in series.into_iter().map(|(step, value)| (step as usize, value)) {
            if step <= last {
                choice.add(step, value, is_kept(step));
            }
        }
        choice
    }

    /// Takes up an evaluation; returns whether its checkpoint is to be kept as the best so far.
    ///
    /// # Errors
    /// [`Error::Bug`] where the evaluation has no such metric: the options were checked for that.
    pub fn record(&mut self, metrics: &EvalMetrics) -> Result<bool> {
        let name = self.metric.recorded_name();
        let found = metrics.fields().into_iter().find(|(field, _)| *field == name);
        match found {
            Some((_, value)) => Ok(self.add(metrics.step, value, true)),
            None => Err(Error::bug(format!("the evaluation has no `{name}`"))),
        }
    }

    fn add(&mut self, step: usize, value: f64, is_kept: bool) -> bool {
        match self.improved {
            Some(before) if !self.metric.is_better(value, before, self.delta) => {
                self.without_improvement += 1
            }
            _ => (self.improved, self.without_improvement) = (Some(value), 0),
        }
        if step == 0 {
            self.start = Some(value);
            return false;
        }
        let is_best = self.best.is_none_or(|(_, best)| self.metric.is_better(value, best, 0.0));
        if self.keeps_best && is_kept && is_best {
            self.best = Some((step, value));
            return true;
        }
        false
    }

    /// The best step whose checkpoint is kept; `None` without `--keep-best`.
    pub fn best(&self) -> Option<Scored> {
        self.best
    }

    /// Whether the run ends here, because the metric did not become better for as long as `--early-stopping` waits.
    pub fn is_over(&self) -> bool {
        self.patience.is_some_and(|patience| self.without_improvement >= patience)
    }

    /// The name of the metric, as `metrics.jsonl` has it.
    pub fn metric(&self) -> String {
        self.metric.recorded_name()
    }

    /// Why the run ended, in words.
    pub fn why_over(&self) -> String {
        let by = match self.delta {
            0.0 => String::new(),
            delta => format!(" by more than {delta}"),
        };
        let evaluations = self.without_improvement;
        let plural = if evaluations == 1 { "" } else { "s" };
        format!(
            "{} did not become better{by} in {evaluations} evaluation{plural} in a row (its best is {})",
            self.metric(),
            self.improved.map_or("unknown".to_string(), |value| format!("{value:.4}"))
        )
    }

    /// A sentence about the best checkpoint of a run that ended after `last` steps.
    pub fn describe(&self, last: usize) -> Option<String> {
        let (step, value) = self.best?;
        let metric = self.metric();
        let mut text = match step == last {
            true => format!("The best checkpoint by {metric} is the last one, of step {step}: {value:.4}."),
            false => format!(
                "The best checkpoint by {metric} is that of step {step}: {value:.4}. The last one is that of step {last}."
            ),
        };
        if let Some(start) = self.start.filter(|&start| self.metric.is_better(start, value, 0.0)) {
            text.push_str(&format!(
                " The starting model was better, with {start:.4}: by this metric the training did harm."
            ));
        }
        Some(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::value::OptionValue;

    fn config(metric: &str, patience: usize, delta: f64) -> EvaluationConfig {
        EvaluationConfig {
            data: None,
            split: None,
            steps: None,
            on_start: true,
            keep_best: Some(EvalMetric::from_text(metric).unwrap()),
            patience: Some(patience),
            delta,
        }
    }

    fn choice(metric: &str, patience: usize, delta: f64) -> Chooser {
        Chooser::new(&config(metric, patience, delta))
    }

    #[test]
    fn the_best_is_the_first_of_the_lowest_losses() {
        let mut choice = choice("loss", 3, 0.0);
        let kept = [0.7, 0.5, 0.6, 0.5].iter().enumerate().map(|(step, &loss)| choice.add(step, loss, true));
        assert_eq!(kept.collect::<Vec<_>>(), [false, true, false, false], "the start has no checkpoint");
        assert_eq!((choice.best(), choice.is_over()), (Some((1, 0.5)), false));
        choice.add(4, 0.55, true);
        assert!(choice.is_over());
        assert!(choice.why_over().contains("eval_loss did not become better in 3 evaluations in a row"));
        assert!(
            choice.describe(4).unwrap().contains("is that of step 1: 0.5000. The last one is that of step 4")
        );
    }

    #[test]
    fn small_gains_count_once_they_add_up() {
        let mut choice = choice("implicit/margins", 2, 0.1);
        for (step, margin) in [0.0, 0.06, 0.12, 0.18, 0.24].into_iter().enumerate() {
            choice.add(step, margin, true);
            assert!(!choice.is_over(), "step {step}");
        }
        choice.add(5, 0.25, true);
        choice.add(6, 0.26, true);
        assert!(choice.is_over());
        assert_eq!(choice.best(), Some((6, 0.26)), "the best needs no delta");
    }

    #[test]
    fn what_has_no_checkpoint_is_not_the_best_and_harm_is_said() {
        let mut choice = choice("loss", 9, 0.0);
        choice.add(0, 0.3, true);
        choice.add(1, 0.5, false);
        assert_eq!(choice.best(), None);
        choice.add(2, 0.6, true);
        assert_eq!(choice.best(), Some((2, 0.6)));
        assert!(choice.describe(2).unwrap().contains("The starting model was better, with 0.3000"));
    }

    /// Wherever a run is cut, ties and waiting included, what its metrics say gives the choice of a run in one piece.
    #[test]
    fn a_resumed_run_chooses_as_one_in_one_piece() {
        // An evaluation before the first step, and after each second one; `loss` is that of the steps.
        let values = [0.7, 0.5, 0.5, 0.6, 0.44, 0.44, 0.5, 0.42, 0.44];
        let folder = tempfile::tempdir().unwrap();
        let mut lines = String::new();
        for (number, value) in values.into_iter().enumerate() {
            let (before, step) = ((2 * number).saturating_sub(1), 2 * number);
            for step in before..=step {
                lines += &format!("{{\"step\": {step}, \"loss\": {}}}\n", 1.0 / (step + 1) as f64);
            }
            lines += &format!(
                "{{\"step\": {step}, \"eval_loss\": {value}, \"eval_implicit/margins\": {}}}\n",
                -value
            );
        }
        std::fs::write(folder.path().join(crate::report::METRICS_FILE), lines).unwrap();
        let history = History::read(folder.path()).unwrap();
        for (metric, sign) in [("loss", 1.0), ("implicit/margins", -1.0)] {
            let config = config(metric, 3, 0.05);
            let mut whole = Chooser::new(&config);
            let state = |chooser: &Chooser| {
                (chooser.best(), chooser.start, chooser.improved, chooser.without_improvement)
            };
            for (number, value) in values.into_iter().enumerate() {
                whole.add(2 * number, sign * value, true);
                for last in [2 * number, 2 * number + 1] {
                    let after = Chooser::after(&config, &history, last, |_| true);
                    assert_eq!(state(&after), state(&whole), "{metric} after step {last}");
                }
            }
            assert_eq!(whole.best(), Some((14, sign * 0.42)), "{metric}");
            // A checkpoint that is gone is not the best; of those that are there the first of equals is.
            let left = Chooser::after(&config, &history, 16, |step| step != 14 && step != 8);
            assert_eq!(left.best(), Some((10, sign * 0.44)), "{metric}");
        }
    }
}
