//! Attention with the shared-prefix mask, forward: blocked, with the online softmax (Milakov and Gimelshein 2018;
//! FlashAttention, Dao et al. 2022). No `T x T` matrix is formed; each thread needs memory for a few tiles.

use std::ops::Range;

use rayon::prelude::*;

use super::attention_tile::{self as tile, HeadColumns, KeyTile, Part, TILE_N};
use super::linear::{Matrix, multiply};
use super::scratch::split;
use super::shared_rows::SharedRows;
use super::storage::Storage;
use super::transpose::transpose;
use super::{CpuBuffer, CpuDevice, simd};
use crate::device::{Attention, AttentionShape, BatchBuffers, Checked};
use crate::error::Result;

impl<C: Storage> Attention for CpuDevice<C> {
    /// The tiles of one block for each thread.
    fn reserve_attention_forward(&self, shape: AttentionShape) -> Result<()> {
        self.scratch.reserve::<f32>(self.threads, Tiles::len::<C>(shape));
        Ok(())
    }

    fn run_attention_forward(
        &self,
        out: &mut CpuBuffer<C>,
        lse: &mut CpuBuffer<f32>,
        qkv: &CpuBuffer<C>,
        batch: &BatchBuffers<CpuDevice<C>>,
        shape: AttentionShape,
        _: Checked,
    ) -> Result<()> {
        self.traced("attention_forward", || {
            let group = shape.heads / shape.kv_heads;
            let out = SharedRows::new(out, shape.out_width());
            let lse = SharedRows::new(lse, shape.heads);
            let parts = || batch.host_spans.iter().flat_map(Part::of);
            let blocks: usize = parts().map(|part| part.block_count(group)).sum();
            self.parallel(|| {
                (0..blocks * shape.kv_heads).into_par_iter().for_each(|index| {
                    let (block, kv_head) = (index / shape.kv_heads, index % shape.kv_heads);
                    let Some((part, queries)) = tile::find_block(parts(), group, block) else { return };
                    let columns = HeadColumns::new(shape, kv_head);
                    let mut memory = self.scratch.take::<f32>(Tiles::len::<C>(shape));
                    let mut tiles = Tiles::new::<C>(shape, &mut memory);
                    tiles.attend(self, qkv, &part, &queries, columns, shape.scale());
                    let heads = kv_head * group..(kv_head + 1) * group;
                    for (i, row) in queries.enumerate() {
                        // SAFETY: each pair (query row, kv head) belongs to one block, and spans do not overlap.
                        let (out, lse) = unsafe {
                            (out.row_mut(row, columns.query_columns()), lse.row_mut(row, heads.clone()))
                        };
                        tiles.write(i * group, out, lse);
                    }
                });
            });
            Ok(())
        })
    }

    fn run_attention_decode(
        &self,
        out: &mut CpuBuffer<C>,
        cache: &CpuBuffer<C>,
        length: usize,
        shape: AttentionShape,
        _: Checked,
    ) -> Result<()> {
        self.traced("attention_decode", || {
            let part = Part { rows: length - 1..length, prefix: 0..length - 1 };
            let group_width = shape.heads / shape.kv_heads * shape.head_size;
            self.parallel(|| {
                out[..shape.out_width()].par_chunks_exact_mut(group_width).enumerate().for_each(
                    |(kv_head, out)| {
                        let columns = HeadColumns::new(shape, kv_head);
                        let mut memory = self.scratch.take::<f32>(Tiles::len::<C>(shape));
                        let mut tiles = Tiles::new::<C>(shape, &mut memory);
                        tiles.attend(self, cache, &part, &part.rows, columns, shape.scale());
                        tiles.write(0, out, &mut vec![0.0; columns.group]);
                    },
                );
            });
            Ok(())
        })
    }
}

/// The tiles of one block of queries. Rows are those of [`attention_tile`](tile): query row times head of the group.
struct Tiles<'a> {
    head_size: usize,
    /// `[rows, E]`, times the softmax scale.
    queries: &'a mut [f32],
    /// `[E, TILE_N]`, the keys of a tile.
    keys: &'a mut [f32],
    /// `[rows, TILE_N]`: scores, then `e^(score - max)`.
    scores: &'a mut [f32],
    /// `[rows, E]`: output before the division by `sums`.
    values: &'a mut [f32],
    maxima: &'a mut [f32],
    sums: &'a mut [f32],
    /// `[TILE_N, E]`: keys, then values of a tile, where they are not stored in f32.
    widened: &'a mut [f32],
}

impl<'a> Tiles<'a> {
    /// Length of each buffer, in the order of the fields.
    fn sizes<C: Storage>(shape: AttentionShape) -> [usize; 7] {
        let rows = tile::tile_rows(shape.heads / shape.kv_heads);
        let (by_head, by_key) = (rows * shape.head_size, rows * TILE_N);
        let widened = tile::widened_values::<C>(shape.head_size);
        [by_head, shape.head_size * TILE_N, by_key, by_head, rows, rows, widened]
    }

    /// Length of all buffers together.
    fn len<C: Storage>(shape: AttentionShape) -> usize {
        Self::sizes::<C>(shape).iter().sum()
    }

    fn new<C: Storage>(shape: AttentionShape, memory: &'a mut [f32]) -> Self {
        let [queries, keys, scores, values, maxima, sums, widened] = split(memory, Self::sizes::<C>(shape));
        Tiles { head_size: shape.head_size, queries, keys, scores, values, maxima, sums, widened }
    }

    /// Computes the attention of `queries` for the group of one key/value head; leaves the result in `values`, `maxima`
    /// and `sums`.
    fn attend<C: Storage>(
        &mut self,
        device: &CpuDevice<C>,
        qkv: &[C],
        part: &Part,
        queries: &Range<usize>,
        columns: HeadColumns,
        scale: f32,
    ) {
        let (head_size, row) = (self.head_size, columns.row);
        let rows = queries.len() * columns.group;
        device.vectorized(
            #[inline(always)]
            || tile::pack(self.queries, qkv, row, queries.clone(), columns.query_columns(), scale),
        );
        self.maxima[..rows].fill(f32::NEG_INFINITY);
        self.sums[..rows].fill(0.0);
        for (index, keys) in part.key_tiles(queries).enumerate() {
            let (first, count) = (keys.keys.start * row, keys.keys.len());
            let size = (count, head_size);
            let (wide, stride) = device.vectorized(
                #[inline(always)]
                || C::wide_rows(&qkv[first + columns.key..], row, size, self.widened),
            );
            // Transposed here, because `gemm` would transpose it value by value.
            transpose(self.keys, TILE_N, wide, stride, size);
            multiply(
                self.scores,
                TILE_N,
                false,
                (rows, head_size, count),
                Matrix::rows(self.queries, head_size),
                Matrix::rows(self.keys, TILE_N),
            );
            device.vectorized(
                #[inline(always)]
                || self.softmax_tile(&keys, queries.start, columns.group, rows),
            );
            let (wide, stride) = device.vectorized(
                #[inline(always)]
                || C::wide_rows(&qkv[first + columns.value..], row, size, self.widened),
            );
            multiply(
                self.values,
                head_size,
                index > 0,
                (rows, count, head_size),
                Matrix::rows(self.scores, TILE_N),
                Matrix::rows(wide, stride),
            );
        }
    }

    /// Replaces scores by `e^(score - max)` under the running maximum, and rescales what was summed before.
    #[inline(always)]
    fn softmax_tile(&mut self, tile: &KeyTile, first_query: usize, group: usize, rows: usize) {
        for m in 0..rows {
            let visible = tile.visible(first_query + m / group);
            let (scores, hidden) = self.scores[m * TILE_N..][..tile.keys.len()].split_at_mut(visible);
            hidden.fill(0.0);
            if visible == 0 {
                continue;
            }
            let old = self.maxima[m];
            let max = simd::larger(old, simd::max(scores));
            let sum = simd::exp_in_place(scores, max);
            if max != old {
                let factor = simd::exp(old - max);
                self.values[m * self.head_size..][..self.head_size].iter_mut().for_each(|v| *v *= factor);
                self.sums[m] *= factor;
                self.maxima[m] = max;
            }
            self.sums[m] += sum;
        }
    }

    /// Writes one query row: `out` of `G * E` values from tile row `m` on, and `lse` of `G`.
    fn write<C: Storage>(&self, m: usize, out: &mut [C], lse: &mut [f32]) {
        let values = &self.values[m * self.head_size..];
        for (h, (out, values)) in
            out.chunks_exact_mut(self.head_size).zip(values.chunks_exact(self.head_size)).enumerate()
        {
            let inverse = 1.0 / self.sums[m + h];
            for (out, value) in out.iter_mut().zip(values) {
                *out = C::round(value * inverse);
            }
            lse[h] = self.maxima[m + h] + self.sums[m + h].ln();
        }
    }
}
