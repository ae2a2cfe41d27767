//! The log-prob head: products to and from the vocabulary around the fused kernels of `kernels/logp_head.cu`.
//!
//! Logits are f32 accumulators, and f32 logits of a whole batch are large (1 GiB for 2048 tokens of a vocabulary of
//! 128256). So the forward forms them for some rows at a time in scratch memory, reads log-probs and entropies off, and
//! keeps the probabilities as bf16 (the kernel's file says in which form), from which the backward forms its gradient in
//! place.

use half::bf16;

use super::{CudaBuffer, CudaDevice, check_sizes, launch_sizes, linear};
use crate::device::{HeadShape, LinearShape, TokenCoefficients, TokenScores};
use crate::error::Result;

/// Rows whose f32 logits exist at once: enough for full tiles of a product, and 250 MiB at the largest vocabulary.
const ROWS_AT_ONCE: usize = 512;

pub(super) fn forward(
    device: &CudaDevice,
    scores: &mut TokenScores<CudaDevice>,
    probabilities: &mut CudaBuffer<bf16>,
    hidden: &CudaBuffer<bf16>,
    weight: &CudaBuffer<bf16>,
    targets: &CudaBuffer<u32>,
    shape: &HeadShape,
) -> Result<()> {
    let name = "logp_head_forward";
    let HeadShape { rows, width, vocab, entropy } = shape;
    let sizes = [
        ("scores.lse", scores.lse.len(), rows.end),
        ("scores.logp", scores.logp.len(), rows.end),
        ("scores.entropy", scores.entropy.len(), if *entropy { rows.end } else { 0 }),
        ("logits", probabilities.len(), rows.len() * vocab),
        ("hidden", hidden.len(), rows.end * width),
        ("weight", weight.len(), vocab * width),
        ("targets", targets.len(), rows.end),
    ];
    check_sizes(name, shape, &sizes)?;
    let scratch_bytes = ROWS_AT_ONCE.min(rows.len()) * vocab * size_of::<f32>();
    device.workspace.with(&device.memory, scratch_bytes, |scratch| {
        let logits: *mut f32 = scratch.cast();
        for first in rows.clone().step_by(ROWS_AT_ONCE) {
            let count = ROWS_AT_ONCE.min(rows.end - first);
            let product = LinearShape { rows: count, inputs: *width, outputs: *vocab };
            let [count, vocab_size] = launch_sizes(name, [count, *vocab])?;
            // SAFETY: the scratch memory holds `count` rows of f32 logits, the buffers cover `shape`.
            unsafe {
                linear::forward_f32(device, logits, hidden.at(first * width), weight.start(), product)?;
            }
            let entropy = if *entropy { scores.entropy.at_mut(first) } else { std::ptr::null_mut() };
            // SAFETY: rows `first..first + count` exist in every buffer, and the product queued above fills `logits`.
            device.launch(name, shape, |kernels, stream| unsafe {
                (kernels.logp_head_forward)(
                    scores.lse.at_mut(first),
                    scores.logp.at_mut(first),
                    entropy,
                    probabilities.at_mut((first - rows.start) * vocab),
                    logits,
                    targets.at(first),
                    count,
                    vocab_size,
                    stream,
                )
            })?;
        }
        Ok(())
    })
}

#[allow(clippy::too_many_arguments)]
pub(super) fn backward(
    device: &CudaDevice,
    hidden: &mut CudaBuffer<bf16>,
    dweight: Option<&mut CudaBuffer<f32>>,
    probabilities: &mut CudaBuffer<bf16>,
    weight: &CudaBuffer<bf16>,
    targets: &CudaBuffer<u32>,
    scores: &TokenScores<CudaDevice>,
    coefficients: &TokenCoefficients<CudaDevice>,
    shape: &HeadShape,
) -> Result<()> {
    let name = "logp_head_backward";
    let HeadShape { rows, width, vocab, entropy } = shape;
    let entropy_rows = if *entropy { rows.end } else { 0 };
    let sizes = [
        ("hidden", hidden.len(), rows.end * width),
        ("dweight", dweight.as_ref().map_or(vocab * width, |dweight| dweight.len()), vocab * width),
        ("logits", probabilities.len(), rows.len() * vocab),
        ("weight", weight.len(), vocab * width),
        ("targets", targets.len(), rows.end),
        ("scores.entropy", scores.entropy.len(), entropy_rows),
        ("coefficients.logp", coefficients.logp.len(), rows.end),
        ("coefficients.entropy", coefficients.entropy.len(), entropy_rows),
    ];
    check_sizes(name, shape, &sizes)?;
    let first = rows.start;
    let [count, vocab_size] = launch_sizes(name, [rows.len(), *vocab])?;
    let (dentropy, entropy) = match entropy {
        true => (coefficients.entropy.at(first), scores.entropy.at(first)),
        false => (std::ptr::null(), std::ptr::null()),
    };
    // SAFETY: the buffers cover `shape`, and `probabilities` is what the forward of the same rows left.
    device.launch(name, shape, |kernels, stream| unsafe {
        (kernels.logp_head_backward)(
            probabilities.start_mut(),
            targets.at(first),
            coefficients.logp.at(first),
            dentropy,
            entropy,
            count,
            vocab_size,
            stream,
        )
    })?;
    let product = LinearShape { rows: rows.len(), inputs: *width, outputs: *vocab };
    let dlogits = probabilities.start();
    if let Some(dweight) = dweight {
        // SAFETY: the buffers cover `shape`.
        unsafe {
            let x = hidden.at(first * width);
            linear::backward_weight_at(device, dweight.start_mut(), dlogits, x, product)?;
        }
    }
    // SAFETY: the buffers cover `shape`. The product above was queued first, so `hidden` may be replaced.
    unsafe {
        let dx = hidden.at_mut(first * width);
        linear::backward_input_at(device, dx, dlogits, weight.start(), product)
    }
}
