//! What goes into an objective and what comes out of it, for one pair.

/// What an objective needs to know of a pair beforehand; the layout is that of `constants[pairs, 4]` on a device.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct PairConstants {
    /// MMPO: `rhat_w`. Other objectives with a reference: the reference's `lp(y_w)`. Else 0.
    pub chosen: f32,
    /// MMPO: `rhat_l`. Other objectives with a reference: the reference's `lp(y_l)`. Else 0.
    pub rejected: f32,
    /// Weight of the pair in the batch's loss: 1 over what [`super::LossMean`] counts.
    pub scale: f32,
    /// Fills the row up to four values; 0.
    pub reserved: f32,
}

/// A pair's inputs: slices over its scored tokens. Entropies may be empty where the objective does not want them.
#[derive(Clone, Copy, Debug)]
pub struct PairScores<'a> {
    /// Log-probs of the chosen response's tokens under the policy, in nats.
    pub logp_chosen: &'a [f32],
    /// Log-probs of the rejected response's tokens under the policy, in nats.
    pub logp_rejected: &'a [f32],
    /// Entropies at the chosen response's tokens, in nats.
    pub entropy_chosen: &'a [f32],
    /// Entropies at the rejected response's tokens, in nats.
    pub entropy_rejected: &'a [f32],
    /// What was known of the pair before the policy's forward.
    pub constants: PairConstants,
}

/// Where a pair's coefficients go: slices over its scored tokens, assigned in full.
#[derive(Debug)]
pub struct PairCoefficients<'a> {
    /// `dL/dlogp` of the chosen response's tokens.
    pub logp_chosen: &'a mut [f32],
    /// `dL/dlogp` of the rejected response's tokens.
    pub logp_rejected: &'a mut [f32],
    /// `dL/dH` of the chosen response's tokens.
    pub entropy_chosen: &'a mut [f32],
    /// `dL/dH` of the rejected response's tokens.
    pub entropy_rejected: &'a mut [f32],
}

/// Results of one pair; the layout is that of `outcomes[pairs, 8]` on a device.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct PairOutcome {
    /// Loss of the pair before `constants.scale`; the batch's loss is the sum of `scale * loss`.
    pub loss: f32,
    /// Reward of the chosen response, as `docs/objectives.md` defines it for each objective.
    pub reward_chosen: f32,
    /// Reward of the rejected response.
    pub reward_rejected: f32,
    /// Sum over the chosen response's scored tokens, whatever the objective divides by.
    pub logp_chosen: f32,
    /// Sum over the rejected response's scored tokens.
    pub logp_rejected: f32,
    /// MMPO: softmax weight of the chosen response, `p_w`; the rejected one has `1 - p_w`. Else 0.
    pub weight_chosen: f32,
    /// Sum of the chosen response's entropies; 0 where they were not computed.
    pub entropy_chosen: f32,
    /// Sum of the rejected response's entropies; 0 where they were not computed.
    pub entropy_rejected: f32,
}

impl PairOutcome {
    /// f32 values of a row of `outcomes`.
    pub const WIDTH: usize = size_of::<PairOutcome>() / size_of::<f32>();
}

/// Sequence log-probs under the frozen reference, and the scored token counts they are sums over.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct ReferencePair {
    /// Sum over the chosen response, in nats.
    pub logp_chosen: f32,
    /// Sum over the rejected response, in nats.
    pub logp_rejected: f32,
    /// Scored tokens of the chosen response.
    pub tokens_chosen: u32,
    /// Scored tokens of the rejected response.
    pub tokens_rejected: u32,
}

impl ReferencePair {
    /// Whether the reference has scored the pair: where it has, there is at least one scored token.
    pub fn is_known(&self) -> bool {
        self.tokens_chosen > 0 && self.tokens_rejected > 0
    }
}
