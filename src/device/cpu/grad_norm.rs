//! The l2 norm over all gradients, and the factor that clips it.

use rayon::prelude::*;

use super::{CpuBuffer, CpuDevice, check_sizes};
use crate::error::Result;

/// Values of one partial sum; fixed, so that the order of summation does not depend on the threads.
const CHUNK: usize = 64 * 1024;
/// f64 partial sums inside a chunk: two AVX-512 registers; LLVM keeps longer arrays on the stack.
const LANES: usize = 16;

pub(super) fn gradient_norm(
    device: &CpuDevice,
    out: &mut CpuBuffer<f32>,
    gradients: &[&CpuBuffer<f32>],
    max_norm: Option<f32>,
) -> Result<()> {
    check_sizes("gradient_norm", &gradients.len(), &[("out", out.len(), 2)])?;
    let partials: Vec<f64> = device.parallel(|| {
        gradients
            .par_iter()
            .flat_map(|gradient| gradient.par_chunks(CHUNK))
            .map(|chunk| {
                device.vectorized(
                    #[inline(always)]
                    || sum_of_squares(chunk),
                )
            })
            .collect()
    });
    let norm = partials.iter().sum::<f64>().sqrt();
    // As torch.nn.utils.clip_grad_norm_: 1e-6 keeps a zero norm finite. Written so that a NaN norm gives a NaN factor.
    let factor = match max_norm.map(|max_norm| max_norm as f64 / (norm + 1e-6)) {
        Some(factor) if factor < 1.0 || factor.is_nan() => factor,
        _ => 1.0,
    };
    out[0] = norm as f32;
    out[1] = factor as f32;
    Ok(())
}

#[inline(always)]
fn sum_of_squares(values: &[f32]) -> f64 {
    let mut lanes = [0.0_f64; LANES];
    let (blocks, rest) = values.as_chunks::<LANES>();
    for block in blocks {
        for i in 0..LANES {
            let value = block[i] as f64;
            lanes[i] = value.mul_add(value, lanes[i]);
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(rest) {
        *lane += value as f64 * value as f64;
    }
    lanes.iter().sum()
}
