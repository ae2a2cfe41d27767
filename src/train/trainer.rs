//! One optimiser step on a device: micro-batches forward and backward, then AdamW.

mod among_ranks;
mod buffers;
mod by_layers;
mod gathered;
mod micro_batches;
mod own_sums;
mod ranks;
mod trace;
mod workload;

use std::ops::Range;
use std::sync::Arc;

use buffers::{GradientBuffers, new_states};
use gathered::GatheredLayers;
use own_sums::OwnSums;
use ranks::OtherRanks;
pub use ranks::RankStep;
pub use trace::Trace;
pub use workload::Workload;

use super::bf16_gradients::{self, Bf16Sums};
use super::deal::Deal;
use super::layer_updates::LayerNorms;
use super::offload::Offloaded;
use crate::config::ShardConfig;
use crate::data::TokenizedPair;
use crate::device::{BatchBuffers, Device, Floats, Gradient, GroupPlace, MemoryPart, hash};
use crate::error::{Error, Result};
use crate::model::{Activations, BackwardScratch, Gradients, HeadPlan, KeepGradients, Llama, LlamaTensors};
use crate::objective::{Objective, PairOutcome, ReferencePair};
use crate::optimizer::{AdamWStep, OptimizerState, StateOptions};
use crate::ranks::RankGroup;

/// A pair with what the frozen reference says of it (zeros where the objective asks for none).
#[derive(Clone, Copy, Debug)]
pub struct TrainingPair<'a> {
    /// The pair.
    pub pair: &'a TokenizedPair,
    /// What the frozen reference says of it.
    pub reference: ReferencePair,
}

/// Results of one optimiser step.
#[derive(Clone, Debug)]
pub struct StepResult {
    /// In the order of the batch.
    pub outcomes: Vec<PairOutcome>,
    /// Mean loss of the batch.
    pub loss: f64,
    /// Global l2 norm of the gradient before clipping.
    pub gradient_norm: f32,
    /// Tokens that went through the model, on all ranks.
    pub tokens: usize,
    /// Whether any rank asks to stop after this step; see [`Trainer::request_stop`].
    pub stop_requested: bool,
    /// Each rank's part; empty where there is but one rank.
    pub ranks: Vec<RankStep>,
}

/// A model in training: weights, gradients, optimiser states and the buffers of the largest micro-batch.
#[derive(Debug)]
pub struct Trainer<D: Device> {
    /// The model in training.
    pub model: Llama<D>,
    /// Optimiser states of the trained tensors; `None` for a frozen one, and for one whose state is in host memory.
    pub states: LlamaTensors<Option<OptimizerState<D>>>,
    /// States in host memory, where some are.
    pub offloaded: Option<Offloaded<D>>,
    /// Gradients of the step, summed over its micro-batches; with one layer where [`Trainer::step_gradients`] has them elsewhere.
    pub gradients: Gradients<D>,
    /// Where the gradients of layers are summed in bf16.
    bf16_sums: Option<Bf16Sums<D>>,
    /// Seed of the dropout of adapters: which values a step drops depends on it, on the step's number and on the micro-batch.
    pub dropout_seed: u64,
    /// Key of the step under way, from which its dropout masks follow.
    dropout_key: u64,
    /// Whether this rank asks all of them to stop.
    wants_stop: bool,
    objective: Objective,
    token_budget: usize,
    state_options: StateOptions,
    activations: Activations<D>,
    scratch: BackwardScratch<D>,
    batch: BatchBuffers<D>,
    /// Everything that the host reads of a step, so that it waits once: the norms, two values each, or among several ranks a row
    /// of [`ranks::ROW`] values for each; then `[pairs of a step, PairOutcome::WIDTH]`, in the order in which `dealt` has them.
    metrics: Floats<D>,
    /// Who computed which pairs of the last batch.
    dealt: Deal,
    /// The other ranks, where there are some.
    ranks: Option<OtherRanks<D>>,
    /// Where gradients are sharded among them: this rank's values of those of the layers. `gradients` has one layer then.
    own_sums: Option<OwnSums<D>>,
    /// Where weights are sharded among them. `model.weights.layers` has this rank's values alone then.
    gathered: Option<GatheredLayers<D>>,
    /// Micro-batches of the last batch that another rank has and this one has not.
    idle_rounds: usize,
    /// Where the outcomes begin in `metrics`.
    first_outcome: usize,
    /// Where gradients are applied layer by layer.
    layer_norms: Option<LayerNorms<D>>,
    /// `[2]`: norm, clip factor.
    norm: Floats<D>,
}

impl<D: Device> Trainer<D> {
    /// Gradients, optimiser states and buffers for `model`, whose frozen tensors get none of the first two.
    ///
    /// # Errors
    /// [`Error::Config`] where every tensor is frozen; [`Error::Device`] where the device has no memory for them.
    pub fn new(model: Llama<D>, objective: Objective, workload: Workload) -> Result<Self> {
        Self::with_group(model, objective, workload, None)
    }

    /// As [`Trainer::new`], of one of the ranks of `group`. All ranks must make the same calls with the same pairs: each computes
    /// its share of them, and gets the results of all.
    ///
    /// # Errors
    /// As [`Trainer::new`], and [`Error::Config`] for options that several ranks do not have.
    pub fn with_group(
        mut model: Llama<D>,
        objective: Objective,
        workload: Workload,
        group: Option<RankGroup<D>>,
    ) -> Result<Self> {
        let ranks = OtherRanks::new(group, &workload.memory)?;
        if !model.layout.iter().any(|tensor| tensor.trained) {
            return Err(Error::config(
                "every tensor of the model is frozen: there is nothing to train",
                "leave a tensor to be trained",
            ));
        }
        let device = Arc::clone(&model.device);
        let device = device.as_ref();
        let gathered = match &ranks {
            Some(ranks) if ranks.shard == ShardConfig::Weights => {
                Some(GatheredLayers::new(&mut model, ranks)?)
            }
            _ => None,
        };
        let capacity = workload.micro_batch;
        let offloaded = device.as_part(MemoryPart::OptimizerStates, || {
            Offloaded::new(&model, &workload.memory, workload.rounding_seed)
        })?;
        let states = new_states(&model, workload, ranks.as_ref())?;
        let GradientBuffers { gradients, layer_norms, own_sums, bf16_sums } =
            GradientBuffers::new(&model, &workload.memory, ranks.as_ref())?;
        let first_outcome = match &ranks {
            Some(ranks) => ranks.rows(),
            None => 2 * layer_norms.as_ref().map_or(1, LayerNorms::count),
        };
        let mut batch = BatchBuffers::new(device, capacity.tokens, capacity.pairs, capacity.scored)?;
        batch.padding_token = model.config.pad_token_id;
        Ok(Trainer {
            states,
            offloaded,
            gradients,
            bf16_sums,
            dropout_seed: 0,
            dropout_key: 0,
            wants_stop: false,
            objective,
            token_budget: workload.token_budget,
            state_options: workload.memory.states,
            scratch: BackwardScratch::new(device, &model.config, capacity)?,
            batch,
            metrics: device.as_part(MemoryPart::Batch, || {
                device.alloc(first_outcome + workload.pairs_per_step * PairOutcome::WIDTH)
            })?,
            first_outcome,
            dealt: Deal::default(),
            ranks,
            own_sums,
            gathered,
            idle_rounds: 0,
            norm: device.as_part(MemoryPart::Gradients, || device.alloc(2))?,
            layer_norms,
            // Last: the head is planned with the memory that all else leaves.
            activations: Activations::of(&model, capacity, workload.purpose())?,
            model,
        })
    }

    /// One optimiser step over `pairs`, whose loss is their mean whatever the micro-batches.
    ///
    /// # Errors
    /// [`Error::Numerics`] for a loss or a gradient that is not finite, before the update; those of the device.
    pub fn step(
        &mut self,
        pairs: &[TrainingPair<'_>],
        adamw: AdamWStep,
        max_grad_norm: Option<f64>,
    ) -> Result<StepResult> {
        self.dropout_key = hash(self.dropout_seed, adamw.step.into());
        if self.layer_norms.is_some() {
            return self.step_by_layers(pairs, Some(adamw), max_grad_norm);
        }
        let result = self.accumulate_gradients(pairs, max_grad_norm)?;
        self.update(adamw)?;
        Ok(result)
    }

    /// Gradients of the mean loss over `pairs`, their norm, and the outcomes; the weights stay as they are. Where
    /// gradients are applied layer by layer, none are left.
    ///
    /// # Errors
    /// As [`Trainer::step`].
    pub fn accumulate_gradients(
        &mut self,
        pairs: &[TrainingPair<'_>],
        max_grad_norm: Option<f64>,
    ) -> Result<StepResult> {
        if self.layer_norms.is_some() {
            return self.step_by_layers(pairs, None, max_grad_norm);
        }
        if self.ranks.is_some() {
            return self.accumulate_among_ranks(pairs, max_grad_norm);
        }
        let device = Arc::clone(&self.model.device);
        self.clear_gradients()?;
        let dropout = Some(self.dropout_key);
        let tokens = self.each_micro_batch(pairs, dropout, |trainer, batch, _| {
            trainer.head_forward_backward(batch)?;
            trainer.backward(batch.tokens())
        })?;
        let gradients: Vec<_> =
            bf16_gradients::of_step(&self.gradients, self.bf16_sums.as_ref()).into_iter().flatten().collect();
        device.gradient_norm_of(&mut self.norm, &gradients, max_grad_norm)?;
        device.copy(&mut self.metrics, 0, &self.norm, 0, 2)?;
        let (norms, outcomes) = self.download_metrics(pairs.len())?;
        let (loss, gradient_norm) = (self.mean_loss(pairs, &outcomes), norms[0]);
        super::guard::check_finite(loss, Some(gradient_norm), pairs, &outcomes)?;
        Ok(self.alone(loss, outcomes, gradient_norm, tokens))
    }

    /// The result of a step on the only rank.
    fn alone(&self, loss: f64, outcomes: Vec<PairOutcome>, gradient_norm: f32, tokens: usize) -> StepResult {
        let stop_requested = self.wants_stop;
        StepResult { loss, outcomes, gradient_norm, tokens, stop_requested, ranks: Vec::new() }
    }

    /// Sets the gradients to zero, and their sums.
    fn clear_gradients(&mut self) -> Result<()> {
        let device = &*self.model.device;
        if let Some(sums) = &mut self.bf16_sums {
            sums.clear(device)?;
        }
        device.zero_all(&mut self.gradients.iter_mut().flatten().collect::<Vec<_>>())
    }

    /// The backward of a micro-batch after that of its head, for an update after all of them.
    fn backward(&mut self, tokens: usize) -> Result<()> {
        let (gradients, scratch) = (&mut self.gradients, &mut self.scratch);
        let (activations, batch) = (&mut self.activations, &self.batch);
        let device = Arc::clone(&self.model.device);
        match &mut self.bf16_sums {
            None => self.model.backward(gradients, scratch, activations, batch, tokens, &mut KeepGradients),
            Some(sums) => {
                let mut sink = sums.sink(&device);
                self.model.backward(gradients, scratch, activations, batch, tokens, &mut sink)
            }
        }
    }

    /// The gradients that [`Trainer::accumulate_gradients`] left, for each tensor in the order of the tree; `None` for a frozen
    /// one. Where gradients are applied layer by layer, they are those outside the layers and of one layer.
    pub fn step_gradients(&self) -> Vec<Option<Gradient<'_, D>>> {
        bf16_gradients::of_step(&self.gradients, self.bf16_sums.as_ref())
    }

    /// AdamW over all trained weights, from the gradients of [`Trainer::accumulate_gradients`].
    ///
    /// # Errors
    /// Those of the device.
    pub fn update(&mut self, adamw: AdamWStep) -> Result<()> {
        if self.layer_norms.is_some() {
            return Err(Error::bug("gradients are applied layer by layer: none are left for an update"));
        }
        if self.ranks.is_some() {
            return self.update_among_ranks(adamw);
        }
        self.update_all(adamw)
    }

    /// Updates every trained weight from a gradient that is whole.
    fn update_all(&mut self, adamw: AdamWStep) -> Result<()> {
        let device = &self.model.device;
        let gradients = bf16_gradients::of_step(&self.gradients, self.bf16_sums.as_ref());
        let weights = self.model.weights.iter_mut().zip(self.states.iter_mut());
        let mut updates: Vec<_> = weights
            .zip(&gradients)
            .filter_map(|((weight, state), gradient)| Some(state.as_mut()?.update_from(weight, (*gradient)?)))
            .collect();
        device.adamw(&mut updates, &self.norm, adamw)?;
        let Some(offloaded) = &mut self.offloaded else { return Ok(()) };
        let tensors = self.model.weights.iter_mut().zip(gradients).enumerate();
        for (number, (weight, gradient)) in tensors {
            let Some(gradient) = gradient else { continue };
            offloaded.update(&**device, number, weight, gradient, &self.norm, adamw)?;
        }
        Ok(())
    }

    /// Outcomes of `pairs` under the current weights, and their mean loss.
    ///
    /// # Errors
    /// Those of the device; [`Error::Interrupted`] where a signal ends the evaluation.
    pub fn evaluate(&mut self, pairs: &[TrainingPair<'_>]) -> Result<(Vec<PairOutcome>, f64)> {
        let mut outcomes = Vec::with_capacity(pairs.len());
        let batch = (self.device().len(&self.metrics) - self.first_outcome) / PairOutcome::WIDTH;
        for chunk in pairs.chunks(batch.max(1)) {
            self.zero_metrics(chunk.len())?;
            self.each_micro_batch(chunk, None, |trainer, batch, _| {
                trainer.model.head_forward(
                    &mut trainer.activations,
                    &trainer.batch,
                    &batch.scored,
                    trainer.objective.needs_entropy(),
                    Some(&trainer.objective),
                )
            })?;
            self.idle_forwards()?;
            self.sum_metrics(chunk.len())?;
            outcomes.extend(self.download_metrics(chunk.len())?.1);
        }
        let loss = self.mean_loss(pairs, &outcomes);
        super::guard::check_finite(loss, None, pairs, &outcomes)?;
        Ok((outcomes, loss))
    }

    /// Says whether this rank asks all ranks to stop, because of a signal for instance: the next [`StepResult::stop_requested`] is
    /// true on every rank where any of them asks.
    pub fn request_stop(&mut self, wants_stop: bool) {
        self.wants_stop = wants_stop;
    }

    /// Where this rank stands.
    pub fn place(&self) -> GroupPlace {
        self.ranks.as_ref().map_or(GroupPlace { rank: 0, ranks: 1 }, OtherRanks::place)
    }

    /// The values of a trained tensor of `len` values whose states this rank has.
    pub fn own(&self, len: usize) -> Range<usize> {
        self.ranks.as_ref().map_or(0..len, |ranks| ranks.own(len))
    }

    /// Where this rank stands among those that have a part of the states each; `None` where it has all.
    pub fn shard_place(&self) -> Option<GroupPlace> {
        self.ranks.as_ref().filter(|ranks| ranks.shard != ShardConfig::None).map(OtherRanks::place)
    }

    /// The rank that computed a pair of the last batch.
    pub fn rank_of(&self, pair: usize) -> usize {
        let mut ranks = (0..self.place().ranks).take_while(|_| self.dealt.order.len() > pair);
        ranks.find(|&rank| self.dealt.pairs(rank).contains(&pair)).unwrap_or(0)
    }

    /// How the head works, and on how much memory.
    pub fn head_plan(&self) -> HeadPlan {
        self.activations.head.plan
    }

    /// What is kept of each trained tensor.
    pub fn state_options(&self) -> StateOptions {
        self.state_options
    }

    /// The device that the model is on.
    pub fn device(&self) -> &D {
        &self.model.device
    }
}
