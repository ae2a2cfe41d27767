//! `mmpo-fast score`: log-probs of pairs under a model, a line a pair.

mod scorer;

pub use scorer::{PairScore, Scorer};
pub fn run(_config: &crate::config::ScoreConfig) -> crate::Result<()> { unimplemented!() }
