//! Log-probs under the frozen reference: computed once before training, kept on disk.

use std::path::PathBuf;

use super::inputs::Inputs;
use crate::checkpoint::ModelFolder;
use crate::config::RunConfig;
use crate::data::{CacheKey, PairDataset, ReferenceCache};
use crate::device::Device;
use crate::error::Result;
use crate::model::Llama;
use crate::objective::ReferencePair;
use crate::report::Progress;
use crate::score::Scorer;

/// References of the training and of the evaluation pairs, in their orders; zeros where the objective needs none.
#[derive(Debug)]
pub struct References {
    pub training: Vec<ReferencePair>,
    pub evaluation: Vec<ReferencePair>,
}

impl References {
    /// `model` is the starting model, which is the reference unless the configuration names another.
    pub fn compute<D: Device>(config: &RunConfig, inputs: &Inputs, model: &Llama<D>) -> Result<Self> {
        let evaluation_pairs = inputs.evaluation.as_ref().map_or(0, |dataset| dataset.pairs.len());
        if !config.objective.needs_reference() {
            return Ok(References {
                training: vec![ReferencePair::default(); inputs.training.pairs.len()],
                evaluation: vec![ReferencePair::default(); evaluation_pairs],
            });
        }
        match &inputs.reference {
            None => Self::of(config, inputs, &inputs.folder, model),
            Some(folder) => {
                let reference = Llama::load(model.device.clone(), folder, inputs.positions())?;
                Self::of(config, inputs, folder, &reference)
            }
        }
    }

    fn of<D: Device>(
        config: &RunConfig,
        inputs: &Inputs,
        folder: &ModelFolder,
        reference: &Llama<D>,
    ) -> Result<Self> {
        let weights = folder.fingerprint();
        let score = |dataset: &PairDataset, label: &str| {
            score_cached(config, inputs, weights, reference, dataset, label)
        };
        Ok(References {
            training: score(&inputs.training, "reference log-probs")?,
            evaluation: match &inputs.evaluation {
                Some(dataset) => score(dataset, "reference log-probs, evaluation")?,
                None => Vec::new(),
            },
        })
    }
}

fn score_cached<D: Device>(
    config: &RunConfig,
    inputs: &Inputs,
    weights: [u8; 32],
    reference: &Llama<D>,
    dataset: &PairDataset,
    label: &str,
) -> Result<Vec<ReferencePair>> {
    let compute = reference.device.arithmetic();
    let key = CacheKey {
        weights,
        tokenizer: inputs.encoder.tokenizer.fingerprint(),
        template: inputs.encoder.template.as_ref().map_or([0; 32], |template| template.fingerprint()),
        data: dataset.fingerprint,
        limits: inputs.limits,
        compute: &compute,
    };
    let cache = ReferenceCache::new(&cache_folder(config), &key);
    let pairs = dataset.pairs.len();
    if let Some(references) = cache.load(pairs)? {
        tracing::info!("{label}: {pairs} pairs from {}", cache.path().display());
        return Ok(references);
    }
    let mut progress = Progress::start(label, "pairs", pairs, 0);
    let mut scorer = Scorer::new(reference, &dataset.pairs, config.batch.tokens_per_micro_batch)?;
    let scores = scorer.run(false, |done| progress.advance(done, String::new))?;
    let references: Vec<ReferencePair> = scores.iter().map(|score| score.reference()).collect();
    if let Err(error) = cache.store(&references) {
        tracing::warn!("the reference log-probs are not kept for the next run: {error}");
    }
    Ok(references)
}

/// One folder for all runs, so that a sweep scores its reference once: `MMPO_FAST_CACHE`, else the user's cache folder,
/// else the run's own.
fn cache_folder(config: &RunConfig) -> PathBuf {
    let folder =
        |variable: &str| std::env::var_os(variable).filter(|path| !path.is_empty()).map(PathBuf::from);
    folder("MMPO_FAST_CACHE")
        .or_else(|| folder("XDG_CACHE_HOME").map(|cache| cache.join("mmpo-fast")))
        .or_else(|| folder("HOME").map(|home| home.join(".cache/mmpo-fast")))
        .unwrap_or_else(|| config.output.join("reference-cache"))
}
