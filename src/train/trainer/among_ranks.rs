//! The step of a trainer among several ranks.

use std::sync::Arc;

use super::ranks::{OtherRanks, ROW, RankStep, SumLayers};
use super::{StepResult, Trainer, TrainingPair};
use crate::config::ShardConfig;
use crate::data::PairBatch;
use crate::device::{Device, GradientPart};
use crate::error::{Error, Result};
use crate::model::{Gradients, KeepGradients};
use crate::objective::PairOutcome;
use crate::optimizer::AdamWStep;
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
        self.other_ranks()?.begin_step();
        self.zero_metrics(pairs.len())?;
        device.zero_all(&mut self.gradients.iter_mut().flatten().collect::<Vec<_>>())?;
        let dropout = Some(self.dropout_key);
        let tokens = self.each_micro_batch(pairs, dropout, Self::micro_batch_among_ranks)?;
        if tokens == 0 {
            self.sum_nothing()?;
        }
        let Some(ranks) = &mut self.ranks else { return Err(no_ranks()) };
        ranks.sum_gradients(&mut self.gradients.outside_layers_mut().flatten().collect::<Vec<_>>())?;
        // Waits for this rank's own work alone: the computation was not yet told to wait for any sum.
        device.download(&mut [0.0], &self.metrics, 0)?;
        let (_, busy) = ranks.seconds();
        ranks.finish()?;
        let own = own_gradients(&*device, ranks, &self.gradients);
        device.gradient_norm_of_parts(&mut self.norm, &own, max_grad_norm)?;
        self.put_row(tokens, busy)?;
        self.sum_metrics(pairs.len())?;
        self.result_among_ranks(pairs, max_grad_norm)
    }

    /// Head and backward of a micro-batch; the last one's backward sums each layer's gradients.
    fn micro_batch_among_ranks(&mut self, batch: &PairBatch, is_last: bool) -> Result<()> {
        self.model.head_forward_backward(
            &mut self.gradients,
            &mut self.scratch,
            &mut self.activations,
            &self.batch,
            &batch.scored,
            &self.objective,
        )?;
        let (gradients, scratch) = (&mut self.gradients, &mut self.scratch);
        let (activations, loaded) = (&mut self.activations, &self.batch);
        let tokens = batch.tokens();
        match &mut self.ranks {
            Some(ranks) if is_last => {
                let sink = &mut SumLayers { ranks };
                self.model.backward(gradients, scratch, activations, loaded, tokens, sink)
            }
            _ => self.model.backward(gradients, scratch, activations, loaded, tokens, &mut KeepGradients),
        }
    }

    /// The sums of the layers' gradients on a rank that has no pairs, in the order in which the others' backward asks for them.
    fn sum_nothing(&mut self) -> Result<()> {
        let Some(ranks) = &mut self.ranks else { return Err(no_ranks()) };
        for layer in (self.model.lowest_trained_layer()..self.model.config.layers).rev() {
            let gradients = &mut self.gradients.layers[layer];
            ranks.sum_gradients(&mut gradients.iter_mut().flatten().collect::<Vec<_>>())?;
        }
        Ok(())
    }

    /// Fills this rank's row of the metrics.
    fn put_row(&mut self, tokens: usize, busy: f64) -> Result<()> {
        let device = Arc::clone(&self.model.device);
        let first = ROW * self.place().rank;
        device.copy(&mut self.metrics, first, &self.norm, 0, 1)?;
        let stop = if self.wants_stop { 1.0 } else { 0.0 };
        device.upload(&mut self.metrics, first + 1, &[tokens as f32, busy as f32, stop])
    }

    /// Reads what all ranks summed, and gives the device the norm over all gradients where it knows its own part alone.
    fn result_among_ranks(
        &mut self,
        pairs: &[TrainingPair<'_>],
        max_grad_norm: Option<f64>,
    ) -> Result<StepResult> {
        let (rows, outcomes) = self.download_metrics(pairs.len())?;
        let ranks = self.other_ranks()?;
        let (seconds, shard) = (ranks.seconds().0, ranks.shard);
        let rows: Vec<&[f32]> = rows.chunks_exact(ROW).collect();
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

    /// As [`Trainer::update`]: each rank updates the values whose states it has, and gets the others'.
    pub(super) fn update_among_ranks(&mut self, adamw: AdamWStep) -> Result<()> {
        self.update_all(adamw)?;
        let Some(ranks) = &mut self.ranks else { return Err(no_ranks()) };
        if ranks.shard == ShardConfig::None {
            return Ok(());
        }
        let (weights, layout) = (&mut self.model.weights, &self.model.layout);
        for (weights, layout) in weights.layers.iter_mut().zip(&layout.layers) {
            let trained = weights.iter_mut().zip(layout.iter()).filter(|(_, tensor)| tensor.trained);
            ranks.gather_weights(&mut trained.map(|(weight, _)| weight).collect::<Vec<_>>())?;
        }
        let outside = weights.outside_layers_mut().zip(layout.outside_layers());
        let trained = outside.filter(|(_, tensor)| tensor.trained);
        ranks.gather_weights(&mut trained.map(|(weight, _)| weight).collect::<Vec<_>>())?;
        ranks.finish()
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
    device: &D,
    ranks: &OtherRanks<D>,
    gradients: &'a Gradients<D>,
) -> Vec<GradientPart<'a, D>> {
    let of = |gradient| (gradient, ranks.own(device.len(gradient)));
    gradients.iter().flatten().map(of).filter(|(_, part)| !part.is_empty()).collect()
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
