//! Which pairs of an optimiser batch each rank computes.
//!
//! The batch, its order and its constants are the same on every rank; only who computes which pair is decided here, from the
//! pairs' costs alone, so that all ranks come to the same answer without a word.

use std::cmp::Reverse;
use std::ops::Range;

use crate::data::{PairBatch, Sides, TokenizedPair};
use crate::model::LlamaConfig;

/// The pairs of a batch in the order of the ranks that compute them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Deal {
    /// Places in the batch: those of rank 0, then those of rank 1, and so on. Each rank's are in the order of the batch.
    pub order: Vec<usize>,
    /// Where each rank's part of `order` ends.
    ends: Vec<usize>,
}

impl Deal {
    /// All `pairs` pairs for the only rank.
    pub fn alone(pairs: usize) -> Self {
        Deal { order: (0..pairs).collect(), ends: vec![pairs] }
    }

    /// The part of [`Deal::order`] that `rank` computes.
    pub fn part(&self, rank: usize) -> Range<usize> {
        let start = rank.checked_sub(1).map_or(0, |before| self.ends[before]);
        start..self.ends[rank]
    }

    /// Places in the batch of the pairs that `rank` computes.
    pub fn pairs(&self, rank: usize) -> &[usize] {
        &self.order[self.part(rank)]
    }

    /// Values in the order of [`Deal::order`], put in the order of the batch.
    pub fn restore<T: Clone + Default>(&self, dealt: &[T]) -> Vec<T> {
        let mut values = vec![T::default(); dealt.len()];
        for (&place, value) in self.order.iter().zip(dealt) {
            values[place] = value.clone();
        }
        values
    }
}

/// Deals pairs of these costs to `ranks` ranks: the costliest first, each to the rank that has the least so far (the lower one of
/// equals). No rank has more than the mean and the largest pair together.
pub fn deal(costs: &[u64], ranks: usize) -> Deal {
    let mut costliest: Vec<usize> = (0..costs.len()).collect();
    costliest.sort_by_key(|&pair| (Reverse(costs[pair]), pair));
    let mut dealt: Vec<(u64, Vec<usize>)> = vec![(0, Vec::new()); ranks];
    for pair in costliest {
        if let Some((cost, pairs)) = dealt.iter_mut().min_by_key(|(cost, _)| *cost) {
            *cost += costs[pair];
            pairs.push(pair);
        }
    }
    let mut deal = Deal::default();
    for (_, mut pairs) in dealt {
        pairs.sort_unstable();
        deal.order.extend(pairs);
        deal.ends.push(deal.order.len());
    }
    deal
}

/// Multiplications of a forward over `pair`: gemms, attention and head. Those of its backward are about twice as many.
pub fn cost(config: &LlamaConfig, pair: &TokenizedPair, sides: Sides) -> u64 {
    let batch = PairBatch::pack([pair], sides);
    let shape = config.attention_shape();
    let (width, mlp) = (config.hidden_size, config.intermediate_size);
    let layer = width * (shape.qkv_width() + shape.out_width()) + 3 * width * mlp;
    let visible: usize = batch.spans.iter().map(|span| span.visible()).sum();
    let layers = config.layers * (batch.tokens() * layer + 2 * visible * shape.out_width());
    (layers + batch.scored_tokens() * width * config.vocab_size) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Costs without a pattern.
    fn costs(pairs: usize) -> Vec<u64> {
        (0..pairs as u64).map(|pair| 1 + crate::device::hash(7, pair) % 1000).collect()
    }

    #[test]
    fn every_pair_has_one_rank_and_none_has_much_more_than_the_mean() {
        for ranks in 1..=9 {
            for pairs in [0, 1, 2, 3, 8, 31, 128] {
                let costs = costs(pairs);
                let deal = deal(&costs, ranks);
                let mut seen = deal.order.clone();
                seen.sort_unstable();
                assert_eq!(seen, (0..pairs).collect::<Vec<_>>(), "{pairs} pairs, {ranks} ranks");
                let loads: Vec<u64> =
                    (0..ranks).map(|rank| deal.pairs(rank).iter().map(|&pair| costs[pair]).sum()).collect();
                let total: u64 = costs.iter().sum();
                assert_eq!(loads.iter().sum::<u64>(), total);
                let most = loads.iter().max().copied().unwrap_or(0);
                let largest = costs.iter().max().copied().unwrap_or(0);
                assert!(most <= total / ranks as u64 + largest, "{loads:?}");
                assert!((0..ranks).all(|rank| deal.pairs(rank).is_sorted()), "{deal:?}");
            }
        }
    }

    #[test]
    fn equal_pairs_go_round_and_few_pairs_leave_the_last_ranks_idle() {
        let equal = deal(&[5; 6], 3);
        assert_eq!((equal.pairs(0), equal.pairs(1), equal.pairs(2)), (&[0, 3][..], &[1, 4][..], &[2, 5][..]));
        let few = deal(&[1, 9], 4);
        assert_eq!(
            (few.pairs(0), few.pairs(1), few.pairs(2), few.pairs(3)),
            (&[1][..], &[0][..], &[][..], &[][..])
        );
        assert_eq!(deal(&[3, 1, 2], 1), Deal::alone(3));
    }

    #[test]
    fn the_long_pair_is_balanced_by_several_short_ones() {
        let dealt = deal(&[1, 1, 1, 10, 1, 1], 2);
        assert_eq!((dealt.pairs(0), dealt.pairs(1)), (&[3][..], &[0, 1, 2, 4, 5][..]));
    }

    /// The multiplications of a small model, counted one by one.
    #[test]
    fn the_cost_of_a_pair_is_that_of_its_gemms_attention_and_head() {
        let text = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 12,
            "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true}"#;
        let config = LlamaConfig::parse(std::path::Path::new("config.json"), text).unwrap();
        let pair = TokenizedPair {
            record: 0,
            prompt: vec![1, 2, 3].into(),
            chosen: vec![4, 5].into(),
            rejected: vec![6].into(),
        };
        // Two heads of four values for queries, one each for keys and values: 16 outputs; then 8 inputs of the output
        // projection, and three matrices of the MLP.
        let weights = 8 * 16 + 8 * 8 + 3 * 8 * 6;
        // A row of the prompt sees itself and what is before it; one of a response sees the prompt and its own response.
        let seen = (1 + 2 + 3) + (4 + 5) + 4;
        // A query and a key of each of two heads, and as much for the values.
        let layer = 6 * weights + seen * 2 * 8;
        assert_eq!(cost(&config, &pair, Sides::Both), 2 * layer + 3 * 8 * 12);
        // Without the rejected response there are five rows, and two that are scored.
        let layer = 5 * weights + (seen - 4) * 2 * 8;
        assert_eq!(cost(&config, &pair, Sides::ChosenOnly), 2 * layer + 2 * 8 * 12);
    }

    #[test]
    fn values_return_to_the_order_of_the_batch() {
        let dealt = deal(&[1, 9, 4], 2);
        assert_eq!(dealt.order, [1, 0, 2]);
        assert_eq!(dealt.restore(&["b", "a", "c"]), ["a", "b", "c"]);
    }
}
