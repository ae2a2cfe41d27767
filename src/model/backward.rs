//! The Llama backward: from the gradient of the residual stream after the last layer to all weight gradients.
//!
//! `scratch.residual` flows from the top of the model down; each block adds what reaches it through its own norm.
//! Weight gradients accumulate over micro-batches, in f32.

use super::Llama;
use super::buffers::{Activations, BackwardScratch};
use super::projection::ProjectionBackward;
use super::tensors::{LayerTensors, LlamaTensors};
use crate::device::{AttentionGradient, BatchBuffers, Device, Floats, RmsNormBackward, RopeDirection};
use crate::error::Result;

/// Learns of each layer when the backward has added all that this micro-batch gives to its gradients: the place to reduce
/// them between processes, or to apply them, while the layers below are still to come.
pub trait GradientSink<D: Device> {
    /// The gradients of `layer` are complete; layers come from the last to the first.
    ///
    /// # Errors
    /// Those of what the sink does with them; they end the backward.
    fn layer_complete(&mut self, layer: usize, gradients: &mut LayerTensors<Floats<D>>) -> Result<()>;
}

/// Leaves the gradients where they are: one optimiser step over all of them follows.
#[derive(Clone, Copy, Debug, Default)]
pub struct KeepGradients;

impl<D: Device> GradientSink<D> for KeepGradients {
    fn layer_complete(&mut self, _: usize, _: &mut LayerTensors<Floats<D>>) -> Result<()> {
        Ok(())
    }
}

impl<D: Device> Llama<D> {
    /// Accumulates into `gradients`; `scratch.residual` holds `dL/d residual[L]` on entry and is consumed.
    /// `activations` must be those of [`Llama::forward`] over the same batch.
    pub fn backward(
        &self,
        gradients: &mut LlamaTensors<Floats<D>>,
        scratch: &mut BackwardScratch<D>,
        activations: &mut Activations<D>,
        batch: &BatchBuffers<D>,
        tokens: usize,
        sink: &mut impl GradientSink<D>,
    ) -> Result<()> {
        for layer in (0..self.config.layers).rev() {
            self.mlp_backward(layer, gradients, scratch, activations, tokens)?;
            self.attention_backward(layer, gradients, scratch, activations, batch, tokens)?;
            sink.layer_complete(layer, &mut gradients.layers[layer])?;
        }
        self.device.embedding_backward(
            &mut gradients.embedding,
            &scratch.residual,
            batch,
            batch.embedding_rows,
            self.config.hidden_size,
        )
    }

    fn mlp_backward(
        &self,
        layer: usize,
        gradients: &mut LlamaTensors<Floats<D>>,
        scratch: &mut BackwardScratch<D>,
        activations: &mut Activations<D>,
        tokens: usize,
    ) -> Result<()> {
        let device = &self.device;
        let (weights, gradients) = (&self.weights.layers[layer], &mut gradients.layers[layer]);
        let slot = activations.slot(layer);
        let mlp_width = self.config.intermediate_size;

        // delta = down(activated)
        device.swiglu_forward(&mut activations.activated, &activations.gate_up[slot], tokens, mlp_width)?;
        self.project_backward(ProjectionBackward {
            dx: &mut scratch.activated,
            dweights: &mut gradients.down,
            dout: &scratch.residual,
            x: &activations.activated,
            weights: &weights.down,
            shape: self.down_shape(tokens),
        })?;

        // activated = silu(gate) * up, gate_up = linear(normed)
        device.swiglu_backward(
            &mut scratch.gate_up,
            &scratch.activated,
            &activations.gate_up[slot],
            tokens,
            mlp_width,
        )?;
        device.rms_norm_forward(
            &mut activations.normed,
            &mut activations.post_rstd[slot],
            &activations.middle[slot],
            &weights.post_norm,
            self.norm_shape(tokens),
        )?;
        self.project_backward(ProjectionBackward {
            dx: &mut scratch.normed,
            dweights: &mut gradients.gate_up,
            dout: &scratch.gate_up,
            x: &activations.normed,
            weights: &weights.gate_up,
            shape: self.gate_up_shape(tokens),
        })?;

        // normed = rms_norm(middle)
        device.rms_norm_backward(RmsNormBackward {
            dx: &mut scratch.residual,
            dweight: &mut gradients.post_norm,
            dout: &scratch.normed,
            x: &activations.middle[slot],
            weight: &weights.post_norm,
            rstd: &activations.post_rstd[slot],
            shape: self.norm_shape(tokens),
        })
    }

    fn attention_backward(
        &self,
        layer: usize,
        gradients: &mut LlamaTensors<Floats<D>>,
        scratch: &mut BackwardScratch<D>,
        activations: &mut Activations<D>,
        batch: &BatchBuffers<D>,
        tokens: usize,
    ) -> Result<()> {
        let device = &self.device;
        let (weights, gradients) = (&self.weights.layers[layer], &mut gradients.layers[layer]);
        let (slot, residual) = (activations.slot(layer), activations.residual_slot(layer));
        let shape = self.config.attention_shape();

        // delta = attention_out(attention)
        self.project_backward(ProjectionBackward {
            dx: &mut scratch.attention,
            dweights: &mut gradients.attention_out,
            dout: &scratch.residual,
            x: &activations.attention[slot],
            weights: &weights.attention_out,
            shape: self.attention_out_shape(tokens),
        })?;

        // attention = softmax(q k^T) v, q and k rotated
        device.attention_backward(AttentionGradient {
            dqkv: &mut scratch.qkv,
            dout: &scratch.attention,
            out: &activations.attention[slot],
            lse: &activations.attention_lse[slot],
            qkv: &activations.qkv[slot],
            batch,
            shape,
        })?;
        device.rope(
            &mut scratch.qkv,
            &self.rope_table,
            &batch.positions,
            tokens,
            shape,
            RopeDirection::Backward,
        )?;

        // qkv = linear(normed)
        device.rms_norm_forward(
            &mut activations.normed,
            &mut activations.input_rstd[slot],
            &activations.residual[residual],
            &weights.input_norm,
            self.norm_shape(tokens),
        )?;
        self.project_backward(ProjectionBackward {
            dx: &mut scratch.normed,
            dweights: &mut gradients.qkv,
            dout: &scratch.qkv,
            x: &activations.normed,
            weights: &weights.qkv,
            shape: self.qkv_shape(tokens),
        })?;

        // normed = rms_norm(residual)
        device.rms_norm_backward(RmsNormBackward {
            dx: &mut scratch.residual,
            dweight: &mut gradients.input_norm,
            dout: &scratch.normed,
            x: &activations.residual[residual],
            weight: &weights.input_norm,
            rstd: &activations.input_rstd[slot],
            shape: self.norm_shape(tokens),
        })
    }
}
