//! The objectives, as pure functions of numbers: no device, no model.
//!
//! Every objective maps a pair's per-token log-probs (and entropies) to a loss and to per-token coefficients
//! `a_t = dL/d logp_t` and `b_t = dL/d H_t`. The backward of the output head is then one formula for all of them.
//!
//! Each objective has a file of its own, which holds its [`Descriptor`] (name, paper, needs, options, defaults) beside its
//! mathematics ([`Formula`]). This file lists the objectives, and the rest of the program asks that list.
//!
//! Sums are taken in f64, inputs and outputs are f32; log-probs and entropies are in nats.

mod descriptor;
mod dpo;
mod formula;
mod hinge;
mod ipo;
mod mmpo;
mod orpo;
mod pair;
mod sft;
mod simpo;

pub use descriptor::{Descriptor, LossMean, OwnOption, Settings};
pub use dpo::Dpo;
pub use formula::{Formula, PairSums, PairTerms};
pub use hinge::Hinge;
pub use ipo::Ipo;
pub use mmpo::Mmpo;
pub use orpo::Orpo;
pub use pair::{PairCoefficients, PairConstants, PairOutcome, PairScores, ReferencePair};
pub use simpo::Simpo;

use crate::data::Sides;

/// An objective with its numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Objective {
    /// Maximum marginal likelihood of the preferred output.
    Mmpo(Mmpo),
    /// Direct preference optimisation.
    Dpo(Dpo),
    /// Preference by mean log-probs with a target margin.
    Simpo(Simpo),
    /// Supervised fine-tuning: `-lp(y_w)`, averaged over the chosen tokens of the optimiser batch.
    Sft,
    /// Identity preference optimisation.
    Ipo(Ipo),
    /// Supervised fine-tuning with an odds ratio.
    Orpo(Orpo),
    /// SLiC's hinge loss on DPO's margin.
    Hinge(Hinge),
}

/// Which objective, without its numbers. The values are those of `mmpo_objective_kind` in `kernels/api.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ObjectiveKind {
    /// [`Objective::Mmpo`]
    Mmpo,
    /// [`Objective::Dpo`]
    Dpo,
    /// [`Objective::Simpo`]
    Simpo,
    /// [`Objective::Sft`]
    Sft,
    /// [`Objective::Ipo`]
    Ipo,
    /// [`Objective::Orpo`]
    Orpo,
    /// [`Objective::Hinge`]
    Hinge,
}

/// All objectives, in the order of [`ObjectiveKind`].
pub const DESCRIPTORS: &[&Descriptor] = &[
    &mmpo::DESCRIPTOR,
    &dpo::DESCRIPTOR,
    &simpo::DESCRIPTOR,
    &sft::DESCRIPTOR,
    &ipo::DESCRIPTOR,
    &orpo::DESCRIPTOR,
    &hinge::DESCRIPTOR,
];

/// [`ObjectiveKind::descriptor`] takes a kind for an index.
const _: () = {
    let mut at = 0;
    while at < DESCRIPTORS.len() {
        assert!(DESCRIPTORS[at].kind as usize == at, "DESCRIPTORS is not in the order of ObjectiveKind");
        at += 1;
    }
};

impl ObjectiveKind {
    /// The kind that `--objective` calls `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        DESCRIPTORS.iter().find(|descriptor| descriptor.name == name).map(|descriptor| descriptor.kind)
    }

    /// What the program knows of this objective.
    pub fn descriptor(self) -> &'static Descriptor {
        DESCRIPTORS[self as usize]
    }
}

impl Objective {
    /// The objective's mathematics.
    pub fn formula(&self) -> &dyn Formula {
        match self {
            Objective::Mmpo(mmpo) => mmpo,
            Objective::Dpo(dpo) => dpo,
            Objective::Simpo(simpo) => simpo,
            Objective::Sft => &sft::Sft,
            Objective::Ipo(ipo) => ipo,
            Objective::Orpo(orpo) => orpo,
            Objective::Hinge(hinge) => hinge,
        }
    }

    /// What the program knows of this objective.
    pub fn descriptor(&self) -> &'static Descriptor {
        self.formula().descriptor()
    }

    /// The objective without its numbers.
    pub fn kind(&self) -> ObjectiveKind {
        self.descriptor().kind
    }

    /// The word of `--objective`.
    pub fn name(&self) -> &'static str {
        self.descriptor().name
    }

    /// The objective's numbers under the names of their options.
    pub fn settings(&self) -> Settings {
        self.formula().settings()
    }

    /// Whether the reference's log-probs are part of the loss.
    pub fn needs_reference(&self) -> bool {
        self.descriptor().needs_reference
    }

    /// Whether per-token entropies are part of the loss.
    pub fn needs_entropy(&self) -> bool {
        self.formula().needs_entropy()
    }

    /// Which responses go through the model.
    pub fn sides(&self) -> Sides {
        self.descriptor().sides
    }

    /// What the sum of the losses of one optimiser batch is divided by, at least 1. `chosen_tokens` counts each pair's scored
    /// chosen tokens.
    pub fn batch_count(&self, chosen_tokens: &[usize]) -> f64 {
        let count = match self.descriptor().mean_over {
            LossMean::Pairs => chosen_tokens.len(),
            LossMean::ChosenTokens => chosen_tokens.iter().sum(),
        };
        count.max(1) as f64
    }

    /// The constants of one optimiser batch of pairs, in its order. `references` is not read where none is needed;
    /// `chosen_tokens` counts each pair's scored chosen tokens.
    pub fn batch_constants(
        &self,
        references: &[ReferencePair],
        chosen_tokens: &[usize],
    ) -> Vec<PairConstants> {
        let pairs = chosen_tokens.len();
        let scale = 1.0 / self.batch_count(chosen_tokens);
        let known = match self.needs_reference() {
            true => self.formula().known(references),
            false => vec![[0.0; 2]; pairs],
        };
        assert_eq!(known.len(), pairs, "one reference per pair: {} for {pairs}", known.len());
        known
            .into_iter()
            .map(|[chosen, rejected]| PairConstants {
                chosen: chosen as f32,
                rejected: rejected as f32,
                scale: scale as f32,
                reserved: 0.0,
            })
            .collect()
    }

    /// The loss of one pair, with its rewards, and into `out` the coefficients `a` and `b` of its `C` and `R` tokens, times the
    /// pair's share of the batch's loss.
    pub fn evaluate(&self, pair: &PairScores, out: &mut PairCoefficients) -> PairOutcome {
        let sums = PairSums::of(pair);
        let terms = self.formula().terms(&sums);
        let scale = f64::from(pair.constants.scale);
        out.logp_chosen.fill((scale * terms.slope[0]) as f32);
        out.logp_rejected.fill((scale * terms.slope[1]) as f32);
        out.entropy_chosen.fill(0.0);
        out.entropy_rejected.fill(0.0);
        let mut loss = terms.loss;
        if self.needs_entropy() {
            let [chosen, rejected] = terms.entropy_weight;
            loss += chosen * entropy_bonus(pair.logp_chosen, pair.entropy_chosen);
            loss += rejected * entropy_bonus(pair.logp_rejected, pair.entropy_rejected);
            add_entropy_slopes(pair.entropy_chosen, scale * chosen, out.logp_chosen, out.entropy_chosen);
            add_entropy_slopes(
                pair.entropy_rejected,
                scale * rejected,
                out.logp_rejected,
                out.entropy_rejected,
            );
        }
        PairOutcome {
            loss: loss as f32,
            reward_chosen: terms.reward[0] as f32,
            reward_rejected: terms.reward[1] as f32,
            logp_chosen: sums.logp[0] as f32,
            logp_rejected: sums.logp[1] as f32,
            weight_chosen: terms.weight_chosen as f32,
            entropy_chosen: formula::sum(pair.entropy_chosen) as f32,
            entropy_rejected: formula::sum(pair.entropy_rejected) as f32,
        }
    }
}

/// `J_ent = sum_t [P_t * H_t + H_t]` with `P_t` the sum of the log-probs before token `t`.
fn entropy_bonus(logp: &[f32], entropy: &[f32]) -> f64 {
    let mut prefix = 0.0;
    let mut bonus = 0.0;
    for (&logp, &entropy) in logp.iter().zip(entropy) {
        bonus += (prefix + 1.0) * f64::from(entropy);
        prefix += f64::from(logp);
    }
    bonus
}

/// Adds `weight * dJ_ent/dlogp_j = weight * sum_{t>j} H_t`, and assigns `weight * dJ_ent/dH_t = weight`.
fn add_entropy_slopes(entropy: &[f32], weight: f64, logp_out: &mut [f32], entropy_out: &mut [f32]) {
    let mut later = 0.0;
    for (j, &entropy) in entropy.iter().enumerate().rev() {
        logp_out[j] = (f64::from(logp_out[j]) + weight * later) as f32;
        entropy_out[j] = weight as f32;
        later += f64::from(entropy);
    }
}
