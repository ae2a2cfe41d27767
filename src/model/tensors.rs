//! The tensors of a Llama as one tree, which holds weights, gradients, optimiser states or names.
//!
//! Matrices that read the same input are stored as one: query, key and value projections are rows of `qkv`, gate and up
//! projections are rows of `gate_up`, so each is one gemm. A file still has them under their own names.

use super::Projection;
use super::config::{LlamaConfig, TensorSpec};

/// One value of type `T` for every fused tensor of a Llama.
#[derive(Clone, Debug)]
pub struct LlamaTensors<T> {
    /// `[V, D]`; also the output head where `lm_head` is `None` (tied).
    pub embedding: T,
    /// The layers, first to last.
    pub layers: Vec<LayerTensors<T>>,
    /// `[D]`
    pub final_norm: T,
    /// `[V, D]`
    pub lm_head: Option<T>,
}

/// One value of type `T` for every fused tensor of a layer.
#[derive(Clone, Debug)]
pub struct LayerTensors<T> {
    /// `[D]`
    pub input_norm: T,
    /// `[(H + 2K) * E, D]`: queries, keys and values.
    pub qkv: Projection<T>,
    /// `[D, H * E]`
    pub attention_out: Projection<T>,
    /// `[D]`
    pub post_norm: T,
    /// `[2F, D]`: gate, then up.
    pub gate_up: Projection<T>,
    /// `[D, F]`
    pub down: Projection<T>,
}

/// The checkpoint tensors that lie one after the other in a fused tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FusedTensor {
    /// Names and shapes, in order.
    pub parts: Vec<TensorSpec>,
    /// Whether training changes it. A frozen tensor keeps its values: it has no gradient and no optimiser state.
    pub trained: bool,
}

impl FusedTensor {
    fn of(parts: Vec<TensorSpec>) -> Self {
        FusedTensor { parts, trained: true }
    }

    /// The name of the first part, by which checkpoints know the whole.
    pub fn name(&self) -> &str {
        self.parts.first().map_or("", |part| part.name.as_str())
    }

    /// Number of values.
    pub fn values(&self) -> usize {
        self.parts.iter().map(TensorSpec::values).sum()
    }

    /// Each part with its offset in the fused tensor.
    pub fn offsets(&self) -> impl Iterator<Item = (usize, &TensorSpec)> {
        self.parts.iter().scan(0, |offset, part| {
            let here = *offset;
            *offset += part.values();
            Some((here, part))
        })
    }
}

impl LlamaTensors<FusedTensor> {
    /// Names and shapes of the checkpoint's tensors, in checkpoint order.
    pub fn layout(config: &LlamaConfig) -> Self {
        let matrix = [config.vocab_size, config.hidden_size];
        let single = |name: &str, shape: &[usize]| FusedTensor::of(vec![TensorSpec::new(name, shape)]);
        LlamaTensors {
            embedding: single("model.embed_tokens.weight", &matrix),
            layers: (0..config.layers).map(|layer| layer_layout(config, layer)).collect(),
            final_norm: single("model.norm.weight", &[config.hidden_size]),
            lm_head: (!config.tie_word_embeddings).then(|| single("lm_head.weight", &matrix)),
        }
    }
}

fn layer_layout(config: &LlamaConfig, layer: usize) -> LayerTensors<FusedTensor> {
    let (width, mlp_width) = (config.hidden_size, config.intermediate_size);
    let (query, key) = (config.heads * config.head_size, config.kv_heads * config.head_size);
    let spec = |name: String, shape: &[usize]| TensorSpec::new(format!("model.layers.{layer}.{name}"), shape);
    let norm = |name: &str| FusedTensor::of(vec![spec(format!("{name}.weight"), &[width])]);
    // Projections of `inputs` values that are stored as one: `parts` gives each one's name and outputs.
    let projection = |parts: &[(&str, usize)], inputs: usize, bias: bool| {
        let of = |kind: &str, shape: &dyn Fn(usize) -> Vec<usize>| {
            let parts = parts.iter().map(|(name, outputs)| spec(format!("{name}.{kind}"), &shape(*outputs)));
            FusedTensor::of(parts.collect())
        };
        Projection {
            weight: of("weight", &|outputs| vec![outputs, inputs]),
            bias: bias.then(|| of("bias", &|outputs| vec![outputs])),
            adapter: None,
        }
    };
    LayerTensors {
        input_norm: norm("input_layernorm"),
        qkv: projection(
            &[("self_attn.q_proj", query), ("self_attn.k_proj", key), ("self_attn.v_proj", key)],
            width,
            config.qkv_bias,
        ),
        attention_out: projection(&[("self_attn.o_proj", width)], query, config.attention_out_bias),
        post_norm: norm("post_attention_layernorm"),
        gate_up: projection(
            &[("mlp.gate_proj", mlp_width), ("mlp.up_proj", mlp_width)],
            width,
            config.mlp_bias,
        ),
        down: projection(&[("mlp.down_proj", width)], mlp_width, config.mlp_bias),
    }
}

impl<T> LlamaTensors<T> {
    /// The output head's `[V, D]`: its own tensor, or the embedding's where they are tied.
    pub fn head(&self) -> &T {
        self.lm_head.as_ref().unwrap_or(&self.embedding)
    }

    /// The vocabulary matrix of the head: the embedding where the two are tied.
    pub fn head_mut(&mut self) -> &mut T {
        self.lm_head.as_mut().unwrap_or(&mut self.embedding)
    }

    /// The values of tensors that belong to no layer, in the order of [`LlamaTensors::iter`].
    pub fn outside_layers(&self) -> impl Iterator<Item = &T> {
        [&self.embedding, &self.final_norm].into_iter().chain(&self.lm_head)
    }

    /// As [`LlamaTensors::outside_layers`].
    pub fn outside_layers_mut(&mut self) -> impl Iterator<Item = &mut T> {
        [&mut self.embedding, &mut self.final_norm].into_iter().chain(&mut self.lm_head)
    }

    /// A tree of the same shape, made value by value in a fixed order.
    ///
    /// # Errors
    /// The first error of `make`, which ends the walk.
    pub fn try_map<U, E>(&self, mut make: impl FnMut(&T) -> Result<U, E>) -> Result<LlamaTensors<U>, E> {
        Ok(LlamaTensors {
            embedding: make(&self.embedding)?,
            layers: self.layers.iter().map(|layer| layer.try_map(&mut make)).collect::<Result<_, E>>()?,
            final_norm: make(&self.final_norm)?,
            lm_head: self.lm_head.as_ref().map(&mut make).transpose()?,
        })
    }

    /// All values, in the order of [`LlamaTensors::try_map`].
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        std::iter::once(&self.embedding)
            .chain(self.layers.iter().flat_map(LayerTensors::iter))
            .chain(std::iter::once(&self.final_norm))
            .chain(&self.lm_head)
    }

    /// As [`LlamaTensors::iter`].
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        std::iter::once(&mut self.embedding)
            .chain(self.layers.iter_mut().flat_map(LayerTensors::iter_mut))
            .chain(std::iter::once(&mut self.final_norm))
            .chain(&mut self.lm_head)
    }
}

impl<T> LayerTensors<T> {
    pub(crate) fn try_map<U, E>(
        &self,
        make: &mut impl FnMut(&T) -> Result<U, E>,
    ) -> Result<LayerTensors<U>, E> {
        Ok(LayerTensors {
            input_norm: make(&self.input_norm)?,
            qkv: self.qkv.try_map(make)?,
            attention_out: self.attention_out.try_map(make)?,
            post_norm: make(&self.post_norm)?,
            gate_up: self.gate_up.try_map(make)?,
            down: self.down.try_map(make)?,
        })
    }

    /// All values of the layer, in the order of [`LlamaTensors::try_map`].
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        let attention =
            std::iter::once(&self.input_norm).chain(self.qkv.iter()).chain(self.attention_out.iter());
        let mlp = std::iter::once(&self.post_norm).chain(self.gate_up.iter()).chain(self.down.iter());
        attention.chain(mlp)
    }

    /// As [`LayerTensors::iter`].
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        let LayerTensors { input_norm, qkv, attention_out, post_norm, gate_up, down } = self;
        let attention = std::iter::once(input_norm).chain(qkv.iter_mut()).chain(attention_out.iter_mut());
        let mlp = std::iter::once(post_norm).chain(gate_up.iter_mut()).chain(down.iter_mut());
        attention.chain(mlp)
    }
}
