//! The log-prob head: from hidden rows and the vocabulary matrix to lse, the target's log-prob and entropy, and back.
//!
//! The vocabulary is cut into [`STRIPS`] strips, which threads take, and a strip into tiles of [`TILE`] tokens, whose
//! logits stay in the second-level cache between the gemm and the softmax. Logits are kept transposed, `[V, N]`: then
//! neither gemm has to transpose the weight, and the softmax runs down the vocabulary with a lane for each row. They are f32
//! whatever the storage, in the memory of the workspace; their gradient is rounded to the storage for the gemms.
//!
//! Sums of exponentials run in f32 over a tile and in f64 above it, so that their error does not grow with the
//! vocabulary; strips are joined in order, so that the bits do not depend on the threads.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};
use rayon::prelude::*;

use super::super::check::check_sizes;
use super::products::Operand;
use super::scratch::Scratch;
use super::storage::{Storage, round};
use super::{CpuDevice, check_indices, simd};
use crate::device::{
    Checked, Head, HeadBackward, HeadForward, HeadMode, HeadShape, HeadSizes, LinearShape,
    RECOMPUTE_WORKSPACE, StorageType,
};
use crate::error::Result;

/// Parts of the vocabulary that may run at the same time. Each has its own sum of `dhidden`, so more of them would cost
/// memory.
const STRIPS: usize = 16;
/// Tokens of a tile: a multiple of 48, the gemm's register block; `384 x 256` logits are 384 KiB.
const TILE: usize = 384;
/// Scored tokens of one pass of the backward. Fewer of them make the strips' sums of `dhidden` smaller.
const BACKWARD_ROWS: usize = 256;
/// Values of the gradient of `hidden` that are summed over the strips at once.
const SUM_COLUMNS: usize = 1024;
/// Scored tokens that are summed side by side: one AVX-512 register.
const LANES: usize = 16;

/// Rows whose logits exist at once in a workspace that holds `held` values.
fn rows_at_once(mode: HeadMode, rows: usize, vocab: usize, held: usize) -> usize {
    let bounded = held.min(RECOMPUTE_WORKSPACE / size_of::<f32>()) / vocab.max(1);
    match mode {
        HeadMode::Main => rows,
        HeadMode::Score | HeadMode::Recompute => bounded.max(1).min(rows),
    }
}

/// `rows` in runs of at most `at_once`.
fn runs(rows: &Range<usize>, at_once: usize) -> impl Iterator<Item = Range<usize>> {
    let end = rows.end;
    rows.clone().step_by(at_once.max(1)).map(move |first| first..end.min(first + at_once))
}

impl<C: Storage> Head for CpuDevice<C> {
    /// Larger chunks gain nothing: their logits leave the caches between the passes over them.
    const HEAD_CHUNK_BYTES: usize = 64 << 20;

    fn logp_head_workspace(&self, mode: HeadMode, rows: usize, _: usize, vocab: usize) -> Result<usize> {
        Ok(C::float_values(rows_at_once(mode, rows, vocab, usize::MAX) * vocab))
    }

    fn reserve_logp_head(&self, mode: HeadMode, rows: usize, sizes: HeadSizes) -> Result<()> {
        let HeadSizes { width, vocab, workspace } = sizes;
        let at_once = rows_at_once(mode, rows, vocab, workspace * size_of::<C>() / size_of::<f32>());
        let strips = strip_count(vocab);
        // The most that is held at the same time.
        let turned = self.scratch.take::<C>(C::head_operand_values(at_once, width));
        let summaries = self.scratch.take::<RowSummary>(strips * at_once);
        let terms = self.scratch.take::<RowTerms>(at_once);
        let block = if mode == HeadMode::Score { 0 } else { at_once.min(BACKWARD_ROWS) };
        let partial = self.scratch.take::<f32>(strips * block * width);
        let held: Vec<_> =
            (0..self.threads).map(|_| self.scratch.take::<C>(narrow_values::<C>(block))).collect();
        C::reserve(self, LinearShape { rows: 0, inputs: width, outputs: vocab });
        drop((turned, summaries, terms, partial, held));
        Ok(())
    }

    fn run_logp_head_forward(&self, operands: HeadForward<'_, Self>, _: Checked) -> Result<()> {
        self.traced("logp_head_forward", || {
            let HeadForward { scores, workspace, hidden, weight, targets, shape } = operands;
            let workspace = C::as_floats(workspace);
            let HeadShape { ref rows, width, vocab, entropy, mode } = *shape;
            let at_once = rows_at_once(mode, rows.len(), vocab, workspace.len());
            check_sizes("logp_head_forward", shape, &[("workspace", workspace.len(), at_once * vocab)])?;
            if rows.is_empty() || vocab == 0 {
                return Ok(());
            }
            check_indices("logp_head_forward", "target", &targets[rows.clone()], vocab)?;
            for run in runs(rows, at_once) {
                let logits = &mut workspace[..run.len() * vocab];
                let hidden = &hidden[run.start * width..run.end * width];
                let strips = form_logits(self, logits, hidden, &weight[..vocab * width], run.len(), entropy);
                for (row, token) in run.clone().enumerate() {
                    let mut total = RowSummary::EMPTY;
                    strips.chunks_exact(run.len()).for_each(|strip| total.join(strip[row]));
                    scores.lse[token] = total.lse();
                    scores.logp[token] = total.logp(logits[targets[token] as usize * run.len() + row]);
                    if entropy {
                        scores.entropy[token] = total.entropy();
                    }
                }
            }
            Ok(())
        })
    }

    fn run_logp_head_backward(&self, operands: HeadBackward<'_, Self>, _: Checked) -> Result<()> {
        self.traced("logp_head_backward", || {
            let HeadBackward { hidden, dweight, workspace, weight, targets, scores, coefficients, shape } =
                operands;
            let workspace = C::as_floats(workspace);
            let HeadShape { ref rows, width, vocab, entropy, mode } = *shape;
            let at_once = rows_at_once(mode, rows.len(), vocab, workspace.len());
            check_sizes("logp_head_backward", shape, &[("workspace", workspace.len(), at_once * vocab)])?;
            if rows.is_empty() || vocab == 0 {
                return Ok(());
            }
            check_indices("logp_head_backward", "target", &targets[rows.clone()], vocab)?;
            let weight = &weight[..vocab * width];
            let mut dweight = dweight.map(|dweight| &mut dweight[..vocab * width]);
            for run in runs(rows, at_once) {
                let mut terms = self.scratch.take::<RowTerms>(run.len());
                for (terms, token) in terms.iter_mut().zip(run.clone()) {
                    *terms = RowTerms {
                        a: coefficients.logp[token],
                        b: if entropy { coefficients.entropy[token] } else { 0.0 },
                        lse: scores.lse[token],
                        entropy: if entropy { scores.entropy[token] } else { 0.0 },
                        target: targets[token],
                    };
                }
                let logits = &mut workspace[..run.len() * vocab];
                let hidden = &mut hidden[run.start * width..run.end * width];
                if mode == HeadMode::Recompute {
                    form_logits(self, logits, hidden, weight, run.len(), false);
                }
                for first in (0..run.len()).step_by(BACKWARD_ROWS) {
                    let block = first..(first + BACKWARD_ROWS).min(run.len());
                    let pass =
                        Pass { device: self, terms: &terms[block.clone()], first, rows: run.len(), width };
                    let hidden = &mut hidden[block.start * width..block.end * width];
                    pass.run(hidden, dweight.as_deref_mut(), logits, weight);
                }
            }
            Ok(())
        })
    }
}

/// Assigns `logits[V, rows]`; gives each strip's summaries of the rows, `[strips, rows]`.
fn form_logits<'a, C: Storage>(
    device: &'a CpuDevice<C>,
    logits: &mut [f32],
    hidden: &[C],
    weight: &[C],
    rows: usize,
    entropy: bool,
) -> Scratch<'a, RowSummary> {
    let (width, vocab) = (hidden.len() / rows, logits.len() / rows);
    let strip = strip_tokens(vocab);
    let mut turned = device.scratch.take::<C>(C::head_operand_values(rows, width));
    let mut summaries = device.scratch.take::<RowSummary>(strip_count(vocab) * rows);
    device.parallel(|| {
        let hidden = C::head_operand(hidden, (rows, width), &mut turned);
        logits
            .par_chunks_mut(strip * rows)
            .zip(weight.par_chunks(strip * width))
            .zip(summaries.par_chunks_mut(rows))
            .for_each(|((logits, weight), summaries)| {
                summarize_strip(device, summaries, logits, hidden, weight, width, entropy);
            });
    });
    summaries
}

/// Tokens of the vocabulary in one strip, a whole number of tiles.
fn strip_tokens(vocab: usize) -> usize {
    vocab.div_ceil(STRIPS).next_multiple_of(TILE)
}

/// Number of strips of the vocabulary.
fn strip_count(vocab: usize) -> usize {
    vocab.div_ceil(strip_tokens(vocab).max(1))
}

/// Sums over a part of a row of logits, relative to the part's maximum.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct RowSummary {
    /// `sum e^(x - max)`
    sum: f64,
    /// `sum e^(x - max) (x - max)`; 0 unless the entropy is wanted.
    weighted: f64,
    max: f32,
    /// Fills the struct up to its alignment: scratch memory holds plain bytes, so none may be left undefined.
    padding: u32,
}

impl RowSummary {
    const EMPTY: RowSummary = RowSummary { sum: 0.0, weighted: 0.0, max: f32::NEG_INFINITY, padding: 0 };

    /// Makes the sums relative to `max`, which is no smaller than the old maximum.
    fn raise(&mut self, max: f32) {
        if self.sum != 0.0 && self.max != max {
            let shift = self.max as f64 - max as f64;
            let factor = shift.exp();
            self.weighted = factor * (self.weighted + self.sum * shift);
            self.sum *= factor;
        }
        self.max = max;
    }

    fn join(&mut self, mut other: RowSummary) {
        let max = simd::larger(self.max, other.max);
        self.raise(max);
        other.raise(max);
        self.sum += other.sum;
        self.weighted += other.weighted;
    }

    fn lse(&self) -> f32 {
        (self.max as f64 + self.sum.ln()) as f32
    }

    /// `target - lse`. The maximum is subtracted first, so that a large lse costs no precision.
    fn logp(&self, target: f32) -> f32 {
        ((target as f64 - self.max as f64) - self.sum.ln()) as f32
    }

    /// `lse - sum p x`, both relative to the maximum.
    fn entropy(&self) -> f32 {
        (self.sum.ln() - self.weighted / self.sum) as f32
    }
}

/// Assigns the logits of one strip and the summaries of its rows.
fn summarize_strip<C: Storage>(
    device: &CpuDevice<C>,
    summaries: &mut [RowSummary],
    logits: &mut [f32],
    hidden: Operand<'_, C>,
    weight: &[C],
    width: usize,
    entropy: bool,
) {
    let rows = summaries.len();
    summaries.fill(RowSummary::EMPTY);
    for (logits, weight) in logits.chunks_mut(TILE * rows).zip(weight.chunks(TILE * width)) {
        let tokens = weight.len() / width;
        // logits[tokens, rows] = weight[tokens, D] * hidden[D, rows]
        C::multiply(device, logits, false, (tokens, width, rows), Operand::along(weight, width), hidden);
        device.vectorized(
            #[inline(always)]
            || {
                for (block, summaries) in summaries.chunks_mut(LANES).enumerate() {
                    summarize_tile(summaries, logits, block * LANES, rows, entropy);
                }
            },
        );
    }
}

/// Adds a tile of logits `[tokens, rows]` to the summaries of rows `first..first + summaries.len()`.
#[inline(always)]
fn summarize_tile(summaries: &mut [RowSummary], logits: &[f32], first: usize, rows: usize, entropy: bool) {
    let count = summaries.len();
    let mut maxima = [f32::NEG_INFINITY; LANES];
    for (max, summary) in maxima.iter_mut().zip(summaries.iter()) {
        *max = summary.max;
    }
    for row in logits.chunks_exact(rows) {
        let x = lanes(&row[first..first + count]);
        for i in 0..LANES {
            maxima[i] = simd::larger(maxima[i], x[i]);
        }
    }
    let (mut sums, mut weighted) = ([0.0_f32; LANES], [0.0_f32; LANES]);
    for row in logits.chunks_exact(rows) {
        let x = lanes(&row[first..first + count]);
        for i in 0..LANES {
            let shifted = x[i] - maxima[i];
            let e = simd::exp(shifted);
            sums[i] += e;
            if entropy {
                weighted[i] = e.mul_add(shifted, weighted[i]);
            }
        }
    }
    for (i, summary) in summaries.iter_mut().enumerate() {
        summary.raise(maxima[i]);
        summary.sum += sums[i] as f64;
        summary.weighted += weighted[i] as f64;
    }
}

/// `values`, of which there are at most [`LANES`], followed by zeros.
#[inline(always)]
fn lanes(values: &[f32]) -> [f32; LANES] {
    match values.first_chunk::<LANES>() {
        Some(whole) => *whole,
        None => {
            let mut padded = [0.0; LANES];
            padded[..values.len()].copy_from_slice(values);
            padded
        }
    }
}

/// Values of the gradient of a tile's logits that are rounded for the gemms; none where they are stored in f32.
fn narrow_values<C: Storage>(rows: usize) -> usize {
    if C::TYPE == StorageType::F32 { 0 } else { TILE * rows }
}

/// The numbers of one scored row from which the gradient of its logits is computed.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct RowTerms {
    a: f32,
    b: f32,
    lse: f32,
    entropy: f32,
    target: u32,
}

/// The backward of up to [`BACKWARD_ROWS`] scored tokens.
struct Pass<'a, C> {
    device: &'a CpuDevice<C>,
    terms: &'a [RowTerms],
    /// The first of these rows in `logits[V, rows]`.
    first: usize,
    rows: usize,
    width: usize,
}

impl<C: Storage> Pass<'_, C> {
    /// Replaces `hidden` by its gradient and accumulates the weight's.
    fn run(&self, hidden: &mut [C], dweight: Option<&mut [f32]>, logits: &mut [f32], weight: &[C]) {
        let (width, vocab) = (self.width, weight.len() / self.width);
        let (strip, values) = (strip_tokens(vocab), self.terms.len() * width);
        let mut partial = self.device.scratch.take::<f32>(strip_count(vocab) * values);
        let input: &[C] = hidden;
        self.device.parallel(|| {
            let strips = partial
                .par_chunks_mut(values)
                .zip(logits.par_chunks_mut(strip * self.rows))
                .zip(weight.par_chunks(strip * width))
                .enumerate();
            match dweight {
                None => strips.for_each(|(index, ((dhidden, logits), weight))| {
                    self.strip(dhidden, None, logits, (input, weight), index * strip)
                }),
                Some(dweight) => strips.zip(dweight.par_chunks_mut(strip * width)).for_each(
                    |((index, ((dhidden, logits), weight)), dweight)| {
                        self.strip(dhidden, Some(dweight), logits, (input, weight), index * strip)
                    },
                ),
            }
        });
        self.device.parallel(|| {
            hidden.par_chunks_mut(SUM_COLUMNS).enumerate().for_each(|(block, out)| {
                let mut sums = [0.0; SUM_COLUMNS];
                for partial in partial.chunks_exact(values) {
                    let values = &partial[block * SUM_COLUMNS..][..out.len()];
                    sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
                }
                round(out, &sums);
            });
        });
    }

    /// One strip, whose first token is `first_token`: assigns its part of the gradient of `hidden` to `dhidden`.
    fn strip(
        &self,
        dhidden: &mut [f32],
        mut dweight: Option<&mut [f32]>,
        logits: &mut [f32],
        (hidden, weight): (&[C], &[C]),
        first_token: usize,
    ) {
        let (rows, count, width) = (self.rows, self.terms.len(), self.width);
        let mut memory = self.device.scratch.take::<C>(narrow_values::<C>(count));
        for (tile, (logits, weight)) in
            logits.chunks_mut(TILE * rows).zip(weight.chunks(TILE * width)).enumerate()
        {
            let tokens = weight.len() / width;
            self.logit_gradients(logits, first_token + tile * TILE);
            let (dlogits, stride) = self.device.vectorized(
                #[inline(always)]
                || C::narrow_rows(&logits[self.first..], rows, (tokens, count), &mut memory),
            );
            if let Some(dweight) = &mut dweight {
                let out = &mut dweight[tile * TILE * width..];
                let (lhs, rhs) = (Operand::along(dlogits, stride), Operand::down(hidden, width));
                C::multiply(self.device, out, true, (tokens, count, width), lhs, rhs);
            }
            let (lhs, rhs) = (Operand::down(dlogits, stride), Operand::down(weight, width));
            C::multiply(self.device, dhidden, tile > 0, (count, tokens, width), lhs, rhs);
        }
    }

    /// Replaces logits `[tokens, rows]` by `a (onehot - pi) - b pi (log pi + H)`, in the columns of this pass.
    fn logit_gradients(&self, logits: &mut [f32], first_token: usize) {
        let columns = self.first..self.first + self.terms.len();
        self.device.vectorized(
            #[inline(always)]
            || {
                for row in logits.chunks_exact_mut(self.rows) {
                    for (x, terms) in row[columns.clone()].iter_mut().zip(self.terms) {
                        let logp = *x - terms.lse;
                        *x = -simd::exp(logp) * terms.b.mul_add(logp + terms.entropy, terms.a);
                    }
                }
            },
        );
        let tokens = first_token..first_token + logits.len() / self.rows;
        for (column, terms) in columns.zip(self.terms) {
            let target = terms.target as usize;
            if tokens.contains(&target) {
                logits[(target - first_token) * self.rows + column] += terms.a;
            }
        }
    }
}
