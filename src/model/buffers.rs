//! Activations of the largest micro-batch, allocated once.
//!
//! Kept for the backward: the residual stream at both norms of a layer, `qkv` after RoPE, the attention's output and
//! lse, and `gate_up`; or less of it, see [`Recompute`]. Normed inputs and SwiGLU outputs are cheap and are computed again.

use super::Llama;
use super::adapter::AdapterActivations;
use super::config::LlamaConfig;
use super::head_plan::{HeadOptions, HeadPlan};
use crate::data::PairBatch;
use crate::device::{
    AttentionCapacity, ComputeBuffer, Device, Floats, HeadMode, HeadSizes, MemoryPart, TokenCoefficients,
    TokenScores,
};
use crate::error::Result;
use crate::objective::PairOutcome;

/// What the largest micro-batch holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capacity {
    /// `T`
    pub tokens: usize,
    /// Pairs of the batch.
    pub pairs: usize,
    /// `N`
    pub scored: usize,
    /// Tokens of the longest prompt or response.
    pub longest_part: usize,
    /// Scored tokens of the longest pair.
    pub longest: usize,
}

impl Capacity {
    /// The least capacity that holds `self` and also `batch`.
    pub fn cover(self, batch: &PairBatch) -> Self {
        let longest = batch.scored.iter().map(|pair| pair.rejected.end - pair.chosen.start).max();
        let longest_part =
            batch.spans.iter().map(|span| span.prompt.max(span.chosen).max(span.rejected)).max();
        Capacity {
            tokens: self.tokens.max(batch.tokens()),
            pairs: self.pairs.max(batch.spans.len()),
            longest_part: self.longest_part.max(longest_part.unwrap_or(0) as usize),
            scored: self.scored.max(batch.scored_tokens()),
            longest: self.longest.max(longest.unwrap_or(0)),
        }
    }
}

/// The part of a layer's forward that is computed again in its backward, to the same bits, so that all layers share its
/// buffers.
/// The residual stream that enters each layer is kept in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Recompute {
    /// Nothing but normed inputs and SwiGLU outputs, which are cheap.
    #[default]
    None,
    /// Gate and up, the largest activations: one gemm is run twice. What attention computes is expensive, and is kept.
    Selective,
    /// Everything between two residual streams: the whole layer but its last gemm is run twice.
    Layer,
}

/// Whether a backward follows. Without one, all layers share one set of buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Forward and backward.
    Training {
        /// How the head uses memory.
        head: HeadOptions,
        /// What is not kept.
        recompute: Recompute,
    },
    /// Forward alone.
    Inference,
}

/// Results of the forward. A field that is a `Vec` has one buffer per layer, or a single one for what no backward reads
/// or what it computes again; [`Activations::slot`] and the methods like it map a layer to its buffer.
#[derive(Debug)]
pub struct Activations<D: Device> {
    /// What the backward must compute again.
    pub recompute: Recompute,
    slots: usize,
    /// `[T, D]` the residual stream entering each layer, and after the last.
    pub residual: Vec<ComputeBuffer<D>>,
    /// `[T]`, of the norm before attention: `1 / sqrt(mean(x^2) + epsilon)`.
    pub input_rstd: Vec<Floats<D>>,
    /// `[T, (H + 2K) * E]`
    pub qkv: Vec<ComputeBuffer<D>>,
    /// `[T, H * E]`
    pub attention: Vec<ComputeBuffer<D>>,
    /// `[T, H]`
    pub attention_lse: Vec<Floats<D>>,
    /// `[T, D]` the residual stream between attention and MLP.
    pub middle: Vec<ComputeBuffer<D>>,
    /// `[T]`, of the norm before the MLP: as `input_rstd`.
    pub post_rstd: Vec<Floats<D>>,
    /// `[T, 2F]`
    pub gate_up: Vec<ComputeBuffer<D>>,
    /// `[T, D]` scratch: a norm's output.
    pub normed: ComputeBuffer<D>,
    /// `[T, D]` scratch: what a block adds to the residual stream.
    pub delta: ComputeBuffer<D>,
    /// `[T, F]` scratch: SwiGLU's output.
    pub activated: ComputeBuffer<D>,
    /// Buffers of low-rank adapters, where the model has some.
    pub(super) adapter: Option<AdapterActivations<D>>,
    /// Buffers of the log-prob head.
    pub head: HeadBuffers<D>,
}

/// The head works on the `N` scored rows alone.
#[derive(Debug)]
pub struct HeadBuffers<D: Device> {
    /// `[N, D]` the residual rows that predict a target; in the backward, their gradient.
    pub gathered: ComputeBuffer<D>,
    /// `[N, D]` the same after the final norm; the head's backward replaces it by its gradient.
    pub normed: ComputeBuffer<D>,
    /// `[N]`
    pub rstd: Floats<D>,
    /// How the head cuts its rows into chunks.
    pub plan: HeadPlan,
    /// `[plan.values]`
    pub workspace: ComputeBuffer<D>,
    /// Log-prob, entropy and logsumexp of each scored token.
    pub scores: TokenScores<D>,
    /// Coefficients of each scored token.
    pub coefficients: TokenCoefficients<D>,
    /// `[pairs, PairOutcome::WIDTH]`
    pub outcomes: Floats<D>,
}

/// Scratch of the backward: gradients of activations, reused from layer to layer.
#[derive(Debug)]
pub struct BackwardScratch<D: Device> {
    /// `[T, D]` of the residual stream, from the top of the model down.
    pub residual: ComputeBuffer<D>,
    /// `[T, D]`
    pub normed: ComputeBuffer<D>,
    /// `[T, (H + 2K) * E]`
    pub qkv: ComputeBuffer<D>,
    /// `[T, H * E]`
    pub attention: ComputeBuffer<D>,
    /// `[T, 2F]`
    pub gate_up: ComputeBuffer<D>,
    /// `[T, F]`
    pub activated: ComputeBuffer<D>,
    /// `[N, D]` of the gathered residual rows.
    pub gathered: ComputeBuffer<D>,
}

impl<D: Device> Activations<D> {
    /// Buffers for batches of up to `capacity` through `model`, its adapters included.
    ///
    /// # Errors
    /// As [`Activations::new`].
    pub fn of(model: &Llama<D>, capacity: Capacity, purpose: Purpose) -> Result<Self> {
        let (slots, training) = match purpose {
            Purpose::Training { recompute: Recompute::Layer, .. } => (1, true),
            Purpose::Training { .. } => (model.config.layers, true),
            Purpose::Inference => (1, false),
        };
        // Before the others: the head is planned with the memory that all else leaves.
        let adapter = model
            .device
            .as_part(MemoryPart::Activations, || AdapterActivations::new(model, capacity, slots, training))?;
        if training {
            AdapterActivations::reserve(model, capacity)?;
        }
        Ok(Activations {
            adapter,
            ..Activations::new(model.device.as_ref(), &model.config, capacity, purpose)?
        })
    }

    /// Buffers for batches of up to `capacity` through a model without adapters.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) if the device has not enough memory.
    pub fn new(device: &D, config: &LlamaConfig, capacity: Capacity, purpose: Purpose) -> Result<Self> {
        let activations = device
            .as_part(MemoryPart::Activations, || Self::without_head(device, config, capacity, purpose))?;
        let head =
            device.as_part(MemoryPart::Head, || HeadBuffers::new(device, config, capacity, purpose))?;
        Ok(activations(head))
    }

    /// All but the head, which is made last.
    fn without_head(
        device: &D,
        config: &LlamaConfig,
        capacity: Capacity,
        purpose: Purpose,
    ) -> Result<impl FnOnce(HeadBuffers<D>) -> Self + use<D>> {
        let shape = config.attention_shape();
        let tokens = capacity.tokens;
        let recompute = match purpose {
            Purpose::Training { recompute, .. } => recompute,
            Purpose::Inference => Recompute::None,
        };
        let slots = match purpose {
            Purpose::Training { recompute: Recompute::None | Recompute::Selective, .. } => config.layers,
            Purpose::Training { recompute: Recompute::Layer, .. } => 1,
            Purpose::Inference => 1,
        };
        let gate_up_slots = if recompute == Recompute::None { slots } else { 1 };
        let residuals = match purpose {
            Purpose::Training { .. } => config.layers + 1,
            Purpose::Inference => 1,
        };
        let compute = |count: usize, width: usize| -> Result<Vec<ComputeBuffer<D>>> {
            (0..count).map(|_| device.alloc(tokens * width)).collect()
        };
        let floats = |width: usize| -> Result<Vec<Floats<D>>> {
            (0..slots).map(|_| device.alloc(tokens * width)).collect()
        };
        let residual = compute(residuals, config.hidden_size)?;
        let input_rstd = floats(1)?;
        let qkv = compute(slots, shape.qkv_width())?;
        let attention = compute(slots, shape.out_width())?;
        let attention_lse = floats(shape.heads)?;
        let middle = compute(slots, config.hidden_size)?;
        let post_rstd = floats(1)?;
        let gate_up = compute(gate_up_slots, 2 * config.intermediate_size)?;
        let normed = device.alloc(tokens * config.hidden_size)?;
        let delta = device.alloc(tokens * config.hidden_size)?;
        let activated = device.alloc(tokens * config.intermediate_size)?;
        Ok(move |head| Activations {
            recompute,
            slots,
            residual,
            input_rstd,
            qkv,
            attention,
            attention_lse,
            middle,
            post_rstd,
            gate_up,
            normed,
            delta,
            activated,
            adapter: None,
            head,
        })
    }

    /// Index of a layer's buffers, but for `residual` and `gate_up`.
    pub fn slot(&self, layer: usize) -> usize {
        layer % self.slots
    }

    /// Index of a layer's `gate_up`.
    pub fn gate_up_slot(&self, layer: usize) -> usize {
        layer % self.gate_up.len()
    }

    /// Index of the residual stream entering `layer` (of the model's output for `layer == L`).
    pub fn residual_slot(&self, layer: usize) -> usize {
        layer % self.residual.len()
    }
}

impl<D: Device> HeadBuffers<D> {
    /// Call it when everything else is allocated: the plan looks at the memory that is left.
    fn new(device: &D, config: &LlamaConfig, capacity: Capacity, purpose: Purpose) -> Result<Self> {
        let gathered = device.alloc(capacity.scored * config.hidden_size)?;
        let normed = device.alloc(capacity.scored * config.hidden_size)?;
        let rstd = device.alloc(capacity.scored)?;
        let scores = TokenScores::new(device, capacity.scored)?;
        let coefficients = TokenCoefficients::new(device, capacity.scored)?;
        let outcomes = device.alloc(capacity.pairs * PairOutcome::WIDTH)?;
        let (width, vocab) = (config.hidden_size, config.vocab_size);
        let plan = match purpose {
            Purpose::Training { head: options, .. } => {
                reserve_layers(device, config, capacity)?;
                HeadPlan::training(device, (width, vocab), capacity.scored, capacity.longest, options)?
            }
            Purpose::Inference => {
                reserve_forward(device, config, capacity)?;
                HeadPlan::inference(device, (width, vocab), capacity.scored)?
            }
        };
        let workspace = device.alloc(plan.values)?;
        let sizes = HeadSizes { width, vocab, workspace: plan.values };
        match purpose {
            Purpose::Training { .. } => {
                for (mode, rows) in plan.calls(capacity.scored) {
                    device.reserve_logp_head(mode, rows, sizes)?;
                }
            }
            Purpose::Inference => device.reserve_logp_head(HeadMode::Score, capacity.scored, sizes)?,
        }
        Ok(HeadBuffers { gathered, normed, rstd, plan, workspace, scores, coefficients, outcomes })
    }
}

/// Sets aside the scratch memory of a layer's operations, forward and backward, so that no step allocates it.
fn reserve_layers<D: Device>(device: &D, config: &LlamaConfig, capacity: Capacity) -> Result<()> {
    let Capacity { tokens, pairs, longest_part, scored, .. } = capacity;
    let attention = AttentionCapacity { rows: tokens, pairs, longest_part };
    device.reserve_attention(attention, config.attention_shape())?;
    device.reserve_rms_norm(config.norm_shape(tokens.max(scored)))?;
    for (shape, bias) in [
        (config.qkv_shape(tokens), config.qkv_bias),
        (config.attention_out_shape(tokens), config.attention_out_bias),
        (config.gate_up_shape(tokens), config.mlp_bias),
        (config.down_shape(tokens), config.mlp_bias),
    ] {
        device.reserve_linear(shape, bias)?;
    }
    Ok(())
}

/// As [`reserve_layers`], for a forward alone.
fn reserve_forward<D: Device>(device: &D, config: &LlamaConfig, capacity: Capacity) -> Result<()> {
    let tokens = capacity.tokens;
    device.reserve_attention_forward(config.attention_shape())?;
    for shape in [
        config.qkv_shape(tokens),
        config.attention_out_shape(tokens),
        config.gate_up_shape(tokens),
        config.down_shape(tokens),
    ] {
        device.reserve_linear_forward(shape)?;
    }
    Ok(())
}

impl<D: Device> BackwardScratch<D> {
    /// Buffers for batches of up to `capacity`.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) if the device has not enough memory.
    pub fn new(device: &D, config: &LlamaConfig, capacity: Capacity) -> Result<Self> {
        device.as_part(MemoryPart::ActivationGradients, || Self::of_part(device, config, capacity))
    }

    fn of_part(device: &D, config: &LlamaConfig, capacity: Capacity) -> Result<Self> {
        let shape = config.attention_shape();
        let tokens = capacity.tokens;
        Ok(BackwardScratch {
            residual: device.alloc(tokens * config.hidden_size)?,
            normed: device.alloc(tokens * config.hidden_size)?,
            qkv: device.alloc(tokens * shape.qkv_width())?,
            attention: device.alloc(tokens * shape.out_width())?,
            gate_up: device.alloc(tokens * 2 * config.intermediate_size)?,
            activated: device.alloc(tokens * config.intermediate_size)?,
            gathered: device.alloc(capacity.scored * config.hidden_size)?,
        })
    }
}
