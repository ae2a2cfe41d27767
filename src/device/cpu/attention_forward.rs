//! Attention with the shared-prefix mask, forward: blocked, with the online softmax (Milakov and Gimelshein 2018;
//! FlashAttention, Dao et al. 2022). No `T x T` matrix is formed; memory is a few tiles a thread.

use std::ops::Range;

use rayon::prelude::*;

use super::attention_tile::{self as tile, HeadColumns, KeyTile, Part, TILE_N};
use super::linear::{Matrix, multiply};
use super::shared_rows::SharedRows;
use super::transpose::transpose;
use super::{CpuBuffer, CpuDevice, simd};
use crate::device::{Attention, AttentionShape, BatchBuffers, Checked};
use crate::error::Result;

impl Attention for CpuDevice {
    fn run_attention_forward(
        &self,
        out: &mut CpuBuffer<f32>,
        lse: &mut CpuBuffer<f32>,
        qkv: &CpuBuffer<f32>,
        batch: &BatchBuffers<CpuDevice>,
        shape: AttentionShape,
        _: Checked,
    ) -> Result<()> {
        self.traced("attention_forward", || {
            let parts: Vec<Part> = batch.host_spans.iter().flat_map(Part::of).collect();
            let group = shape.heads / shape.kv_heads;
            let blocks: Vec<(&Part, Range<usize>, usize)> = parts
                .iter()
                .flat_map(|part| part.query_blocks(group).map(move |queries| (part, queries)))
                .flat_map(|(part, queries)| {
                    (0..shape.kv_heads).map(move |head| (part, queries.clone(), head))
                })
                .collect();
            let out = SharedRows::new(out, shape.out_width());
            let lse = SharedRows::new(lse, shape.heads);
            self.parallel(|| {
                blocks.into_par_iter().for_each_init(
                    || Scratch::new(shape),
                    |scratch, (part, queries, kv_head)| {
                        let columns = HeadColumns::new(shape, kv_head);
                        scratch.attend(self, qkv, part, &queries, columns, shape.scale());
                        let heads = kv_head * group..(kv_head + 1) * group;
                        for (i, row) in queries.enumerate() {
                            // SAFETY: each pair (query row, kv head) belongs to one block, and spans do not overlap.
                            let (out, lse) = unsafe {
                                (out.row_mut(row, columns.query_columns()), lse.row_mut(row, heads.clone()))
                            };
                            scratch.write(i * group, out, lse);
                        }
                    },
                );
            });
            Ok(())
        })
    }

    fn run_attention_decode(
        &self,
        out: &mut CpuBuffer<f32>,
        cache: &CpuBuffer<f32>,
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
                        let mut scratch = Scratch::new(shape);
                        scratch.attend(self, cache, &part, &part.rows, columns, shape.scale());
                        scratch.write(0, out, &mut vec![0.0; columns.group]);
                    },
                );
            });
            Ok(())
        })
    }
}

/// The tiles of one thread. Rows are those of [`attention_tile`](tile): query row times head of the group.
struct Scratch {
    head_size: usize,
    /// `[rows, E]`, times the softmax scale.
    queries: Vec<f32>,
    /// `[E, TILE_N]`, the keys of a tile.
    keys: Vec<f32>,
    /// `[rows, TILE_N]`: scores, then `e^(score - max)`.
    scores: Vec<f32>,
    /// `[rows, E]`: output before the division by `sums`.
    values: Vec<f32>,
    maxima: Vec<f32>,
    sums: Vec<f32>,
}

impl Scratch {
    fn new(shape: AttentionShape) -> Self {
        let rows = tile::tile_rows(shape.heads / shape.kv_heads);
        Scratch {
            head_size: shape.head_size,
            queries: vec![0.0; rows * shape.head_size],
            keys: vec![0.0; shape.head_size * TILE_N],
            scores: vec![0.0; rows * TILE_N],
            values: vec![0.0; rows * shape.head_size],
            maxima: vec![0.0; rows],
            sums: vec![0.0; rows],
        }
    }

    /// Attention of `queries` for the group of one key/value head; the result stays in the scratch.
    fn attend(
        &mut self,
        device: &CpuDevice,
        qkv: &[f32],
        part: &Part,
        queries: &Range<usize>,
        columns: HeadColumns,
        scale: f32,
    ) {
        let (head_size, row) = (self.head_size, columns.row);
        let rows = queries.len() * columns.group;
        device.vectorized(
            #[inline(always)]
            || tile::pack(&mut self.queries, qkv, row, queries.clone(), columns.query_columns(), scale),
        );
        self.maxima[..rows].fill(f32::NEG_INFINITY);
        self.sums[..rows].fill(0.0);
        for (index, keys) in part.key_tiles(queries).enumerate() {
            let (first, count) = (keys.keys.start * row, keys.keys.len());
            // Turned here, because `gemm` would turn it value by value.
            transpose(&mut self.keys, TILE_N, &qkv[first + columns.key..], row, (count, head_size));
            multiply(
                &mut self.scores,
                TILE_N,
                false,
                (rows, head_size, count),
                Matrix::rows(&self.queries, head_size),
                Matrix::rows(&self.keys, TILE_N),
            );
            device.vectorized(
                #[inline(always)]
                || self.softmax_tile(&keys, queries.start, columns.group, rows),
            );
            multiply(
                &mut self.values,
                head_size,
                index > 0,
                (rows, count, head_size),
                Matrix::rows(&self.scores, TILE_N),
                Matrix::rows(&qkv[first + columns.value..], row),
            );
        }
    }

    /// Turns scores into `e^(score - max)` under the running maximum, and rescales what was summed before.
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
    fn write(&self, m: usize, out: &mut [f32], lse: &mut [f32]) {
        let values = &self.values[m * self.head_size..];
        for (h, (out, values)) in
            out.chunks_exact_mut(self.head_size).zip(values.chunks_exact(self.head_size)).enumerate()
        {
            let inverse = 1.0 / self.sums[m + h];
            for (out, value) in out.iter_mut().zip(values) {
                *out = value * inverse;
            }
            lse[h] = self.maxima[m + h] + self.sums[m + h].ln();
        }
    }
}
