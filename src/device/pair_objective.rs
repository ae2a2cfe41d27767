//! From token scores to losses, rewards and per-token coefficients of pairs.

use std::ops::Range;

use super::check::check_sizes;
use super::{BatchBuffers, Checked, Floats, Memory, TokenCoefficients, TokenScores};
use crate::error::Result;
use crate::objective::{Objective, PairOutcome};

/// Operands of [`PairObjective::pair_objective`].
#[derive(Debug)]
pub struct ObjectiveOperands<'a, D: Memory> {
    /// `[pairs, PairOutcome::WIDTH]`: the rows of `pairs` are assigned.
    pub outcomes: &'a mut Floats<D>,
    /// The tokens of `pairs` are assigned.
    pub coefficients: &'a mut TokenCoefficients<D>,
    /// As the head's forward assigned them.
    pub scores: &'a TokenScores<D>,
    /// The batch that was scored.
    pub batch: &'a BatchBuffers<D>,
    /// The objective to evaluate.
    pub objective: &'a Objective,
    /// The pairs of the batch that it is evaluated for.
    pub pairs: Range<usize>,
}

/// The objective, evaluated on the device.
pub trait PairObjective: Memory {
    /// Assigns `outcomes` and `coefficients` of `pairs`.
    ///
    /// # Errors
    /// [`crate::Error::Bug`] for buffers that are too small, and [`crate::Error::Device`] where the device fails.
    fn pair_objective(&self, operands: ObjectiveOperands<'_, Self>) -> Result<()> {
        let (pairs, tokens) = (operands.pairs.end, self.len(&operands.scores.logp));
        let sizes = [
            ("outcomes", self.len(operands.outcomes), pairs * PairOutcome::WIDTH),
            ("scored", self.len(&operands.batch.scored), pairs * 4),
            ("constants", self.len(&operands.batch.constants), pairs * 4),
            ("coefficients.logp", self.len(&operands.coefficients.logp), tokens),
            ("coefficients.entropy", self.len(&operands.coefficients.entropy), tokens),
            ("scores.entropy", self.len(&operands.scores.entropy), tokens),
        ];
        let checked = check_sizes("pair_objective", &operands.pairs, &sizes)?;
        self.run_pair_objective(operands, checked)
    }

    /// The device's part of [`PairObjective::pair_objective`].
    fn run_pair_objective(&self, operands: ObjectiveOperands<'_, Self>, checked: Checked) -> Result<()>;
}
