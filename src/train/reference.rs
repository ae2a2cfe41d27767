//! Log-probs under the frozen reference: computed once before training, kept on disk.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::inputs::Inputs;
use super::trainer::LoadedModel;
use super::{self_test, shared_references};
use crate::checkpoint::ModelFolder;
use crate::config::RunConfig;
use crate::data::{CacheKey, PairDataset, ReferenceCache, Sides};
use crate::device::{Device, MemoryPart};
use crate::error::Result;
use crate::interrupt::{self, Keeper};
use crate::objective::ReferencePair;
use crate::ranks::{self, RankGroup, Team};
use crate::report::Progress;
use crate::score::{ScoredModel, Scorer};

/// Time between two writes of the scores so far: a process that is killed loses no more than that.
pub(super) const STORE_INTERVAL: Duration = Duration::from_secs(60);

/// The ranks of the run, and their collectives where there are several.
pub type RanksOf<'a, D> = (&'a Team, Option<&'a Arc<RankGroup<D>>>);

/// References of the training and of the evaluation pairs, in their orders.
#[derive(Debug)]
pub struct References {
    /// References of the training pairs, in their order; not known where the objective needs none.
    pub training: Vec<ReferencePair>,
    /// References of the evaluation pairs, in their order; not known where the objective looks only at the chosen
    /// responses. All other objectives have them, whatever they train on, to show what training changes.
    pub evaluation: Vec<ReferencePair>,
    /// The cache file that the former come from, where they were not computed by this run.
    pub training_cache: Option<PathBuf>,
    /// As `training_cache`, of the evaluation pairs.
    pub evaluation_cache: Option<PathBuf>,
}

impl References {
    /// Scores the pairs whose references are wanted; the fields say which. `model` is the starting model, which is the
    /// reference unless the configuration names another.
    ///
    /// # Errors
    /// Those of the reference's folder and of the device; [`crate::Error::Numerics`] for log-probs that are not finite.
    pub fn compute<D: Device>(
        config: &RunConfig,
        inputs: &Inputs,
        model: &mut LoadedModel<D>,
        ranks: RanksOf<'_, D>,
    ) -> Result<Self> {
        let Some(folder) = &inputs.reference else {
            return Self::of(config, inputs, (&inputs.folder, model.scored()), ranks);
        };
        let device = Arc::clone(&model.scored().llama().device);
        let sharded = LoadedModel::cut_among(ranks.1, &config.memory);
        let mut reference = device.as_part(MemoryPart::Reference, || {
            LoadedModel::load(&device, folder, (inputs.positions(), true), sharded)
        })?;
        Self::of(config, inputs, (folder, reference.scored()), ranks)
    }

    fn of<D: Device>(
        config: &RunConfig,
        inputs: &Inputs,
        (folder, mut reference): (&ModelFolder, ScoredModel<'_, D>),
        ranks: RanksOf<'_, D>,
    ) -> Result<Self> {
        let weights = folder.fingerprint();
        let mut score = |dataset: &PairDataset, label: &str| {
            score_cached(config, inputs, (weights, reference.again()), (dataset, label), ranks)
        };
        let unknown = |dataset: &PairDataset| (vec![ReferencePair::default(); dataset.pairs.len()], None);
        let (training, training_cache) = match config.objective.needs_reference() {
            true => score(&inputs.training, "reference log-probs")?,
            false => unknown(&inputs.training),
        };
        let (evaluation, evaluation_cache) = match &inputs.evaluation {
            Some(dataset) if config.objective.sides() == Sides::Both => {
                score(dataset, "reference log-probs, evaluation")?
            }
            Some(dataset) => unknown(dataset),
            None => (Vec::new(), None),
        };
        Ok(References { training, evaluation, training_cache, evaluation_cache })
    }
}

fn score_cached<D: Device>(
    config: &RunConfig,
    inputs: &Inputs,
    (weights, mut reference): ([u8; 32], ScoredModel<'_, D>),
    (dataset, label): (&PairDataset, &str),
    (team, group): RanksOf<'_, D>,
) -> Result<(Vec<ReferencePair>, Option<PathBuf>)> {
    let compute = reference.llama().device.arithmetic();
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
    let known = match group {
        None => cache.load(pairs),
        Some(group) => shared_references::known(cache.load(pairs), dataset, team, group)?,
    };
    if let Some(references) = known {
        tracing::info!("{label}: {pairs} pairs from {}", cache.path().display());
        // Where the policy begins as the reference, the self-test of the policy compares the same.
        if self_test::is_another_model(inputs) {
            let source = (cache.path(), config.batch.tokens_per_micro_batch);
            self_test::check_cache(reference.again(), dataset, &references, source)?;
        }
        return Ok((references, Some(cache.path().to_path_buf())));
    }
    let budget = config.batch.tokens_per_micro_batch;
    let references = match group {
        None => score_rest(config, reference, dataset, label, &cache)?,
        Some(group) => shared_references::score(reference, (dataset, budget), label, &cache, (team, group))?,
    };
    if !team.is_first() {
        return Ok((references, None));
    }
    if let Err(error) = cache.store(&references) {
        tracing::warn!("the reference log-probs are not kept for the next run: {error}");
    }
    Ok((references, None))
}

/// Scores the pairs that an earlier run, which was stopped, did not; a signal keeps those that are done by then.
fn score_rest<D: Device>(
    config: &RunConfig,
    mut reference: ScoredModel<'_, D>,
    dataset: &PairDataset,
    label: &str,
    cache: &ReferenceCache,
) -> Result<Vec<ReferencePair>> {
    let pairs = dataset.pairs.len();
    let earlier = cache.load_partial(pairs);
    if !earlier.is_empty() {
        tracing::info!("{label}: {} of {pairs} pairs were scored by an earlier run", earlier.len());
    }
    let mut scorer = Scorer::new(reference.again(), &dataset.pairs, config.batch.tokens_per_micro_batch)?;
    let mut progress = Progress::start(label, "pairs", pairs, earlier.len());
    let first = earlier.len();
    let done = Arc::new(Mutex::new(earlier));
    let keeper = keep_partial(cache.clone(), Arc::clone(&done), pairs);
    let mut stored = Instant::now();
    interrupt::check()?;
    scorer.run_from(first, false, |start, scores| {
        let count = {
            let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
            // The micro-batch at the border is scored as a whole, as in a run that was not stopped.
            done.truncate(start);
            done.extend(scores.iter().map(|score| score.reference()));
            done.len()
        };
        progress.advance(count.saturating_sub(start.max(first)), String::new);
        ranks::progress::tick();
        interrupt::check()?;
        if stored.elapsed() >= STORE_INTERVAL {
            stored = Instant::now();
            let done = done.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(error) = cache.store_partial(&done, pairs) {
                tracing::debug!("{error}");
            }
        }
        Ok(())
    })?;
    drop(keeper);
    Ok(std::mem::take(&mut *done.lock().unwrap_or_else(PoisonError::into_inner)))
}

/// On a signal, keeps the references that are scored by then.
fn keep_partial(cache: ReferenceCache, done: Arc<Mutex<Vec<ReferencePair>>>, pairs: usize) -> Keeper {
    interrupt::keep_before_end(move || {
        let done = done.lock().unwrap_or_else(PoisonError::into_inner);
        if done.is_empty() {
            return None;
        }
        let count = done.len();
        Some(match cache.store_partial(&done, pairs) {
            Ok(()) => format!(
                "{count} of {pairs} reference log-probs are kept, and the same command goes on from them"
            ),
            Err(error) => format!("{count} reference log-probs are lost: {error}"),
        })
    })
}

/// One folder for all runs, so that a sweep scores its reference once: the user's, else the run's own.
fn cache_folder(config: &RunConfig) -> PathBuf {
    crate::data::cache_folder().unwrap_or_else(|| config.output.join("reference-cache"))
}
