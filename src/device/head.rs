//! The log-prob head: hidden rows times the vocabulary matrix, to log-probs of targets, and back.

use std::ops::Range;

use super::check::check_sizes;
use super::{Checked, ComputeBuffer, Floats, Indices, Memory};
use crate::error::{Error, Result};

/// What the head's forward leaves for its backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadMode {
    /// Log-probs alone: no backward follows.
    Score,
    /// The probabilities of all of a call's rows: `6 N V D` operations, and a workspace that grows with the rows of a call.
    Main,
    /// Nothing: the backward forms the logits once more. `8 N V D` operations, and a workspace below
    /// [`RECOMPUTE_WORKSPACE`].
    Recompute,
}

/// Bytes that the head's workspace stays below, whatever the batch, unless [`HeadMode::Main`] keeps probabilities in it.
pub const RECOMPUTE_WORKSPACE: usize = 64 << 20;

/// A slice of the `N` scored tokens that one call of the head works on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeadShape {
    /// Rows of the `[N, ..]` buffers.
    pub rows: Range<usize>,
    /// `D`
    pub width: usize,
    /// `V`
    pub vocab: usize,
    /// Whether entropies are wanted (they cost a little more).
    pub entropy: bool,
    /// What the forward keeps.
    pub mode: HeadMode,
}

/// Sizes of the head that do not depend on the rows of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadSizes {
    /// `D`
    pub width: usize,
    /// `V`
    pub vocab: usize,
    /// Values that the workspace holds.
    pub workspace: usize,
}

/// Per-token results of the head, `[N]` each, natural log, f32.
#[derive(Debug)]
pub struct TokenScores<D: Memory> {
    /// `logsumexp` over the vocabulary.
    pub lse: Floats<D>,
    /// Log-prob of the target.
    pub logp: Floats<D>,
    /// Entropy; valid only where [`HeadShape::entropy`] was set.
    pub entropy: Floats<D>,
}

/// Per-token coefficients of the objective, `[N]` each, f32: `a = dL/dlogp`, `b = dL/dentropy`.
#[derive(Debug)]
pub struct TokenCoefficients<D: Memory> {
    /// `a`
    pub logp: Floats<D>,
    /// `b`
    pub entropy: Floats<D>,
}

impl<D: Memory> TokenScores<D> {
    /// Buffers of `[scored]` values each, whose contents the head's forward assigns.
    ///
    /// # Errors
    /// [`Error::Device`] where the device has no memory for them.
    pub fn new(device: &D, scored: usize) -> Result<Self> {
        Ok(TokenScores {
            lse: device.alloc(scored)?,
            logp: device.alloc(scored)?,
            entropy: device.alloc(scored)?,
        })
    }
}

impl<D: Memory> TokenCoefficients<D> {
    /// Buffers of `[scored]` values each, which the objective assigns.
    ///
    /// # Errors
    /// [`Error::Device`] where the device has no memory for them.
    pub fn new(device: &D, scored: usize) -> Result<Self> {
        Ok(TokenCoefficients { logp: device.alloc(scored)?, entropy: device.alloc(scored)? })
    }
}

/// Operands of [`Head::logp_head_forward`].
#[derive(Debug)]
pub struct HeadForward<'a, D: Memory> {
    /// Rows `shape.rows` are assigned.
    pub scores: &'a mut TokenScores<D>,
    /// Scratch of the device; in [`HeadMode::Main`] it carries the probabilities to the backward of the same shape.
    pub workspace: &'a mut ComputeBuffer<D>,
    /// `[N, D]`
    pub hidden: &'a ComputeBuffer<D>,
    /// `[V, D]`
    pub weight: &'a ComputeBuffer<D>,
    /// `[N]`
    pub targets: &'a Indices<D>,
    /// Rows and sizes.
    pub shape: &'a HeadShape,
}

/// Operands of [`Head::logp_head_backward`].
#[derive(Debug)]
pub struct HeadBackward<'a, D: Memory> {
    /// `[N, D]`: rows `shape.rows` are replaced by their gradient.
    pub hidden: &'a mut ComputeBuffer<D>,
    /// Accumulated, `[V, D]`; `None` where the vocabulary matrix is not trained.
    pub dweight: Option<&'a mut Floats<D>>,
    /// As the forward of the same shape left it.
    pub workspace: &'a mut ComputeBuffer<D>,
    /// `[V, D]`
    pub weight: &'a ComputeBuffer<D>,
    /// `[N]`
    pub targets: &'a Indices<D>,
    /// As the forward assigned them.
    pub scores: &'a TokenScores<D>,
    /// As the objective assigned them.
    pub coefficients: &'a TokenCoefficients<D>,
    /// Rows and sizes.
    pub shape: &'a HeadShape,
}

/// The log-prob head.
///
/// # Errors
/// All methods return [`Error::Bug`] for buffers that are smaller than the shape, and [`Error::Device`] where the
/// device fails; the CPU also for a target outside the vocabulary.
pub trait Head: Memory {
    /// Chunk size, in bytes of probabilities, beyond which larger chunks of pairs do not speed up a step.
    const HEAD_CHUNK_BYTES: usize;

    /// Values of `workspace` that the head takes for a call of up to `rows` rows. With fewer, except in
    /// [`HeadMode::Main`], it works on smaller chunks.
    fn logp_head_workspace(&self, mode: HeadMode, rows: usize, width: usize, vocab: usize) -> Result<usize>;

    /// Assigns rows `shape.rows` of `scores` from the logits `hidden[N, D] * weight[V, D]^T`. Log-probs come from f32
    /// accumulators, never from rounded logits.
    fn logp_head_forward(&self, operands: HeadForward<'_, Self>) -> Result<()> {
        let shape = operands.shape;
        let (rows, entropy_rows) = (shape.rows.end, if shape.entropy { shape.rows.end } else { 0 });
        let sizes = [
            ("scores.lse", self.len(&operands.scores.lse), rows),
            ("scores.logp", self.len(&operands.scores.logp), rows),
            ("scores.entropy", self.len(&operands.scores.entropy), entropy_rows),
            ("hidden", self.len(operands.hidden), rows * shape.width),
            ("weight", self.len(operands.weight), shape.vocab * shape.width),
            ("targets", self.len(operands.targets), rows),
        ];
        let checked = check_sizes("logp_head_forward", shape, &sizes)?;
        self.run_logp_head_forward(operands, checked)
    }

    /// With `dlogits = a * (onehot - pi) - b * pi * (log pi + entropy)`, accumulates
    /// `dweight[V, D] += dlogits^T * hidden` and replaces rows `shape.rows` of `hidden` by their gradient.
    fn logp_head_backward(&self, operands: HeadBackward<'_, Self>) -> Result<()> {
        let (name, shape) = ("logp_head_backward", operands.shape);
        let (rows, entropy_rows) = (shape.rows.end, if shape.entropy { shape.rows.end } else { 0 });
        let matrix = shape.vocab * shape.width;
        let sizes = [
            ("hidden", self.len(operands.hidden), rows * shape.width),
            ("dweight", operands.dweight.as_ref().map_or(matrix, |dweight| self.len(dweight)), matrix),
            ("weight", self.len(operands.weight), matrix),
            ("targets", self.len(operands.targets), rows),
            ("scores.lse", self.len(&operands.scores.lse), rows),
            ("scores.logp", self.len(&operands.scores.logp), rows),
            ("scores.entropy", self.len(&operands.scores.entropy), entropy_rows),
            ("coefficients.logp", self.len(&operands.coefficients.logp), rows),
            ("coefficients.entropy", self.len(&operands.coefficients.entropy), entropy_rows),
        ];
        let checked = check_sizes(name, shape, &sizes)?;
        if shape.mode == HeadMode::Score {
            return Err(Error::bug(format!("{name}: the forward of {shape:?} kept nothing for a backward")));
        }
        self.run_logp_head_backward(operands, checked)
    }

    /// Sets aside the scratch memory that forward and backward of this mode take, beside the workspace, for calls of up
    /// to `rows` rows, so that no step allocates it.
    fn reserve_logp_head(&self, mode: HeadMode, rows: usize, sizes: HeadSizes) -> Result<()>;

    /// The device's part of [`Head::logp_head_forward`]; it checks its own use of the workspace.
    fn run_logp_head_forward(&self, operands: HeadForward<'_, Self>, checked: Checked) -> Result<()>;

    /// The device's part of [`Head::logp_head_backward`]; it checks its own use of the workspace.
    fn run_logp_head_backward(&self, operands: HeadBackward<'_, Self>, checked: Checked) -> Result<()>;
}
