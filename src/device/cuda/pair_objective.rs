//! Losses, rewards and per-token coefficients of pairs: `kernels/pair_objective.cu`.

use super::bindings::{
    MMPO_OBJECTIVE_DPO, MMPO_OBJECTIVE_MMPO, MMPO_OBJECTIVE_SFT, MMPO_OBJECTIVE_SIMPO, mmpo_objective,
};
use super::{CudaDevice, launch_sizes};
use crate::device::{Checked, ObjectiveOperands, PairObjective};
use crate::error::Result;
use crate::objective::Objective;

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

/// The objective as the kernel takes it.
fn parameters(objective: &Objective) -> mmpo_objective {
    let mut parameters = mmpo_objective {
        kind: 0,
        length_normalize: 0,
        beta: 0.0,
        preference_weight: 0.0,
        entropy_weight: 0.0,
        label_smoothing: 0.0,
        gamma_beta_ratio: 0.0,
    };
    let kind = match objective {
        Objective::Mmpo(mmpo) => {
            parameters.length_normalize = i32::from(mmpo.length_normalize);
            parameters.preference_weight = mmpo.preference_weight as f32;
            parameters.entropy_weight = mmpo.entropy_weight as f32;
            MMPO_OBJECTIVE_MMPO
        }
        Objective::Dpo(dpo) => {
            parameters.beta = dpo.beta as f32;
            parameters.label_smoothing = dpo.label_smoothing as f32;
            MMPO_OBJECTIVE_DPO
        }
        Objective::Simpo(simpo) => {
            parameters.beta = simpo.beta as f32;
            parameters.gamma_beta_ratio = simpo.gamma_beta_ratio as f32;
            MMPO_OBJECTIVE_SIMPO
        }
        Objective::Sft => MMPO_OBJECTIVE_SFT,
    };
    parameters.kind = kind as i32;
    parameters
}
