//! ORPO: supervised fine-tuning with a term that sets the odds of the responses apart.

use super::descriptor::{Descriptor, LossMean, OwnOption, Settings};
use super::formula::{Formula, PairSums, PairTerms, log_sigmoid, sigmoid};
use super::{Objective, ObjectiveKind};
use crate::data::Sides;

pub(super) const DESCRIPTOR: Descriptor = Descriptor {
    kind: ObjectiveKind::Orpo,
    name: "orpo",
    title: "ORPO",
    help: "supervised fine-tuning on the chosen responses, and an odds ratio that sets the rejected ones apart",
    source: "Hong et al. 2024, arXiv 2403.07691",
    needs_reference: false,
    sides: Sides::Both,
    mean_over: LossMean::Pairs,
    has_weights: false,
    options: &[OwnOption::beta(0.1, "weight of the odds ratio, the paper's lambda")],
    learning_rate: 1e-5,
    build: |settings| Objective::Orpo(Orpo { beta: settings.beta }),
};

/// A mean log-prob counts in the odds as at most minus this many nats. f32 log-probs are differences of numbers of
/// about 16, and are known no better than that; at 0 itself the odds are infinite, and with them the loss.
const LEAST_SURPRISE: f64 = 1e-6;

/// `L = -m_w - beta * log sigmoid(o_w - o_l)`: `m = lp / n` is the mean log-prob of a response, `o = m - log(1 - e^m)` the
/// logarithm of its odds.
///
/// Equations 4, 6 and 7 of the paper; `beta` is its lambda, as in TRL. `m` counts as at most -1e-6 in the odds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Orpo {
    /// Weight of the odds ratio.
    pub beta: f64,
}

impl Formula for Orpo {
    fn descriptor(&self) -> &'static Descriptor {
        &DESCRIPTOR
    }

    fn settings(&self) -> Settings {
        Settings { beta: self.beta, ..Settings::default() }
    }

    /// `do/dm = 1 / (1 - e^m)`. Where `m` is held at its bound the slope is that of the bound, so that a rejected
    /// response that is certain still becomes less certain.
    fn terms(&self, pair: &PairSums) -> PairTerms {
        let mean = [pair.logp[0] / pair.length[0], pair.logp[1] / pair.length[1]];
        // Not `min`, which takes a NaN for the other number.
        let bounded = mean.map(|mean| if mean > -LEAST_SURPRISE { -LEAST_SURPRISE } else { mean });
        // 1 - e^m
        let doubt = bounded.map(|mean| -mean.exp_m1());
        let margin = (bounded[0] - doubt[0].ln()) - (bounded[1] - doubt[1].ln());
        let pull = self.beta * sigmoid(-margin);
        PairTerms {
            loss: -mean[0] - self.beta * log_sigmoid(margin),
            reward: mean.map(|mean| self.beta * mean),
            slope: [(-pull / doubt[0] - 1.0) / pair.length[0], pull / doubt[1] / pair.length[1]],
            ..PairTerms::default()
        }
    }
}
