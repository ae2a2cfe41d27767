//! The Llama backward: from the gradient of the residual stream after the last layer to all weight gradients.
//!
//! `gradients.residual` flows from the top of the model down; each block adds what reaches it through its own norm.
//! Weight gradients accumulate over micro-batches, in f32.

use super::Llama;
use super::buffers::{Activations, Gradients};
use super::tensors::LlamaTensors;
use crate::device::{AttentionGradient, BatchBuffers, Device, Floats, RmsNormBackward, RopeDirection};
use crate::error::Result;

impl<D: Device> Llama<D> {
    /// Accumulates into `dweights`; `gradients.residual` holds `dL/d residual[L]` on entry and is consumed.
    /// `activations` must be those of [`Llama::forward`] over the same batch.
    pub fn backward(
        &self,
        dweights: &mut LlamaTensors<Floats<D>>,
        gradients: &mut Gradients<D>,
        activations: &mut Activations<D>,
        batch: &BatchBuffers<D>,
        tokens: usize,
    ) -> Result<()> {
        for layer in (0..self.config.layers).rev() {
            self.mlp_backward(layer, dweights, gradients, activations, tokens)?;
            self.attention_backward(layer, dweights, gradients, activations, batch, tokens)?;
        }
        self.device.embedding_backward(
            &mut dweights.embedding,
            &gradients.residual,
            batch,
            batch.embedding_rows,
            self.config.hidden_size,
        )
    }

    fn mlp_backward(
        &self,
        layer: usize,
        dweights: &mut LlamaTensors<Floats<D>>,
        gradients: &mut Gradients<D>,
        activations: &mut Activations<D>,
        tokens: usize,
    ) -> Result<()> {
        let device = &self.device;
        let (weights, dweights) = (&self.weights.layers[layer], &mut dweights.layers[layer]);
        let slot = activations.slot(layer);
        let mlp_width = self.config.intermediate_size;

        // delta = down(activated)
        device.swiglu_forward(&mut activations.activated, &activations.gate_up[slot], tokens, mlp_width)?;
        device.linear_backward_weight(
            &mut dweights.down,
            dweights.down_bias.as_mut(),
            &gradients.residual,
            &activations.activated,
            self.down_shape(tokens),
        )?;
        device.linear_backward_input(
            &mut gradients.activated,
            &gradients.residual,
            &weights.down,
            self.down_shape(tokens),
        )?;

        // activated = silu(gate) * up, gate_up = linear(normed)
        device.swiglu_backward(
            &mut gradients.gate_up,
            &gradients.activated,
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
        device.linear_backward_weight(
            &mut dweights.gate_up,
            dweights.gate_up_bias.as_mut(),
            &gradients.gate_up,
            &activations.normed,
            self.gate_up_shape(tokens),
        )?;
        device.linear_backward_input(
            &mut gradients.normed,
            &gradients.gate_up,
            &weights.gate_up,
            self.gate_up_shape(tokens),
        )?;

        // normed = rms_norm(middle)
        device.rms_norm_backward(RmsNormBackward {
            dx: &mut gradients.residual,
            dweight: &mut dweights.post_norm,
            dout: &gradients.normed,
            x: &activations.middle[slot],
            weight: &weights.post_norm,
            rstd: &activations.post_rstd[slot],
            shape: self.norm_shape(tokens),
        })
    }

    fn attention_backward(
        &self,
        layer: usize,
        dweights: &mut LlamaTensors<Floats<D>>,
        gradients: &mut Gradients<D>,
        activations: &mut Activations<D>,
        batch: &BatchBuffers<D>,
        tokens: usize,
    ) -> Result<()> {
        let device = &self.device;
        let (weights, dweights) = (&self.weights.layers[layer], &mut dweights.layers[layer]);
        let (slot, residual) = (activations.slot(layer), activations.residual_slot(layer));
        let shape = self.config.attention_shape();

        // delta = attention_out(attention)
        device.linear_backward_weight(
            &mut dweights.attention_out,
            dweights.attention_out_bias.as_mut(),
            &gradients.residual,
            &activations.attention[slot],
            self.attention_out_shape(tokens),
        )?;
        device.linear_backward_input(
            &mut gradients.attention,
            &gradients.residual,
            &weights.attention_out,
            self.attention_out_shape(tokens),
        )?;

        // attention = softmax(q k^T) v, q and k rotated
        device.attention_backward(AttentionGradient {
            dqkv: &mut gradients.qkv,
            dout: &gradients.attention,
            out: &activations.attention[slot],
            lse: &activations.attention_lse[slot],
            qkv: &activations.qkv[slot],
            batch,
            shape,
        })?;
        device.rope(
            &mut gradients.qkv,
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
        device.linear_backward_weight(
            &mut dweights.qkv,
            dweights.qkv_bias.as_mut(),
            &gradients.qkv,
            &activations.normed,
            self.qkv_shape(tokens),
        )?;
        device.linear_backward_input(
            &mut gradients.normed,
            &gradients.qkv,
            &weights.qkv,
            self.qkv_shape(tokens),
        )?;

        // normed = rms_norm(residual)
        device.rms_norm_backward(RmsNormBackward {
            dx: &mut gradients.residual,
            dweight: &mut dweights.input_norm,
            dout: &gradients.normed,
            x: &activations.residual[residual],
            weight: &weights.input_norm,
            rstd: &activations.input_rstd[slot],
            shape: self.norm_shape(tokens),
        })
    }
}
