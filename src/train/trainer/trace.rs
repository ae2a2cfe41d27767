//! A step looked at closely: where the first number appears that is not finite.

use std::sync::Arc;

use half::bf16;

use super::{Trainer, TrainingPair};
use crate::data::PairBatch;
use crate::device::{ComputeBuffer, Device, Floats, Gradient, hash};
use crate::error::Result;
use crate::objective::PairOutcome;
use crate::train::{bf16_gradients, layer_updates};

/// Values downloaded at a time.
const PIECE: usize = 1 << 20;

/// What a step computes, without its update.
#[derive(Clone, Debug)]
pub struct Trace {
    /// In the order of the batch.
    pub outcomes: Vec<PairOutcome>,
    /// Mean loss of the batch.
    pub loss: f64,
    /// Global l2 norm of the gradient before clipping.
    pub gradient_norm: f32,
    /// The first number that is not finite, in the order of the computation; `None` where all are.
    pub first: Option<Broken>,
}

/// A number that is not finite.
#[derive(Clone, Debug, PartialEq)]
pub struct Broken {
    /// What it is a value of.
    pub place: String,
    /// NaN or an infinity.
    pub value: f32,
    /// 0-based place in the batch of the pair that it belongs to, where it belongs to one.
    pub pair: Option<usize>,
}

impl<D: Device> Trainer<D> {
    /// The gradients of the step with 1-based number `step` over `pairs`, as [`Trainer::step`] forms them before its update, with
    /// a look at every stage. The weights stay as they are.
    ///
    /// # Errors
    /// Those of the device. Numbers that are not finite are no error here.
    pub fn trace(&mut self, pairs: &[TrainingPair<'_>], step: u32) -> Result<Trace> {
        self.dropout_key = hash(self.dropout_seed, step.into());
        let mut first = self.first_in_weights()?;
        self.clear_gradients()?;
        let mut done = 0;
        self.each_micro_batch(pairs, Some(self.dropout_key), |trainer, batch, _| {
            first = first
                .take()
                .map_or_else(|| trainer.first_in_forward(batch, done), |found| Ok(Some(found)))?;
            trainer.head_forward_backward(batch)?;
            first =
                first.take().map_or_else(|| trainer.first_in_head(batch, done), |found| Ok(Some(found)))?;
            done += batch.spans.len();
            match trainer.layer_norms.is_some() {
                true => trainer.backward_by_layers(batch.tokens(), None),
                false => trainer.backward(batch.tokens()),
            }
        })?;
        let gradient_norm = self.norm_of_gradients()?;
        if first.is_none() && !gradient_norm.is_finite() {
            first = self.first_in_gradients()?;
        }
        let outcomes = self.download_outcomes(pairs.len())?;
        Ok(Trace { loss: self.mean_loss(pairs, &outcomes), outcomes, gradient_norm, first })
    }

    fn norm_of_gradients(&mut self) -> Result<f32> {
        if self.layer_norms.is_some() {
            self.finish_by_layers(None)?;
            return Ok(layer_updates::total(&self.download_metrics(0)?.0));
        }
        let device = Arc::clone(&self.model.device);
        let gradients: Vec<_> = bf16_gradients::of_step(&self.gradients, self.bf16_sums.as_ref());
        let gradients: Vec<_> = gradients.into_iter().flatten().collect();
        device.gradient_norm_of(&mut self.norm, &gradients, None)?;
        let mut norm = [0.0; 2];
        device.download(&mut norm, &self.norm, 0)?;
        Ok(norm[0])
    }

    fn first_in_weights(&self) -> Result<Option<Broken>> {
        for (tensor, weight) in self.model.layout.iter().zip(self.model.weights.iter()) {
            if let Some((index, value)) = self.first_in_compute(weight, tensor.values())? {
                let place = format!("weight `{}` at index {index}, before the step", tensor.name());
                return Ok(Some(Broken { place, value, pair: None }));
            }
        }
        Ok(None)
    }

    /// Looks at the residual stream that the forward left. `before` is the number of pairs of the step in earlier micro-batches.
    fn first_in_forward(&self, batch: &PairBatch, before: usize) -> Result<Option<Broken>> {
        let (layers, width) = (self.model.config.layers, self.model.config.hidden_size);
        let activations = &self.activations;
        let mut stages: Vec<(String, &ComputeBuffer<D>)> = Vec::new();
        let keeps_all = activations.residual.len() > layers;
        if keeps_all {
            stages.push(("the embedding".to_string(), &activations.residual[0]));
        }
        for layer in 0..layers {
            if activations.middle.len() == layers {
                let after = format!("the residual stream after the attention of layer {layer}");
                stages.push((after, &activations.middle[layer]));
            }
            if keeps_all || layer + 1 == layers {
                let after = format!("the residual stream after the MLP of layer {layer}");
                stages.push((after, &activations.residual[activations.residual_slot(layer + 1)]));
            }
        }
        for (place, buffer) in stages {
            if let Some((index, value)) = self.first_in_compute(buffer, batch.tokens() * width)? {
                let row = index / width;
                let pair = batch.spans.iter().position(|span| span.rows().contains(&row));
                let place = format!("{place}, in column {} of token {row} of the micro-batch", index % width);
                return Ok(Some(Broken { place, value, pair: pair.map(|pair| before + pair) }));
            }
        }
        Ok(None)
    }

    /// Looks at the log-probs and the losses of a micro-batch.
    fn first_in_head(&self, batch: &PairBatch, before: usize) -> Result<Option<Broken>> {
        let head = &self.activations.head;
        if let Some((index, value)) = self.first_in_floats(&head.scores.logp, batch.scored_tokens())? {
            let of = |scored: &crate::data::ScoredPair| {
                scored.chosen.contains(&index) || scored.rejected.contains(&index)
            };
            let pair = batch.scored.iter().position(of).map(|pair| before + pair);
            let place = format!("the log-prob of scored token {index} of the micro-batch");
            return Ok(Some(Broken { place, value, pair }));
        }
        let mut outcomes = vec![PairOutcome::default(); batch.spans.len()];
        self.device().download::<f32>(bytemuck::cast_slice_mut(&mut outcomes), &head.outcomes, 0)?;
        let broken = outcomes.iter().position(|outcome| !outcome.loss.is_finite());
        Ok(broken.map(|pair| Broken {
            place: "the loss of a pair, whose log-probs are finite".to_string(),
            value: outcomes[pair].loss,
            pair: Some(before + pair),
        }))
    }

    /// Looks at the gradients, in the order in which the backward forms them.
    fn first_in_gradients(&self) -> Result<Option<Broken>> {
        if let Some(norms) = &self.layer_norms {
            let found = norms.first_broken(self.device())?;
            return Ok(found.map(|layer| {
                let place = match layer {
                    Some(layer) => format!("the gradients of layer {layer}"),
                    None => "the gradients outside the layers".to_string(),
                };
                Broken { place, value: f32::NAN, pair: None }
            }));
        }
        let named = self.model.layout.iter().zip(self.step_gradients());
        let gradients: Vec<_> =
            named.filter_map(|(tensor, gradient)| Some((tensor.name(), gradient?))).collect();
        // The backward goes through the tensors from the last to the first.
        for (name, gradient) in gradients.into_iter().rev() {
            if let Some((index, value)) = self.first_in_gradient(gradient)? {
                let place = format!("the gradient of `{name}`, at index {index}");
                return Ok(Some(Broken { place, value, pair: None }));
            }
        }
        // Each is finite, and the sum of their squares is not.
        let place = "the norm over all gradients, each of which is finite".to_string();
        Ok(Some(Broken { place, value: f32::INFINITY, pair: None }))
    }

    fn first_in_compute(&self, buffer: &ComputeBuffer<D>, values: usize) -> Result<Option<(usize, f32)>> {
        let device = self.device();
        first_broken(values, |piece, offset| device.download_compute(piece, buffer, offset))
    }

    fn first_in_gradient(&self, gradient: Gradient<'_, D>) -> Result<Option<(usize, f32)>> {
        let (device, values) = (self.device(), gradient.values(self.device()));
        match gradient {
            Gradient::F32(gradient) => self.first_in_floats(gradient, values),
            Gradient::Bf16(gradient) => first_broken(values, |piece, offset| {
                let mut narrow = vec![bf16::ZERO; piece.len()];
                device.download(&mut narrow, gradient, offset)?;
                piece.iter_mut().zip(narrow).for_each(|(value, narrow)| *value = narrow.to_f32());
                Ok(())
            }),
        }
    }

    fn first_in_floats(&self, buffer: &Floats<D>, values: usize) -> Result<Option<(usize, f32)>> {
        let device = self.device();
        first_broken(values, |piece, offset| device.download(piece, buffer, offset))
    }
}

/// Index and value of the first of `values` numbers that is not finite.
fn first_broken(
    values: usize,
    mut download: impl FnMut(&mut [f32], usize) -> Result<()>,
) -> Result<Option<(usize, f32)>> {
    let mut piece = Vec::new();
    for offset in (0..values).step_by(PIECE) {
        piece.resize(PIECE.min(values - offset), 0.0);
        download(&mut piece, offset)?;
        if let Some(index) = piece.iter().position(|value| !value.is_finite()) {
            return Ok(Some((offset + index, piece[index])));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_broken_value_is_found_beyond_a_piece() {
        let numbers = |broken: usize| {
            move |piece: &mut [f32], offset: usize| {
                for (index, value) in piece.iter_mut().enumerate() {
                    *value = if offset + index >= broken { f32::INFINITY } else { 1.0 };
                }
                Ok(())
            }
        };
        let all = 2 * PIECE + 5;
        assert_eq!(first_broken(all, numbers(PIECE + 3)).unwrap(), Some((PIECE + 3, f32::INFINITY)));
        assert_eq!(first_broken(all, numbers(all)).unwrap(), None);
        assert_eq!(first_broken(0, numbers(0)).unwrap(), None);
    }
}
