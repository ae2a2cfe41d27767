//! The Llama backward: from the gradient of the residual stream after the last layer to all weight gradients.
//!
//! `scratch.residual` flows from the top of the model down; each block adds what reaches it through its own norm.
//! Weight gradients accumulate over micro-batches, in f32. A frozen tensor has none, and the gemm that would form it is
//! not run.

use super::adapter::{Place, Site};
use super::buffers::{Activations, BackwardScratch};
use super::projection::ProjectionBackward;
use super::tensors::LayerTensors;
use super::{Gradients, LayerGradients, Llama};
use crate::device::{AttentionGradient, BatchBuffers, ComputeBuffer, Device, RmsNormBackward, RopeDirection};
use crate::error::Result;

/// A layer whose gradients the backward has completed, for this micro-batch.
#[derive(Debug)]
pub struct CompleteLayer<'a, D: Device> {
    /// Its number, from 0.
    pub layer: usize,
    /// Its weights. The rest of the backward does not read them, so they may be updated.
    pub weights: &'a mut LayerTensors<ComputeBuffer<D>>,
    /// The gradients of the trained ones.
    pub gradients: &'a mut LayerGradients<D>,
}

/// Is told of each layer once the backward has added all that this micro-batch contributes to its gradients. This is
/// the place to reduce them between processes, or to apply them, while the layers below are still to come.
pub trait GradientSink<D: Device> {
    /// The backward of `layer` begins: `weights[layer]` must hold the layer's weights when this returns.
    ///
    /// # Errors
    /// As [`GradientSink::layer_complete`].
    fn before_layer(&mut self, _layer: usize, _weights: &mut [LayerTensors<ComputeBuffer<D>>]) -> Result<()> {
        Ok(())
    }

    /// The gradients of a layer are complete. Layers come from the last one to the lowest that the backward reaches, each
    /// once.
    ///
    /// # Errors
    /// Those of what the sink does with them; they end the backward.
    fn layer_complete(&mut self, layer: CompleteLayer<'_, D>) -> Result<()>;
}

/// Leaves the gradients where they are: one optimiser step over all of them follows.
#[derive(Clone, Copy, Debug, Default)]
pub struct KeepGradients;

impl<D: Device> GradientSink<D> for KeepGradients {
    fn layer_complete(&mut self, _: CompleteLayer<'_, D>) -> Result<()> {
        Ok(())
    }
}

impl<D: Device> Llama<D> {
    /// Accumulates into `gradients`; `scratch.residual` holds `dL/d residual[L]` on entry and is consumed.
    /// `activations` must be those of [`Llama::forward`] over the same batch. The backward ends at the lowest tensor
    /// that is trained. Weights change only where `sink` changes them.
    ///
    /// # Errors
    /// Those of the device and of `sink`.
    pub fn backward(
        &mut self,
        gradients: &mut Gradients<D>,
        scratch: &mut BackwardScratch<D>,
        activations: &mut Activations<D>,
        batch: &BatchBuffers<D>,
        tokens: usize,
        sink: &mut impl GradientSink<D>,
    ) -> Result<()> {
        for layer in (self.lowest_trained_layer()..self.config.layers).rev() {
            sink.before_layer(layer, &mut self.weights.layers)?;
            self.complete_activations(layer, activations, batch, tokens)?;
            // All layers share the gradients of one where a sink applies them.
            let gradient_slot = layer % gradients.layers.len();
            let gradients = &mut gradients.layers[gradient_slot];
            LayerBackward {
                model: self,
                weights: &self.weights.layers[layer],
                layer,
                slot: activations.slot(layer),
                gate_up_slot: activations.gate_up_slot(layer),
                residual_slot: activations.residual_slot(layer),
                gradients: &mut *gradients,
                scratch: &mut *scratch,
                activations: &mut *activations,
                tokens,
            }
            .run(batch)?;
            sink.layer_complete(CompleteLayer {
                layer,
                weights: &mut self.weights.layers[layer],
                gradients,
            })?;
        }
        let Some(dtable) = &mut gradients.embedding else { return Ok(()) };
        let (rows, width) = (batch.embedding_rows, self.config.hidden_size);
        self.device.embedding_backward(dtable, &scratch.residual, batch, rows, width)
    }

    /// The lowest layer that the gradient must pass through to reach all trained tensors; the number of layers if they
    /// all lie above the layers.
    pub(crate) fn lowest_trained_layer(&self) -> usize {
        if self.layout.embedding.trained {
            return 0;
        }
        let mut layers = self.layout.layers.iter();
        let lowest = layers.position(|layer| layer.iter().any(|tensor| tensor.trained));
        lowest.unwrap_or(self.config.layers)
    }
}

/// The backward of one layer: what its stages read and write.
struct LayerBackward<'a, D: Device> {
    model: &'a Llama<D>,
    weights: &'a LayerTensors<ComputeBuffer<D>>,
    layer: usize,
    slot: usize,
    gate_up_slot: usize,
    residual_slot: usize,
    gradients: &'a mut LayerGradients<D>,
    scratch: &'a mut BackwardScratch<D>,
    activations: &'a mut Activations<D>,
    tokens: usize,
}

impl<D: Device> LayerBackward<'_, D> {
    fn run(&mut self, batch: &BatchBuffers<D>) -> Result<()> {
        self.down()?;
        self.gate_up()?;
        self.attention_out()?;
        self.attention(batch)?;
        self.qkv()
    }

    fn place(&self, site: Site) -> Place {
        Place { layer: self.layer, site, slot: self.slot, tokens: self.tokens }
    }

    /// `delta = down(activated)`: from the residual stream's gradient to that of `activated`.
    fn down(&mut self) -> Result<()> {
        let place = self.place(Site::Down);
        let LayerBackward { model, gate_up_slot, gradients, scratch, activations, tokens, .. } = self;
        let width = model.config.intermediate_size;
        let gate_up = &activations.gate_up[*gate_up_slot];
        model.device.swiglu_forward(&mut activations.activated, gate_up, *tokens, width)?;
        model.project_backward(ProjectionBackward {
            dx: &mut scratch.activated,
            dweights: &mut gradients.down,
            dout: &scratch.residual,
            x: &activations.activated,
            adapter: activations.adapter.as_mut(),
            place,
        })
    }

    /// `activated = silu(gate) * up`, `gate_up = linear(normed)`, `normed = rms_norm(middle)`: to the gradient of the
    /// residual stream between attention and MLP.
    fn gate_up(&mut self) -> Result<()> {
        let place = self.place(Site::GateUp);
        let LayerBackward {
            model, weights, slot, gate_up_slot, gradients, scratch, activations, tokens, ..
        } = self;
        let (slot, tokens, norm_shape) = (*slot, *tokens, model.config.norm_shape(*tokens));
        model.device.swiglu_backward(
            &mut scratch.gate_up,
            &scratch.activated,
            &activations.gate_up[*gate_up_slot],
            tokens,
            model.config.intermediate_size,
        )?;
        model.device.rms_norm_forward(
            &mut activations.normed,
            &mut activations.post_rstd[slot],
            &activations.middle[slot],
            &weights.post_norm,
            norm_shape,
        )?;
        model.project_backward(ProjectionBackward {
            dx: &mut scratch.normed,
            dweights: &mut gradients.gate_up,
            dout: &scratch.gate_up,
            x: &activations.normed,
            adapter: activations.adapter.as_mut(),
            place,
        })?;
        model.device.rms_norm_backward(RmsNormBackward {
            dx: &mut scratch.residual,
            dweight: gradients.post_norm.as_mut(),
            dout: &scratch.normed,
            x: &activations.middle[slot],
            weight: &weights.post_norm,
            rstd: &activations.post_rstd[slot],
            shape: norm_shape,
        })
    }

    /// `delta = attention_out(attention)`: to the gradient of the attention's output.
    fn attention_out(&mut self) -> Result<()> {
        let place = self.place(Site::AttentionOut);
        let LayerBackward { model, slot, gradients, scratch, activations, .. } = self;
        model.project_backward(ProjectionBackward {
            dx: &mut scratch.attention,
            dweights: &mut gradients.attention_out,
            dout: &scratch.residual,
            x: &activations.attention[*slot],
            adapter: activations.adapter.as_mut(),
            place,
        })
    }

    /// `attention = softmax(q k^T) v` with `q` and `k` rotated: to the gradient of `qkv` before the rotation.
    fn attention(&mut self, batch: &BatchBuffers<D>) -> Result<()> {
        let LayerBackward { model, slot, scratch, activations, tokens, .. } = self;
        let shape = model.config.attention_shape();
        model.device.attention_backward(AttentionGradient {
            dqkv: &mut scratch.qkv,
            dout: &scratch.attention,
            out: &activations.attention[*slot],
            lse: &activations.attention_lse[*slot],
            qkv: &activations.qkv[*slot],
            batch,
            shape,
        })?;
        let (table, positions) = (&model.rope_table, &batch.positions);
        model.device.rope(&mut scratch.qkv, table, positions, *tokens, shape, RopeDirection::Backward)
    }

    /// `qkv = linear(normed)`, `normed = rms_norm(residual)`: to the gradient of the residual stream entering the layer.
    fn qkv(&mut self) -> Result<()> {
        let place = self.place(Site::Qkv);
        let LayerBackward {
            model,
            weights,
            slot,
            residual_slot,
            gradients,
            scratch,
            activations,
            tokens,
            ..
        } = self;
        let (slot, residual_slot, norm_shape) = (*slot, *residual_slot, model.config.norm_shape(*tokens));
        model.device.rms_norm_forward(
            &mut activations.normed,
            &mut activations.input_rstd[slot],
            &activations.residual[residual_slot],
            &weights.input_norm,
            norm_shape,
        )?;
        model.project_backward(ProjectionBackward {
            dx: &mut scratch.normed,
            dweights: &mut gradients.qkv,
            dout: &scratch.qkv,
            x: &activations.normed,
            adapter: activations.adapter.as_mut(),
            place,
        })?;
        model.device.rms_norm_backward(RmsNormBackward {
            dx: &mut scratch.residual,
            dweight: gradients.input_norm.as_mut(),
            dout: &scratch.normed,
            x: &activations.residual[residual_slot],
            weight: &weights.input_norm,
            rstd: &activations.input_rstd[slot],
            shape: norm_shape,
        })
    }
}
