//! The Llama forward: from a packed batch to the residual stream after the last layer.
//!
//! As transformers defines it (`LlamaForCausalLM`): RMSNorm, attention with rotary positions, RMSNorm, SwiGLU MLP,
//! each block added to the residual stream. A layer is a closed unit with both of its norms; the residual sum before each
//! norm is fused with it.

use super::Llama;
use super::adapter::{Place, Site};
use super::buffers::{Activations, Recompute};
use super::decode::KvCache;
use super::tensors::LayerTensors;
use crate::device::{
    AdapterTerms, AddRmsNorm, BatchBuffers, ComputeBuffer, Device, LinearSwiglu, RopeDirection,
};
use crate::error::Result;

/// What the queries of a forward see.
pub enum Context<'a, D: Device> {
    /// Their own pair, by the shared-prefix mask.
    Packed,
    /// As [`Context::Packed`]; their keys and values are kept for what follows.
    Prefill(&'a mut KvCache<D>),
    /// One token after all that the cache holds.
    Decode(&'a mut KvCache<D>),
}

/// Is told of each layer of a forward before and after it runs, with the layers' weights: the place to bring a layer's weights from
/// somewhere else.
pub trait WeightSource<D: Device> {
    /// `weights[layer]` must hold the layer's weights when this returns.
    ///
    /// # Errors
    /// Those of what the source does; they end the forward.
    fn before_layer(&mut self, layer: usize, weights: &mut [LayerTensors<ComputeBuffer<D>>]) -> Result<()>;

    /// The layer has run.
    ///
    /// # Errors
    /// As [`WeightSource::before_layer`].
    fn after_layer(&mut self, layer: usize, weights: &mut [LayerTensors<ComputeBuffer<D>>]) -> Result<()>;
}

impl<D: Device> Llama<D> {
    /// Leaves the residual stream of the last layer in `activations`, `[T, D]`, before the final norm.
    ///
    /// # Errors
    /// Those of the device.
    pub fn forward(
        &self,
        activations: &mut Activations<D>,
        batch: &BatchBuffers<D>,
        tokens: usize,
        mut context: Context<'_, D>,
    ) -> Result<()> {
        self.embed(activations, batch, tokens)?;
        for layer in 0..self.config.layers {
            self.layer_forward(layer, activations, batch, tokens, &mut context)?;
        }
        self.last_residual_sum(activations, tokens)
    }

    /// As [`Llama::forward`] over packed pairs, with the layers' weights from `source`.
    ///
    /// # Errors
    /// Those of the device and of `source`.
    pub fn forward_from(
        &mut self,
        source: &mut impl WeightSource<D>,
        activations: &mut Activations<D>,
        batch: &BatchBuffers<D>,
        tokens: usize,
    ) -> Result<()> {
        self.embed(activations, batch, tokens)?;
        for layer in 0..self.config.layers {
            source.before_layer(layer, &mut self.weights.layers)?;
            self.layer_forward(layer, activations, batch, tokens, &mut Context::Packed)?;
            source.after_layer(layer, &mut self.weights.layers)?;
        }
        self.last_residual_sum(activations, tokens)
    }

    /// The residual stream that enters the first layer.
    fn embed(&self, activations: &mut Activations<D>, batch: &BatchBuffers<D>, tokens: usize) -> Result<()> {
        self.device.embedding_forward(
            &mut activations.residual[0],
            &self.weights.embedding,
            &batch.token_ids,
            tokens,
            self.config.hidden_size,
        )
    }

    /// The residual sum that ends the last layer.
    fn last_residual_sum(&self, activations: &mut Activations<D>, tokens: usize) -> Result<()> {
        let width = self.config.hidden_size;
        let last = activations.slot(self.config.layers - 1);
        let end = activations.residual_slot(self.config.layers);
        let values = tokens * width;
        self.device.add(&mut activations.residual[end], &activations.middle[last], &activations.delta, values)
    }

    /// One layer: its input norm, attention, the norm before the MLP, and the MLP, whose output is left in `delta` for
    /// the residual sum that the next layer begins with.
    fn layer_forward(
        &self,
        layer: usize,
        activations: &mut Activations<D>,
        batch: &BatchBuffers<D>,
        tokens: usize,
        context: &mut Context<'_, D>,
    ) -> Result<()> {
        match layer.checked_sub(1) {
            // The first layer has its residual stream from the embedding.
            None => self.input_norm(layer, activations, tokens)?,
            Some(before) => self.residual_sum_and_input_norm(before, activations, tokens)?,
        }
        self.attention_block(layer, activations, batch, tokens, context)?;
        self.gate_up_block(layer, activations, tokens)?;
        let place = Place { layer, site: Site::Down, slot: activations.slot(layer), tokens };
        let adapter = activations.adapter.as_mut();
        self.project(&mut activations.delta, &activations.activated, adapter, place)
    }

    /// Computes the activations of a layer that its backward reads once more, to the same bits, from the residual stream
    /// that enters the layer: `qkv`, `attention` and its lse, `middle`, `gate_up`, the `rstd` of both norms, and the input of
    /// each adapter's second matrix. The layer's output is not formed: the backward does not read it.
    ///
    /// `activations.residual` of the layer and `batch` must be those of a forward with [`Context::Packed`].
    ///
    /// # Errors
    /// Those of the device.
    pub fn recompute_layer(
        &self,
        layer: usize,
        activations: &mut Activations<D>,
        batch: &BatchBuffers<D>,
        tokens: usize,
    ) -> Result<()> {
        self.input_norm(layer, activations, tokens)?;
        self.attention_block(layer, activations, batch, tokens, &mut Context::Packed)?;
        self.gate_up_block(layer, activations, tokens)?;
        let place = Place { layer, site: Site::Down, slot: activations.slot(layer), tokens };
        self.adapter_inner(activations.adapter.as_mut(), &activations.activated, place)
    }

    /// Computes `gate_up` again from `middle`, where nothing else is missing; see [`Llama::recompute_layer`].
    fn recompute_gate_up(&self, layer: usize, activations: &mut Activations<D>, tokens: usize) -> Result<()> {
        let slot = activations.slot(layer);
        self.device.rms_norm_forward(
            &mut activations.normed,
            &mut activations.post_rstd[slot],
            &activations.middle[slot],
            &self.weights.layers[layer].post_norm,
            self.config.norm_shape(tokens),
        )?;
        self.gate_up_block(layer, activations, tokens)
    }

    /// Computes again what the forward has not kept for the backward of a layer. Call it for the layers from the last down: the
    /// last one's activations are still in the buffers that all layers share.
    pub(super) fn complete_activations(
        &self,
        layer: usize,
        activations: &mut Activations<D>,
        batch: &BatchBuffers<D>,
        tokens: usize,
    ) -> Result<()> {
        if layer + 1 == self.config.layers {
            return Ok(());
        }
        match activations.recompute {
            Recompute::None => Ok(()),
            Recompute::Selective => self.recompute_gate_up(layer, activations, tokens),
            Recompute::Layer => self.recompute_layer(layer, activations, batch, tokens),
        }
    }

    /// Computes the input norm of a layer over its residual stream, into `normed`.
    fn input_norm(&self, layer: usize, activations: &mut Activations<D>, tokens: usize) -> Result<()> {
        let (slot, residual) = (activations.slot(layer), activations.residual_slot(layer));
        self.device.rms_norm_forward(
            &mut activations.normed,
            &mut activations.input_rstd[slot],
            &activations.residual[residual],
            &self.weights.layers[layer].input_norm,
            self.config.norm_shape(tokens),
        )
    }

    /// Computes the residual sum that ends layer `before`, fused with the input norm of the layer after it, into that
    /// layer's `residual` and into `normed`.
    fn residual_sum_and_input_norm(
        &self,
        before: usize,
        activations: &mut Activations<D>,
        tokens: usize,
    ) -> Result<()> {
        let layer = before + 1;
        let (slot, residual) = (activations.slot(layer), activations.residual_slot(layer));
        let middle = activations.slot(before);
        self.device.add_rms_norm_forward(AddRmsNorm {
            sum: &mut activations.residual[residual],
            out: &mut activations.normed,
            rstd: &mut activations.input_rstd[slot],
            x: &activations.middle[middle],
            delta: &activations.delta,
            weight: &self.weights.layers[layer].input_norm,
            shape: self.config.norm_shape(tokens),
        })
    }

    /// The attention block, its residual sum and the norm after it. Reads the block's input from `normed`, and leaves
    /// the norm's output there.
    fn attention_block(
        &self,
        layer: usize,
        activations: &mut Activations<D>,
        batch: &BatchBuffers<D>,
        tokens: usize,
        context: &mut Context<'_, D>,
    ) -> Result<()> {
        let weights = &self.weights.layers[layer];
        let shape = self.config.attention_shape();
        let (slot, residual) = (activations.slot(layer), activations.residual_slot(layer));
        let qkv = &mut activations.qkv[slot];
        let attention = &mut activations.attention[slot];
        let lse = &mut activations.attention_lse[slot];

        let place = Place { layer, site: Site::Qkv, slot, tokens };
        self.project(qkv, &activations.normed, activations.adapter.as_mut(), place)?;
        self.device.rope(qkv, &self.rope_table, &batch.positions, tokens, shape, RopeDirection::Forward)?;
        match context {
            Context::Packed => self.device.attention_forward(attention, lse, qkv, batch, shape)?,
            Context::Prefill(cache) => {
                cache.append(&self.device, layer, qkv, tokens)?;
                self.device.attention_forward(attention, lse, qkv, batch, shape)?;
            }
            Context::Decode(cache) => {
                cache.append(&self.device, layer, qkv, tokens)?;
                let rows = cache.rows(layer);
                self.device.attention_decode(attention, &cache.layers[layer], rows, shape)?;
            }
        }
        let place = Place { site: Site::AttentionOut, ..place };
        self.project(&mut activations.delta, attention, activations.adapter.as_mut(), place)?;
        self.device.add_rms_norm_forward(AddRmsNorm {
            sum: &mut activations.middle[slot],
            out: &mut activations.normed,
            rstd: &mut activations.post_rstd[slot],
            x: &activations.residual[residual],
            delta: &activations.delta,
            weight: &weights.post_norm,
            shape: self.config.norm_shape(tokens),
        })
    }

    /// The MLP up to its last gemm: reads `normed`, assigns `gate_up` and `activated`.
    fn gate_up_block(&self, layer: usize, activations: &mut Activations<D>, tokens: usize) -> Result<()> {
        let weights = &self.weights.layers[layer].gate_up;
        let place = Place { layer, site: Site::GateUp, slot: activations.slot(layer), tokens };
        let slot = activations.gate_up_slot(layer);
        self.adapter_inner(activations.adapter.as_mut(), &activations.normed, place)?;
        let operands = LinearSwiglu {
            out: &mut activations.activated,
            gate_up: &mut activations.gate_up[slot],
            x: &activations.normed,
            weight: &weights.weight,
            bias: weights.bias.as_ref(),
            shape: self.config.gate_up_shape(tokens),
        };
        match self.adapter_terms(activations.adapter.as_ref(), place)? {
            None => self.device.linear_swiglu_forward(operands),
            Some((inner, b, parts)) => {
                self.device.adapted_linear_swiglu_forward(operands, AdapterTerms { inner, b, parts: &parts })
            }
        }
    }

    /// Assigns the scored rows, and what the final norm makes of them: `head.gathered` and `head.normed`, `[N, D]`.
    pub(super) fn head_input(
        &self,
        activations: &mut Activations<D>,
        batch: &BatchBuffers<D>,
        scored: usize,
    ) -> Result<()> {
        let last = activations.residual_slot(self.config.layers);
        let head = &mut activations.head;
        self.device.gather_rows(
            &mut head.gathered,
            &activations.residual[last],
            batch,
            scored,
            self.config.hidden_size,
        )?;
        self.device.rms_norm_forward(
            &mut head.normed,
            &mut head.rstd,
            &head.gathered,
            &self.weights.final_norm,
            self.config.norm_shape(scored),
        )
    }
}
