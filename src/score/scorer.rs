//! Sequence log-probs and entropies of pairs under a model, without gradients.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::data::{PairBatch, ScoredPair, Sides, TokenizedPair, micro_batches};
use crate::device::{BatchBuffers, Device, MemoryPart};
use crate::error::{Error, Result};
use crate::interrupt;
use crate::model::{Activations, Capacity, Context, Llama, Purpose};
use crate::objective::ReferencePair;

/// What a model says of a pair: sums over the scored tokens, nats.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PairScore {
    /// Log-prob of the chosen response.
    pub logp_chosen: f64,
    /// Log-prob of the rejected response.
    pub logp_rejected: f64,
    /// Entropy along the chosen response; 0 where it was not asked for.
    pub entropy_chosen: f64,
    /// Entropy along the rejected response; 0 where it was not asked for.
    pub entropy_rejected: f64,
    /// Scored tokens of the chosen response.
    pub tokens_chosen: usize,
    /// Scored tokens of the rejected response.
    pub tokens_rejected: usize,
}

impl PairScore {
    /// Fails where a score is not finite: finite weights can still overflow on the way, as after a diverged training.
    fn check_finite(&self, pair: &TokenizedPair) -> Result<()> {
        let PairScore { logp_chosen, logp_rejected, entropy_chosen, entropy_rejected, .. } = *self;
        if [logp_chosen, logp_rejected, entropy_chosen, entropy_rejected]
            .iter()
            .all(|value| value.is_finite())
        {
            return Ok(());
        }
        Err(Error::numerics(
            format!(
                "record {} of the data: log-probs {logp_chosen} and {logp_rejected}, entropies {entropy_chosen} and \
                 {entropy_rejected} are not all finite",
                pair.record + 1
            ),
            "the model's activations overflow: its training diverged, or its config.json is not its own",
        ))
    }

    /// The scores as objectives take them.
    pub fn reference(&self) -> ReferencePair {
        ReferencePair {
            logp_chosen: self.logp_chosen as f32,
            logp_rejected: self.logp_rejected as f32,
            tokens_chosen: self.tokens_chosen as u32,
            tokens_rejected: self.tokens_rejected as u32,
        }
    }
}

/// Log-probs of the scored tokens of a pair, in nats.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenLogps {
    /// Those of the chosen response's tokens, in their order.
    pub chosen: Vec<f32>,
    /// Those of the rejected response's tokens.
    pub rejected: Vec<f32>,
}

/// The forward of a model whose layers are cut among ranks. Every rank must run as many, or take part in them.
pub trait ShardedForward<D: Device> {
    /// The model, whose layers have this rank's values alone.
    fn model(&self) -> &Llama<D>;

    /// As [`Llama::forward`] over packed pairs.
    ///
    /// # Errors
    /// Those of the device and of the other ranks.
    fn forward(
        &mut self,
        activations: &mut Activations<D>,
        batch: &BatchBuffers<D>,
        tokens: usize,
    ) -> Result<()>;

    /// Takes part in a forward that other ranks run and this one does not.
    ///
    /// # Errors
    /// As [`ShardedForward::forward`].
    fn idle(&mut self) -> Result<()>;
}

/// A model that a [`Scorer`] asks.
pub enum ScoredModel<'a, D: Device> {
    /// One that this process has all of.
    Whole(&'a Llama<D>),
    /// One whose layers are cut among ranks.
    Sharded(&'a mut dyn ShardedForward<D>),
}

impl<'a, D: Device> From<&'a Llama<D>> for ScoredModel<'a, D> {
    fn from(model: &'a Llama<D>) -> Self {
        ScoredModel::Whole(model)
    }
}

impl<D: Device> fmt::Debug for ScoredModel<'_, D> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            ScoredModel::Whole(_) => "a whole model",
            ScoredModel::Sharded(_) => "a model of several ranks",
        })
    }
}

impl<D: Device> ScoredModel<'_, D> {
    /// The model itself.
    pub fn llama(&self) -> &Llama<D> {
        match self {
            ScoredModel::Whole(model) => model,
            ScoredModel::Sharded(model) => model.model(),
        }
    }

    /// The same model for a shorter time.
    pub fn again(&mut self) -> ScoredModel<'_, D> {
        match self {
            ScoredModel::Whole(model) => ScoredModel::Whole(model),
            ScoredModel::Sharded(model) => ScoredModel::Sharded(&mut **model),
        }
    }

    fn forward(
        &mut self,
        activations: &mut Activations<D>,
        batch: &BatchBuffers<D>,
        tokens: usize,
    ) -> Result<()> {
        match self {
            ScoredModel::Whole(model) => model.forward(activations, batch, tokens, Context::Packed),
            ScoredModel::Sharded(model) => model.forward(activations, batch, tokens),
        }
    }
}

/// A model with the buffers to score micro-batches of up to `token_budget` tokens.
#[derive(Debug)]
pub struct Scorer<'a, D: Device> {
    model: ScoredModel<'a, D>,
    activations: Activations<D>,
    batch: BatchBuffers<D>,
    runs: Vec<Range<usize>>,
    pairs: &'a [TokenizedPair],
    logp: Vec<f32>,
    entropy: Vec<f32>,
}

impl<'a, D: Device> Scorer<'a, D> {
    /// Buffers for all micro-batches of `pairs`, each of up to `token_budget` tokens, or of one pair that is longer.
    ///
    /// # Errors
    /// [`Error::Device`] if the device has not enough memory.
    pub fn new(
        model: impl Into<ScoredModel<'a, D>>,
        pairs: &'a [TokenizedPair],
        token_budget: usize,
    ) -> Result<Self> {
        let (runs, capacity) = Self::micro_batches(pairs, token_budget);
        Self::for_capacity(model, pairs, runs, capacity)
    }

    /// The micro-batches that `pairs` are scored in, as ranges of them, and what the largest holds.
    pub fn micro_batches(pairs: &[TokenizedPair], token_budget: usize) -> (Vec<Range<usize>>, Capacity) {
        let sizes: Vec<usize> = pairs.iter().map(TokenizedPair::tokens).collect();
        let runs = micro_batches(&sizes, token_budget);
        let packed = runs.iter().map(|run| PairBatch::pack(&pairs[run.clone()], Sides::Both));
        let capacity = packed.fold(Capacity::default(), |capacity, batch| capacity.cover(&batch));
        (runs, capacity)
    }

    /// As [`Scorer::new`], for what [`Scorer::micro_batches`] gives.
    ///
    /// # Errors
    /// As [`Scorer::new`].
    pub fn for_capacity(
        model: impl Into<ScoredModel<'a, D>>,
        pairs: &'a [TokenizedPair],
        runs: Vec<Range<usize>>,
        capacity: Capacity,
    ) -> Result<Self> {
        let model: ScoredModel<'a, D> = model.into();
        let device = Arc::clone(&model.llama().device);
        device.as_part(MemoryPart::Reference, || {
            Ok(Scorer {
                activations: Activations::of(model.llama(), capacity, Purpose::Inference)?,
                batch: BatchBuffers::new(&*device, capacity.tokens, capacity.pairs, capacity.scored)?,
                model,
                runs,
                pairs,
                logp: vec![0.0; capacity.scored],
                entropy: vec![0.0; capacity.scored],
            })
        })
    }

    /// Scores the pairs in order, from the micro-batch that holds pair `first`, and returns the scores from that
    /// micro-batch's first pair on. `on_scores` gets the index of each micro-batch's first pair and its scores, and its
    /// error ends the scoring. `entropy: false` leaves entropies 0.
    ///
    /// Micro-batches are the same whatever `first` is, so that scores of two parts are to the bit those of the whole.
    ///
    /// # Errors
    /// [`Error::Numerics`] naming the first pair whose scores are not finite; those of the device and of `on_scores`.
    pub fn run_from(
        &mut self,
        first: usize,
        entropy: bool,
        on_scores: impl FnMut(usize, &[PairScore]) -> Result<()>,
    ) -> Result<Vec<PairScore>> {
        self.run_within(first..self.pairs.len(), entropy, on_scores)
    }

    /// As [`Scorer::run_from`], up to the micro-batch that holds the last pair of `wanted`.
    ///
    /// # Errors
    /// As [`Scorer::run_from`].
    pub fn run_within(
        &mut self,
        wanted: Range<usize>,
        entropy: bool,
        mut on_scores: impl FnMut(usize, &[PairScore]) -> Result<()>,
    ) -> Result<Vec<PairScore>> {
        let mut scores = Vec::with_capacity(wanted.len());
        for run in self.runs_within(&wanted) {
            let batch = PairBatch::pack(&self.pairs[run.clone()], Sides::Both);
            self.score_batch(&batch, entropy)?;
            let before = scores.len();
            for (pair, scored) in self.pairs[run.clone()].iter().zip(&batch.scored) {
                let score = self.pair_score(scored);
                score.check_finite(pair)?;
                scores.push(score);
            }
            on_scores(run.start, &scores[before..])?;
        }
        Ok(scores)
    }

    /// The micro-batches that hold pairs of `wanted`.
    fn runs_within(&self, wanted: &Range<usize>) -> Vec<Range<usize>> {
        let is_wanted = |run: &&Range<usize>| run.end > wanted.start && run.start < wanted.end;
        self.runs.iter().filter(is_wanted).cloned().collect()
    }

    /// How many forwards [`Scorer::run_within`] takes for these pairs.
    pub fn forwards(&self, wanted: &Range<usize>) -> usize {
        self.runs_within(wanted).len()
    }

    /// Where the model is cut among ranks, takes part in so many forwards that other ranks run and this one does not.
    ///
    /// # Errors
    /// Those of the device and of the other ranks; [`Error::Interrupted`].
    pub fn idle(&mut self, forwards: usize) -> Result<()> {
        let ScoredModel::Sharded(model) = &mut self.model else { return Ok(()) };
        (0..forwards).try_for_each(|_| {
            interrupt::check()?;
            model.idle()
        })
    }

    /// Scores all pairs, in order; `progress` is called with the number of pairs that were just scored. A signal ends
    /// the scoring between micro-batches.
    ///
    /// # Errors
    /// As [`Scorer::run_from`]; [`Error::Interrupted`].
    pub fn run(&mut self, entropy: bool, mut progress: impl FnMut(usize)) -> Result<Vec<PairScore>> {
        self.run_from(0, entropy, |_, scores| {
            progress(scores.len());
            interrupt::check()
        })
    }

    /// The log-prob of every scored token of all pairs, in order. Their sums are those of [`Scorer::run`].
    ///
    /// # Errors
    /// As [`Scorer::run`].
    pub fn token_logps(&mut self) -> Result<Vec<TokenLogps>> {
        let mut logps = Vec::with_capacity(self.pairs.len());
        for run in self.runs.clone() {
            interrupt::check()?;
            let batch = PairBatch::pack(&self.pairs[run.clone()], Sides::Both);
            self.score_batch(&batch, false)?;
            for (pair, scored) in self.pairs[run].iter().zip(&batch.scored) {
                self.pair_score(scored).check_finite(pair)?;
                let of = |range: &Range<usize>| self.logp[range.clone()].to_vec();
                logps.push(TokenLogps { chosen: of(&scored.chosen), rejected: of(&scored.rejected) });
            }
        }
        Ok(logps)
    }

    /// The pairs of each of `ranks` ranks that score together: micro-batches in a row, of about the same number of tokens.
    pub fn shares(&self, ranks: usize) -> Vec<Range<usize>> {
        let tokens_of =
            |run: &Range<usize>| self.pairs[run.clone()].iter().map(TokenizedPair::tokens).sum::<usize>();
        let total: usize = self.runs.iter().map(tokens_of).sum();
        let (mut shares, mut first, mut tokens) = (Vec::with_capacity(ranks), 0, 0);
        for run in &self.runs {
            tokens += tokens_of(run);
            // The share ends with the micro-batch that takes it to its part of all tokens.
            while shares.len() + 1 < ranks && tokens * ranks >= total * (shares.len() + 1) {
                shares.push(first..run.end);
                first = run.end;
            }
        }
        shares.resize(ranks - 1, first..first);
        shares.push(first..self.pairs.len());
        shares
    }

    fn score_batch(&mut self, batch: &PairBatch, entropy: bool) -> Result<()> {
        let device = Arc::clone(&self.model.llama().device);
        let count = batch.scored_tokens();
        self.batch.load(&*device, batch, &[])?;
        self.model.forward(&mut self.activations, &self.batch, batch.tokens())?;
        let model = self.model.llama();
        model.head_forward(&mut self.activations, &self.batch, &batch.scored, entropy, None)?;
        let scores = &self.activations.head.scores;
        device.download(&mut self.logp[..count], &scores.logp, 0)?;
        match entropy {
            true => device.download(&mut self.entropy[..count], &scores.entropy, 0),
            false => Ok(()),
        }
    }

    fn pair_score(&self, scored: &ScoredPair) -> PairScore {
        let sum = |values: &[f32], range: &Range<usize>| {
            values[range.clone()].iter().map(|&value| value as f64).sum()
        };
        PairScore {
            logp_chosen: sum(&self.logp, &scored.chosen),
            logp_rejected: sum(&self.logp, &scored.rejected),
            entropy_chosen: sum(&self.entropy, &scored.chosen),
            entropy_rejected: sum(&self.entropy, &scored.rejected),
            tokens_chosen: scored.chosen.len(),
            tokens_rejected: scored.rejected.len(),
        }
    }
}
