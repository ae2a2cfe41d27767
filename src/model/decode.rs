//! Generation: a key/value cache, and one step of it.

use super::buffers::{Activations, Capacity, Purpose};
use super::forward::Context;
use super::{Llama, LlamaConfig};
use crate::data::{PairBatch, PairSpan};
use crate::device::{BatchBuffers, ComputeBuffer, Device, MemoryPart};
use crate::error::{Error, Result};

/// Rows of `qkv`, after RoPE, of all tokens so far, for each layer; it grows with them.
#[derive(Debug)]
pub struct KvCache<D: Device> {
    /// `[capacity, (H + 2K) * E]` each.
    pub(super) layers: Vec<ComputeBuffer<D>>,
    filled: Vec<usize>,
    row_width: usize,
}

impl<D: Device> KvCache<D> {
    /// Room for `capacity` tokens to begin with.
    ///
    /// # Errors
    /// [`Error::Device`] where the device has no memory for them.
    pub fn new(device: &D, config: &LlamaConfig, capacity: usize) -> Result<Self> {
        let row_width = config.attention_shape().qkv_width();
        let len = capacity.saturating_mul(row_width);
        Ok(KvCache {
            layers: (0..config.layers).map(|_| device.alloc(len)).collect::<Result<_>>()?,
            filled: vec![0; config.layers],
            row_width,
        })
    }

    /// Tokens of `layer` so far.
    pub(super) fn rows(&self, layer: usize) -> usize {
        self.filled[layer]
    }

    /// Appends the first `rows` rows of `qkv`.
    pub(super) fn append(
        &mut self,
        device: &D,
        layer: usize,
        qkv: &ComputeBuffer<D>,
        rows: usize,
    ) -> Result<()> {
        let start = self.filled[layer];
        self.reserve(device, layer, start + rows)?;
        device.copy(&mut self.layers[layer], start * self.row_width, qkv, 0, rows * self.row_width)?;
        self.filled[layer] += rows;
        Ok(())
    }

    /// Makes room for `tokens` tokens in all; a layer that is too small becomes twice as large, so that growing costs
    /// no more than one copy of a row per token.
    fn reserve(&mut self, device: &D, layer: usize, tokens: usize) -> Result<()> {
        let capacity = device.len(&self.layers[layer]) / self.row_width;
        if tokens <= capacity {
            return Ok(());
        }
        let mut larger = device.alloc(tokens.max(2 * capacity) * self.row_width)?;
        device.copy(&mut larger, 0, &self.layers[layer], 0, self.filled[layer] * self.row_width)?;
        self.layers[layer] = larger;
        Ok(())
    }
}

/// Memory for this many tokens of an answer is taken before the first of them.
const FIRST_TOKENS: usize = 256;

/// A sequence being generated. One at a time: this serves samples in reports and `mmpo-fast generate`.
#[derive(Debug)]
pub struct Generation<'a, D: Device> {
    model: &'a Llama<D>,
    activations: Activations<D>,
    batch: BatchBuffers<D>,
    cache: KvCache<D>,
    length: usize,
    /// `[V]` on the device.
    device_logits: ComputeBuffer<D>,
    logits: Vec<f32>,
}

impl<'a, D: Device> Generation<'a, D> {
    /// Reads `prompt` (at least one token). `max_new_tokens` is how many may follow: memory for the first of them is
    /// taken at once, for more as they come. The model's RoPE table must reach to the last of them.
    ///
    /// # Errors
    /// [`Error::Config`] for a prompt without tokens; those of the device.
    pub fn start(model: &'a Llama<D>, prompt: &[u32], max_new_tokens: usize) -> Result<Self> {
        if prompt.is_empty() {
            return Err(Error::config(
                "the prompt has no tokens",
                "give some text, or use a model with a BOS token",
            ));
        }
        let mut generation = Self::buffers(model, prompt.len(), max_new_tokens)?;
        generation.advance(prompt)?;
        Ok(generation)
    }

    /// The memory of a generation after a prompt of `prompt` tokens.
    ///
    /// # Errors
    /// [`Error::Device`] where the device has no memory for it.
    pub fn buffers(model: &'a Llama<D>, prompt: usize, max_new_tokens: usize) -> Result<Self> {
        let capacity = Capacity { tokens: prompt, pairs: 1, longest_part: prompt, scored: 1, longest: 1 };
        let device = model.device.as_ref();
        device.as_part(MemoryPart::Samples, || {
            Ok(Generation {
                model,
                activations: Activations::of(model, capacity, Purpose::Inference)?,
                batch: BatchBuffers::new(device, prompt, 1, 1)?,
                cache: KvCache::new(device, &model.config, prompt + max_new_tokens.min(FIRST_TOKENS))?,
                length: 0,
                device_logits: device.alloc(model.config.vocab_size)?,
                logits: vec![0.0; model.config.vocab_size],
            })
        })
    }

    /// `[V]` f32 logits of the next token.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// Appends `token`, and computes the logits of the one after it.
    ///
    /// # Errors
    /// Those of the device.
    pub fn push(&mut self, token: u32) -> Result<()> {
        self.advance(&[token])
    }

    fn advance(&mut self, tokens: &[u32]) -> Result<()> {
        let model = self.model;
        model.device.together(|| self.compute_logits(tokens))
    }

    fn compute_logits(&mut self, tokens: &[u32]) -> Result<()> {
        let model = self.model;
        let (device, config) = (model.device.as_ref(), &model.config);
        let count = tokens.len();
        self.batch.load(device, &causal_batch(tokens, self.length), &[])?;
        let context = match self.length {
            0 => Context::Prefill(&mut self.cache),
            _ => Context::Decode(&mut self.cache),
        };
        model.forward(&mut self.activations, &self.batch, count, context)?;
        model.head_input(&mut self.activations, &self.batch, 1)?;
        let normed = &self.activations.head.normed;
        let shape =
            crate::device::LinearShape { rows: 1, inputs: config.hidden_size, outputs: config.vocab_size };
        device.linear_forward(&mut self.device_logits, normed, model.weights.head(), None, shape)?;
        device.download_compute(&mut self.logits, &self.device_logits, 0)?;
        self.length += count;
        Ok(())
    }
}

/// A plain causal sequence whose last row is scored (against token 0: only its logits are read).
fn causal_batch(tokens: &[u32], first_position: usize) -> PairBatch {
    let count = tokens.len() as u32;
    let first = first_position as u32;
    PairBatch {
        spans: vec![PairSpan { start: 0, prompt: count, chosen: 0, rejected: 0 }],
        token_ids: tokens.to_vec(),
        positions: (first..first + count).collect(),
        scored_rows: vec![count - 1],
        targets: vec![0],
        scored: vec![crate::data::ScoredPair { chosen: 0..1, rejected: 1..1 }],
    }
}
