//! MMPO: maximum marginal likelihood of the preferred output.

use super::descriptor::{Descriptor, LossMean, OwnOption, Settings};
use super::formula::{Formula, PairSums, PairTerms, log_sigmoid, sigmoid};
use super::{Objective, ObjectiveKind, ReferencePair};
use crate::data::Sides;

/// Offset of the reward normalisation, as the authors' code has it.
const REWARD_OFFSET: f64 = 1e-6;

pub(super) const DESCRIPTOR: Descriptor = Descriptor {
    kind: ObjectiveKind::Mmpo,
    name: "mmpo",
    title: "MMPO",
    help: "maximum marginal likelihood of the preferred output",
    source: "Najafi and Fyshe, EACL 2026, arXiv 2510.22881",
    needs_reference: true,
    sides: Sides::Both,
    mean_over: LossMean::Pairs,
    has_weights: true,
    options: &[
        OwnOption::beta(0.05, "weight of the reference log-prob in the reward"),
        OwnOption::named("epsilon"),
        OwnOption::named("reward_group"),
        OwnOption::named("reward_normalize"),
        OwnOption::named("length_normalize"),
        OwnOption::named("preference_weight"),
        OwnOption::named("entropy_weight"),
    ],
    learning_rate: 1e-4,
    build: |settings| {
        Objective::Mmpo(Mmpo {
            beta: settings.beta,
            epsilon: settings.epsilon,
            reward_group: settings.reward_group,
            reward_normalize: settings.reward_normalize,
            length_normalize: settings.length_normalize,
            preference_weight: settings.preference_weight,
            entropy_weight: settings.entropy_weight,
        })
    },
};

/// `L = -logsumexp(s_w, s_l)` with `s_i = lp(y_i) + rhat_i`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mmpo {
    /// Weight of the reference log-prob in the reward.
    pub beta: f64,
    /// Reward of the chosen response; the rejected one gets `1 - epsilon`.
    pub epsilon: f64,
    /// Pairs whose rewards are normalised together.
    pub reward_group: usize,
    /// `false`: `s_i = lp + r_i` with raw rewards.
    pub reward_normalize: bool,
    /// Means instead of sums for policy, reference and entropy.
    pub length_normalize: bool,
    /// Adds `preference_weight * -log sigmoid(s_w - s_l)`. At 1 the sum is exactly `-s_w`: SFT on the chosen response.
    pub preference_weight: f64,
    /// Adds `-entropy_weight * mean over both responses of J_ent`.
    pub entropy_weight: f64,
}

impl Formula for Mmpo {
    fn descriptor(&self) -> &'static Descriptor {
        &DESCRIPTOR
    }

    fn settings(&self) -> Settings {
        Settings {
            beta: self.beta,
            epsilon: self.epsilon,
            reward_group: self.reward_group,
            reward_normalize: self.reward_normalize,
            length_normalize: self.length_normalize,
            preference_weight: self.preference_weight,
            entropy_weight: self.entropy_weight,
            ..Settings::default()
        }
    }

    fn terms(&self, pair: &PairSums) -> PairTerms {
        let length = if self.length_normalize { pair.length } else { [1.0; 2] };
        let score_chosen = pair.logp[0] / length[0] + pair.known[0];
        let score_rejected = pair.logp[1] / length[1] + pair.known[1];
        let margin = score_chosen - score_rejected;
        let (weight_chosen, weight_rejected) = (sigmoid(margin), sigmoid(-margin));
        // logsumexp(s_w, s_l) = s_w - log sigmoid(s_w - s_l)
        let likelihood = log_sigmoid(margin) - score_chosen;
        let preference = self.preference_weight;
        PairTerms {
            loss: likelihood - preference * log_sigmoid(margin),
            reward: [score_chosen, score_rejected],
            slope: [
                (-weight_chosen - preference * weight_rejected) / length[0],
                (-weight_rejected + preference * weight_rejected) / length[1],
            ],
            entropy_weight: length.map(|length| -0.5 * self.entropy_weight / length),
            weight_chosen,
        }
    }

    fn needs_entropy(&self) -> bool {
        self.entropy_weight != 0.0
    }

    fn pairs_together(&self) -> usize {
        self.reward_group
    }

    /// `rhat` of each pair, normalised within consecutive groups of `reward_group` pairs.
    fn known(&self, references: &[ReferencePair]) -> Vec<[f64; 2]> {
        let length = |tokens: u32| if self.length_normalize { f64::from(tokens.max(1)) } else { 1.0 };
        let reward =
            |constant: f64, logp: f32, tokens: u32| constant + self.beta * f64::from(logp) / length(tokens);
        let mut rewards: Vec<[f64; 2]> = references
            .iter()
            .map(|pair| {
                [
                    reward(self.epsilon, pair.logp_chosen, pair.tokens_chosen),
                    reward(1.0 - self.epsilon, pair.logp_rejected, pair.tokens_rejected),
                ]
            })
            .collect();
        if self.reward_normalize {
            rewards.chunks_mut(self.reward_group.max(1)).for_each(normalize_rewards);
        }
        rewards
    }
}

/// `rhat = (r + 1e-6 - min) / (max - min + 1e-6)` over all rewards of one group.
fn normalize_rewards(group: &mut [[f64; 2]]) {
    let min = group.iter().flatten().fold(f64::INFINITY, |low, &r| low.min(r));
    let max = group.iter().flatten().fold(f64::NEG_INFINITY, |high, &r| high.max(r));
    for reward in group.iter_mut().flatten() {
        *reward = (*reward + REWARD_OFFSET - min) / (max - min + REWARD_OFFSET);
    }
}
