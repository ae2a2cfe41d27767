//! The log-prob head: from the residual stream to per-token log-probs, the objective, and back.
//!
//! Logits of all `N x V` are never held. The weight of a response depends on its own pair alone, so in main mode each
//! chunk of whole pairs runs the forward, evaluates the objective, and reuses its saved probabilities in the backward:
//! the logits are computed once (`6 N V D` operations), where a program that needs the batch's loss first computes them
//! twice (`8 N V D`). The recompute mode does that too: it keeps nothing, and the objective sees the whole batch before
//! any backward. [`HeadPlan`](super::HeadPlan) says which mode runs, and on how much memory.

use std::ops::Range;

use super::buffers::{Activations, BackwardScratch, HeadBuffers};
use super::{Gradients, Llama};
use crate::data::{ScoredPair, micro_batches};
use crate::device::{
    BatchBuffers, Device, HeadBackward, HeadForward, HeadMode, HeadShape, ObjectiveOperands, RmsNormBackward,
};
use crate::error::Result;
use crate::objective::Objective;

impl<D: Device> Llama<D> {
    /// Log-probs, objective and gradient of a batch. Reads the residual stream that [`Llama::forward`] left, assigns
    /// `scratch.residual`, accumulates the gradients of the vocabulary matrix and of the final norm's weight, and
    /// leaves `activations.head.outcomes`.
    ///
    /// # Errors
    /// Those of the device.
    pub fn head_forward_backward(
        &self,
        gradients: &mut Gradients<D>,
        scratch: &mut BackwardScratch<D>,
        activations: &mut Activations<D>,
        batch: &BatchBuffers<D>,
        scored: &[ScoredPair],
        objective: &Objective,
    ) -> Result<()> {
        let device = &self.device;
        let width = self.config.hidden_size;
        let total = scored.last().map_or(0, |pair| pair.rejected.end);
        self.head_input(activations, batch, total)?;

        let head = &mut activations.head;
        let weight = self.weights.head();
        for pairs in head.chunks(scored) {
            let mut shape = self.head_shape(scored, &pairs, objective.needs_entropy());
            shape.mode = head.plan.mode(shape.rows.len());
            device.logp_head_forward(HeadForward {
                scores: &mut head.scores,
                workspace: &mut head.workspace,
                hidden: &head.normed,
                weight,
                targets: &batch.targets,
                shape: &shape,
            })?;
            device.pair_objective(ObjectiveOperands {
                outcomes: &mut head.outcomes,
                coefficients: &mut head.coefficients,
                scores: &head.scores,
                batch,
                objective,
                pairs,
            })?;
            device.logp_head_backward(HeadBackward {
                hidden: &mut head.normed,
                dweight: gradients.head_mut().as_mut(),
                workspace: &mut head.workspace,
                weight,
                targets: &batch.targets,
                scores: &head.scores,
                coefficients: &head.coefficients,
                shape: &shape,
            })?;
        }

        device.zero(&mut scratch.gathered, 0..total * width)?;
        device.rms_norm_backward(RmsNormBackward {
            dx: &mut scratch.gathered,
            dweight: gradients.final_norm.as_mut(),
            dout: &head.normed,
            x: &head.gathered,
            weight: &self.weights.final_norm,
            rstd: &head.rstd,
            shape: self.config.norm_shape(total),
        })?;
        let tokens = batch.host_spans.last().map_or(0, |span| span.rows().end);
        device.gather_rows_backward(&mut scratch.residual, &scratch.gathered, batch, tokens, width)
    }

    /// Per-token scores of a batch in `activations.head.scores`, without any gradient; with `objective`, its outcomes
    /// too.
    ///
    /// # Errors
    /// Those of the device.
    pub fn head_forward(
        &self,
        activations: &mut Activations<D>,
        batch: &BatchBuffers<D>,
        scored: &[ScoredPair],
        entropy: bool,
        objective: Option<&Objective>,
    ) -> Result<()> {
        let device = &self.device;
        let total = scored.last().map_or(0, |pair| pair.rejected.end);
        self.head_input(activations, batch, total)?;
        let head = &mut activations.head;
        let shape = self.head_shape(scored, &(0..scored.len()), entropy);
        device.logp_head_forward(HeadForward {
            scores: &mut head.scores,
            workspace: &mut head.workspace,
            hidden: &head.normed,
            weight: self.weights.head(),
            targets: &batch.targets,
            shape: &shape,
        })?;
        match objective {
            Some(objective) => device.pair_objective(ObjectiveOperands {
                outcomes: &mut head.outcomes,
                coefficients: &mut head.coefficients,
                scores: &head.scores,
                batch,
                objective,
                pairs: 0..scored.len(),
            }),
            None => Ok(()),
        }
    }

    /// The head's shape for these pairs, in the mode of scoring; callers that run a backward set `mode`.
    fn head_shape(&self, scored: &[ScoredPair], pairs: &Range<usize>, entropy: bool) -> HeadShape {
        let pairs = &scored[pairs.clone()];
        let rows = match (pairs.first(), pairs.last()) {
            (Some(first), Some(last)) => first.chosen.start..last.rejected.end,
            _ => 0..0,
        };
        let (width, vocab) = (self.config.hidden_size, self.config.vocab_size);
        HeadShape { rows, width, vocab, entropy, mode: HeadMode::Score }
    }
}

impl<D: Device> HeadBuffers<D> {
    /// Runs of whole pairs that go through the head together: as many as main mode has room for, or all of them.
    fn chunks(&self, scored: &[ScoredPair]) -> Vec<Range<usize>> {
        if self.plan.main_rows == 0 {
            return std::iter::once(0..scored.len()).collect();
        }
        let rows: Vec<usize> = scored.iter().map(|pair| pair.rejected.end - pair.chosen.start).collect();
        even_chunks(&rows, self.plan.chunk_rows)
    }
}

/// Cuts pairs into as few runs as [`micro_batches`] does, of at most `most` rows each, and makes the largest run as
/// small as it can be. Every run walks over the whole vocabulary matrix, so a last one of a few rows would cost as much
/// as a full one.
fn even_chunks(rows: &[usize], most: usize) -> Vec<Range<usize>> {
    let chunks = micro_batches(rows, most);
    let (mut least, mut enough) = (rows.iter().sum::<usize>() / chunks.len().max(1), most);
    while least < enough {
        let middle = least + (enough - least) / 2;
        match micro_batches(rows, middle).len() > chunks.len() {
            true => least = middle + 1,
            false => enough = middle,
        }
    }
    micro_batches(rows, enough)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_few_and_even() {
        let sizes = |rows: &[usize], most| -> Vec<usize> {
            even_chunks(rows, most).into_iter().map(|run| rows[run].iter().sum()).collect()
        };
        assert_eq!(sizes(&[100; 41], 2000), [1400, 1400, 1300]);
        assert_eq!(sizes(&[5, 5, 5], 100), [15]);
        // A pair of more than the limit is a chunk of its own.
        assert_eq!(sizes(&[3, 50, 3, 3], 10), [3, 50, 6]);
        assert_eq!(sizes(&[0, 0], 10), [0]);
        assert!(even_chunks(&[], 10).is_empty());
    }
}
