//! The step of a trainer whose gradients are applied layer by layer, inside the backward.

use std::sync::Arc;

use super::{StepResult, Trainer, TrainingPair};
use crate::data::micro_batches;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::objective::PairOutcome;
use crate::optimizer::AdamWStep;
use crate::train::layer_updates::{self, UpdateLayers};
use crate::train::{guard, offload};

impl<D: Device> Trainer<D> {
    /// As [`Trainer::step`], or without `adamw` as [`Trainer::accumulate_gradients`], with the gradients of one layer at a time.
    pub(super) fn step_by_layers(
        &mut self,
        pairs: &[TrainingPair<'_>],
        adamw: Option<AdamWStep>,
        max_grad_norm: Option<f64>,
    ) -> Result<StepResult> {
        let sizes = self.pair_sizes(pairs);
        layer_updates::check(micro_batches(&sizes, self.token_budget).len(), max_grad_norm)?;
        self.clear_gradients()?;
        let dropout = Some(self.dropout_key);
        let tokens = self.each_micro_batch(pairs, dropout, |trainer, batch, _| {
            trainer.head_forward_backward(batch)?;
            trainer.check_before_updates(pairs, adamw)?;
            trainer.backward_by_layers(batch.tokens(), adamw)
        })?;
        self.finish_by_layers(adamw)?;
        let (norms, outcomes) = self.download_metrics(pairs.len())?;
        let gradient_norm = layer_updates::total(&norms);
        let loss = self.mean_loss(pairs, &outcomes);
        guard::check_finite(loss, Some(gradient_norm), pairs, &outcomes)?;
        Ok(self.alone(loss, outcomes, gradient_norm, tokens))
    }

    /// The backward of a micro-batch after that of its head, which takes the norm of each layer's gradients when they are complete,
    /// and updates the layer where `adamw` asks for it.
    pub(super) fn backward_by_layers(&mut self, tokens: usize, adamw: Option<AdamWStep>) -> Result<()> {
        let Some(norms) = &mut self.layer_norms else { return Err(not_by_layers()) };
        let device = Arc::clone(&self.model.device);
        let mut sink = UpdateLayers {
            device: &*device,
            numbers: offload::layer_numbers(&self.states),
            states: &mut self.states.layers,
            offloaded: self.offloaded.as_mut(),
            norms,
            step: adamw,
        };
        let (gradients, scratch) = (&mut self.gradients, &mut self.scratch);
        let (activations, batch) = (&mut self.activations, &self.batch);
        self.model.backward(gradients, scratch, activations, batch, tokens, &mut sink)
    }

    /// What follows the backward: the norm of the gradients outside the layers, the update of those tensors where `adamw` asks for
    /// it, and all norms in the metrics.
    pub(super) fn finish_by_layers(&mut self, adamw: Option<AdamWStep>) -> Result<()> {
        let Some(norms) = &mut self.layer_norms else { return Err(not_by_layers()) };
        let states = (&mut self.states, self.offloaded.as_mut());
        norms.finish(&mut self.model, states, &self.gradients, adamw)?;
        norms.copy_to(&self.model.device, &mut self.metrics)
    }

    /// Fails where a loss is not finite, before the first layer is updated inside the backward. The gradients of all layers are
    /// known only after that: where one of them is not finite the run ends too, with nothing saved.
    fn check_before_updates(&mut self, pairs: &[TrainingPair<'_>], adamw: Option<AdamWStep>) -> Result<()> {
        if adamw.is_none() {
            return Ok(());
        }
        let device = Arc::clone(&self.model.device);
        let values = pairs.len() * PairOutcome::WIDTH;
        // The step is one micro-batch, so that these are all its pairs.
        let first = self.first_outcome;
        device.copy(&mut self.metrics, first, &self.activations.head.outcomes, 0, values)?;
        let outcomes = self.download_outcomes(pairs.len())?;
        guard::check_finite(self.mean_loss(pairs, &outcomes), None, pairs, &outcomes)
    }
}

fn not_by_layers() -> Error {
    Error::bug("a trainer that keeps all gradients was asked for a step layer by layer")
}
