//! The account of one run: its memory, work and time under its own options and under others.

use std::cell::{OnceCell, RefCell};
use std::collections::HashMap;
use std::sync::Arc;

use super::footprint::{Choice, Footprint, Job, Sizes};
use super::offload::Copies;
use super::rates::Rates;
use super::search::{self, Candidate, Room, Tried};
use super::work::{Trained, Volume, Work};
use crate::config::{GradientConfig, OffloadConfig, RunConfig, ShardConfig};
use crate::data::{TokenizedPair, micro_batches};
use crate::device::{Device, GroupPlace, Memory};
use crate::error::Result;
use crate::model::{FusedTensor, LlamaConfig, LlamaTensors, LoraSettings};
use crate::train::{Plan, offload_plan, sample_prompts};

/// Steps whose micro-batches are counted for the mean.
const COUNTED_STEPS: usize = 20;
/// Rates that only serve to put options in an order, where the machine's are not known.
const NOMINAL: Rates = Rates { tflops: 1.0, bandwidth: 50.0, bus: 5.0 };

/// The models of a run.
#[derive(Clone, Debug)]
pub struct Models {
    /// The model that is trained.
    pub model: LlamaConfig,
    /// The reference, where it is another.
    pub reference: Option<LlamaConfig>,
    /// The adapters, where they are trained.
    pub lora: Option<LoraSettings>,
}

/// The account of a run over these pairs.
pub struct Account<'a> {
    /// The run.
    pub config: &'a RunConfig,
    /// Its steps.
    pub plan: &'a Plan,
    /// What its memory follows from.
    pub job: Job,
    training: &'a [TokenizedPair],
    evaluation: &'a [TokenizedPair],
    trained: Trained,
    /// The model's tensors, and which of them are trained.
    layout: LlamaTensors<FusedTensor>,
    /// A step, where it does not follow from the pairs.
    assumed_step: Option<Volume>,
    /// All training pairs together, once they are asked for.
    volume: OnceCell<Volume>,
    sizes: RefCell<HashMap<usize, Sizes>>,
}

impl<'a> Account<'a> {
    /// The account of `config` over `training` and `evaluation` pairs.
    pub fn new(
        config: &'a RunConfig,
        plan: &'a Plan,
        models: Models,
        training: &'a [TokenizedPair],
        evaluation: &'a [TokenizedPair],
    ) -> Self {
        let Models { model, reference, lora } = models;
        let positions = training.iter().chain(evaluation).map(TokenizedPair::positions).max().unwrap_or(0);
        let trained = Trained::new(&model, lora.as_ref());
        let layout = LlamaTensors::layout(&model);
        let layout = match &lora {
            Some(settings) => layout.with_adapters(&model, settings),
            None => layout,
        };
        let answered = if evaluation.is_empty() { training } else { evaluation };
        let job = Job {
            model,
            reference,
            lora,
            objective: config.objective,
            pairs_per_step: plan.pairs_per_step,
            positions,
            prompts: sample_prompts(answered).iter().map(|pair| pair.prompt.len()).collect(),
            place: None,
        };
        let (assumed_step, volume, sizes) = Default::default();
        Account { config, plan, job, training, evaluation, trained, layout, assumed_step, volume, sizes }
    }

    /// The same account of one rank among several.
    #[must_use]
    pub fn among(mut self, place: GroupPlace) -> Self {
        self.job.place = Some(place).filter(|place| place.ranks > 1);
        self
    }

    /// The same account with steps of this volume, where the pairs only stand for the largest that there can be.
    #[must_use]
    pub fn with_step(self, step: Volume) -> Self {
        Account { assumed_step: Some(step), ..self }
    }

    /// The run as it is asked for.
    pub fn asked(&self) -> Choice {
        let RunConfig { memory, head, ref batch, .. } = *self.config;
        Choice { memory, head, token_budget: batch.tokens_per_micro_batch }
    }

    /// The run with other options.
    pub fn with(&self, choice: &Choice) -> RunConfig {
        let mut config = self.config.clone();
        (config.memory, config.head) = (choice.memory, choice.head);
        config.batch.tokens_per_micro_batch = choice.token_budget;
        config
    }

    /// Values of the model, and those that are trained.
    pub fn trained(&self) -> &Trained {
        &self.trained
    }

    /// The largest batches where a micro-batch has up to so many tokens.
    pub fn sizes(&self, token_budget: usize) -> Sizes {
        let mut known = self.sizes.borrow_mut();
        let sizes = known.entry(token_budget).or_insert_with(|| {
            let step = (self.job.pairs_per_step, token_budget);
            Sizes::of(self.training, self.evaluation, &self.job.objective, step)
        });
        sizes.clone()
    }

    /// The device memory that a choice takes, counted on a device of the same kind as `device` that has `limit` bytes.
    ///
    /// # Errors
    /// Those of the device.
    pub fn footprint<D: Device>(
        &self,
        device: &D,
        choice: &Choice,
        limit: Option<usize>,
    ) -> Result<Footprint> {
        let planned = Arc::new(device.planned(limit)?);
        Footprint::on(&planned, &self.job, choice, &self.sizes(choice.token_budget))
    }

    /// Tokens of the largest pair.
    fn largest_pair(&self) -> usize {
        let sides = self.job.objective.sides();
        self.training.iter().chain(self.evaluation).map(|pair| pair.tokens_of(sides)).max().unwrap_or(0)
    }

    /// A mean step where a micro-batch has up to so many tokens.
    pub fn step_volume(&self, token_budget: usize) -> Volume {
        if let Some(step) = self.assumed_step {
            let micro_batches = (step.tokens / token_budget.max(self.largest_pair()) as f64).ceil();
            return Volume { micro_batches, ..step };
        }
        let sides = self.job.objective.sides();
        let full = self.job.pairs_per_step;
        let steps = self.plan.order.from_step(0).take(COUNTED_STEPS.min(self.plan.total_steps));
        let counts: Vec<usize> = steps
            .filter(|step| step.pairs.len() == full)
            .map(|step| {
                let sizes: Vec<usize> =
                    step.pairs.iter().map(|&pair| self.training[pair].tokens_of(sides)).collect();
                micro_batches(&sizes, token_budget).len()
            })
            .collect();
        let mean = counts.iter().sum::<usize>() as f64 / counts.len().max(1) as f64;
        let volume = self.volume.get_or_init(|| Volume::of(self.training, sides));
        volume.share(full as f64 / volume.pairs.max(1.0), mean.max(1.0))
    }

    /// The work of a mean step: operations and bytes. `recomputes_head` says that the head keeps no probabilities, and `size` is the bytes of a
    /// weight.
    pub fn work(&self, choice: &Choice, recomputes_head: bool, size: usize) -> Work {
        let volume = self.step_volume(choice.token_budget);
        self.trained.work(&volume, &choice.memory, recomputes_head, size)
    }

    /// The copies of a mean step where states are offloaded; `size` is the bytes of a weight.
    pub fn copies(&self, choice: &Choice, work: &Work, size: usize, rates: &Rates) -> Option<Copies> {
        Copies::of(&self.layout, &choice.memory, (work, size), rates)
    }

    /// Bytes of pinned host memory that a choice takes.
    fn host_bytes(&self, choice: &Choice, size: usize) -> usize {
        offload_plan(&self.layout, &choice.memory, size < size_of::<f32>()).host_bytes()
    }

    /// Seconds of a mean step, with what the bus adds.
    fn seconds(&self, choice: &Choice, size: usize, rates: &Rates) -> f64 {
        let work = self.work(choice, false, size);
        let exposed = self.copies(choice, &work, size, rates).map_or(0.0, |copies| copies.exposed());
        work.seconds(rates) + exposed
    }

    /// All combinations of options that keep no more than the run as it is asked for, best first.
    pub fn candidates<D: Memory>(&self, rates: Option<Rates>) -> Vec<Candidate> {
        let size = size_of::<D::Compute>();
        let rates = rates.unwrap_or(NOMINAL);
        let (asked, largest_pair) = (self.asked(), self.largest_pair());
        let largest_batch = self.sizes(asked.token_budget).training.tokens;
        let can_offload = !D::IS_CPU;
        let room = Room { asked, largest_pair, largest_batch, can_offload, layer_budgets: &[] };
        let budgets = search::budgets(room);
        let layer_budgets: Vec<usize> =
            budgets.into_iter().filter(|&budget| self.can_apply_by_layer(budget)).collect();
        let room = Room { layer_budgets: &layer_budgets, ..room };
        let mut found = search::candidates(room, |choice| self.seconds(choice, size, &rates));
        if self.job.place.is_some() {
            // What the trainer refuses of several ranks.
            found.retain(|candidate| {
                let memory = candidate.choice.memory;
                let is_whole = memory.shard == ShardConfig::None || memory.offload == OffloadConfig::None;
                candidate.choice == asked || (memory.gradients == GradientConfig::F32 && is_whole)
            });
        }
        found
    }

    /// Whether gradients can be applied layer by layer at this budget.
    fn can_apply_by_layer(&self, token_budget: usize) -> bool {
        let mut config = self.config.clone();
        config.memory.gradients = GradientConfig::Layer;
        config.batch.tokens_per_micro_batch = token_budget;
        config.optimizer.max_grad_norm.is_none()
            && self.plan.check_micro_batches(&config, self.training).is_ok()
    }

    /// Tries options on a device like `device` until `wanted` combinations fit into `limit` bytes of it, and into `host` bytes of
    /// pinned host memory where these are known.
    ///
    /// # Errors
    /// Those of the device.
    pub fn alternatives<D: Device>(
        &self,
        device: &D,
        rates: Option<Rates>,
        (limit, host): (usize, Option<usize>),
        wanted: usize,
    ) -> Result<Vec<Tried>> {
        let mut candidates = self.candidates::<D>(rates);
        if let Some(host) = host {
            let size = size_of::<D::Compute>();
            candidates.retain(|candidate| self.host_bytes(&candidate.choice, size) <= host);
        }
        search::try_in_order(&candidates, limit, wanted, |choice| self.footprint(device, choice, Some(limit)))
    }
}
