//! The step of a trainer among several ranks.

use std::sync::Arc;

use super::gathered::{GatherDown, GatherUp};
use super::own_sums::{OwnSums, ScatterLayers};
use super::ranks::{OtherRanks, ROW, RankStep, SumLayers};
use super::{StepResult, Trainer, TrainingPair};
use crate::config::ShardConfig;
use crate::data::{PairBatch, micro_batches};
use crate::device::{AdamWUpdate, ComputeBuffer, Device, Floats, Gradient, GradientPart};
use crate::error::{Error, Result};
use crate::model::{Gradients, KeepGradients, LayerTensors};
use crate::objective::PairOutcome;
use crate::optimizer::{AdamWStep, MasterWeights};
use crate::train::guard;

impl<D: Device> Trainer<D> {
    /// As [`Trainer::accumulate_gradients`]: this rank's share of the pairs, and sums over all ranks.
    ///
    /// Gradients are summed inside the backward of the last micro-batch, layer by layer. The host waits twice: once for its own
    /// gradients, so that the time after that is known to be spent on others, and once for the sums.
    pub(super) fn accumulate_among_ranks(
        &mut self,
        pairs: &[TrainingPair<'_>],
        max_grad_norm: Option<f64>,
    ) -> Result<StepResult> {
        let device = Arc::clone(&self.model.device);
        self.other_ranks()?.begin_step()?;
        self.zero_metrics(pairs.len())?;
        let sums = self.own_sums.iter_mut().flat_map(OwnSums::iter_mut);
        device.zero_all(&mut self.gradients.iter_mut().flatten().chain(sums).collect::<Vec<_>>())?;
        let dropout = Some(self.dropout_key);
        let tokens = self.each_micro_batch(pairs, dropout, Self::micro_batch_among_ranks)?;
        self.sum_nothing(tokens == 0)?;
        let Some(ranks) = &mut self.ranks else { return Err(no_ranks()) };
        ranks.sum_gradients(&mut self.gradients.outside_layers_mut().flatten().collect::<Vec<_>>())?;
        // Waits for this rank's own work, and where gradients are sharded for the sums that its backward has waited for. The
        // computation is told to wait for all other sums after this.
        device.download(&mut [0.0], &self.metrics, 0)?;
        let (_, busy) = ranks.seconds();
        ranks.finish()?;
        let own = own_gradients(ranks, &self.gradients, self.own_sums.as_ref());
        device.gradient_norm_of_parts(&mut self.norm, &own, max_grad_norm)?;
        self.put_row(tokens, busy)?;
        self.sum_metrics(pairs.len())?;
        self.result_among_ranks(pairs, max_grad_norm)
    }

    /// Head and backward of a micro-batch. The last one's backward sums each layer's gradients; where gradients are sharded, every
    /// one does.
    fn micro_batch_among_ranks(&mut self, batch: &PairBatch, is_last: bool) -> Result<()> {
        self.head_forward_backward(batch)?;
        let (gradients, scratch) = (&mut self.gradients, &mut self.scratch);
        let (activations, loaded) = (&mut self.activations, &self.batch);
        let tokens = batch.tokens();
        let lowest = self.model.lowest_trained_layer();
        match (&mut self.ranks, &mut self.own_sums, &mut self.gathered) {
            (Some(ranks), Some(sums), Some(gathered)) => {
                let sink = &mut GatherDown { ranks, gathered, sums, lowest };
                self.model.backward(gradients, scratch, activations, loaded, tokens, sink)
            }
            (Some(ranks), Some(sums), None) => {
                let sink = &mut ScatterLayers { ranks, sums };
                self.model.backward(gradients, scratch, activations, loaded, tokens, sink)
            }
            (Some(ranks), None, _) if is_last => {
                let sink = &mut SumLayers { ranks };
                self.model.backward(gradients, scratch, activations, loaded, tokens, sink)
            }
            _ => self.model.backward(gradients, scratch, activations, loaded, tokens, &mut KeepGradients),
        }
    }

    /// How many micro-batches more than `own` another rank has.
    pub(super) fn idle_rounds(&self, own: usize, sizes: &[usize]) -> usize {
        let count = |rank| {
            let sizes: Vec<usize> = self.dealt.pairs(rank).iter().map(|&pair| sizes[pair]).collect();
            micro_batches(&sizes, self.token_budget).len()
        };
        (0..self.place().ranks).map(count).max().unwrap_or(0).saturating_sub(own)
    }

    /// The sums of the layers' gradients that other ranks' backward asks for and this rank's did not, in the same order. `has_none` says
    /// that this rank has no pairs.
    fn sum_nothing(&mut self, has_none: bool) -> Result<()> {
        let Some(ranks) = &mut self.ranks else { return Err(no_ranks()) };
        let layers = self.model.lowest_trained_layer()..self.model.config.layers;
        if let Some(sums) = &mut self.own_sums {
            for _ in 0..self.idle_rounds {
                let gradients = &mut self.gradients;
                match &mut self.gathered {
                    None => ScatterLayers { ranks, sums }.idle(gradients, layers.clone())?,
                    Some(gathered) => {
                        let weights = &mut self.model.weights.layers;
                        GatherUp { ranks, gathered }.idle(weights)?;
                        let lowest = layers.start;
                        GatherDown { ranks, gathered, sums, lowest }.idle(
                            weights,
                            gradients,
                            layers.clone(),
                        )?;
                    }
                }
            }
            return sums.settle(ranks);
        }
        if !has_none {
            return Ok(());
        }
        for layer in layers.rev() {
            let gradients = &mut self.gradients.layers[layer];
            ranks.sum_gradients(&mut gradients.iter_mut().flatten().collect::<Vec<_>>())?;
        }
        Ok(())
    }

    /// Fills this rank's row of the metrics.
    fn put_row(&mut self, tokens: usize, busy: f64) -> Result<()> {
        let Trainer { model, metrics, norm, wants_stop, ranks: Some(ranks), .. } = self else {
            return Err(no_ranks());
        };
        let (device, first) = (&*model.device, ROW * ranks.place().rank);
        device.copy(metrics, first, norm, 0, 1)?;
        let stop = if *wants_stop { 1.0 } else { 0.0 };
        device.upload(metrics, first + 1, &[tokens as f32, busy as f32, stop])?;
        device.copy(metrics, first + 4, &ranks.own_norms, 0, 1)
    }

    /// Reads what all ranks summed, and gives the device the norm over all gradients where it knows its own part alone.
    fn result_among_ranks(
        &mut self,
        pairs: &[TrainingPair<'_>],
        max_grad_norm: Option<f64>,
    ) -> Result<StepResult> {
        let (rows, outcomes) = self.download_metrics(pairs.len())?;
        let rows: Vec<&[f32]> = rows.chunks_exact(ROW).collect();
        let of_pair = self.rank_of_broken(&outcomes);
        let ranks = self.other_ranks()?;
        let (seconds, shard) = (ranks.seconds().0, ranks.shard);
        ranks.broken = of_pair.or_else(|| rank_of_broken_gradient(&rows));
        let gradient_norm = match shard {
            // The same sums everywhere; one rank's norm stands for all, so that no two can decide differently.
            ShardConfig::None => rows[0][0],
            _ => rows.iter().map(|row| f64::from(row[0]).powi(2)).sum::<f64>().sqrt() as f32,
        };
        let loss = self.mean_loss(pairs, &outcomes);
        guard::check_finite(loss, Some(gradient_norm), pairs, &outcomes)?;
        if shard != ShardConfig::None {
            let device = Arc::clone(&self.model.device);
            device.upload(&mut self.norm, 0, &[gradient_norm, clip_factor(gradient_norm, max_grad_norm)])?;
        }
        let ranks: Vec<RankStep> = rows
            .iter()
            .map(|row| RankStep {
                tokens: row[1] as usize,
                busy_seconds: f64::from(row[2]),
                waited_seconds: (seconds - f64::from(row[2])).max(0.0),
            })
            .collect();
        Ok(StepResult {
            outcomes,
            loss,
            gradient_norm,
            tokens: ranks.iter().map(|rank| rank.tokens).sum(),
            stop_requested: rows.iter().any(|row| row[3] > 0.0),
            ranks,
        })
    }

    /// The rank that computed the first of these pairs of the last batch whose loss is not finite.
    fn rank_of_broken(&self, outcomes: &[PairOutcome]) -> Option<usize> {
        outcomes.iter().position(|outcome| !outcome.loss.is_finite()).map(|pair| self.rank_of(pair))
    }

    /// Notes the rank of the first pair of an evaluation whose loss is not finite.
    pub(super) fn note_broken(&mut self, outcomes: &[PairOutcome]) {
        let found = self.rank_of_broken(outcomes);
        if let Some(ranks) = &mut self.ranks {
            ranks.broken = ranks.broken.or(found);
        }
    }

    /// The rank that had the first number that is not finite, where there was one in the last step or evaluation, and where one
    /// rank alone had it first; `None` also where there is but one rank.
    pub fn broken_rank(&self) -> Option<usize> {
        self.ranks.as_ref()?.broken
    }

    /// As [`Trainer::update`]: each rank updates the values whose states it has, and gets the others'.
    pub(super) fn update_among_ranks(&mut self, adamw: AdamWStep) -> Result<()> {
        match self.own_sums {
            None => self.update_all(adamw)?,
            Some(_) => self.update_own(adamw)?,
        }
        let Some(ranks) = &mut self.ranks else { return Err(no_ranks()) };
        if ranks.shard == ShardConfig::None {
            return Ok(());
        }
        let (weights, layout) = (&mut self.model.weights, &self.model.layout);
        if let Some(gathered) = &mut self.gathered {
            // Each rank has its own values of the layers, and is done with them.
            gathered.forget();
        }
        let whole_layers = if self.gathered.is_some() { 0 } else { layout.layers.len() };
        for (weights, layout) in weights.layers.iter_mut().zip(&layout.layers).take(whole_layers) {
            let trained = weights.iter_mut().zip(layout.iter()).filter(|(_, tensor)| tensor.trained);
            ranks.gather(&mut trained.map(|(weight, _)| weight).collect::<Vec<_>>())?;
        }
        let outside = weights.outside_layers_mut().zip(layout.outside_layers());
        let trained = outside.filter(|(_, tensor)| tensor.trained);
        ranks.gather(&mut trained.map(|(weight, _)| weight).collect::<Vec<_>>())?;
        ranks.finish()
    }

    /// Updates the weights whose gradients this rank has, where those of layers are parts.
    fn update_own(&mut self, adamw: AdamWStep) -> Result<()> {
        let gradients = summed(&self.gradients, self.own_sums.as_ref());
        let device = &self.model.device;
        let weights = self.model.weights.iter_mut().zip(self.states.iter_mut());
        let mut updates: Vec<_> = weights
            .zip(self.model.layout.iter())
            .zip(gradients)
            .filter_map(|(((weight, state), tensor), gradient)| {
                let (gradient, first_gradient) = gradient?;
                let is_whole = device.len(weight) == tensor.values();
                let update = state.as_mut()?.update(weight, gradient);
                let first_weight = if is_whole { 0 } else { update.part.as_ref()?.start };
                Some(AdamWUpdate { first_gradient, first_weight, ..update })
            })
            .collect();
        device.adamw(&mut updates, &self.norm, adamw)
    }

    /// Gives every rank a word of this one, and waits for theirs: in the order of the ranks. Alone, the word comes back at once.
    ///
    /// # Errors
    /// Those of the device and of the other ranks.
    pub fn exchange(&mut self, word: u32) -> Result<Vec<u32>> {
        match &mut self.ranks {
            Some(ranks) => ranks.exchange(word),
            None => Ok(vec![word]),
        }
    }

    /// The f32 values of all trained tensors, in the order of the model, where states are sharded and each rank has its own values
    /// alone; `None` where it has all of them. Every rank must call it.
    ///
    /// # Errors
    /// As [`Trainer::exchange`].
    pub fn gather_masters(&mut self) -> Result<Option<Vec<Option<Vec<f32>>>>> {
        let Some(ranks) = self.ranks.as_mut().filter(|ranks| ranks.shard != ShardConfig::None) else {
            return Ok(None);
        };
        let device = &self.model.device;
        let tensors = self.model.layout.iter().zip(self.model.weights.iter()).zip(self.states.iter());
        let whole = tensors.map(|((tensor, weight), state)| {
            if !tensor.trained {
                return Ok(None);
            }
            let mut values = vec![0.0; tensor.values()];
            if !device.needs_master() || self.state_options.master == MasterWeights::None {
                if device.len(weight) == values.len() {
                    device.download_compute(&mut values, weight, 0)?;
                    return Ok(Some(values));
                }
                let mut gathered: ComputeBuffer<D> = device.alloc(values.len())?;
                let own = ranks.own(values.len());
                device.copy(&mut gathered, own.start, weight, 0, own.len())?;
                ranks.gather(&mut [&mut gathered])?;
                ranks.finish()?;
                device.download_compute(&mut values, &gathered, 0)?;
                return Ok(Some(values));
            }
            let mut gathered: Floats<D> = device.alloc(values.len())?;
            if let Some((state, master)) =
                state.as_ref().and_then(|state| Some((state, state.master.as_ref()?)))
            {
                let first = state.part.as_ref().map_or(0, |part| part.start);
                let in_weight = if device.len(weight) == values.len() { first } else { 0 };
                let own = &mut values[first..first + master.len(device)];
                master.download(device, (weight, in_weight), 0, own)?;
                device.upload(&mut gathered, first, own)?;
            }
            ranks.gather(&mut [&mut gathered])?;
            ranks.finish()?;
            device.download(&mut values, &gathered, 0)?;
            Ok(Some(values))
        });
        Ok(Some(whole.collect::<Result<_>>()?))
    }

    /// Takes part in the forwards of an evaluation that other ranks have and this one has not.
    pub(super) fn idle_forwards(&mut self) -> Result<()> {
        let (Some(ranks), Some(gathered)) = (&mut self.ranks, &mut self.gathered) else { return Ok(()) };
        let mut source = GatherUp { ranks, gathered };
        (0..self.idle_rounds).try_for_each(|_| source.idle(&mut self.model.weights.layers))
    }

    /// Says that the parts of sharded weights have new values.
    pub(in crate::train) fn forget_gathered(&mut self) {
        self.gathered.iter_mut().for_each(|gathered| gathered.forget());
    }

    /// Whether the weights of layers are sharded, so that this rank has its own values of them alone.
    pub fn has_weight_parts(&self) -> bool {
        self.gathered.is_some()
    }

    /// A layer's whole weights, where they are sharded; every rank must call it with the same layer.
    ///
    /// # Errors
    /// As [`Trainer::exchange`].
    pub fn gather_layer(&mut self, layer: usize) -> Result<&LayerTensors<ComputeBuffer<D>>> {
        let (Some(ranks), Some(gathered)) = (&mut self.ranks, &mut self.gathered) else {
            return Ok(&self.model.weights.layers[layer]);
        };
        gathered.fetch(ranks, layer, &self.model.weights.layers)?;
        Ok(gathered.layer(layer))
    }

    /// Sets what the ranks sum to zero: each adds its own.
    pub(super) fn zero_metrics(&mut self, pairs: usize) -> Result<()> {
        if self.ranks.is_none() {
            return Ok(());
        }
        let values = self.first_outcome + pairs * PairOutcome::WIDTH;
        let device = Arc::clone(&self.model.device);
        device.zero(&mut self.metrics, 0..values)
    }

    /// Sums the metrics over all ranks.
    pub(super) fn sum_metrics(&mut self, pairs: usize) -> Result<()> {
        let Some(ranks) = &mut self.ranks else { return Ok(()) };
        ranks.sum_metrics(&mut self.metrics, self.first_outcome + pairs * PairOutcome::WIDTH)
    }

    fn other_ranks(&mut self) -> Result<&mut OtherRanks<D>> {
        self.ranks.as_mut().ok_or_else(no_ranks)
    }
}

/// The gradients whose sums this rank has, and the values of them that count for the norm of all.
fn own_gradients<'a, D: Device>(
    ranks: &OtherRanks<D>,
    gradients: &'a Gradients<D>,
    sums: Option<&'a OwnSums<D>>,
) -> Vec<GradientPart<'a, D>> {
    let device = ranks.device();
    let whole = |gradient| (Gradient::F32(gradient), ranks.own(device.len(gradient)));
    let all: Vec<GradientPart<'a, D>> = match sums {
        None => gradients.iter().flatten().map(whole).collect(),
        Some(sums) => {
            let of_layers = sums.iter().map(|sum| (Gradient::F32(sum), 0..device.len(sum)));
            gradients.outside_layers().flatten().map(whole).chain(of_layers).collect()
        }
    };
    all.into_iter().filter(|(_, part)| !part.is_empty()).collect()
}

/// The gradient of each tensor, in the order of the model, and the value of the tensor with which it begins.
fn summed<'a, D: Device>(
    gradients: &'a Gradients<D>,
    sums: Option<&'a OwnSums<D>>,
) -> Vec<Option<(&'a Floats<D>, usize)>> {
    let whole = |gradient: &'a Option<Floats<D>>| gradient.as_ref().map(|gradient| (gradient, 0));
    let Some(sums) = sums else { return gradients.iter().map(whole).collect() };
    let of_layers = sums.layers.iter().flatten();
    std::iter::once(whole(&gradients.embedding))
        .chain(of_layers.map(|sum| sum.values.as_ref().map(|values| (values, sum.part.start))))
        .chain(std::iter::once(whole(&gradients.final_norm)))
        .chain(gradients.lm_head.as_ref().map(whole))
        .collect()
}

/// The first rank whose own gradients were not finite, else the only one that got sums that are not, from the rows of all ranks.
fn rank_of_broken_gradient(rows: &[&[f32]]) -> Option<usize> {
    let broken = |value: usize| rows.iter().enumerate().filter(move |(_, row)| !row[value].is_finite());
    let own = broken(4).map(|(rank, _)| rank).next();
    own.or_else(|| broken(0).map(|(rank, _)| rank).next().filter(|_| broken(0).count() == 1))
}

/// The factor that clips gradients of this norm, as the devices compute it.
fn clip_factor(norm: f32, max_norm: Option<f64>) -> f32 {
    match max_norm.map(|max_norm| max_norm as f32 / (norm + 1e-6)) {
        Some(factor) if factor < 1.0 => factor,
        _ => 1.0,
    }
}

fn no_ranks() -> Error {
    Error::bug("a trainer without other ranks was asked for a step among them")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rank_of_a_gradient_that_is_not_finite_is_found() {
        let row = |sums: f32, own: f32| [sums, 10.0, 0.5, 0.0, own];
        let found = |rows: [[f32; ROW]; 3]| rank_of_broken_gradient(&rows.each_ref().map(|row| &row[..]));
        assert_eq!(found([row(1.0, 2.0); 3]), None);
        // Its own gradient, which has spoilt the sums of all; and sums that one rank alone did not get.
        let nan = f32::NAN;
        assert_eq!(found([row(nan, 2.0), row(nan, 2.0), row(nan, f32::INFINITY)]), Some(2));
        assert_eq!(found([row(1.0, 2.0), row(nan, 2.0), row(1.0, 2.0)]), Some(1));
        // Finite gradients whose sum is not: no rank had it first.
        assert_eq!(found([row(f32::INFINITY, 3e38); 3]), None);
    }
}
