//! Attention with the shared-prefix mask, forward: blocked, with the online softmax (Milakov and Gimelshein 2018;
//! FlashAttention, Dao et al. 2022). No `T x T` matrix is formed; each thread needs memory for a few tiles.

use std::ops::Range;

use rayon::prelude::*;

use super::attention_tile::{self as tile, HeadColumns, KeyTile, Part, TILE_N, score_scale};
use super::products::Operand;
use super::scratch::split;
use super::shared_rows::SharedRows;
use super::storage::Storage;
use super::{CpuBuffer, CpuDevice, simd};
use crate::device::{Attention, AttentionShape, BatchBuffers, Checked};
use crate::error::Result;

impl<C: Storage> Attention for CpuDevice<C> {
    /// The tiles of one block for each thread.
    fn reserve_attention_forward(&self, shape: AttentionShape) -> Result<()> {
        self.scratch.reserve::<f32>(self.threads, Tiles::len(self, shape));
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
                    let mut memory = self.scratch.take::<f32>(Tiles::len(self, shape));
                    let mut tiles = Tiles::new(self, shape, &mut memory);
                    tiles.attend(self, qkv, &part, &queries, columns);
                    let heads = kv_head * group..(kv_head + 1) * group;
                    for (i, row) in queries.enumerate() {
                        // SAFETY: each pair (query row, kv head) belongs to one block, and spans do not overlap.
                        let (out, lse) = unsafe {
                            (out.row_mut(row, columns.query_columns()), lse.row_mut(row, heads.clone()))
                        };
                        self.vectorized(
                            #[inline(always)]
                            || tiles.write(i * group, out, lse),
                        );
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
                        let mut memory = self.scratch.take::<f32>(Tiles::len(self, shape));
                        let mut tiles = Tiles::new(self, shape, &mut memory);
                        tiles.attend(self, cache, &part, &part.rows, columns);
                        tiles.write(0, out, &mut vec![0.0; columns.group]);
                    },
                );
            });
            Ok(())
        })
    }
}

/// The tiles of one block of queries. Rows are those of [`attention_tile`](tile): query row times head of the group.
struct Tiles<'a, C> {
    shape: AttentionShape,
    /// `[rows, E]`, times the part of the softmax scale that queries carry.
    queries: &'a mut [C],
    /// `[rows, TILE_N]`: scores, then `e^(score - max)`.
    scores: &'a mut [f32],
    /// `[rows, TILE_N]`: `e^(score - max)` as the product with the values reads them, where that is not f32.
    narrow: &'a mut [C],
    /// `[rows, E]`: output before the division by `sums`.
    values: &'a mut [f32],
    maxima: &'a mut [f32],
    sums: &'a mut [f32],
    /// Memory of the products.
    packed: &'a mut [f32],
}

impl<'a, C: Storage> Tiles<'a, C> {
    /// Length of each buffer in f32 values, in the order of the fields.
    fn sizes(device: &CpuDevice<C>, shape: AttentionShape) -> [usize; 7] {
        let rows = tile::tile_rows(shape.heads / shape.kv_heads);
        let by_head = rows * shape.head_size;
        let (queries, narrow) = (tile::floats_for::<C>(by_head), tile::narrow_floats::<C>(rows));
        let packed = tile::product_memory(device, rows, shape.head_size);
        [queries, rows * TILE_N, narrow, by_head, rows, rows, packed]
    }

    /// Length of all buffers together.
    fn len(device: &CpuDevice<C>, shape: AttentionShape) -> usize {
        Self::sizes(device, shape).iter().sum()
    }

    fn new(device: &CpuDevice<C>, shape: AttentionShape, memory: &'a mut [f32]) -> Self {
        let [queries, scores, narrow, values, maxima, sums, packed] =
            split(memory, Self::sizes(device, shape));
        let (queries, narrow) = (bytemuck::cast_slice_mut(queries), bytemuck::cast_slice_mut(narrow));
        Tiles { shape, queries, scores, narrow, values, maxima, sums, packed }
    }

    /// Computes the attention of `queries` for the group of one key/value head; leaves the result in `values`, `maxima`
    /// and `sums`.
    fn attend(
        &mut self,
        device: &CpuDevice<C>,
        qkv: &[C],
        part: &Part,
        queries: &Range<usize>,
        columns: HeadColumns,
    ) {
        let (head_size, row) = (self.shape.head_size, columns.row);
        let rows = queries.len() * columns.group;
        let scale = C::query_scale(self.shape.scale());
        device.vectorized(
            #[inline(always)]
            || tile::pack(self.queries, qkv, row, queries.clone(), columns.query_columns(), scale),
        );
        self.maxima[..rows].fill(f32::NEG_INFINITY);
        self.sums[..rows].fill(0.0);
        for (index, keys) in part.key_tiles(queries).enumerate() {
            let (first, count) = (keys.keys.start * row, keys.keys.len());
            C::multiply_tile(
                device,
                (self.scores, TILE_N),
                false,
                (rows, head_size, count),
                Operand::along(self.queries, head_size),
                Operand::along(&qkv[first + columns.key..], row),
                self.packed,
            );
            device.vectorized(
                #[inline(always)]
                || self.softmax_tile(&keys, queries.start, columns.group, rows),
            );
            let (scores, narrow) = (&*self.scores, &mut *self.narrow);
            let (weights, stride) = device.vectorized(
                #[inline(always)]
                || C::narrow_rows(scores, TILE_N, (rows, count), narrow),
            );
            C::multiply_tile(
                device,
                (self.values, head_size),
                index > 0,
                (rows, count, head_size),
                Operand::along(weights, stride),
                Operand::down(&qkv[first + columns.value..], row),
                self.packed,
            );
        }
    }

    /// Replaces scores by `e^(score - max)` under the running maximum, and rescales what was summed before.
    #[inline(always)]
    fn softmax_tile(&mut self, tile: &KeyTile, first_query: usize, group: usize, rows: usize) {
        let (scale, head_size) = (score_scale::<C>(self.shape), self.shape.head_size);
        for m in 0..rows {
            let visible = tile.visible(first_query + m / group);
            let (scores, hidden) = self.scores[m * TILE_N..][..tile.keys.len()].split_at_mut(visible);
            hidden.fill(0.0);
            if visible == 0 {
                continue;
            }
            let old = self.maxima[m];
            let max = simd::larger(old, simd::max(scores) * scale);
            let sum = simd::exp_in_place(scores, scale, max);
            if max != old {
                let factor = simd::exp(old - max);
                self.values[m * head_size..][..head_size].iter_mut().for_each(|v| *v *= factor);
                self.sums[m] *= factor;
                self.maxima[m] = max;
            }
            self.sums[m] += sum;
        }
    }

    /// Writes one query row: `out` of `G * E` values from tile row `m` on, and `lse` of `G`.
    #[inline(always)]
    fn write(&self, m: usize, out: &mut [C], lse: &mut [f32]) {
        let head_size = self.shape.head_size;
        let values = &self.values[m * head_size..];
        for (h, (out, values)) in
            out.chunks_exact_mut(head_size).zip(values.chunks_exact(head_size)).enumerate()
        {
            let inverse = 1.0 / self.sums[m + h];
            for (out, value) in out.iter_mut().zip(values) {
                *out = C::round(value * inverse);
            }
            lse[h] = self.maxima[m + h] + self.sums[m + h].ln();
        }
    }
}
