//! The micro-batches of a step: which pairs are in them, their forward, and the numbers that the host reads after them.

use std::ops::Range;
use std::sync::Arc;

use super::gathered::GatherUp;
use super::{Trainer, TrainingPair};
use crate::data::{PairBatch, micro_batches};
use crate::device::{Device, hash};
use crate::error::Result;
use crate::interrupt;
use crate::model::Context;
use crate::objective::{PairOutcome, ReferencePair};
use crate::ranks::progress;
use crate::train::deal::{self, Deal};

impl<D: Device> Trainer<D> {
    /// Forward of each micro-batch of this rank's share of `pairs`, then `head`, which is told whether it is the last one; gathers the
    /// outcomes. Returns the tokens that went through. `dropout` names the masks of adapters' dropout; `None` drops nothing.
    pub(super) fn each_micro_batch(
        &mut self,
        pairs: &[TrainingPair<'_>],
        dropout: Option<u64>,
        mut head: impl FnMut(&mut Self, &PairBatch, bool) -> Result<()>,
    ) -> Result<usize> {
        let device = Arc::clone(&self.model.device);
        let sides = self.objective.sides();
        let references: Vec<ReferencePair> = pairs.iter().map(|pair| pair.reference).collect();
        let constants = self.objective.batch_constants(&references, &chosen_tokens(pairs));
        self.dealt = self.deal(pairs);
        let (runs, before) = self.own_micro_batches(&self.pair_sizes(pairs));
        self.idle_rounds = self.idle_rounds(runs.len(), &self.pair_sizes(pairs));
        let last = runs.len().saturating_sub(1);
        let mut tokens = 0;
        for (number, run) in runs.into_iter().enumerate() {
            let own = &self.dealt.order[run.clone()];
            let own_constants: Vec<_> = own.iter().map(|&pair| constants[pair]).collect();
            let batch = PairBatch::pack(own.iter().map(|&pair| pairs[pair].pair), sides);
            self.model.set_dropout_key(dropout.map(|key| hash(key, (before + number) as u64)));
            // Ends an evaluation before the first step; while steps run, a signal waits for the loop.
            interrupt::check()?;
            progress::tick();
            self.batch.load(device.as_ref(), &batch, &own_constants)?;
            self.forward(batch.tokens())?;
            head(self, &batch, number == last)?;
            device.copy(
                &mut self.metrics,
                self.first_outcome + run.start * PairOutcome::WIDTH,
                &self.activations.head.outcomes,
                0,
                run.len() * PairOutcome::WIDTH,
            )?;
            tokens += batch.tokens();
        }
        self.model.set_dropout_key(None);
        Ok(tokens)
    }

    /// The model's forward over the batch that is loaded.
    fn forward(&mut self, tokens: usize) -> Result<()> {
        let Trainer { model, activations, batch, ranks, gathered, .. } = self;
        match (ranks, gathered) {
            (Some(ranks), Some(gathered)) => {
                model.forward_from(&mut GatherUp { ranks, gathered }, activations, batch, tokens)
            }
            _ => model.forward(activations, batch, tokens, Context::Packed),
        }
    }

    /// The head's forward, the objective and the head's backward over the batch that is loaded, of which `batch` is the description.
    pub(super) fn head_forward_backward(&mut self, batch: &PairBatch) -> Result<()> {
        self.model.head_forward_backward(
            &mut self.gradients,
            &mut self.scratch,
            &mut self.activations,
            &self.batch,
            &batch.scored,
            &self.objective,
        )
    }

    /// Who computes which of `pairs`.
    fn deal(&self, pairs: &[TrainingPair<'_>]) -> Deal {
        let ranks = self.place().ranks;
        if ranks == 1 {
            return Deal::alone(pairs.len());
        }
        let sides = self.objective.sides();
        let costs: Vec<u64> =
            pairs.iter().map(|pair| deal::cost(&self.model.config, pair.pair, sides)).collect();
        deal::deal(&costs, ranks)
    }

    /// The micro-batches of this rank, as parts of the order of `dealt`, and how many the ranks before it have together. `sizes`
    /// are those of the batch.
    fn own_micro_batches(&self, sizes: &[usize]) -> (Vec<Range<usize>>, usize) {
        let rank = self.place().rank;
        let of = |rank: usize| {
            let own: Vec<usize> = self.dealt.pairs(rank).iter().map(|&pair| sizes[pair]).collect();
            micro_batches(&own, self.token_budget)
        };
        let first = self.dealt.part(rank).start;
        let runs = of(rank).into_iter().map(|run| first + run.start..first + run.end).collect();
        (runs, (0..rank).map(|rank| of(rank).len()).sum())
    }

    /// Tokens of each pair.
    pub(super) fn pair_sizes(&self, pairs: &[TrainingPair<'_>]) -> Vec<usize> {
        pairs.iter().map(|pair| pair.pair.tokens_of(self.objective.sides())).collect()
    }

    /// The outcomes of the last `pairs` pairs that went through the head; [`Trainer::step`] leaves those of a step that failed.
    ///
    /// # Errors
    /// Those of the device.
    pub(in crate::train) fn download_outcomes(&self, pairs: usize) -> Result<Vec<PairOutcome>> {
        Ok(self.download_metrics(pairs)?.1)
    }

    /// The norms of the last backward, two values each, and the outcomes of the first `pairs` pairs. A step waits for the device here
    /// alone.
    pub(super) fn download_metrics(&self, pairs: usize) -> Result<(Vec<f32>, Vec<PairOutcome>)> {
        let _waiting = progress::wait();
        let mut values = vec![0.0; self.first_outcome + pairs * PairOutcome::WIDTH];
        self.device().download(&mut values, &self.metrics, 0)?;
        let outcomes: &[PairOutcome] = bytemuck::cast_slice(&values[self.first_outcome..]);
        // A capsule asks for the outcomes of a batch that may never have been dealt.
        let outcomes = match self.dealt.order.len() == pairs {
            true => self.dealt.restore(outcomes),
            false => outcomes.to_vec(),
        };
        values.truncate(self.first_outcome);
        Ok((values, outcomes))
    }

    pub(super) fn mean_loss(&self, pairs: &[TrainingPair<'_>], outcomes: &[PairOutcome]) -> f64 {
        let count = self.objective.batch_count(&chosen_tokens(pairs));
        outcomes.iter().map(|outcome| outcome.loss as f64).sum::<f64>() / count
    }
}

fn chosen_tokens(pairs: &[TrainingPair<'_>]) -> Vec<usize> {
    pairs.iter().map(|pair| pair.pair.scored_tokens()[0]).collect()
}
