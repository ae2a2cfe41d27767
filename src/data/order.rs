//! Which pairs make up which optimiser step.
//!
//! Each epoch visits every pair once in an order drawn from `(seed, epoch)` alone, so any step's pairs can be told
//! without replaying the steps before it: a resumed run positions itself at its step and goes on. The last batch of
//! an epoch keeps what is left over and is smaller; no pair is ever dropped, and no batch spans two epochs.

use rand::Rng;
use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::SeedableRng;

/// The pairs of every optimiser step of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchOrder {
    pairs: usize,
    pairs_per_step: usize,
    seed: u64,
}

/// The pairs of one optimiser step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepBatch {
    /// 0-based step since the start of the run.
    pub step: usize,
    /// 0-based epoch.
    pub epoch: usize,
    /// Indices into the dataset's pairs, in training order.
    pub pairs: Vec<usize>,
}

impl BatchOrder {
    /// An order over `pairs` pairs; 0 `pairs_per_step` is taken as 1.
    pub fn new(pairs: usize, pairs_per_step: usize, seed: u64) -> Self {
        BatchOrder { pairs, pairs_per_step: pairs_per_step.max(1), seed }
    }

    /// Optimiser steps of one epoch, the smaller last one included.
    pub fn steps_per_epoch(&self) -> usize {
        self.pairs.div_ceil(self.pairs_per_step)
    }

    /// Steps that `epochs` epochs take; a part of an epoch is rounded up to whole steps.
    pub fn steps_of(&self, epochs: f64) -> usize {
        (epochs * self.steps_per_epoch() as f64).ceil() as usize
    }

    /// Epochs done after `steps` steps, in fractions.
    pub fn epochs_after(&self, steps: usize) -> f64 {
        match self.steps_per_epoch() {
            0 => 0.0,
            steps_per_epoch => {
                let (epochs, rest) = (steps / steps_per_epoch, steps % steps_per_epoch);
                epochs as f64 + (rest * self.pairs_per_step) as f64 / self.pairs as f64
            }
        }
    }

    /// The batches from step `first_step` on, without an end (none if there are no pairs).
    pub fn from_step(self, first_step: usize) -> Steps {
        Steps { order: self, step: first_step, permuted_epoch: None, permutation: Vec::new() }
    }
}

/// Iterator over the batches of a [`BatchOrder`].
#[derive(Clone, Debug)]
pub struct Steps {
    order: BatchOrder,
    step: usize,
    permuted_epoch: Option<usize>,
    permutation: Vec<usize>,
}

impl Iterator for Steps {
    type Item = StepBatch;

    fn next(&mut self) -> Option<StepBatch> {
        let steps_per_epoch = self.order.steps_per_epoch();
        if steps_per_epoch == 0 {
            return None;
        }
        let (step, epoch) = (self.step, self.step / steps_per_epoch);
        if self.permuted_epoch != Some(epoch) {
            self.permutation = permutation(self.order.pairs, self.order.seed, epoch);
            self.permuted_epoch = Some(epoch);
        }
        let start = step % steps_per_epoch * self.order.pairs_per_step;
        let end = (start + self.order.pairs_per_step).min(self.order.pairs);
        self.step += 1;
        Some(StepBatch { step, epoch, pairs: self.permutation[start..end].to_vec() })
    }
}

/// A permutation of `0..length` that depends on `(seed, epoch)` alone and is the same on every platform:
/// Fisher-Yates over ChaCha20 keyed by both. Bounded numbers are drawn here, since those of the `rand` crate may
/// change from version to version.
pub fn permutation(length: usize, seed: u64, epoch: usize) -> Vec<usize> {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&(epoch as u64).to_le_bytes());
    let mut random = ChaCha20Rng::from_seed(key);
    let mut order: Vec<usize> = (0..length).collect();
    for last in (1..length).rev() {
        order.swap(last, below(&mut random, last as u64 + 1) as usize);
    }
    order
}

/// A uniform number below `bound` (Lemire: the high half of a product, rejecting the few low halves that would bias it).
fn below(random: &mut ChaCha20Rng, bound: u64) -> u64 {
    let biased = bound.wrapping_neg() % bound;
    loop {
        let product = random.next_u64() as u128 * bound as u128;
        if product as u64 >= biased {
            return (product >> 64) as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_visits_every_pair_once_and_keeps_the_last_batch() {
        let order = BatchOrder::new(10, 4, 42);
        let steps: Vec<StepBatch> = order.from_step(0).take(6).collect();
        assert_eq!(order.steps_per_epoch(), 3);
        assert_eq!(steps.iter().map(|step| step.pairs.len()).collect::<Vec<_>>(), [4, 4, 2, 4, 4, 2]);
        assert_eq!(steps.iter().map(|step| step.epoch).collect::<Vec<_>>(), [0, 0, 0, 1, 1, 1]);
        for epoch in steps.chunks(3) {
            let mut seen: Vec<usize> = epoch.iter().flat_map(|step| step.pairs.clone()).collect();
            seen.sort_unstable();
            assert_eq!(seen, (0..10).collect::<Vec<_>>());
        }
        assert_ne!(steps[0].pairs, steps[3].pairs, "epochs are shuffled anew");
    }

    #[test]
    fn any_step_can_be_reached_directly() {
        let order = BatchOrder::new(11, 3, 7);
        let all: Vec<StepBatch> = order.from_step(0).take(20).collect();
        for start in 0..20 {
            let rest: Vec<StepBatch> = order.from_step(start).take(20 - start).collect();
            assert_eq!(rest, all[start..], "from step {start}");
        }
    }

    #[test]
    fn the_permutation_is_pinned() {
        // Worked out with a ChaCha20 written in Python. A change here would change every run and break every resume.
        assert_eq!(permutation(8, 42, 0), PINNED[0]);
        assert_eq!(permutation(8, 42, 1), PINNED[1]);
        assert_eq!(permutation(8, 43, 0), PINNED[2]);
        assert!(permutation(0, 42, 0).is_empty());
    }

    const PINNED: [[usize; 8]; 3] =
        [[2, 5, 1, 7, 0, 6, 4, 3], [0, 3, 6, 7, 5, 1, 4, 2], [0, 4, 5, 3, 2, 1, 6, 7]];

    #[test]
    fn all_orders_of_four_are_about_equally_likely() {
        let mut counts = std::collections::HashMap::new();
        let draws = 24_000;
        for seed in 0..draws {
            *counts.entry(permutation(4, seed, 0)).or_insert(0u32) += 1;
        }
        assert_eq!(counts.len(), 24);
        // 1000 expected, standard deviation 31.
        assert!(counts.values().all(|count| (850..1150).contains(count)), "{counts:?}");
    }

    #[test]
    fn epochs_and_steps_convert() {
        let order = BatchOrder::new(10, 4, 0);
        assert_eq!(order.steps_of(2.0), 6);
        assert_eq!(order.steps_of(0.5), 2);
        assert_eq!(order.epochs_after(3), 1.0);
        assert!((order.epochs_after(4) - 1.4).abs() <= 1e-12, "{}", order.epochs_after(4));
        assert_eq!(BatchOrder::new(0, 4, 0).from_step(0).next(), None);
    }
}
