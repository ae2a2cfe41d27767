//! The objectives, as pure functions of numbers: no device, no model.
//!
//! Every objective maps a pair's per-token log-probs (and entropies) to a loss and to per-token coefficients
//! `a_t = dL/d logp_t` and `b_t = dL/d H_t`. The backward of the output head is then one formula for all of them.
//!
//! Sources: MMPO, Najafi and Fyshe, EACL 2026 (arXiv 2510.22881); DPO, Rafailov et al. 2023; SimPO, Meng et al. 2024.
//! Sums are taken in f64, inputs and outputs are f32; log-probs and entropies are in nats.

use crate::data::Sides;

/// Offset of the reward normalisation, as the authors' code has it.
const REWARD_OFFSET: f64 = 1e-6;

/// Maximum marginal likelihood: `L = -logsumexp(s_w, s_l)` with `s_i = lp(y_i) + rhat_i`.
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

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dpo {
    pub beta: f64,
    /// Probability that a label is wrong (conservative DPO).
    pub label_smoothing: f64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Simpo {
    pub beta: f64,
    /// Target margin in units of `beta`.
    pub gamma_beta_ratio: f64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Objective {
    Mmpo(Mmpo),
    Dpo(Dpo),
    Simpo(Simpo),
    /// `-lp(y_w)`, averaged over the chosen tokens of the optimiser batch.
    Sft,
}

/// What an objective needs to know of a pair beforehand; the layout is that of `constants[pairs, 4]` on a device.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct PairConstants {
    /// MMPO: `rhat_w`. DPO: the reference's `lp(y_w)`. Else 0.
    pub chosen: f32,
    /// MMPO: `rhat_l`. DPO: the reference's `lp(y_l)`. Else 0.
    pub rejected: f32,
    /// Weight of the pair in the batch's loss: `1 / pairs`; SFT: `1 / chosen tokens`.
    pub scale: f32,
    pub reserved: f32,
}

/// A pair's inputs: slices over its scored tokens. Entropies may be empty where the objective does not want them.
#[derive(Clone, Copy, Debug)]
pub struct PairScores<'a> {
    pub logp_chosen: &'a [f32],
    pub logp_rejected: &'a [f32],
    pub entropy_chosen: &'a [f32],
    pub entropy_rejected: &'a [f32],
    pub constants: PairConstants,
}

/// Where a pair's coefficients go: slices over its scored tokens, assigned in full.
#[derive(Debug)]
pub struct PairCoefficients<'a> {
    pub logp_chosen: &'a mut [f32],
    pub logp_rejected: &'a mut [f32],
    pub entropy_chosen: &'a mut [f32],
    pub entropy_rejected: &'a mut [f32],
}

/// What a pair came to; the layout is that of `outcomes[pairs, 8]` on a device.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct PairOutcome {
    /// Loss of the pair before `constants.scale`; the batch's loss is the sum of `scale * loss`.
    pub loss: f32,
    pub reward_chosen: f32,
    pub reward_rejected: f32,
    /// Sums over the scored tokens, whatever `length_normalize` says.
    pub logp_chosen: f32,
    pub logp_rejected: f32,
    /// MMPO: softmax weight of the chosen response, `p_w`; the rejected one has `1 - p_w`. Else 0.
    pub weight_chosen: f32,
    pub entropy_chosen: f32,
    pub entropy_rejected: f32,
}

impl PairOutcome {
    /// f32 values of a row of `outcomes`.
    pub const WIDTH: usize = size_of::<PairOutcome>() / size_of::<f32>();
}

/// Sequence log-probs under the frozen reference, and the scored token counts they are sums over.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct ReferencePair {
    pub logp_chosen: f32,
    pub logp_rejected: f32,
    pub tokens_chosen: u32,
    pub tokens_rejected: u32,
}

impl Objective {
    pub fn name(&self) -> &'static str {
        match self {
            Objective::Mmpo(_) => "mmpo",
            Objective::Dpo(_) => "dpo",
            Objective::Simpo(_) => "simpo",
            Objective::Sft => "sft",
        }
    }

    /// Whether the reference's log-probs are part of the loss.
    pub fn needs_reference(&self) -> bool {
        matches!(self, Objective::Mmpo(_) | Objective::Dpo(_))
    }

    /// Whether per-token entropies are part of the loss.
    pub fn needs_entropy(&self) -> bool {
        matches!(self, Objective::Mmpo(mmpo) if mmpo.entropy_weight != 0.0)
    }

    pub fn sides(&self) -> Sides {
        match self {
            Objective::Sft => Sides::ChosenOnly,
            _ => Sides::Both,
        }
    }

    /// The constants of one optimiser batch of pairs, in its order. `references` is empty where none is needed;
    /// `chosen_tokens` counts each pair's scored chosen tokens.
    pub fn batch_constants(
        &self,
        references: &[ReferencePair],
        chosen_tokens: &[usize],
    ) -> Vec<PairConstants> {
        let pairs = chosen_tokens.len();
        let scale = match self {
            Objective::Sft => 1.0 / (chosen_tokens.iter().sum::<usize>().max(1) as f64),
            _ => 1.0 / (pairs.max(1) as f64),
        };
        let values: Vec<[f64; 2]> = match self {
            Objective::Mmpo(mmpo) => mmpo.rewards(references),
            Objective::Dpo(_) => {
                references.iter().map(|r| [r.logp_chosen as f64, r.logp_rejected as f64]).collect()
            }
            Objective::Simpo(_) | Objective::Sft => vec![[0.0; 2]; pairs],
        };
        assert_eq!(values.len(), pairs, "one reference a pair: {} for {pairs}", values.len());
        values
            .into_iter()
            .map(|[chosen, rejected]| PairConstants {
                chosen: chosen as f32,
                rejected: rejected as f32,
                scale: scale as f32,
                reserved: 0.0,
            })
            .collect()
    }

    /// Loss and coefficients of one pair.
    pub fn evaluate(&self, pair: &PairScores, out: &mut PairCoefficients) -> PairOutcome {
        let outcome = PairOutcome {
            logp_chosen: sum(pair.logp_chosen) as f32,
            logp_rejected: sum(pair.logp_rejected) as f32,
            entropy_chosen: sum(pair.entropy_chosen) as f32,
            entropy_rejected: sum(pair.entropy_rejected) as f32,
            ..PairOutcome::default()
        };
        out.entropy_chosen.fill(0.0);
        out.entropy_rejected.fill(0.0);
        match self {
            Objective::Mmpo(mmpo) => mmpo.evaluate(pair, out, outcome),
            Objective::Dpo(dpo) => dpo.evaluate(pair, out, outcome),
            Objective::Simpo(simpo) => simpo.evaluate(pair, out, outcome),
            Objective::Sft => sft(pair, out, outcome),
        }
    }
}

impl Mmpo {
    /// `rhat` of each pair, `[chosen, rejected]`, normalised within consecutive groups of `reward_group` pairs.
    pub fn rewards(&self, references: &[ReferencePair]) -> Vec<[f64; 2]> {
        let mut rewards: Vec<[f64; 2]> = references
            .iter()
            .map(|pair| {
                let chosen = self.length(pair.tokens_chosen as usize);
                let rejected = self.length(pair.tokens_rejected as usize);
                [
                    self.epsilon + self.beta * pair.logp_chosen as f64 / chosen,
                    1.0 - self.epsilon + self.beta * pair.logp_rejected as f64 / rejected,
                ]
            })
            .collect();
        if self.reward_normalize {
            rewards.chunks_mut(self.reward_group.max(1)).for_each(normalize_rewards);
        }
        rewards
    }

    /// What a log-prob sum of `tokens` tokens is divided by.
    fn length(&self, tokens: usize) -> f64 {
        if self.length_normalize { tokens.max(1) as f64 } else { 1.0 }
    }

    fn evaluate(
        &self,
        pair: &PairScores,
        out: &mut PairCoefficients,
        mut outcome: PairOutcome,
    ) -> PairOutcome {
        let length_chosen = self.length(pair.logp_chosen.len());
        let length_rejected = self.length(pair.logp_rejected.len());
        let score_chosen = sum(pair.logp_chosen) / length_chosen + pair.constants.chosen as f64;
        let score_rejected = sum(pair.logp_rejected) / length_rejected + pair.constants.rejected as f64;
        let margin = score_chosen - score_rejected;
        let weight_chosen = sigmoid(margin);
        let weight_rejected = sigmoid(-margin);
        // logsumexp(s_w, s_l) = s_w - log sigmoid(s_w - s_l)
        let mut loss = log_sigmoid(margin) - score_chosen;
        loss -= self.preference_weight * log_sigmoid(margin);

        let scale = pair.constants.scale as f64;
        let chosen = -weight_chosen - self.preference_weight * weight_rejected;
        let rejected = -weight_rejected + self.preference_weight * weight_rejected;
        out.logp_chosen.fill((scale * chosen / length_chosen) as f32);
        out.logp_rejected.fill((scale * rejected / length_rejected) as f32);
        if self.entropy_weight != 0.0 {
            for (logp, entropy, logp_out, entropy_out, length) in [
                (
                    pair.logp_chosen,
                    pair.entropy_chosen,
                    &mut *out.logp_chosen,
                    &mut *out.entropy_chosen,
                    length_chosen,
                ),
                (
                    pair.logp_rejected,
                    pair.entropy_rejected,
                    &mut *out.logp_rejected,
                    &mut *out.entropy_rejected,
                    length_rejected,
                ),
            ] {
                let weight = -0.5 * self.entropy_weight / length;
                loss += weight * entropy_bonus(logp, entropy);
                add_entropy_coefficients(entropy, scale * weight, logp_out, entropy_out);
            }
        }
        outcome.loss = loss as f32;
        outcome.reward_chosen = score_chosen as f32;
        outcome.reward_rejected = score_rejected as f32;
        outcome.weight_chosen = weight_chosen as f32;
        outcome
    }
}

impl Dpo {
    fn evaluate(
        &self,
        pair: &PairScores,
        out: &mut PairCoefficients,
        mut outcome: PairOutcome,
    ) -> PairOutcome {
        let chosen = self.beta * (sum(pair.logp_chosen) - pair.constants.chosen as f64);
        let rejected = self.beta * (sum(pair.logp_rejected) - pair.constants.rejected as f64);
        let margin = chosen - rejected;
        let loss =
            -(1.0 - self.label_smoothing) * log_sigmoid(margin) - self.label_smoothing * log_sigmoid(-margin);
        let slope = -(1.0 - self.label_smoothing) * sigmoid(-margin) + self.label_smoothing * sigmoid(margin);
        let coefficient = pair.constants.scale as f64 * self.beta * slope;
        out.logp_chosen.fill(coefficient as f32);
        out.logp_rejected.fill(-coefficient as f32);
        outcome.loss = loss as f32;
        outcome.reward_chosen = chosen as f32;
        outcome.reward_rejected = rejected as f32;
        outcome
    }
}

impl Simpo {
    fn evaluate(
        &self,
        pair: &PairScores,
        out: &mut PairCoefficients,
        mut outcome: PairOutcome,
    ) -> PairOutcome {
        let length_chosen = pair.logp_chosen.len().max(1) as f64;
        let length_rejected = pair.logp_rejected.len().max(1) as f64;
        let chosen = self.beta * sum(pair.logp_chosen) / length_chosen;
        let rejected = self.beta * sum(pair.logp_rejected) / length_rejected;
        let margin = chosen - rejected - self.beta * self.gamma_beta_ratio;
        let slope = -pair.constants.scale as f64 * self.beta * sigmoid(-margin);
        out.logp_chosen.fill((slope / length_chosen) as f32);
        out.logp_rejected.fill((-slope / length_rejected) as f32);
        outcome.loss = -log_sigmoid(margin) as f32;
        outcome.reward_chosen = chosen as f32;
        outcome.reward_rejected = rejected as f32;
        outcome
    }
}

fn sft(pair: &PairScores, out: &mut PairCoefficients, mut outcome: PairOutcome) -> PairOutcome {
    out.logp_chosen.fill(-pair.constants.scale);
    out.logp_rejected.fill(0.0);
    outcome.loss = -outcome.logp_chosen;
    outcome.reward_chosen = outcome.logp_chosen;
    outcome.reward_rejected = outcome.logp_rejected;
    outcome
}

/// `rhat = (r + 1e-6 - min) / (max - min + 1e-6)` over all rewards of one group.
fn normalize_rewards(group: &mut [[f64; 2]]) {
    let min = group.iter().flatten().fold(f64::INFINITY, |low, &r| low.min(r));
    let max = group.iter().flatten().fold(f64::NEG_INFINITY, |high, &r| high.max(r));
    for reward in group.iter_mut().flatten() {
        *reward = (*reward + REWARD_OFFSET - min) / (max - min + REWARD_OFFSET);
    }
}

/// `J_ent = sum_t [P_t * H_t + H_t]` with `P_t` the sum of the log-probs before token `t`.
fn entropy_bonus(logp: &[f32], entropy: &[f32]) -> f64 {
    let mut prefix = 0.0;
    let mut bonus = 0.0;
    for (&logp, &entropy) in logp.iter().zip(entropy) {
        bonus += (prefix + 1.0) * entropy as f64;
        prefix += logp as f64;
    }
    bonus
}

/// Adds `weight * dJ_ent/dlogp_j = weight * sum_{t>j} H_t`, and assigns `weight * dJ_ent/dH_t = weight`.
fn add_entropy_coefficients(entropy: &[f32], weight: f64, logp_out: &mut [f32], entropy_out: &mut [f32]) {
    let mut behind = 0.0;
    for (j, &entropy) in entropy.iter().enumerate().rev() {
        logp_out[j] = (logp_out[j] as f64 + weight * behind) as f32;
        entropy_out[j] = weight as f32;
        behind += entropy as f64;
    }
}

fn sum(values: &[f32]) -> f64 {
    values.iter().map(|&value| value as f64).sum()
}

fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 {
        1.0 / (1.0 + (-x).exp())
    } else {
        let e = x.exp();
        e / (1.0 + e)
    }
}

fn log_sigmoid(x: f64) -> f64 {
    -(-x.abs()).exp().ln_1p() + x.min(0.0)
}
