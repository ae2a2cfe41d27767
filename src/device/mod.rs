//! The one interface between the model and what computes it.
//!
//! The Llama forward and backward in `model/` are written once over [`Device`]. A device has one storage type for
//! weights and activations ([`Device::Compute`]: f32 on the CPU, bf16 on CUDA); statistics, log-probs, gradients of
//! weights and optimiser states are f32 everywhere. Every operation takes its sizes explicitly, because buffers are
//! allocated once for the largest micro-batch and reused: nothing is allocated inside a step.
//!
//! Legend of shapes: `T` tokens of a packed batch, `N` scored tokens, `D` hidden width, `F` MLP width, `V` vocabulary,
//! `H`/`K` query and key/value heads, `E` head size. Matrices are row-major. `out` comes first, then what is updated,
//! then inputs, then the shape. The documentation of each operation says whether it *assigns* or *accumulates*.

mod batch_buffers;
pub mod cpu;
pub mod cuda;
mod mapped_file;
mod select;
mod trace;

use std::ops::Range;

pub use mapped_file::MappedFile;
pub use select::{DeviceChoice, DeviceReport, DeviceTask, run_on};
pub use trace::OperationTime;

use crate::data::PairSpan;
use crate::error::Result;
use crate::objective::Objective;

/// A number a buffer may hold.
pub trait Element: bytemuck::Pod + Default + Send + Sync + std::fmt::Debug {}
impl Element for f32 {}
impl Element for u32 {}
impl Element for half::bf16 {}

/// Buffer of weights or activations.
pub type Compute<D> = <D as Device>::Buffer<<D as Device>::Compute>;
/// Buffer of statistics, weight gradients or optimiser states.
pub type Floats<D> = <D as Device>::Buffer<f32>;
/// Buffer of token ids, positions or row numbers.
pub type Indices<D> = <D as Device>::Buffer<u32>;

/// Storage type of numbers in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StorageType {
    F32,
    F16,
    Bf16,
}

impl StorageType {
    /// Bytes of one value.
    pub fn size(self) -> usize {
        match self {
            StorageType::F32 => 4,
            StorageType::F16 | StorageType::Bf16 => 2,
        }
    }
}

/// Little-endian numbers as they lie in a file or memory map, of any alignment.
#[derive(Clone, Copy, Debug)]
pub struct RawValues<'a> {
    pub storage: StorageType,
    pub bytes: &'a [u8],
}

impl<'a> RawValues<'a> {
    pub fn from_f32(values: &'a [f32]) -> Self {
        RawValues { storage: StorageType::F32, bytes: bytemuck::cast_slice(values) }
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.bytes.len() / self.storage.size()
    }

    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}

/// `out[rows, outputs] = x[rows, inputs] * weight[outputs, inputs]^T + bias[outputs]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearShape {
    pub rows: usize,
    pub inputs: usize,
    pub outputs: usize,
}

/// RMSNorm over the last axis of `[rows, width]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormShape {
    pub rows: usize,
    pub width: usize,
    pub epsilon: f32,
}

/// Heads inside a row of `qkv[T, (H + 2K) * E]`: `H` query heads, then `K` key heads, then `K` value heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_size: usize,
}

impl AttentionShape {
    /// Width of a row of `qkv`: `(H + 2K) * E`.
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_size
    }

    /// Width of a row of the attention output: `H * E`.
    pub fn out_width(&self) -> usize {
        self.heads * self.head_size
    }

    /// Softmax scale `1 / sqrt(E)`.
    pub fn scale(&self) -> f32 {
        1.0 / (self.head_size as f32).sqrt()
    }
}

/// Which way [`Device::rope`] turns: the backward of a rotation is the inverse rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeDirection {
    Forward,
    Backward,
}

/// What the head's forward leaves for its backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadMode {
    /// Log-probs alone: no backward follows.
    Score,
    /// The probabilities of all of a call's rows: `6 N V D` operations, and a workspace that grows with the rows of a call.
    Main,
    /// Nothing: the backward forms the logits once more. `8 N V D` operations in less than [`RECOMPUTE_WORKSPACE`].
    Recompute,
}

/// Bytes that the head's workspace stays below, whatever the batch, unless [`HeadMode::Main`] keeps probabilities in it.
pub const RECOMPUTE_WORKSPACE: usize = 64 << 20;

/// A slice of the `N` scored tokens that one call of the head works on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeadShape {
    /// Rows of the `[N, ..]` buffers.
    pub rows: Range<usize>,
    pub width: usize,
    pub vocab: usize,
    /// Whether entropies are wanted (they cost a little more).
    pub entropy: bool,
    pub mode: HeadMode,
}

/// Per-token results of the head, `[N]` each, natural log, f32.
#[derive(Debug)]
pub struct TokenScores<D: Device> {
    /// `logsumexp` over the vocabulary.
    pub lse: Floats<D>,
    /// Log-prob of the target.
    pub logp: Floats<D>,
    /// Entropy; valid only where [`HeadShape::entropy`] was set.
    pub entropy: Floats<D>,
}

/// Per-token coefficients of the objective, `[N]` each: `a = dL/dlogp`, `b = dL/dentropy`.
#[derive(Debug)]
pub struct TokenCoefficients<D: Device> {
    pub logp: Floats<D>,
    pub entropy: Floats<D>,
}

/// A packed batch on the device. Capacities are fixed when it is made; `BatchBuffers::load` refills it.
#[derive(Debug)]
pub struct BatchBuffers<D: Device> {
    /// Host copy of the spans: launchers choose their work from it.
    pub host_spans: Vec<PairSpan>,
    /// This token's row of the embedding gets no gradient from its use as an input, as transformers' `padding_idx`.
    pub padding_token: Option<u32>,
    /// Rows listed in `rows_by_token`: all but those of the padding token.
    pub embedding_rows: usize,
    /// `[pairs, 4]`: start, prompt, chosen, rejected.
    pub spans: Indices<D>,
    /// `[T]`
    pub token_ids: Indices<D>,
    /// `[T]`
    pub positions: Indices<D>,
    /// `[T]` row numbers sorted by token id (ties by row): the fixed order of the embedding's gradient.
    pub rows_by_token: Indices<D>,
    /// `[N]` the row that predicts each target.
    pub scored_rows: Indices<D>,
    /// `[N]`
    pub targets: Indices<D>,
    /// `[T, 2]` the scored tokens each row predicts, `u32::MAX` for none: the inverse of `scored_rows`.
    pub row_scores: Indices<D>,
    /// `[pairs, 4]` the ranges of the scored tokens: chosen start, chosen end, rejected start, rejected end.
    pub scored: Indices<D>,
    /// `[pairs, 4]` constants of each pair for the objective, see [`crate::objective::PairConstants`].
    pub constants: Floats<D>,
}

/// One AdamW update (decoupled weight decay, as PyTorch's).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWStep {
    pub learning_rate: f32,
    pub beta1: f32,
    pub beta2: f32,
    pub epsilon: f32,
    pub weight_decay: f32,
    /// 1-based number of this update, for the bias correction.
    pub step: u32,
}

/// A trainable tensor's optimiser state. `master` holds the f32 weights where [`Device::Compute`] is narrower.
#[derive(Debug)]
pub struct AdamWState<D: Device> {
    pub master: Option<Floats<D>>,
    pub first_moment: Floats<D>,
    pub second_moment: Floats<D>,
}

/// One of the tensors that a call of [`Device::adamw`] updates.
#[derive(Debug)]
pub struct AdamWUpdate<'a, D: Device> {
    pub weight: &'a mut Compute<D>,
    pub state: &'a mut AdamWState<D>,
    pub gradient: &'a Floats<D>,
}

/// What computes: the CPU, a CUDA GPU, or the emulated one.
///
/// Operations are asynchronous where the device is; [`Device::download`] waits. Errors name the operation and shapes.
pub trait Device: Sized + Send + Sync + 'static {
    /// Storage of weights and activations.
    type Compute: Element;
    type Buffer<T: Element>: Send + Sync + std::fmt::Debug;

    /// One line for people: `cpu (AMD EPYC, 2 threads, AVX-512)`.
    fn describe(&self) -> String;
    /// Kind of device and number format, `cpu f32`: results of different arithmetic differ in their last bits.
    fn arithmetic(&self) -> String;
    /// Whether AdamW keeps an f32 master copy beside the weights.
    fn needs_master(&self) -> bool;
    /// Bytes in use on the device now, and the highest so far.
    fn memory(&self) -> MemoryUse;
    /// Bytes that a large buffer may still have; `None` where that is no fixed number, as in a computer's main memory.
    fn free_memory(&self) -> Result<Option<usize>>;

    // Time.
    /// Seconds of the device's own time for what `work` queues: between two events on a GPU, by the clock elsewhere.
    fn time(&self, work: impl FnOnce() -> Result<()>) -> Result<f64>;
    /// Runs `work` and says how long each operation in it took, in order. The noting costs some microseconds each.
    fn trace<R>(&self, work: impl FnOnce() -> Result<R>) -> Result<(R, Vec<OperationTime>)>;

    // Memory.
    /// A buffer of `len` zeros.
    fn alloc<T: Element>(&self, len: usize) -> Result<Self::Buffer<T>>;
    fn len<T: Element>(&self, buffer: &Self::Buffer<T>) -> usize;
    /// Copies `source` to `out[offset..]`.
    fn upload<T: Element>(&self, out: &mut Self::Buffer<T>, offset: usize, source: &[T]) -> Result<()>;
    /// Copies `source[offset..][..out.len()]` to the host; waits for all work queued before.
    fn download<T: Element>(&self, out: &mut [T], source: &Self::Buffer<T>, offset: usize) -> Result<()>;
    /// As `upload`, converting (round to nearest even, or widening) to [`Device::Compute`]; straight from a memory map.
    fn upload_values(&self, out: &mut Compute<Self>, offset: usize, source: RawValues<'_>) -> Result<()>;
    /// As `download`, widening to f32.
    fn download_compute(&self, out: &mut [f32], source: &Compute<Self>, offset: usize) -> Result<()>;
    /// Assigns zero to `out[range]`.
    fn zero<T: Element>(&self, out: &mut Self::Buffer<T>, range: Range<usize>) -> Result<()>;
    /// Assigns zero to all of `outs`, in a few launches however many they are.
    fn zero_all(&self, outs: &mut [&mut Floats<Self>]) -> Result<()>;
    /// `out[out_offset..][..len] = source[offset..][..len]`.
    fn copy<T: Element>(
        &self,
        out: &mut Self::Buffer<T>,
        out_offset: usize,
        source: &Self::Buffer<T>,
        offset: usize,
        len: usize,
    ) -> Result<()>;

    // Embedding.
    /// Assigns `out[T, D] = table[token_ids, :]`.
    fn embedding_forward(
        &self,
        out: &mut Compute<Self>,
        table: &Compute<Self>,
        token_ids: &Indices<Self>,
        rows: usize,
        width: usize,
    ) -> Result<()>;
    /// Accumulates `dtable[V, D] += scatter(dout[T, D])` over the first `rows` entries of `rows_by_token`, in their order.
    fn embedding_backward(
        &self,
        dtable: &mut Floats<Self>,
        dout: &Compute<Self>,
        batch: &BatchBuffers<Self>,
        rows: usize,
        width: usize,
    ) -> Result<()>;

    // RMSNorm (Zhang and Sennrich 2019).
    /// Assigns `out = x * rstd * weight` and `rstd[rows] = rsqrt(mean(x^2) + epsilon)`.
    fn rms_norm_forward(
        &self,
        out: &mut Compute<Self>,
        rstd: &mut Floats<Self>,
        x: &Compute<Self>,
        weight: &Compute<Self>,
        shape: NormShape,
    ) -> Result<()>;
    /// Assigns `sum = x + delta`, then as [`Device::rms_norm_forward`] over `sum`.
    #[allow(clippy::too_many_arguments)]
    fn add_rms_norm_forward(
        &self,
        sum: &mut Compute<Self>,
        out: &mut Compute<Self>,
        rstd: &mut Floats<Self>,
        x: &Compute<Self>,
        delta: &Compute<Self>,
        weight: &Compute<Self>,
        shape: NormShape,
    ) -> Result<()>;
    /// Assigns `sum = x + delta` over `[len]`.
    fn add(
        &self,
        sum: &mut Compute<Self>,
        x: &Compute<Self>,
        delta: &Compute<Self>,
        len: usize,
    ) -> Result<()>;
    /// Accumulates `dx[rows, D] += ..` and `dweight[D] += ..`.
    #[allow(clippy::too_many_arguments)]
    fn rms_norm_backward(
        &self,
        dx: &mut Compute<Self>,
        dweight: &mut Floats<Self>,
        dout: &Compute<Self>,
        x: &Compute<Self>,
        weight: &Compute<Self>,
        rstd: &Floats<Self>,
        shape: NormShape,
    ) -> Result<()>;

    // Matrix products.
    /// Assigns `out[T, outputs] = x * weight^T (+ bias)`.
    fn linear_forward(
        &self,
        out: &mut Compute<Self>,
        x: &Compute<Self>,
        weight: &Compute<Self>,
        bias: Option<&Compute<Self>>,
        shape: LinearShape,
    ) -> Result<()>;
    /// Assigns `dx[T, inputs] = dout * weight`.
    fn linear_backward_input(
        &self,
        dx: &mut Compute<Self>,
        dout: &Compute<Self>,
        weight: &Compute<Self>,
        shape: LinearShape,
    ) -> Result<()>;
    /// Accumulates `dweight[outputs, inputs] += dout^T * x` and `dbias[outputs] += column sums of dout`.
    fn linear_backward_weight(
        &self,
        dweight: &mut Floats<Self>,
        dbias: Option<&mut Floats<Self>>,
        dout: &Compute<Self>,
        x: &Compute<Self>,
        shape: LinearShape,
    ) -> Result<()>;

    // Rotary positions (Su et al. 2021), half-split pairs as in Hugging Face checkpoints.
    /// Rotates the query and key heads of `qkv[T, (H + 2K) * E]` in place. `table[positions, E]` holds `E/2` cosines,
    /// then `E/2` sines, of each position.
    fn rope(
        &self,
        qkv: &mut Compute<Self>,
        table: &Floats<Self>,
        positions: &Indices<Self>,
        rows: usize,
        shape: AttentionShape,
        direction: RopeDirection,
    ) -> Result<()>;

    // Attention with the shared-prefix mask of `PairSpan`.
    /// Assigns `out[T, H * E]` and `lse[T, H]` (natural log, of scaled scores).
    fn attention_forward(
        &self,
        out: &mut Compute<Self>,
        lse: &mut Floats<Self>,
        qkv: &Compute<Self>,
        batch: &BatchBuffers<Self>,
        shape: AttentionShape,
    ) -> Result<()>;
    /// Assigns `dqkv[T, (H + 2K) * E]`.
    #[allow(clippy::too_many_arguments)]
    fn attention_backward(
        &self,
        dqkv: &mut Compute<Self>,
        dout: &Compute<Self>,
        out: &Compute<Self>,
        lse: &Floats<Self>,
        qkv: &Compute<Self>,
        batch: &BatchBuffers<Self>,
        shape: AttentionShape,
    ) -> Result<()>;
    /// Sets the scratch memory aside that [`Device::attention_backward`] takes for batches of up to `rows` rows and `pairs`
    /// pairs: no step allocates it then, and [`Device::free_memory`] no longer counts it.
    fn reserve_attention_backward(&self, rows: usize, pairs: usize, shape: AttentionShape) -> Result<()>;
    /// Generation: assigns `out[1, H * E]`, the attention of the query in row `length - 1` of `cache` (rows as those
    /// of `qkv`) over rows `0..length`.
    fn attention_decode(
        &self,
        out: &mut Compute<Self>,
        cache: &Compute<Self>,
        length: usize,
        shape: AttentionShape,
    ) -> Result<()>;

    // SwiGLU (Shazeer 2020): a row of `gate_up` is `F` gate values, then `F` up values.
    /// Assigns `out[T, F] = silu(gate) * up`.
    fn swiglu_forward(
        &self,
        out: &mut Compute<Self>,
        gate_up: &Compute<Self>,
        rows: usize,
        width: usize,
    ) -> Result<()>;
    /// Assigns `gate_up[T, 2F] = x * weight^T (+ bias)`, with `shape.outputs` = 2F, then as [`Device::swiglu_forward`]: one
    /// pass over `gate_up` less where a device does both in one kernel. The results are those of the two.
    fn linear_swiglu_forward(
        &self,
        out: &mut Compute<Self>,
        gate_up: &mut Compute<Self>,
        x: &Compute<Self>,
        weight: &Compute<Self>,
        bias: Option<&Compute<Self>>,
        shape: LinearShape,
    ) -> Result<()> {
        self.linear_forward(gate_up, x, weight, bias, shape)?;
        self.swiglu_forward(out, gate_up, shape.rows, shape.outputs / 2)
    }
    /// Assigns `dgate_up[T, 2F]`.
    fn swiglu_backward(
        &self,
        dgate_up: &mut Compute<Self>,
        dout: &Compute<Self>,
        gate_up: &Compute<Self>,
        rows: usize,
        width: usize,
    ) -> Result<()>;

    // The log-prob head.
    /// Assigns `out[N, D] = hidden[scored_rows, :]`.
    fn gather_rows(
        &self,
        out: &mut Compute<Self>,
        hidden: &Compute<Self>,
        batch: &BatchBuffers<Self>,
        scored: usize,
        width: usize,
    ) -> Result<()>;
    /// Assigns `dhidden[T, D]`: the sum of `dout[N, D]` over the scored tokens each row predicts, zero where none.
    fn gather_rows_backward(
        &self,
        dhidden: &mut Compute<Self>,
        dout: &Compute<Self>,
        batch: &BatchBuffers<Self>,
        rows: usize,
        width: usize,
    ) -> Result<()>;
    /// Bytes of probabilities in [`HeadMode::Main`] from which on larger chunks of pairs make no step faster.
    const HEAD_CHUNK_BYTES: usize;
    /// Values of `workspace` that the head takes for a call of up to `rows` rows. With fewer, but for
    /// [`HeadMode::Main`], it works on smaller chunks.
    fn logp_head_workspace(&self, mode: HeadMode, rows: usize, width: usize, vocab: usize) -> Result<usize>;
    /// Assigns rows `shape.rows` of `scores` from the logits `hidden[N, D] * weight[V, D]^T`. Log-probs come from f32
    /// accumulators, never from rounded logits. How `workspace` is used is the device's own affair; in
    /// [`HeadMode::Main`] it is left for [`Device::logp_head_backward`] of the same shape.
    fn logp_head_forward(
        &self,
        scores: &mut TokenScores<Self>,
        workspace: &mut Compute<Self>,
        hidden: &Compute<Self>,
        weight: &Compute<Self>,
        targets: &Indices<Self>,
        shape: &HeadShape,
    ) -> Result<()>;
    /// Objective of pairs `pairs`: assigns their rows of `coefficients` and of `outcomes[pairs, PairOutcome::WIDTH]`.
    fn pair_objective(
        &self,
        outcomes: &mut Floats<Self>,
        coefficients: &mut TokenCoefficients<Self>,
        scores: &TokenScores<Self>,
        batch: &BatchBuffers<Self>,
        objective: &Objective,
        pairs: Range<usize>,
    ) -> Result<()>;
    /// Of `dlogits = a * (onehot - pi) - b * pi * (log pi + entropy)` accumulates
    /// `dweight[V, D] += dlogits^T * hidden` and replaces rows `shape.rows` of `hidden` by their gradient.
    #[allow(clippy::too_many_arguments)]
    fn logp_head_backward(
        &self,
        hidden: &mut Compute<Self>,
        dweight: Option<&mut Floats<Self>>,
        workspace: &mut Compute<Self>,
        weight: &Compute<Self>,
        targets: &Indices<Self>,
        scores: &TokenScores<Self>,
        coefficients: &TokenCoefficients<Self>,
        shape: &HeadShape,
    ) -> Result<()>;

    // The optimiser.
    /// Assigns `out[0]`, the l2 norm over all `gradients`, and `out[1]`, the factor that clips it to `max_norm`
    /// (1 without clipping). The order of summation is fixed.
    fn gradient_norm(
        &self,
        out: &mut Floats<Self>,
        gradients: &[&Floats<Self>],
        max_norm: Option<f32>,
    ) -> Result<()>;
    /// Updates each tensor's `weight` and `state` from `gradient * norm[1]`, in a few launches however many they are.
    fn adamw(
        &self,
        updates: &mut [AdamWUpdate<'_, Self>],
        norm: &Floats<Self>,
        step: AdamWStep,
    ) -> Result<()>;
}

/// Bytes held by a device's buffers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUse {
    pub now: usize,
    pub peak: usize,
}
