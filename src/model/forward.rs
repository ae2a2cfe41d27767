//! The Llama forward: from a packed batch to the residual stream after the last layer.
//!
//! As transformers defines it (`LlamaForCausalLM`): RMSNorm, attention with rotary positions, RMSNorm, SwiGLU MLP,
//! each block added to the residual stream. A layer is a closed unit with both of its norms; the residual sum before each
//! norm is fused with it.

use super::Llama;
use super::buffers::Activations;
use super::decode::KvCache;
use crate::device::{AddRmsNorm, BatchBuffers, Device, LinearShape, LinearSwiglu, NormShape, RopeDirection};
use crate::error::Result;

/// What the queries of a forward see.
pub enum Context<'a, D: Device> {
    /// Their own pair, by the shared-prefix mask.
    Packed,
    /// The same, and their keys and values are kept for what follows.
    Prefill(&'a mut KvCache<D>),
    /// One token after all that the cache holds.
    Decode(&'a mut KvCache<D>),
}

impl<D: Device> Llama<D> {
    /// Leaves the residual stream of the last layer in `activations`, `[T, D]`, before the final norm.
    pub fn forward(
        &self,
        activations: &mut Activations<D>,
        batch: &BatchBuffers<D>,
        tokens: usize,
        mut context: Context<'_, D>,
    ) -> Result<()> {
        let width = self.config.hidden_size;
        self.device.embedding_forward(
            &mut activations.residual[0],
            &self.weights.embedding,
            &batch.token_ids,
            tokens,
            width,
        )?;
        for layer in 0..self.config.layers {
            self.layer_forward(layer, activations, batch, tokens, &mut context)?;
        }
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
        self.open_layer(layer, activations, tokens)?;
        self.attention_block(layer, activations, batch, tokens, context)?;
        self.mlp_block(layer, activations, tokens)
    }

    /// The residual sum that ends the layer before, fused with this layer's input norm: to `residual` and `normed`. The
    /// first layer has its residual stream from the embedding.
    fn open_layer(&self, layer: usize, activations: &mut Activations<D>, tokens: usize) -> Result<()> {
        let (slot, residual) = (activations.slot(layer), activations.residual_slot(layer));
        let before = layer.checked_sub(1).map(|before| activations.slot(before));
        let weight = &self.weights.layers[layer].input_norm;
        let shape = self.norm_shape(tokens);
        let (out, rstd) = (&mut activations.normed, &mut activations.input_rstd[slot]);
        let Some(before) = before else {
            return self.device.rms_norm_forward(out, rstd, &activations.residual[residual], weight, shape);
        };
        self.device.add_rms_norm_forward(AddRmsNorm {
            sum: &mut activations.residual[residual],
            out,
            rstd,
            x: &activations.middle[before],
            delta: &activations.delta,
            weight,
            shape,
        })
    }

    /// From `normed` to `normed`: the attention block, its residual sum and the norm after it.
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

        self.project(qkv, &activations.normed, &weights.qkv, self.qkv_shape(tokens))?;
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
        self.project(
            &mut activations.delta,
            attention,
            &weights.attention_out,
            self.attention_out_shape(tokens),
        )?;
        self.device.add_rms_norm_forward(AddRmsNorm {
            sum: &mut activations.middle[slot],
            out: &mut activations.normed,
            rstd: &mut activations.post_rstd[slot],
            x: &activations.residual[residual],
            delta: &activations.delta,
            weight: &weights.post_norm,
            shape: self.norm_shape(tokens),
        })
    }

    /// From `normed` to `delta`.
    fn mlp_block(&self, layer: usize, activations: &mut Activations<D>, tokens: usize) -> Result<()> {
        let weights = &self.weights.layers[layer];
        let slot = activations.slot(layer);
        self.device.linear_swiglu_forward(LinearSwiglu {
            out: &mut activations.activated,
            gate_up: &mut activations.gate_up[slot],
            x: &activations.normed,
            weight: &weights.gate_up.weight,
            bias: weights.gate_up.bias.as_ref(),
            shape: self.gate_up_shape(tokens),
        })?;
        self.project(&mut activations.delta, &activations.activated, &weights.down, self.down_shape(tokens))
    }

    /// The scored rows after the final norm: `head.gathered` and `head.normed`, `[N, D]`.
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
            self.norm_shape(scored),
        )
    }

    pub(super) fn norm_shape(&self, rows: usize) -> NormShape {
        NormShape { rows, width: self.config.hidden_size, epsilon: self.config.rms_norm_eps }
    }

    pub(super) fn qkv_shape(&self, rows: usize) -> LinearShape {
        LinearShape {
            rows,
            inputs: self.config.hidden_size,
            outputs: self.config.attention_shape().qkv_width(),
        }
    }

    pub(super) fn attention_out_shape(&self, rows: usize) -> LinearShape {
        LinearShape {
            rows,
            inputs: self.config.attention_shape().out_width(),
            outputs: self.config.hidden_size,
        }
    }

    pub(super) fn gate_up_shape(&self, rows: usize) -> LinearShape {
        LinearShape { rows, inputs: self.config.hidden_size, outputs: 2 * self.config.intermediate_size }
    }

    pub(super) fn down_shape(&self, rows: usize) -> LinearShape {
        LinearShape { rows, inputs: self.config.intermediate_size, outputs: self.config.hidden_size }
    }
}
