//! Attention with the shared-prefix mask of [`PairSpan`], without a matrix of scores (FlashAttention-2, Dao 2023).

use super::check::check_sizes;
use super::{BatchBuffers, Checked, ComputeBuffer, Floats, Memory};
use crate::data::PairSpan;
use crate::error::{Error, Result};

/// Heads inside a row of `qkv[T, (H + 2K) * E]`: `H` query heads, then `K` key heads, then `K` value heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// `H`
    pub heads: usize,
    /// `K`
    pub kv_heads: usize,
    /// `E`
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

/// Attention, forward.
///
/// # Errors
/// All methods return [`crate::Error::Device`] for heads that do not divide evenly or that the device has no kernel for,
/// and where the device fails; [`crate::Error::Bug`] for spans that do not tile the batch in order, and for buffers that are
/// too small.
pub trait Attention: Memory {
    /// Assigns `out[T, H * E]` and `lse[T, H]` (natural log, of scaled scores).
    fn attention_forward(
        &self,
        out: &mut ComputeBuffer<Self>,
        lse: &mut Floats<Self>,
        qkv: &ComputeBuffer<Self>,
        batch: &BatchBuffers<Self>,
        shape: AttentionShape,
    ) -> Result<()> {
        let name = "attention_forward";
        check_heads(name, shape)?;
        let rows = check_spans(name, &batch.host_spans)?;
        let sizes = [
            ("out", self.len(out), rows * shape.out_width()),
            ("lse", self.len(lse), rows * shape.heads),
            ("qkv", self.len(qkv), rows * shape.qkv_width()),
            ("spans", self.len(&batch.spans), 4 * batch.host_spans.len()),
        ];
        let checked = check_sizes(name, &(rows, shape), &sizes)?;
        self.run_attention_forward(out, lse, qkv, batch, shape, checked)
    }

    /// Generation: assigns `out[1, H * E]`, the attention of the query in row `length - 1` of `cache` (rows as those of
    /// `qkv`) over rows `0..length`.
    fn attention_decode(
        &self,
        out: &mut ComputeBuffer<Self>,
        cache: &ComputeBuffer<Self>,
        length: usize,
        shape: AttentionShape,
    ) -> Result<()> {
        let name = "attention_decode";
        check_heads(name, shape)?;
        let sizes = [
            ("out", self.len(out), shape.out_width()),
            ("cache", self.len(cache), length * shape.qkv_width()),
            ("length", length, 1),
        ];
        let checked = check_sizes(name, &(length, shape), &sizes)?;
        self.run_attention_decode(out, cache, length, shape, checked)
    }

    /// As [`AttentionBackward::reserve_attention`], for the forward and [`Attention::attention_decode`] alone; a device on which
    /// a single stream shares what it has takes it as it comes.
    fn reserve_attention_forward(&self, _: AttentionShape) -> Result<()> {
        Ok(())
    }

    /// The device's part of [`Attention::attention_forward`].
    fn run_attention_forward(
        &self,
        out: &mut ComputeBuffer<Self>,
        lse: &mut Floats<Self>,
        qkv: &ComputeBuffer<Self>,
        batch: &BatchBuffers<Self>,
        shape: AttentionShape,
        checked: Checked,
    ) -> Result<()>;

    /// The device's part of [`Attention::attention_decode`].
    fn run_attention_decode(
        &self,
        out: &mut ComputeBuffer<Self>,
        cache: &ComputeBuffer<Self>,
        length: usize,
        shape: AttentionShape,
        checked: Checked,
    ) -> Result<()>;
}

/// Operands of [`AttentionBackward::attention_backward`].
#[derive(Debug)]
pub struct AttentionGradient<'a, D: Memory> {
    /// Assigned, `[T, (H + 2K) * E]`: the gradient of `qkv`.
    pub dqkv: &'a mut ComputeBuffer<D>,
    /// `[T, H * E]`: the gradient of `out`.
    pub dout: &'a ComputeBuffer<D>,
    /// `[T, H * E]`, as the forward assigned it.
    pub out: &'a ComputeBuffer<D>,
    /// `[T, H]`, as the forward assigned it.
    pub lse: &'a Floats<D>,
    /// `[T, (H + 2K) * E]`, the forward's input.
    pub qkv: &'a ComputeBuffer<D>,
    /// The batch that the forward ran over.
    pub batch: &'a BatchBuffers<D>,
    /// Heads and their size.
    pub shape: AttentionShape,
}

/// What the largest batch holds, as far as attention's scratch memory depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionCapacity {
    /// `T`
    pub rows: usize,
    /// Pairs of the batch.
    pub pairs: usize,
    /// Rows of the longest prompt or response.
    pub longest_part: usize,
}

/// Attention, backward. Errors are those of [`Attention`].
pub trait AttentionBackward: Memory {
    /// Assigns `dqkv[T, (H + 2K) * E]`.
    fn attention_backward(&self, operands: AttentionGradient<'_, Self>) -> Result<()> {
        let (name, shape) = ("attention_backward", operands.shape);
        check_heads(name, shape)?;
        let spans = &operands.batch.host_spans;
        let rows = check_spans(name, spans)?;
        let sizes = [
            ("dqkv", self.len(operands.dqkv), rows * shape.qkv_width()),
            ("dout", self.len(operands.dout), rows * shape.out_width()),
            ("out", self.len(operands.out), rows * shape.out_width()),
            ("lse", self.len(operands.lse), rows * shape.heads),
            ("qkv", self.len(operands.qkv), rows * shape.qkv_width()),
            ("spans", self.len(&operands.batch.spans), 4 * spans.len()),
        ];
        let checked = check_sizes(name, &(rows, shape), &sizes)?;
        self.run_attention_backward(operands, checked)
    }

    /// Sets aside the scratch memory that [`Attention::attention_forward`] and
    /// [`AttentionBackward::attention_backward`] take for batches of up to this capacity: no step allocates it then,
    /// and [`Memory::free_memory`] no longer counts it.
    fn reserve_attention(&self, capacity: AttentionCapacity, shape: AttentionShape) -> Result<()>;

    /// Another handle of this device, whose attention backward adds the terms of a sum in whatever order its blocks come
    /// to them; `None` for a device that has one order only. No training run asks for it: it is there to measure and to
    /// test what the fixed order costs.
    fn in_any_order(&self) -> Option<Self> {
        None
    }

    /// The device's part of [`AttentionBackward::attention_backward`].
    fn run_attention_backward(&self, operands: AttentionGradient<'_, Self>, checked: Checked) -> Result<()>;
}

/// Refuses query heads that cannot be shared out evenly over the key/value heads.
fn check_heads(operation: &str, shape: AttentionShape) -> Result<()> {
    let AttentionShape { heads, kv_heads, head_size } = shape;
    if kv_heads == 0 || head_size == 0 || heads == 0 || heads % kv_heads != 0 {
        return Err(Error::device(
            format!(
                "{operation}: {heads} query heads cannot share {kv_heads} key/value heads of {head_size}"
            ),
            "the query heads of a model are a multiple of its key/value heads; check config.json",
        ));
    }
    Ok(())
}

/// The rows of a batch, `T`, after checking that its spans tile them in order.
fn check_spans(operation: &str, spans: &[PairSpan]) -> Result<usize> {
    let mut end = 0;
    for span in spans {
        if span.start as usize != end {
            let message =
                format!("{operation}: {span:?} overlaps the span before it or leaves a gap at row {end}");
            return Err(Error::bug(message));
        }
        end = span.rows().end;
    }
    Ok(end)
}
