//! The work of an optimiser step: floating-point operations and bytes moved, by formula, and the time they take at given rates.
//!
//! A multiplication with an addition counts as two operations. `T` packed tokens, `N` scored tokens, `A` query-key pairs that the
//! mask lets through, `P` values of a layer's four matrices, `L` layers; the rest as in `docs/shapes.md`.
//!
//! | part | operations |
//! |---|---|
//! | gemms | `2 T P L` forward, as many for the inputs' gradients, as many for the weights' gradients where these are trained |
//! | adapters | three times `2 T` for each value of their matrices |
//! | attention | `4 A H E L` forward, `10 A H E L` backward, of which `2 A H E L` form the scores again |
//! | head | `2 N V D` forward, as many for the rows' gradients, as many for the matrix's where it is trained |
//! | recomputed | `selective`: `2 T * 2F * D L`; `layer`: the forward of the layers but for their last gemm; the head's recompute mode: `2 N V D` |

use super::rates::Rates;
use crate::config::{GradientConfig, MemoryConfig};
use crate::data::{PairBatch, Sides, TokenizedPair};
use crate::model::{LlamaConfig, LlamaTensors, LoraSettings, Recompute};
use crate::optimizer::MasterWeights;

/// What a step's batches hold.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Volume {
    /// Pairs.
    pub pairs: f64,
    /// `T`
    pub tokens: f64,
    /// `N`
    pub scored: f64,
    /// `A`
    pub visible: f64,
    /// Micro-batches that they are cut into.
    pub micro_batches: f64,
}

impl Volume {
    /// The volume of `pairs` in one micro-batch; an objective that looks at one response packs one.
    pub fn of<'a>(pairs: impl IntoIterator<Item = &'a TokenizedPair>, sides: Sides) -> Self {
        let mut volume = Volume { micro_batches: 1.0, ..Volume::default() };
        for pair in pairs {
            let batch = PairBatch::pack([pair], sides);
            volume.pairs += 1.0;
            volume.tokens += batch.tokens() as f64;
            volume.scored += batch.scored_tokens() as f64;
            volume.visible += batch.spans.iter().map(|span| span.visible() as f64).sum::<f64>();
        }
        volume
    }

    /// A share of it, with its own number of micro-batches.
    pub fn share(self, share: f64, micro_batches: f64) -> Self {
        Volume {
            pairs: self.pairs * share,
            tokens: self.tokens * share,
            scored: self.scored * share,
            visible: self.visible * share,
            micro_batches,
        }
    }
}

/// What is trained, as far as work depends on it.
#[derive(Clone, Debug)]
pub struct Trained {
    config: LlamaConfig,
    /// Values of all tensors, and of the trained ones.
    all: f64,
    trained: f64,
    /// Values of embedding, final norm and head.
    outside: f64,
    /// Values of the adapters' matrices.
    adapters: f64,
}

impl Trained {
    /// The whole model, or adapters of it.
    pub fn new(config: &LlamaConfig, lora: Option<&LoraSettings>) -> Self {
        let layout = LlamaTensors::layout(config);
        let all = layout.iter().map(|tensor| tensor.values() as f64).sum();
        let outside = layout.outside_layers().map(|tensor| tensor.values() as f64).sum();
        let adapters = lora.map_or(0.0, |settings| {
            let layout = layout.clone().with_adapters(config, settings);
            layout.adapter_tensors().map(|tensor| tensor.values() as f64).sum()
        });
        let trained = if lora.is_some() { adapters } else { all };
        Trained { config: config.clone(), all, trained, outside, adapters }
    }

    fn is_frozen(&self) -> bool {
        self.adapters > 0.0
    }

    /// Share of a micro-batch's time that its backward takes: a frozen weight has no gradient of its own to compute.
    pub fn backward_share(&self) -> f64 {
        if self.is_frozen() { 1.0 / 2.0 } else { 2.0 / 3.0 }
    }

    /// Values of all tensors.
    pub fn parameters(&self) -> f64 {
        self.all + self.adapters
    }

    /// Values of the trained tensors.
    pub fn trained_parameters(&self) -> f64 {
        self.trained
    }

    /// Values of all layers.
    pub fn layer_parameters(&self) -> f64 {
        self.parameters() - self.outside
    }

    /// Values of the trained tensors that belong to no layer.
    pub fn trained_outside_layers(&self) -> f64 {
        if self.is_frozen() { 0.0 } else { self.outside }
    }

    /// `P`, and the part of it that is gate and up, and the part that is the last gemm.
    fn layer_matrices(&self) -> (f64, f64, f64) {
        let shape = self.config.attention_shape();
        let (width, mlp) = (self.config.hidden_size as f64, self.config.intermediate_size as f64);
        let attention = width * (shape.qkv_width() + shape.out_width()) as f64;
        (attention + 3.0 * width * mlp, 2.0 * width * mlp, width * mlp)
    }

    /// The operations that the model itself asks for, as MFU counts them: nothing that is computed twice to save memory.
    pub fn model_flops(&self, volume: &Volume) -> f64 {
        let work = self.work(volume, &MemoryConfig::default(), false, 2);
        let shape = self.config.attention_shape();
        let again = 2.0 * volume.visible * shape.out_width() as f64 * self.config.layers as f64;
        work.gemm + work.attention - again + work.head
    }

    /// The work of a step; `recomputes_head` says that the head keeps no probabilities, and `size` is the bytes of a weight.
    pub fn work(&self, volume: &Volume, memory: &MemoryConfig, recomputes_head: bool, size: usize) -> Work {
        let config = &self.config;
        let (layers, shape) = (config.layers as f64, config.attention_shape());
        let (matrices, gate_up, down) = self.layer_matrices();
        let passes = if self.is_frozen() { 2.0 } else { 3.0 };
        let forward = 2.0 * volume.tokens * layers;
        let attention = volume.visible * shape.out_width() as f64 * layers;
        let vocabulary = 2.0 * volume.scored * (config.vocab_size * config.hidden_size) as f64;
        let recomputed = match memory.recompute {
            Recompute::None => 0.0,
            Recompute::Selective => forward * gate_up,
            Recompute::Layer => forward * (matrices - down) + 4.0 * attention,
        };
        Work {
            gemm: passes * forward * matrices + 6.0 * volume.tokens * self.adapters,
            attention: 14.0 * attention,
            head: passes * vocabulary,
            recomputed: recomputed + if recomputes_head { vocabulary } else { 0.0 },
            update_bytes: self.update_bytes(memory, size as f64),
            bytes: self.moved_bytes(volume, size as f64) + self.sum_bytes(volume, memory),
        }
    }

    /// Bytes of the update and of what belongs to it once a step: the norm over the gradients, and setting them to zero.
    fn update_bytes(&self, memory: &MemoryConfig, size: f64) -> f64 {
        const VALUES: usize = 1 << 20;
        let moments = memory.states.moments.bytes(VALUES) as f64 / VALUES as f64;
        // What an update comes from is read, and it and the weight are written.
        let weight = match memory.states.master {
            MasterWeights::F32 if size < 4.0 => size + 8.0,
            MasterWeights::Split if size < 4.0 => 2.0 * (size + 2.0),
            _ => 2.0 * size,
        };
        let gradient = match memory.gradients {
            GradientConfig::F32 | GradientConfig::Layer => 4.0,
            GradientConfig::Bf16 => 2.0,
        };
        self.trained * (weight + 2.0 * moments + 3.0 * gradient)
    }

    /// Bytes by which each micro-batch is added to bf16 sums: the f32 gradient is read, the sum read and written, and the gradient
    /// set to zero for the next layer.
    fn sum_bytes(&self, volume: &Volume, memory: &MemoryConfig) -> f64 {
        match memory.gradients {
            GradientConfig::F32 | GradientConfig::Layer => 0.0,
            GradientConfig::Bf16 => 12.0 * self.trained * volume.micro_batches,
        }
    }

    /// Bytes of operations that do no gemm, and of the gradients that each micro-batch is added to. For a token and a layer
    /// norms move about 20 rows of `D`, rotations 4 of a row of `qkv`, SwiGLU 11 of `F`.
    fn moved_bytes(&self, volume: &Volume, size: f64) -> f64 {
        let config = &self.config;
        let width = config.hidden_size as f64;
        let row = 20.0 * width
            + 4.0 * config.attention_shape().qkv_width() as f64
            + 11.0 * config.intermediate_size as f64;
        let head = volume.scored * (6.0 * width + 3.0 * config.vocab_size as f64);
        let gradients = 8.0 * self.trained * volume.micro_batches;
        let weights = 2.0 * size * self.all * volume.micro_batches;
        size * (volume.tokens * config.layers as f64 * row + head) + gradients + weights
    }
}

/// Floating-point operations and bytes of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct Work {
    /// Gemms of the layers and of adapters.
    pub gemm: f64,
    /// Attention.
    pub attention: f64,
    /// The log-prob head.
    pub head: f64,
    /// What is computed a second time to save memory.
    pub recomputed: f64,
    /// Bytes of the update.
    pub update_bytes: f64,
    /// Other bytes that no gemm hides.
    pub bytes: f64,
}

impl Work {
    /// All operations.
    pub fn flops(&self) -> f64 {
        self.gemm + self.attention + self.head + self.recomputed
    }

    /// Seconds at these rates, of which the kernels reach the shares that [`Rates`] documents.
    pub fn seconds(&self, rates: &Rates) -> f64 {
        let peak = rates.tflops * 1e12;
        let gemm = (self.gemm + self.recomputed + self.head) / (peak * Rates::GEMM_SHARE);
        let attention = self.attention / (peak * Rates::ATTENTION_SHARE);
        gemm + attention + (self.bytes + self.update_bytes) / (rates.bandwidth * 1e9 * Rates::BANDWIDTH_SHARE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::shapes;

    fn volume() -> Volume {
        Volume { pairs: 1.0, tokens: 1000.0, scored: 600.0, visible: 300_000.0, micro_batches: 1.0 }
    }

    /// Six operations for each parameter and token, the rule of thumb, where every token is scored and attention is left out.
    #[test]
    fn the_work_of_full_training_is_six_operations_per_parameter() {
        let config = shapes::model("llama-3-8b", None).unwrap();
        let trained = Trained::new(&config, None);
        let work = trained.work(&Volume { scored: 1000.0, ..volume() }, &MemoryConfig::default(), false, 2);
        let embedding = (config.vocab_size * config.hidden_size) as f64;
        let matrices = trained.parameters() - embedding;
        let ratio = (work.gemm + work.head) / (6.0 * 1000.0 * matrices);
        assert!((ratio - 1.0).abs() <= 1e-3, "{ratio}");
        assert_eq!(work.attention, 14.0 * 300_000.0 * 4096.0 * 32.0);
    }

    #[test]
    fn recomputation_costs_what_the_document_says() {
        let config = shapes::model("llama-3-8b", None).unwrap();
        let trained = Trained::new(&config, None);
        let share = |recompute| {
            let memory = MemoryConfig { recompute, ..MemoryConfig::default() };
            let work = trained.work(&Volume { visible: 0.0, scored: 0.0, ..volume() }, &memory, false, 2);
            work.recomputed / work.gemm
        };
        assert!((share(Recompute::Selective) - 0.18).abs() <= 0.01, "{}", share(Recompute::Selective));
        assert!((share(Recompute::Layer) - 0.24).abs() <= 0.025, "{}", share(Recompute::Layer));
    }

    #[test]
    fn frozen_weights_have_no_gradients_to_compute() {
        use crate::model::{AdaptedModule, AdaptedModules};
        let config = shapes::model("llama-3.2-1b", None).unwrap();
        let modules = AdaptedModules::of(AdaptedModule::ALL);
        let lora = LoraSettings { modules, rank: 64, alpha: 64.0, dropout: 0.01, rslora: false };
        let (full, adapted) = (Trained::new(&config, None), Trained::new(&config, Some(&lora)));
        let of = |trained: &Trained| trained.work(&volume(), &MemoryConfig::default(), false, 2);
        let share = of(&adapted).gemm / of(&full).gemm;
        assert!((0.66..0.75).contains(&share), "{share}");
        assert!(adapted.trained_parameters() < 0.05 * full.trained_parameters());
    }

    /// The bytes of an update that `docs/memory.md` states, and 8 for the norm and for setting gradients to zero.
    #[test]
    fn an_update_moves_the_documented_bytes() {
        use crate::optimizer::{MomentFormat, StateOptions};
        let trained = Trained::new(&shapes::model("smollm2-135m", None).unwrap(), None);
        for (moments, master, bytes) in [
            (MomentFormat::F32, MasterWeights::F32, 30.0),
            (MomentFormat::EightBit, MasterWeights::F32, 18.0),
            (MomentFormat::F32, MasterWeights::Split, 28.0),
            (MomentFormat::EightBit, MasterWeights::None, 12.0),
        ] {
            let memory = MemoryConfig { states: StateOptions { moments, master }, ..MemoryConfig::default() };
            let per_value = trained.update_bytes(&memory, 2.0) / trained.trained_parameters() - 8.0;
            assert!((per_value - bytes).abs() <= 0.1, "{moments:?} {master:?}: {per_value}");
        }
    }
}
