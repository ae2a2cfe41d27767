//! The log-prob head: `hidden x vocabulary` to lse, log-prob of the target and entropy, and back.
//!
//! A row of logits is read twice: once for its maximum, once for `sum e^(x - max)` and `sum e^(x - max) (x - max)`.
//! The sums run in f32 over [`RUN`] values and in f64 above that, so that their error does not grow with the
//! vocabulary.

use std::ops::Range;

use rayon::prelude::*;

use super::linear::{Matrix, multiply};
use super::{CpuBuffer, CpuDevice, check_indices, check_sizes, simd};
use crate::device::{HeadShape, TokenCoefficients, TokenScores};
use crate::error::Result;

/// Values of a row summed in f32 before they are added to an f64.
const RUN: usize = 4096;

pub(super) fn forward(
    device: &CpuDevice,
    scores: &mut TokenScores<CpuDevice>,
    logits: &mut CpuBuffer<f32>,
    hidden: &CpuBuffer<f32>,
    weight: &CpuBuffer<f32>,
    targets: &CpuBuffer<u32>,
    shape: &HeadShape,
) -> Result<()> {
    let HeadShape { rows: Range { start, end }, width, vocab, entropy } = *shape;
    let rows = end.saturating_sub(start);
    let entropy_needs = if entropy { end } else { 0 };
    let needs = [
        ("scores.lse", scores.lse.len(), end),
        ("scores.logp", scores.logp.len(), end),
        ("scores.entropy", scores.entropy.len(), entropy_needs),
        ("logits", logits.len(), rows * vocab),
        ("hidden", hidden.len(), end * width),
        ("weight", weight.len(), vocab * width),
        ("targets", targets.len(), end),
    ];
    check_sizes("logp_head_forward", shape, &needs)?;
    if rows * vocab == 0 {
        return Ok(());
    }
    let targets = &targets[start..end];
    check_indices("logp_head_forward", "target", targets, vocab)?;
    let logits = &mut logits[..rows * vocab];
    let (lse, logp) = (&mut scores.lse[start..end], &mut scores.logp[start..end]);
    device.parallel(|| {
        multiply(
            logits,
            vocab,
            false,
            (rows, width, vocab),
            Matrix::rows(&hidden[start * width..], width),
            Matrix::transposed(weight, width),
            device.parallelism(),
        );
        let summaries: Vec<RowSummary> = logits
            .par_chunks_exact(vocab)
            .map(|row| {
                device.vectorized(
                    #[inline(always)]
                    || RowSummary::new(row, entropy),
                )
            })
            .collect();
        for (i, (summary, &target)) in summaries.iter().zip(targets).enumerate() {
            lse[i] = summary.lse();
            logp[i] = summary.logp(logits[i * vocab + target as usize]);
            if entropy {
                scores.entropy[start + i] = summary.entropy();
            }
        }
    });
    Ok(())
}

/// What one pass over a row of logits leaves: everything is relative to the row's maximum.
struct RowSummary {
    max: f32,
    /// `sum e^(x - max)`
    sum: f64,
    /// `sum e^(x - max) (x - max)`; 0 unless the entropy is wanted.
    weighted: f64,
}

impl RowSummary {
    #[inline(always)]
    fn new(row: &[f32], entropy: bool) -> Self {
        let max = simd::max(row);
        let (mut sum, mut weighted) = (0.0, 0.0);
        for run in row.chunks(RUN) {
            if entropy {
                let (run_sum, run_weighted) = weighted_exponentials(run, max);
                sum += run_sum as f64;
                weighted += run_weighted as f64;
            } else {
                sum += simd::sum_terms(
                    run.len(),
                    #[inline(always)]
                    |i| simd::exp(run[i] - max),
                ) as f64;
            }
        }
        RowSummary { max, sum, weighted }
    }

    fn lse(&self) -> f32 {
        (self.max as f64 + self.sum.ln()) as f32
    }

    /// `target - lse`, with the maximum taken off first: no rounding of a large lse.
    fn logp(&self, target: f32) -> f32 {
        ((target as f64 - self.max as f64) - self.sum.ln()) as f32
    }

    /// `lse - sum p x`, both relative to the maximum.
    fn entropy(&self) -> f32 {
        (self.sum.ln() - self.weighted / self.sum) as f32
    }
}

/// `sum e^(x - max)` and `sum e^(x - max) (x - max)` of one run.
#[inline(always)]
fn weighted_exponentials(run: &[f32], max: f32) -> (f32, f32) {
    const LANES: usize = simd::LANES;
    let (mut sums, mut weighted) = ([0.0_f32; LANES], [0.0_f32; LANES]);
    let (blocks, rest) = run.as_chunks::<LANES>();
    for block in blocks {
        for i in 0..LANES {
            let x = block[i] - max;
            let e = simd::exp(x);
            sums[i] += e;
            weighted[i] = e.mul_add(x, weighted[i]);
        }
    }
    for (i, &value) in rest.iter().enumerate() {
        let x = value - max;
        let e = simd::exp(x);
        sums[i] += e;
        weighted[i] = e.mul_add(x, weighted[i]);
    }
    (simd::sum(&sums), simd::sum(&weighted))
}

#[allow(clippy::too_many_arguments)]
pub(super) fn backward(
    device: &CpuDevice,
    hidden: &mut CpuBuffer<f32>,
    dweight: Option<&mut CpuBuffer<f32>>,
    logits: &mut CpuBuffer<f32>,
    weight: &CpuBuffer<f32>,
    targets: &CpuBuffer<u32>,
    scores: &TokenScores<CpuDevice>,
    coefficients: &TokenCoefficients<CpuDevice>,
    shape: &HeadShape,
) -> Result<()> {
    let HeadShape { rows: Range { start, end }, width, vocab, entropy } = *shape;
    let rows = end.saturating_sub(start);
    let entropy_needs = if entropy { end } else { 0 };
    let needs = [
        ("hidden", hidden.len(), end * width),
        ("dweight", dweight.as_ref().map_or(vocab * width, |dweight| dweight.len()), vocab * width),
        ("logits", logits.len(), rows * vocab),
        ("weight", weight.len(), vocab * width),
        ("targets", targets.len(), end),
        ("scores.lse", scores.lse.len(), end),
        ("scores.entropy", scores.entropy.len(), entropy_needs),
        ("coefficients.logp", coefficients.logp.len(), end),
        ("coefficients.entropy", coefficients.entropy.len(), entropy_needs),
    ];
    check_sizes("logp_head_backward", shape, &needs)?;
    if rows * vocab == 0 {
        return Ok(());
    }
    check_indices("logp_head_backward", "target", &targets[start..end], vocab)?;
    let logits = &mut logits[..rows * vocab];
    let hidden = &mut hidden[start * width..end * width];
    device.parallel(|| {
        logits.par_chunks_exact_mut(vocab).enumerate().for_each(|(i, row)| {
            let token = start + i;
            let (b, row_entropy) =
                if entropy { (coefficients.entropy[token], scores.entropy[token]) } else { (0.0, 0.0) };
            let (a, lse) = (coefficients.logp[token], scores.lse[token]);
            device.vectorized(
                #[inline(always)]
                || logit_gradients(row, a, b, lse, row_entropy),
            );
            row[targets[token] as usize] += a;
        });
        if let Some(dweight) = dweight {
            multiply(
                dweight,
                width,
                true,
                (vocab, rows, width),
                Matrix::transposed(logits, vocab),
                Matrix::rows(hidden, width),
                device.parallelism(),
            );
        }
        multiply(
            hidden,
            width,
            false,
            (rows, vocab, width),
            Matrix::rows(logits, vocab),
            Matrix::rows(weight, width),
            device.parallelism(),
        );
    });
    Ok(())
}

/// Replaces logits by `-a pi - b pi (log pi + H)`; the target's `+ a` is the caller's.
#[inline(always)]
fn logit_gradients(row: &mut [f32], a: f32, b: f32, lse: f32, entropy: f32) {
    if b == 0.0 {
        for x in row {
            *x = -a * simd::exp(*x - lse);
        }
    } else {
        for x in row {
            let logp = *x - lse;
            let p = simd::exp(logp);
            *x = -p * b.mul_add(logp + entropy, a);
        }
    }
}
