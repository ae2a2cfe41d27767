//! The results of a step and of an evaluation, under the names that users of this ecosystem already chart.

use crate::data::Sides;
use crate::objective::{Objective, PairOutcome, ReferencePair};

/// A pair counts as saturated when one of its two MMPO weights exceeds this.
const SATURATED: f64 = 0.99;

/// Two margins are a tie where they differ by no more than this share of the log-probs that they are differences of: the
/// rounding of f32 sums of log-probs, formed in other batches by the reference than by the policy.
pub(super) const ROUNDING: f64 = 1e-6;

/// Means over pairs. Log-probs are sums over a response's tokens, in nats.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PairMetrics {
    /// Mean loss, as the objective defines it.
    pub loss: f64,
    /// Mean log-prob of the chosen responses, sums over tokens, in nats.
    pub logps_chosen: f64,
    /// `None` where the rejected response is not looked at (SFT).
    pub preference: Option<PreferenceMetrics>,
    /// `None` where the rejected response is not looked at, or the reference's log-probs are not known.
    pub implicit: Option<ImplicitMetrics>,
    /// MMPO's softmax weights.
    pub weights: Option<WeightMetrics>,
}

/// Metrics of objectives that see both responses; means over pairs.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PreferenceMetrics {
    /// Reward of the chosen response.
    pub rewards_chosen: f64,
    /// Reward of the rejected response.
    pub rewards_rejected: f64,
    /// Share of the pairs whose chosen response has the higher reward.
    pub accuracy: f64,
    /// Log-prob of the rejected responses, sums over tokens, in nats.
    pub logps_rejected: f64,
    /// Share of the pairs whose chosen response is the likelier one; unlike MMPO's rewards it holds no part of the
    /// label.
    pub likelier: f64,
}

/// What training changed: the gain of the chosen response beside that of the rejected one, whatever the objective's reward
/// is. A response's gain is its log-prob less its log-prob under the reference, 0 for every response before training.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ImplicitMetrics {
    /// Share of the pairs whose chosen response gained more than the rejected one; a tie counts as half.
    pub accuracy: f64,
    /// Mean over the pairs of how much more the chosen response gained than the rejected one, in nats.
    pub margin: f64,
}

/// The softmax weights that MMPO gives the responses.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct WeightMetrics {
    /// Mean weight of the chosen response.
    pub chosen: f64,
    /// Share of the pairs that effectively train on one response alone.
    pub saturated: f64,
}

/// One optimiser step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepMetrics {
    /// Optimiser steps done, this one included.
    pub step: usize,
    /// Passes over the data done, a fraction.
    pub epoch: f64,
    /// Metrics of the step's pairs.
    pub pairs: PairMetrics,
    /// Global l2 norm before clipping.
    pub grad_norm: f64,
    /// The learning rate of the step.
    pub learning_rate: f64,
    /// Tokens of the packed batches per second.
    pub tokens_per_second: f64,
    /// Pairs per second.
    pub pairs_per_second: f64,
    /// Model FLOPs utilisation: the share of the device's peak rate that the model's own operations reached; `None` where the
    /// peak is not known.
    pub mfu: Option<f64>,
    /// The most that the device's buffers held so far, in GiB; `None` where it is not known.
    pub memory_peak_gib: Option<f64>,
    /// How the work of the step was shared among ranks; `None` for a run of one process.
    pub ranks: Option<RankMetrics>,
}

/// How evenly the ranks of a run worked in a step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RankMetrics {
    /// Share of the step's time that a rank waited for others or for the network, the mean over the ranks.
    pub waited: f64,
    /// That of the rank that waited most.
    pub waited_most: f64,
    /// The rank that worked longest, for which the others waited.
    pub slowest: f64,
}

impl RankMetrics {
    fn fields(self) -> [(&'static str, f64); 3] {
        [
            ("ranks/waited", self.waited),
            ("ranks/waited_most", self.waited_most),
            ("ranks/slowest", self.slowest),
        ]
    }
}

/// One evaluation. Evaluate before a checkpoint of the same step is saved: a resumed run keeps the lines up to it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct EvalMetrics {
    /// Optimiser steps done before it.
    pub step: usize,
    /// Epochs done so far, with fractions.
    pub epoch: f64,
    /// Metrics of the evaluated pairs.
    pub pairs: PairMetrics,
}

impl PairMetrics {
    /// Means of `outcomes`; `loss` is the batch's, `sum(scale * loss)`, and `references` has the pairs' log-probs under the
    /// reference, in the same order.
    pub fn new(
        objective: &Objective,
        loss: f64,
        outcomes: &[PairOutcome],
        references: impl Iterator<Item = ReferencePair>,
    ) -> Self {
        let pairs = outcomes.len().max(1) as f64;
        let mean = |value: &dyn Fn(&PairOutcome) -> f64| outcomes.iter().map(value).sum::<f64>() / pairs;
        let share =
            |holds: &dyn Fn(&PairOutcome) -> bool| mean(&|outcome| f64::from(u8::from(holds(outcome))));
        let preference = || PreferenceMetrics {
            rewards_chosen: mean(&|outcome| outcome.reward_chosen.into()),
            rewards_rejected: mean(&|outcome| outcome.reward_rejected.into()),
            accuracy: share(&|outcome| outcome.reward_chosen > outcome.reward_rejected),
            logps_rejected: mean(&|outcome| outcome.logp_rejected.into()),
            likelier: share(&|outcome| outcome.logp_chosen > outcome.logp_rejected),
        };
        let larger = |outcome: &PairOutcome| {
            let weight = f64::from(outcome.weight_chosen);
            weight.max(1.0 - weight)
        };
        let weights = || WeightMetrics {
            chosen: mean(&|outcome| outcome.weight_chosen.into()),
            saturated: share(&|outcome| larger(outcome) > SATURATED),
        };
        PairMetrics {
            loss,
            logps_chosen: mean(&|outcome| outcome.logp_chosen.into()),
            preference: (objective.sides() == Sides::Both).then(preference),
            implicit: ImplicitMetrics::new(outcomes, references).filter(|_| objective.sides() == Sides::Both),
            weights: objective.descriptor().has_weights.then(weights),
        }
    }

    /// Names and values without the weights, which come later in the order of names.
    fn fields(&self) -> Vec<(&'static str, f64)> {
        let mut fields = vec![("loss", self.loss)];
        if let Some(preference) = self.preference {
            fields.extend([
                ("rewards/chosen", preference.rewards_chosen),
                ("rewards/rejected", preference.rewards_rejected),
                ("rewards/accuracies", preference.accuracy),
                ("rewards/margins", preference.margin()),
            ]);
        }
        fields.push(("logps/chosen", self.logps_chosen));
        if let Some(preference) = self.preference {
            fields.extend([
                ("logps/rejected", preference.logps_rejected),
                ("logps/accuracies", preference.likelier),
                ("logps/margins", self.logps_chosen - preference.logps_rejected),
            ]);
        }
        if let Some(implicit) = self.implicit {
            fields
                .extend([("implicit/accuracies", implicit.accuracy), ("implicit/margins", implicit.margin)]);
        }
        fields
    }

    fn weight_fields(&self) -> Vec<(&'static str, f64)> {
        self.weights.map_or_else(Vec::new, |weights| {
            vec![("weights/chosen", weights.chosen), ("weights/saturated", weights.saturated)]
        })
    }
}

impl PreferenceMetrics {
    /// Mean of chosen minus rejected rewards.
    pub fn margin(&self) -> f64 {
        self.rewards_chosen - self.rewards_rejected
    }
}

impl ImplicitMetrics {
    /// `None` if a pair's reference is not known.
    fn new(outcomes: &[PairOutcome], references: impl Iterator<Item = ReferencePair>) -> Option<Self> {
        let (mut pairs, mut wins, mut margins) = (0usize, 0.0, 0.0);
        for (outcome, reference) in outcomes.iter().zip(references) {
            if !reference.is_known() {
                return None;
            }
            let [chosen, rejected] = [outcome.logp_chosen, outcome.logp_rejected].map(f64::from);
            let known = [reference.logp_chosen, reference.logp_rejected].map(f64::from);
            let margin = (chosen - known[0]) - (rejected - known[1]);
            let size = chosen.abs() + rejected.abs() + known[0].abs() + known[1].abs();
            wins += match margin {
                _ if margin.abs() <= ROUNDING * size => 0.5,
                _ if margin > 0.0 => 1.0,
                _ => 0.0,
            };
            (pairs, margins) = (pairs + 1, margins + margin);
        }
        let pairs = (pairs > 0).then_some(pairs as f64)?;
        Some(ImplicitMetrics { accuracy: wins / pairs, margin: margins / pairs })
    }
}

impl StepMetrics {
    /// Names and values in the documented order, `step` not among them.
    pub fn fields(&self) -> Vec<(String, f64)> {
        let mut fields = self.pairs.fields();
        fields.extend([
            ("grad_norm", self.grad_norm),
            ("learning_rate", self.learning_rate),
            ("epoch", self.epoch),
        ]);
        fields.extend(self.pairs.weight_fields());
        fields.extend([
            ("tokens_per_second", self.tokens_per_second),
            ("pairs_per_second", self.pairs_per_second),
        ]);
        fields.extend(self.mfu.map(|mfu| ("mfu", mfu)));
        fields.extend(self.memory_peak_gib.map(|gib| ("memory/peak_gib", gib)));
        fields.extend(self.ranks.into_iter().flat_map(RankMetrics::fields));
        fields.into_iter().map(|(name, value)| (name.to_string(), value)).collect()
    }

    /// The step in a few words, beside a progress bar.
    pub fn brief(&self) -> String {
        let PairMetrics { implicit, preference, .. } = self.pairs;
        let gained = implicit.map_or_else(String::new, |i| {
            format!(" chosen gained more {:.2} by {:+.3}", i.accuracy, i.margin)
        });
        let likelier = preference.map_or_else(String::new, |p| format!(" chosen likelier {:.2}", p.likelier));
        format!(
            "loss {:.4}{gained}{likelier} lr {:.1e} {:.0} tok/s",
            self.pairs.loss, self.learning_rate, self.tokens_per_second
        )
    }
}

impl EvalMetrics {
    /// Names and values in the documented order, `step` not among them; all but `epoch` under `eval_`.
    pub fn fields(&self) -> Vec<(String, f64)> {
        let named = |(name, value): (&str, f64)| (format!("eval_{name}"), value);
        let mut fields: Vec<(String, f64)> = self.pairs.fields().into_iter().map(named).collect();
        fields.push(("epoch".into(), self.epoch));
        fields.extend(self.pairs.weight_fields().into_iter().map(named));
        fields
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objective::{Mmpo, Simpo};

    fn outcome(chosen: f32, rejected: f32, weight_chosen: f32) -> PairOutcome {
        PairOutcome {
            reward_chosen: chosen,
            reward_rejected: rejected,
            logp_chosen: -8.0,
            logp_rejected: -4.0,
            weight_chosen,
            ..PairOutcome::default()
        }
    }

    fn mmpo() -> Objective {
        Objective::Mmpo(Mmpo {
            beta: 0.05,
            epsilon: 0.9,
            reward_group: 2,
            reward_normalize: true,
            length_normalize: false,
            preference_weight: 0.0,
            entropy_weight: 0.0,
        })
    }

    #[test]
    fn means_shares_and_saturation() {
        let outcomes = [
            outcome(1.0, 0.0, 0.995),
            outcome(0.0, 3.0, 0.001),
            outcome(2.0, 2.0, 0.5),
            outcome(5.0, 1.0, 0.9),
        ];
        let metrics = PairMetrics::new(&mmpo(), 1.5, &outcomes, unknown());
        let preference = metrics.preference.unwrap();
        assert_eq!(
            (preference.rewards_chosen, preference.rewards_rejected, preference.margin()),
            (2.0, 1.5, 0.5)
        );
        assert_eq!(preference.accuracy, 0.5, "a tie is not a win");
        assert_eq!((metrics.loss, metrics.logps_chosen, preference.logps_rejected), (1.5, -8.0, -4.0));
        let weights = metrics.weights.unwrap();
        assert_eq!(weights.saturated, 0.5);
        assert!((weights.chosen - 0.599).abs() <= 1e-6, "{weights:?}");
    }

    /// A pair before training is a tie, also where rounding says otherwise; the rewards of MMPO say nothing of it.
    #[test]
    fn what_training_changed_is_zero_before_it() {
        let reference = |chosen, rejected| ReferencePair {
            logp_chosen: chosen,
            logp_rejected: rejected,
            tokens_chosen: 3,
            tokens_rejected: 4,
        };
        let implicit = |references: [ReferencePair; 2]| {
            let outcomes = [outcome(9.0, 0.0, 0.5), outcome(0.0, 9.0, 0.5)];
            PairMetrics::new(&mmpo(), 0.0, &outcomes, references.into_iter()).implicit
        };
        let before = implicit([reference(-8.0, -4.0), reference(-8.000001, -4.0)]).unwrap();
        assert_eq!(before.accuracy, 0.5);
        assert!(before.margin.abs() <= 1e-6, "{before:?}");
        let after = implicit([reference(-9.0, -4.0), reference(-8.0, -3.5)]).unwrap();
        assert_eq!(after, ImplicitMetrics { accuracy: 1.0, margin: 0.75 });
        let apart = implicit([reference(-8.0, -4.5), reference(-9.0, -4.0)]).unwrap();
        assert_eq!(apart, ImplicitMetrics { accuracy: 0.5, margin: 0.25 });
        assert_eq!(implicit([reference(-8.0, -4.0), ReferencePair::default()]), None);
    }

    fn unknown() -> impl Iterator<Item = ReferencePair> {
        std::iter::repeat(ReferencePair::default())
    }

    #[test]
    fn objectives_have_what_they_know() {
        let simpo = Objective::Simpo(Simpo { beta: 2.0, gamma_beta_ratio: 0.5 });
        let metrics = PairMetrics::new(&simpo, 0.0, &[outcome(1.0, 0.0, 0.0)], unknown());
        assert!(metrics.preference.is_some() && metrics.weights.is_none() && metrics.implicit.is_none());
        let metrics = PairMetrics::new(&Objective::Sft, 0.0, &[outcome(1.0, 0.0, 0.0)], unknown());
        assert!(metrics.preference.is_none() && metrics.weights.is_none() && metrics.implicit.is_none());
    }

    #[test]
    fn names_are_the_documented_ones_in_order() {
        let pairs = PairMetrics {
            preference: Some(PreferenceMetrics::default()),
            implicit: Some(ImplicitMetrics::default()),
            weights: Some(WeightMetrics::default()),
            ..PairMetrics::default()
        };
        let step =
            StepMetrics { pairs, mfu: Some(0.5), memory_peak_gib: Some(1.0), ..StepMetrics::default() };
        let names: Vec<String> = step.fields().into_iter().map(|(name, _)| name).collect();
        let documented = "loss rewards/chosen rewards/rejected rewards/accuracies rewards/margins logps/chosen \
             logps/rejected logps/accuracies logps/margins implicit/accuracies implicit/margins grad_norm learning_rate \
             epoch weights/chosen weights/saturated tokens_per_second pairs_per_second mfu memory/peak_gib";
        assert_eq!(names.join(" "), documented);
        let names: Vec<String> =
            EvalMetrics { pairs, ..EvalMetrics::default() }.fields().into_iter().map(|(n, _)| n).collect();
        assert_eq!(
            names.join(" "),
            "eval_loss eval_rewards/chosen eval_rewards/rejected eval_rewards/accuracies eval_rewards/margins \
             eval_logps/chosen eval_logps/rejected eval_logps/accuracies eval_logps/margins \
             eval_implicit/accuracies eval_implicit/margins epoch \
             eval_weights/chosen eval_weights/saturated"
        );
    }
}
