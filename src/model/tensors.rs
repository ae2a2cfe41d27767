//! The tensors of a Llama, once as a shape: the same tree holds weights, gradients, optimiser states or names.
//!
//! Matrices that read the same input are stored as one: query, key and value projections are rows of `qkv`, gate and
//! up projections are rows of `gate_up`, so each is one product. A file still sees them by their own names.

use super::config::{LlamaConfig, TensorSpec};

/// One value of type `T` for every fused tensor of a Llama.
#[derive(Clone, Debug)]
pub struct LlamaTensors<T> {
    /// `[V, D]`; also the output head where `lm_head` is `None` (tied).
    pub embedding: T,
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
    /// `[(H + 2K) * E, D]`
    pub qkv: T,
    /// `[(H + 2K) * E]`
    pub qkv_bias: Option<T>,
    /// `[D, H * E]`
    pub attention_out: T,
    /// `[D]`
    pub attention_out_bias: Option<T>,
    /// `[D]`
    pub post_norm: T,
    /// `[2F, D]`
    pub gate_up: T,
    /// `[2F]`
    pub gate_up_bias: Option<T>,
    /// `[D, F]`
    pub down: T,
    /// `[D]`
    pub down_bias: Option<T>,
}

/// The checkpoint tensors that lie one after the other in a fused tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FusedTensor {
    pub parts: Vec<TensorSpec>,
}

impl FusedTensor {
    fn of(parts: Vec<TensorSpec>) -> Self {
        FusedTensor { parts }
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
    let fused = |module: &str, kind: &str, parts: &[(&str, &[usize])]| {
        FusedTensor::of(
            parts
                .iter()
                .map(|(name, shape)| {
                    TensorSpec::new(format!("model.layers.{layer}.{module}{name}.{kind}"), shape)
                })
                .collect(),
        )
    };
    let attention_bias =
        |parts: &[(&str, &[usize])]| config.attention_bias.then(|| fused("self_attn.", "bias", parts));
    let mlp_bias = |parts: &[(&str, &[usize])]| config.mlp_bias.then(|| fused("mlp.", "bias", parts));
    LayerTensors {
        input_norm: fused("", "weight", &[("input_layernorm", &[width])]),
        qkv: fused(
            "self_attn.",
            "weight",
            &[("q_proj", &[query, width]), ("k_proj", &[key, width]), ("v_proj", &[key, width])],
        ),
        qkv_bias: attention_bias(&[("q_proj", &[query]), ("k_proj", &[key]), ("v_proj", &[key])]),
        attention_out: fused("self_attn.", "weight", &[("o_proj", &[width, query])]),
        attention_out_bias: attention_bias(&[("o_proj", &[width])]),
        post_norm: fused("", "weight", &[("post_attention_layernorm", &[width])]),
        gate_up: fused(
            "mlp.",
            "weight",
            &[("gate_proj", &[mlp_width, width]), ("up_proj", &[mlp_width, width])],
        ),
        gate_up_bias: mlp_bias(&[("gate_proj", &[mlp_width]), ("up_proj", &[mlp_width])]),
        down: fused("mlp.", "weight", &[("down_proj", &[width, mlp_width])]),
        down_bias: mlp_bias(&[("down_proj", &[width])]),
    }
}

impl<T> LlamaTensors<T> {
    /// The output head's `[V, D]`: its own tensor, or the embedding's where they are tied.
    pub fn head(&self) -> &T {
        self.lm_head.as_ref().unwrap_or(&self.embedding)
    }

    pub fn head_mut(&mut self) -> &mut T {
        self.lm_head.as_mut().unwrap_or(&mut self.embedding)
    }

    /// A tree of the same shape, made value by value in a fixed order.
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
    fn try_map<U, E>(&self, make: &mut impl FnMut(&T) -> Result<U, E>) -> Result<LayerTensors<U>, E> {
        Ok(LayerTensors {
            input_norm: make(&self.input_norm)?,
            qkv: make(&self.qkv)?,
            qkv_bias: self.qkv_bias.as_ref().map(&mut *make).transpose()?,
            attention_out: make(&self.attention_out)?,
            attention_out_bias: self.attention_out_bias.as_ref().map(&mut *make).transpose()?,
            post_norm: make(&self.post_norm)?,
            gate_up: make(&self.gate_up)?,
            gate_up_bias: self.gate_up_bias.as_ref().map(&mut *make).transpose()?,
            down: make(&self.down)?,
            down_bias: self.down_bias.as_ref().map(&mut *make).transpose()?,
        })
    }

    fn iter(&self) -> impl Iterator<Item = &T> {
        [Some(&self.input_norm), Some(&self.qkv), self.qkv_bias.as_ref(), Some(&self.attention_out)]
            .into_iter()
            .chain([self.attention_out_bias.as_ref(), Some(&self.post_norm), Some(&self.gate_up)])
            .chain([self.gate_up_bias.as_ref(), Some(&self.down), self.down_bias.as_ref()])
            .flatten()
    }

    fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        [
            Some(&mut self.input_norm),
            Some(&mut self.qkv),
            self.qkv_bias.as_mut(),
            Some(&mut self.attention_out),
        ]
        .into_iter()
        .chain([self.attention_out_bias.as_mut(), Some(&mut self.post_norm), Some(&mut self.gate_up)])
        .chain([self.gate_up_bias.as_mut(), Some(&mut self.down), self.down_bias.as_mut()])
        .flatten()
    }
}
