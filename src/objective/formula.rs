//! The mathematics of an objective: from a pair's sums to its loss and slopes.

use super::descriptor::{Descriptor, Settings};
use super::pair::{PairScores, ReferencePair};

/// What each objective implements, beside its [`Descriptor`].
pub trait Formula {
    /// The objective's entry in [`super::DESCRIPTORS`].
    fn descriptor(&self) -> &'static Descriptor;

    /// The objective's numbers under the names of their options; those of other objectives are left at their defaults.
    fn settings(&self) -> Settings;

    /// Loss, rewards and slopes of one pair. A NaN among the inputs that matter must come out as a NaN loss.
    fn terms(&self, pair: &PairSums) -> PairTerms;

    /// Whether per-token entropies are part of the loss.
    fn needs_entropy(&self) -> bool {
        false
    }

    /// Number of pairs that must lie together in one optimiser step.
    fn pairs_together(&self) -> usize {
        1
    }

    /// What the reference makes of each pair of an optimiser batch, `[chosen, rejected]`: [`PairSums::known`]. Called where
    /// the objective needs a reference; unless it says otherwise these are the reference's log-prob sums.
    fn known(&self, references: &[ReferencePair]) -> Vec<[f64; 2]> {
        references.iter().map(|pair| [pair.logp_chosen.into(), pair.logp_rejected.into()]).collect()
    }
}

/// What an objective sees of a pair. Arrays are `[chosen, rejected]`.
#[derive(Clone, Copy, Debug)]
pub struct PairSums {
    /// Log-prob sums under the policy, in nats.
    pub logp: [f64; 2],
    /// Scored tokens, at least 1: what a mean divides by.
    pub length: [f64; 2],
    /// What [`Formula::known`] said of the pair, 0 without a reference.
    pub known: [f64; 2],
}

impl PairSums {
    /// The sums of a pair's tokens, in f64.
    pub fn of(pair: &PairScores) -> Self {
        let tokens = [pair.logp_chosen, pair.logp_rejected];
        PairSums {
            logp: tokens.map(sum),
            length: tokens.map(|side| side.len().max(1) as f64),
            known: [pair.constants.chosen.into(), pair.constants.rejected.into()],
        }
    }

    /// Log-prob sums under the policy, less those under the reference.
    pub fn log_ratio(&self) -> [f64; 2] {
        [self.logp[0] - self.known[0], self.logp[1] - self.known[1]]
    }
}

/// What an objective makes of a pair, before the pair's scale. Arrays are `[chosen, rejected]`.
#[derive(Clone, Copy, Debug, Default)]
pub struct PairTerms {
    /// The loss, without an entropy term.
    pub loss: f64,
    /// The rewards that reports and charts show.
    pub reward: [f64; 2],
    /// `dL/dlogp` of each token, without an entropy term: the same for all tokens of a response.
    pub slope: [f64; 2],
    /// Weight of the response's `J_ent` in the loss (see `docs/objectives.md`); 0 without an entropy term.
    pub entropy_weight: [f64; 2],
    /// MMPO's softmax weight of the chosen response, else 0.
    pub weight_chosen: f64,
}

/// Sum in f64, in order.
pub(super) fn sum(values: &[f32]) -> f64 {
    values.iter().map(|&value| f64::from(value)).sum()
}

/// The logistic function, without overflow on either side.
pub(super) fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 {
        1.0 / (1.0 + (-x).exp())
    } else {
        let e = x.exp();
        e / (1.0 + e)
    }
}

/// Logarithm of [`sigmoid`], exact where that one underflows.
pub(super) fn log_sigmoid(x: f64) -> f64 {
    -(-x.abs()).exp().ln_1p() + x.min(0.0)
}
