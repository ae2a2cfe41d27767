//! Losses, rewards and per-token coefficients of pairs: `kernels/pair_objective.cu`.

use super::bindings::{MMPO_OBJECTIVE_KINDS, mmpo_objective};
use super::{CudaDevice, launch_sizes};
use crate::device::{Checked, ObjectiveOperands, PairObjective};
use crate::error::Result;
use crate::objective::{DESCRIPTORS, Objective};

impl PairObjective for CudaDevice {
    fn run_pair_objective(&self, operands: ObjectiveOperands<'_, Self>, _: Checked) -> Result<()> {
        let ObjectiveOperands { outcomes, coefficients, scores, batch, objective, pairs } = operands;
        let name = "pair_objective";
        let [first_pair, pair_count] = launch_sizes(name, [pairs.start, pairs.len()])?;
        let parameters = parameters(objective);
        let entropy = if objective.needs_entropy() { scores.entropy.start() } else { std::ptr::null() };
        // SAFETY: the per-pair buffers cover the pairs, and `scored` names tokens of the batch that the scores belong to.
        self.launch(name, &pairs, |kernels, stream| unsafe {
            (kernels.pair_objective)(
                outcomes.start_mut(),
                coefficients.logp.start_mut(),
                coefficients.entropy.start_mut(),
                scores.logp.start(),
                entropy,
                batch.scored.start(),
                batch.constants.start(),
                first_pair,
                pair_count,
                parameters,
                stream,
            )
        })
    }
}

/// The kernel's numbers of the kinds are those of [`crate::objective::ObjectiveKind`]; the kernel's tests compare every kind
/// with the objective of the same number.
const _: () = assert!(MMPO_OBJECTIVE_KINDS as usize == DESCRIPTORS.len());

/// The objective as the kernel takes it.
fn parameters(objective: &Objective) -> mmpo_objective {
    let settings = objective.settings();
    mmpo_objective {
        kind: objective.kind() as i32,
        length_normalize: settings.length_normalize.into(),
        beta: settings.beta as f32,
        preference_weight: settings.preference_weight as f32,
        entropy_weight: settings.entropy_weight as f32,
        label_smoothing: settings.label_smoothing as f32,
        gamma_beta_ratio: settings.gamma_beta_ratio as f32,
    }
}
