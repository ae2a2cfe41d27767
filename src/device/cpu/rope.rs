//! Rotary positions (Su et al. 2021): the pair `(i, i + E/2)` of each query and key head is rotated by its position's
//! angle.

use rayon::prelude::*;

use super::storage::Storage;
use super::{CpuBuffer, CpuDevice, check_indices};
use crate::device::{AttentionShape, Checked, RopeDirection, RotaryPositions};
use crate::error::Result;

impl<C: Storage> RotaryPositions for CpuDevice<C> {
    fn run_rope(
        &self,
        qkv: &mut CpuBuffer<C>,
        table: &CpuBuffer<f32>,
        positions: &CpuBuffer<u32>,
        (rows, shape): (usize, AttentionShape),
        direction: RopeDirection,
        _: Checked,
    ) -> Result<()> {
        self.traced("rope", || {
            let width = shape.qkv_width();
            let head_size = shape.head_size;
            check_indices("rope", "position", &positions[..rows], table.len() / head_size.max(1))?;
            if rows * width == 0 {
                return Ok(());
            }
            // The inverse of a rotation is the rotation by the negative angle: the same cosine, the negative sine.
            let sign = match direction {
                RopeDirection::Forward => 1.0,
                RopeDirection::Backward => -1.0,
            };
            let rotated = (shape.heads + shape.kv_heads) * head_size;
            let block_rows = self.block_rows(width);
            self.parallel(|| {
                qkv[..rows * width]
                    .par_chunks_mut(block_rows * width)
                    .zip(positions[..rows].par_chunks(block_rows))
                    .for_each(|(qkv, positions)| {
                        self.vectorized(
                            #[inline(always)]
                            || {
                                for (row, &position) in qkv.chunks_exact_mut(width).zip(positions) {
                                    let angles = &table[position as usize * head_size..][..head_size];
                                    rotate_row(&mut row[..rotated], angles, sign);
                                }
                            },
                        )
                    });
            });
            Ok(())
        })
    }
}

/// Rotates every head of `row`; `angles` holds `E/2` cosines, then `E/2` sines.
#[inline(always)]
fn rotate_row<C: Storage>(row: &mut [C], angles: &[f32], sign: f32) {
    let half = angles.len() / 2;
    let (cosines, sines) = angles.split_at(half);
    for head in row.chunks_exact_mut(angles.len()) {
        let (first, second) = head.split_at_mut(half);
        for (((a, b), cosine), sine) in first.iter_mut().zip(second).zip(cosines).zip(sines) {
            let (x, y, sine) = (a.widen(), b.widen(), sign * sine);
            *a = C::round(x * cosine - y * sine);
            *b = C::round(y * cosine + x * sine);
        }
    }
}
