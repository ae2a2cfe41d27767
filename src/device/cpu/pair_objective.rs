//! From token scores to outcomes and coefficients of pairs: [`crate::objective`] applied to each pair.

use std::ops::Range;

use super::super::check::check_sizes;
use super::CpuDevice;
use super::storage::Storage;
use crate::device::{Checked, ObjectiveOperands, PairObjective};
use crate::error::{Error, Result};
use crate::objective::{PairCoefficients, PairConstants, PairOutcome, PairScores};

const OPERATION: &str = "pair_objective";

impl<C: Storage> PairObjective for CpuDevice<C> {
    /// Runs on one thread: a pair takes only a few thousand additions.
    fn run_pair_objective(&self, operands: ObjectiveOperands<'_, Self>, _: Checked) -> Result<()> {
        self.traced("pair_objective", || {
            let ObjectiveOperands { outcomes, coefficients, scores, batch, objective, pairs } = operands;
            let capacity = [
                scores.logp.len(),
                scores.entropy.len(),
                coefficients.logp.len(),
                coefficients.entropy.len(),
            ]
            .into_iter()
            .fold(usize::MAX, usize::min);
            for pair in pairs {
                let (chosen, rejected) = scored_ranges(&batch.scored[pair * 4..][..4], capacity)?;
                let constants: &[PairConstants] = bytemuck::cast_slice(&batch.constants[pair * 4..][..4]);
                let entropy = |range: &Range<usize>| {
                    if objective.needs_entropy() { &scores.entropy[range.clone()] } else { &[] }
                };
                let pair_scores = PairScores {
                    logp_chosen: &scores.logp[chosen.clone()],
                    logp_rejected: &scores.logp[rejected.clone()],
                    entropy_chosen: entropy(&chosen),
                    entropy_rejected: entropy(&rejected),
                    constants: constants[0],
                };
                let (logp_chosen, logp_rejected) = split(&mut coefficients.logp, &chosen, &rejected);
                let (entropy_chosen, entropy_rejected) = split(&mut coefficients.entropy, &chosen, &rejected);
                let mut out =
                    PairCoefficients { logp_chosen, logp_rejected, entropy_chosen, entropy_rejected };
                let outcome = objective.evaluate(&pair_scores, &mut out);
                outcomes[pair * PairOutcome::WIDTH..][..PairOutcome::WIDTH]
                    .copy_from_slice(bytemuck::cast_slice(&[outcome]));
            }
            Ok(())
        })
    }
}

/// The chosen and the rejected range of one pair; chosen comes first.
fn scored_ranges(ends: &[u32], capacity: usize) -> Result<(Range<usize>, Range<usize>)> {
    let [chosen_start, chosen_end, rejected_start, rejected_end] =
        [ends[0] as usize, ends[1] as usize, ends[2] as usize, ends[3] as usize];
    let ordered =
        chosen_start <= chosen_end && chosen_end <= rejected_start && rejected_start <= rejected_end;
    if !ordered {
        return Err(Error::bug(format!("{OPERATION}: scored ranges {ends:?} are not in order")));
    }
    check_sizes(OPERATION, &ends, &[("scores or coefficients", capacity, rejected_end)])?;
    Ok((chosen_start..chosen_end, rejected_start..rejected_end))
}

fn split<'a>(
    values: &'a mut [f32],
    chosen: &Range<usize>,
    rejected: &Range<usize>,
) -> (&'a mut [f32], &'a mut [f32]) {
    let (head, tail) = values.split_at_mut(rejected.start);
    (&mut head[chosen.clone()], &mut tail[..rejected.len()])
}
