//! The step of a trainer whose gradients are applied layer by layer, inside the backward.

use std::sync::Arc;

use super::{StepResult, Trainer, TrainingPair};
use crate::data::micro_batches;
use crate::device::Device;
use crate::error::Result;
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
        let device = Arc::clone(&self.model.device);
        device.zero_all(&mut self.gradients.iter_mut().flatten().collect::<Vec<_>>())?;
        let dropout = Some(self.dropout_key);
        let tokens = self.each_micro_batch(pairs, dropout, |trainer, batch, _| {
            trainer.model.head_forward_backward(
                &mut trainer.gradients,
                &mut trainer.scratch,
                &mut trainer.activations,
                &trainer.batch,
                &batch.scored,
                &trainer.objective,
            )?;
            trainer.check_before_updates(pairs, adamw)?;
            let Some(norms) = &mut trainer.layer_norms else { return Ok(()) };
            let mut sink = UpdateLayers {
                device: &*device,
                numbers: offload::layer_numbers(&trainer.states),
                states: &mut trainer.states.layers,
                offloaded: trainer.offloaded.as_mut(),
                norms,
                step: adamw,
            };
            trainer.model.backward(
                &mut trainer.gradients,
                &mut trainer.scratch,
                &mut trainer.activations,
                &trainer.batch,
                batch.tokens(),
                &mut sink,
            )
        })?;
        if let Some(norms) = &mut self.layer_norms {
            let states = (&mut self.states, self.offloaded.as_mut());
            norms.finish(&mut self.model, states, &self.gradients, adamw)?;
            norms.copy_to(&*device, &mut self.metrics)?;
        }
        let (norms, outcomes) = self.download_metrics(pairs.len())?;
        let gradient_norm = layer_updates::total(&norms);
        let loss = self.mean_loss(pairs, &outcomes);
        guard::check_finite(loss, Some(gradient_norm), pairs, &outcomes)?;
        Ok(self.alone(loss, outcomes, gradient_norm, tokens))
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
