//! The norm over all gradients with the factor that clips it, and the call of AdamW, which stands in `adamw.rs`.

use rayon::prelude::*;

use super::adamw::{self, Numbers};
use super::shared_rows::SharedRows;
use super::storage::Storage;
use super::{CpuBuffer, CpuDevice};
use crate::device::{AdamWUpdate, Checked, Gradient, GradientPart, Optimizer, StorageType};
use crate::error::Result;
use crate::optimizer::AdamWFactors;

/// Values of one partial sum; fixed, so that the order of summation does not depend on the threads.
const CHUNK: usize = 64 * 1024;
/// f64 partial sums inside a chunk: two AVX-512 registers; LLVM keeps longer arrays on the stack.
const LANES: usize = 16;

impl<C: Storage> Optimizer for CpuDevice<C> {
    fn needs_master(&self) -> bool {
        C::TYPE != StorageType::F32
    }

    fn reserve_gradient_norm_of(&self, gradients: &[Gradient<'_, Self>]) -> Result<()> {
        let values = gradients.iter().map(|gradient| gradient.values(self));
        self.scratch.reserve::<f64>(1, chunks(values));
        Ok(())
    }

    fn run_gradient_norm(
        &self,
        out: &mut CpuBuffer<f32>,
        gradients: &[GradientPart<'_, Self>],
        max_norm: Option<f32>,
        _: Checked,
    ) -> Result<()> {
        self.traced("gradient_norm", || {
            let mut partials = self.scratch.take::<f64>(chunks(lengths::<C>(gradients)));
            let cells = SharedRows::new(&mut partials[..], 1);
            self.parallel(|| {
                let tensors = gradients.par_iter().enumerate();
                let all = tensors.flat_map(|(tensor, (gradient, part))| {
                    let first = chunks(lengths::<C>(&gradients[..tensor]));
                    let count = part.len().div_ceil(CHUNK);
                    (0..count).into_par_iter().map(move |chunk| {
                        let start = part.start + chunk * CHUNK;
                        (first + chunk, *gradient, start..part.end.min(start + CHUNK))
                    })
                });
                all.for_each(|(index, gradient, part)| {
                    // SAFETY: each chunk has a cell of its own.
                    let cell = unsafe { cells.row_mut(index, 0..1) };
                    cell[0] = self.vectorized(
                        #[inline(always)]
                        || match gradient {
                            Gradient::F32(values) => sum_of_squares(&values[part]),
                            Gradient::Bf16(values) => sum_of_squares(&values[part]),
                        },
                    );
                });
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
        })
    }

    fn run_adamw(
        &self,
        updates: &mut [AdamWUpdate<'_, Self>],
        norm: &CpuBuffer<f32>,
        factors: AdamWFactors,
        _: Checked,
    ) -> Result<()> {
        self.traced("adamw", || {
            let numbers = Numbers { factors, clip: norm[1] };
            self.parallel(|| {
                updates.par_iter_mut().for_each(|update| adamw::update(self, update, numbers));
            });
            Ok(())
        })
    }
}

/// Number of partial sums of the norm over gradients of these lengths.
fn chunks(lengths: impl Iterator<Item = usize>) -> usize {
    lengths.map(|len| len.div_ceil(CHUNK)).sum()
}

fn lengths<'a, C: Storage>(
    gradients: &'a [GradientPart<'a, CpuDevice<C>>],
) -> impl Iterator<Item = usize> + 'a {
    gradients.iter().map(|(_, part)| part.len())
}

#[inline(always)]
fn sum_of_squares<G: Storage>(values: &[G]) -> f64 {
    let mut lanes = [0.0_f64; LANES];
    let (blocks, rest) = values.as_chunks::<LANES>();
    for block in blocks {
        for i in 0..LANES {
            let value = block[i].widen() as f64;
            lanes[i] = value.mul_add(value, lanes[i]);
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        let value = value.widen() as f64;
        *lane += value * value;
    }
    lanes.iter().sum()
}
