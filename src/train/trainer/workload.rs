//! The sizes that a trainer allocates for.

use crate::config::MemoryConfig;
use crate::data::{PairBatch, TokenizedPair};
use crate::model::{Capacity, HeadOptions, Purpose};
use crate::objective::Objective;

/// The sizes a [`Trainer`](super::Trainer) allocates for.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    /// The largest micro-batch.
    pub micro_batch: Capacity,
    /// Pairs of an optimiser step.
    pub pairs_per_step: usize,
    /// Tokens of a micro-batch.
    pub token_budget: usize,
    /// How the head uses memory.
    pub head: HeadOptions,
    /// What is kept on the device, and in which format.
    pub memory: MemoryConfig,
    /// Seed of the stochastic rounding of weights without a master copy.
    pub rounding_seed: u64,
}

impl Workload {
    pub(super) fn purpose(&self) -> Purpose {
        Purpose::Training { head: self.head, recompute: self.memory.recompute }
    }

    /// Covers every way of cutting `pairs` into micro-batches of at most `token_budget` tokens (a longer pair gets
    /// one of its own).
    pub fn plan<'a>(
        pairs: impl IntoIterator<Item = &'a TokenizedPair>,
        objective: &Objective,
        pairs_per_step: usize,
        token_budget: usize,
    ) -> Self {
        let mut micro_batch = Capacity::default();
        let mut shortest = usize::MAX;
        for pair in pairs {
            let alone = PairBatch::pack([pair], objective.sides());
            micro_batch = micro_batch.cover(&alone);
            shortest = shortest.min(alone.tokens().max(1));
        }
        let most_pairs = (token_budget / shortest).clamp(1, pairs_per_step.max(1));
        let budget = token_budget.min(micro_batch.tokens * most_pairs).max(micro_batch.tokens);
        // No pair scores more tokens than it has, so the budget bounds the scored ones; `most_pairs` more are to spare.
        let scored = micro_batch.scored.max(budget + most_pairs);
        Workload {
            micro_batch: Capacity {
                tokens: budget,
                pairs: most_pairs,
                longest_part: micro_batch.longest_part,
                scored: scored.min(micro_batch.scored * most_pairs),
                longest: micro_batch.longest,
            },
            pairs_per_step,
            token_budget,
            head: HeadOptions::default(),
            memory: MemoryConfig::default(),
            rounding_seed: 0,
        }
    }
}
