//! Llama of candle's differentiable operations, with transformers' weight layout (`[out, in]`).

use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_nn::{ops, rotary_emb};

use crate::bench::{Matrix, ModelShape};

pub struct Llama {
    shape: ModelShape,
    /// In the order of `new`: embedding, then nine a layer, final norm, head (untied).
    weights: Vec<Var>,
    /// `[sequence, head_dim / 2]`
    cos: Tensor,
    sin: Tensor,
    /// `[sequence, sequence]`: 0 where a row may look, -inf elsewhere.
    mask: Tensor,
}

/// Places in a layer's nine weights.
const Q: usize = 0;
const K: usize = 1;
const V: usize = 2;
const O: usize = 3;
const GATE: usize = 4;
const UP: usize = 5;
const DOWN: usize = 6;
const INPUT_NORM: usize = 7;
const MLP_NORM: usize = 8;
const PER_LAYER: usize = 9;

impl Llama {
    pub fn new(shape: ModelShape, sequence: usize, device: &Device, dtype: DType) -> Result<Llama> {
        let hidden = shape.hidden;
        let (q_width, kv_width) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        let matrix = |matrix: Matrix, rows: usize, columns: usize| {
            let values = Tensor::from_vec(matrix.values(rows * columns), (rows, columns), device)?;
            Var::from_tensor(&values.to_dtype(dtype)?)
        };
        let mut weights = vec![matrix(Matrix::Embedding, shape.vocabulary, hidden)?];
        let projections = [
            (q_width, hidden),
            (kv_width, hidden),
            (kv_width, hidden),
            (hidden, q_width),
            (shape.mlp, hidden),
            (shape.mlp, hidden),
            (hidden, shape.mlp),
        ];
        for layer in 0..shape.layers {
            for (projection, &(rows, columns)) in projections.iter().enumerate() {
                weights.push(matrix(Matrix::Layer { layer, projection }, rows, columns)?);
            }
            weights.push(Var::ones(hidden, dtype, device)?);
            weights.push(Var::ones(hidden, dtype, device)?);
        }
        weights.push(Var::ones(hidden, dtype, device)?);
        if !shape.tied {
            weights.push(matrix(Matrix::Head { layers: shape.layers }, shape.vocabulary, hidden)?);
        }
        let (cos, sin) = rope_tables(&shape, sequence, device)?;
        let (cos, sin) = (cos.to_dtype(dtype)?, sin.to_dtype(dtype)?);
        let mask = causal_mask(sequence, device)?.to_dtype(dtype)?;
        Ok(Llama { shape, weights, cos, sin, mask })
    }

    pub fn weights(&self) -> &[Var] {
        &self.weights
    }

    /// Logits `[rows, response, V]` that predict the last `response` tokens of `ids`, `[rows, sequence]`.
    pub fn response_logits(&self, ids: &Tensor, response: usize) -> Result<Tensor> {
        let (rows, sequence) = ids.dims2()?;
        let embedding = self.weights[0].as_tensor();
        let mut x =
            embedding.index_select(&ids.flatten_all()?, 0)?.reshape((rows, sequence, self.shape.hidden))?;
        for layer in 0..self.shape.layers {
            let weights = &self.weights[1 + layer * PER_LAYER..][..PER_LAYER];
            x = (&x + self.attention(weights, &self.norm(&x, &weights[INPUT_NORM])?)?)?;
            x = (&x + self.mlp(weights, &self.norm(&x, &weights[MLP_NORM])?)?)?;
        }
        let scored = x.narrow(1, sequence - response - 1, response)?.contiguous()?;
        let scored = self.norm(&scored, &self.weights[1 + self.shape.layers * PER_LAYER])?;
        let head = if self.shape.tied { embedding } else { self.weights[self.weights.len() - 1].as_tensor() };
        linear(&scored, head)
    }

    fn norm(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        ops::rms_norm_slow(x, weight, self.shape.rms_norm_eps as f32)
    }

    fn attention(&self, weights: &[Var], x: &Tensor) -> Result<Tensor> {
        let (rows, sequence, _) = x.dims3()?;
        let &ModelShape { heads, kv_heads, head_dim, .. } = &self.shape;
        let split = |x: Tensor, heads: usize| {
            x.reshape((rows, sequence, heads, head_dim))?.transpose(1, 2)?.contiguous()
        };
        let q = rotary_emb::rope_slow(&split(linear(x, &weights[Q])?, heads)?, &self.cos, &self.sin)?;
        let k = rotary_emb::rope_slow(&split(linear(x, &weights[K])?, kv_heads)?, &self.cos, &self.sin)?;
        let k = repeat_heads(&k, heads / kv_heads)?;
        let v = repeat_heads(&split(linear(x, &weights[V])?, kv_heads)?, heads / kv_heads)?;
        let out = scaled_attention(&q, &k, &v, &self.mask)?;
        let out = out.transpose(1, 2)?.reshape((rows, sequence, heads * head_dim))?;
        linear(&out, &weights[O])
    }

    fn mlp(&self, weights: &[Var], x: &Tensor) -> Result<Tensor> {
        let gate = linear(x, &weights[GATE])?.silu()?;
        linear(&(gate * linear(x, &weights[UP])?)?, &weights[DOWN])
    }
}

/// `[sequence, sequence]`: 0 where a row may look, -inf elsewhere.
pub fn causal_mask(sequence: usize, device: &Device) -> Result<Tensor> {
    let mask = (0..sequence * sequence)
        .map(|at| if at % sequence <= at / sequence { 0f32 } else { f32::NEG_INFINITY });
    Tensor::from_iter(mask, device)?.reshape((sequence, sequence))
}

/// Of `[rows, heads, sequence, head_dim]`, as many key and value heads as query heads.
pub fn scaled_attention(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let scale = 1.0 / (q.dim(D::Minus1)? as f64).sqrt();
    let scores = (q.matmul(&k.t()?)? * scale)?;
    ops::softmax(&scores.broadcast_add(mask)?, D::Minus1)?.matmul(v)
}

/// `x [rows, sequence, in]` by `weight [out, in]`, as one two-dimensional product.
fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (rows, sequence, width) = x.dims3()?;
    x.reshape((rows * sequence, width))?.matmul(&weight.t()?)?.reshape((rows, sequence, ()))
}

/// `[rows, heads, sequence, head_dim]`, each head `times` in a row.
pub fn repeat_heads(x: &Tensor, times: usize) -> Result<Tensor> {
    let (rows, heads, sequence, head_dim) = x.dims4()?;
    Tensor::cat(&vec![x; times], 2)?.reshape((rows, heads * times, sequence, head_dim))
}

fn rope_tables(shape: &ModelShape, sequence: usize, device: &Device) -> Result<(Tensor, Tensor)> {
    let half = shape.head_dim / 2;
    let angles: Vec<f64> = (0..sequence * half)
        .map(|at| {
            let exponent = (at % half) as f64 / half as f64;
            (at / half) as f64 * shape.rope_theta().powf(-exponent)
        })
        .collect();
    let table = |f: fn(f64) -> f64| {
        Tensor::from_iter(angles.iter().map(|&angle| f(angle) as f32), device)?.reshape((sequence, half))
    };
    Ok((table(f64::cos)?, table(f64::sin)?))
}
