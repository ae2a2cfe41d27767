//! Fills a model folder with random weights: `random_model FOLDER`, where FOLDER holds a `config.json`.
//!
//! For timing a training run of a model's shapes where its weights are not at hand.

#[path = "make_demo/random_weights.rs"]
mod random_weights;

use std::error::Error;
use std::path::PathBuf;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::args_os().nth(1).map(PathBuf::from).ok_or("usage: random_model FOLDER")?;
    random_weights::write_random_weights(&folder, &mut ChaCha8Rng::seed_from_u64(42))
}
