//! From a file of preference pairs to packed batches of token ids.

mod batch;

pub use batch::{PairBatch, PairSpan, ScoredPair, Sides, TokenizedPair, micro_batches};
