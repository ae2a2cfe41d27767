//! How much device memory a run takes: its buffers are made, by the code that makes them in the run, on a device that only counts.

use std::sync::Arc;

use crate::config::MemoryConfig;
use crate::data::TokenizedPair;
use crate::device::{Device, GroupPlace, MemoryPart, MemoryParts, StorageType};
use crate::error::{Error, Result};
use crate::model::{Capacity, Generation, HeadOptions, HeadPlan, Llama, LlamaConfig, LoraSettings};
use crate::objective::Objective;
use crate::ranks::RankGroup;
use crate::score::Scorer;
use crate::train::{LoadedModel, MAX_NEW_TOKENS, Trainer, Workload};

/// What the memory of a run follows from, but for what [`Choice`] leaves open.
#[derive(Clone, Debug)]
pub struct Job {
    /// The model that is trained.
    pub model: LlamaConfig,
    /// The frozen reference, where it is another model.
    pub reference: Option<LlamaConfig>,
    /// The adapters that are trained in place of the weights.
    pub lora: Option<LoraSettings>,
    /// What is optimised.
    pub objective: Objective,
    /// Pairs of an optimiser step.
    pub pairs_per_step: usize,
    /// Positions of the longest sequence of any pair.
    pub positions: usize,
    /// Tokens of the prompts that are answered before and after training.
    pub prompts: Vec<usize>,
    /// The rank whose memory it is, among several.
    pub place: Option<GroupPlace>,
}

impl Job {
    /// How the model's weights are stored: as its config says, else in bf16.
    fn storage(config: &LlamaConfig) -> StorageType {
        config.dtype.unwrap_or(StorageType::Bf16)
    }
}

/// The options that `--memory auto` may choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// States, recomputation and gradients.
    pub memory: MemoryConfig,
    /// Tokens of a micro-batch.
    pub token_budget: usize,
    /// How the head uses memory.
    pub head: HeadOptions,
}

/// The largest batches of a run at one token budget.
#[derive(Clone, Debug)]
pub struct Sizes {
    /// The largest micro-batch of training and evaluation that the run makes room for.
    pub training: Capacity,
    /// The largest batch of each set of pairs that the reference scores.
    pub scored: Vec<Capacity>,
}

impl Sizes {
    /// The sizes for `training` and `evaluation` pairs. The reference scores the training pairs where the objective needs it, and
    /// the evaluation pairs where both responses are looked at, as a run does.
    pub fn of(
        training: &[TokenizedPair],
        evaluation: &[TokenizedPair],
        objective: &Objective,
        (pairs_per_step, token_budget): (usize, usize),
    ) -> Self {
        let all = training.iter().chain(evaluation);
        let workload = Workload::plan(all, objective, pairs_per_step, token_budget);
        let scores_evaluation = objective.sides() == crate::data::Sides::Both && !evaluation.is_empty();
        let sets = [(objective.needs_reference(), training), (scores_evaluation, evaluation)];
        // The scorer's device does not matter for its micro-batches.
        let capacity = |pairs| Scorer::<crate::device::cpu::CpuDevice>::micro_batches(pairs, token_budget).1;
        Sizes {
            training: workload.micro_batch,
            scored: sets
                .into_iter()
                .filter(|(scores, _)| *scores)
                .map(|(_, pairs)| capacity(pairs))
                .collect(),
        }
    }
}

/// The device memory of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// The most bytes that all buffers together have at once.
    pub peak: usize,
    /// The most bytes that are taken from the machine: the driver gives a GPU's memory in large pieces.
    pub taken: usize,
    /// What makes up the peak.
    pub parts: MemoryParts,
    /// How the log-prob head works.
    pub head: HeadPlan,
}

impl Footprint {
    /// Makes the buffers of a whole run on `device`, which [`Memory::planned`](crate::device::Memory::planned) made and nothing has
    /// used before.
    ///
    /// # Errors
    /// [`crate::Error::Device`] for a model that the device has no kernels for.
    pub fn on<D: Device>(device: &Arc<D>, job: &Job, choice: &Choice, sizes: &Sizes) -> Result<Self> {
        let positions = job.positions + MAX_NEW_TOKENS;
        let (config, storage) = (job.model.clone(), Job::storage(&job.model));
        let join = |place| {
            let communicator = device.join_group(&device.new_group()?, place)?;
            Ok::<_, Error>(Arc::new(RankGroup { device: Arc::clone(device), communicator }))
        };
        let group = job.place.map(join).transpose()?;
        let sharded = LoadedModel::cut_among(group.as_ref(), &choice.memory);
        // An adapter's base is only read.
        let how = (positions, job.lora.is_some());
        let mut model = LoadedModel::planned(device, (config, storage), how, sharded)?;
        score(device, job, (&mut model, sharded), sizes)?;
        let has_parts = model.has_parts();
        let mut model = model.into_model();
        if let Some(settings) = job.lora {
            model.adapt(settings, |_| Ok(vec![0.0]))?;
        }
        if !has_parts {
            answer(&model, job)?;
        }
        let workload = Workload {
            micro_batch: sizes.training,
            pairs_per_step: job.pairs_per_step,
            token_budget: choice.token_budget,
            head: choice.head,
            memory: choice.memory,
            rounding_seed: 0,
        };
        let trainer = Trainer::with_group(model, job.objective, workload, group)?;
        if !trainer.has_weight_parts() {
            answer(&trainer.model, job)?;
        }
        Ok(Footprint {
            peak: device.memory().peak,
            taken: device.taken_at_peak(),
            parts: device.memory_counter().parts_at_peak(),
            head: trainer.head_plan(),
        })
    }
}

/// The memory of the reference's pass, which is given back after it.
fn score<D: Device>(
    device: &Arc<D>,
    job: &Job,
    (model, sharded): (&mut LoadedModel<D>, Option<&Arc<RankGroup<D>>>),
    sizes: &Sizes,
) -> Result<()> {
    let mut other = match &job.reference {
        None => None,
        Some(config) => Some(device.as_part(MemoryPart::Reference, || {
            let what = (config.clone(), Job::storage(config));
            LoadedModel::planned(device, what, (job.positions, true), sharded)
        })?),
    };
    let reference = other.as_mut().unwrap_or(model);
    for &capacity in &sizes.scored {
        Scorer::for_capacity(reference.scored(), &[], Vec::new(), capacity)?;
    }
    Ok(())
}

/// The memory of the answers to sample prompts, one after the other.
fn answer<D: Device>(model: &Llama<D>, job: &Job) -> Result<()> {
    job.prompts.iter().try_for_each(|&prompt| Generation::buffers(model, prompt, MAX_NEW_TOKENS).map(|_| ()))
}
