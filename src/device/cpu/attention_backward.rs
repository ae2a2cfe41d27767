//! Attention with the shared-prefix mask, backward: probabilities come again from `lse` tile by tile (FlashAttention-2,
//! Dao 2023), so memory is a few tiles and the gradients of one part's keys and values a thread.
//!
//! For each tile: `P = e^(S - lse)`, `dP = dO V^T`, `dS = P (dP - delta)` with `delta = dot(dO, O)`, then `dV += P^T dO`,
//! `dK += dS^T Q scale`, `dQ += dS K scale`.
//!
//! A unit of work is one part of a pair (prompt, chosen, rejected) for one key/value head. A response also has gradients
//! for the prompt's keys and values; they are kept apart and added afterwards in the order prompt, chosen, rejected,
//! whichever unit ended first.

use std::ops::Range;

use rayon::prelude::*;

use super::attention_tile::{self as tile, HeadColumns, KeyTile, Part, TILE_N};
use super::linear::{Matrix, multiply};
use super::shared_rows::SharedRows;
use super::transpose::transpose;
use super::{CpuDevice, simd};
use crate::device::{AttentionBackward, AttentionGradient, AttentionShape, Checked};
use crate::error::Result;

/// What a unit reads.
#[derive(Clone, Copy)]
struct Inputs<'a> {
    dout: &'a [f32],
    out: &'a [f32],
    lse: &'a [f32],
    qkv: &'a [f32],
    shape: AttentionShape,
}

impl AttentionBackward for CpuDevice {
    /// Nothing to do: a unit of work allocates its own few tiles.
    fn reserve_attention_backward(&self, _: usize, _: usize, _: AttentionShape) -> Result<()> {
        Ok(())
    }

    fn run_attention_backward(&self, operands: AttentionGradient<'_, Self>, _: Checked) -> Result<()> {
        self.traced("attention_backward", || {
            let AttentionGradient { dqkv, dout, out, lse, qkv, batch, shape } = operands;
            let inputs = Inputs { dout, out, lse, qkv, shape };
            let kv_heads = shape.kv_heads;
            // Responses first: they are the longer units, and the prompt's fill the gaps at the end.
            let parts: Vec<[Part; 3]> = batch.host_spans.iter().map(Part::of).collect();
            let units: Vec<(&Part, usize)> =
                parts.iter().flatten().flat_map(|part| (0..kv_heads).map(move |head| (part, head))).collect();
            let dqkv = SharedRows::new(dqkv, shape.qkv_width());
            self.parallel(|| {
                let prefix_gradients: Vec<KeyValueGradients> = units
                    .par_iter()
                    .with_max_len(1)
                    .map(|&(part, head)| Unit::new(inputs, part, head).run(self, &dqkv))
                    .collect();
                (0..parts.len() * kv_heads).into_par_iter().for_each(|index| {
                    let (pair, head) = (index / kv_heads, index % kv_heads);
                    for response in 1..3 {
                        let gradients = &prefix_gradients[(pair * 3 + response) * kv_heads + head];
                        add_to_prompt(&dqkv, &parts[pair][0], HeadColumns::new(shape, head), gradients);
                    }
                });
            });
            Ok(())
        })
    }
}

/// Gradients of consecutive keys and values, `[keys, E]` each.
struct KeyValueGradients {
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl KeyValueGradients {
    fn zeros(len: usize) -> Self {
        KeyValueGradients { keys: vec![0.0; len], values: vec![0.0; len] }
    }
}

/// Adds a response's gradients of the prompt's keys and values to what the prompt's own queries left in `dqkv`.
fn add_to_prompt(dqkv: &SharedRows<'_>, prompt: &Part, columns: HeadColumns, gradients: &KeyValueGradients) {
    let head_size = columns.head_size;
    for (values, range) in
        [(&gradients.keys, columns.key_columns()), (&gradients.values, columns.value_columns())]
    {
        for (row, values) in prompt.rows.clone().zip(values.chunks_exact(head_size)) {
            // SAFETY: each (pair, kv head) is one work item, all units have ended, and keys and values are distinct
            // columns.
            let sum = unsafe { dqkv.row_mut(row, range.clone()) };
            sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
        }
    }
}

/// One part of a pair for one key/value head, with the tiles it works on.
struct Unit<'a> {
    inputs: Inputs<'a>,
    part: &'a Part,
    columns: HeadColumns,
    kv_head: usize,
    /// `[rows, E]`, times the softmax scale.
    queries: Vec<f32>,
    /// `[rows, E]`
    dout: Vec<f32>,
    /// `[rows, E]`
    dqueries: Vec<f32>,
    /// `[rows, TILE_N]`: scores, then probabilities.
    probabilities: Vec<f32>,
    /// `[rows, TILE_N]`: `dP`, then `dS`.
    dscores: Vec<f32>,
    /// `[E, TILE_N]`: keys, then values of a tile.
    turned: Vec<f32>,
    lse: Vec<f32>,
    delta: Vec<f32>,
    /// Gradients of the prefix' keys and values, and of the part's own.
    prefix: KeyValueGradients,
    own: KeyValueGradients,
}

impl<'a> Unit<'a> {
    fn new(inputs: Inputs<'a>, part: &'a Part, kv_head: usize) -> Self {
        let columns = HeadColumns::new(inputs.shape, kv_head);
        let head_size = columns.head_size;
        let rows = tile::tile_rows(columns.group).min(part.rows.len() * columns.group);
        // A response without tokens gives the prompt nothing, and needs no room.
        let prefix = if part.rows.is_empty() { 0 } else { part.prefix.len() };
        Unit {
            inputs,
            part,
            columns,
            kv_head,
            queries: vec![0.0; rows * head_size],
            dout: vec![0.0; rows * head_size],
            dqueries: vec![0.0; rows * head_size],
            probabilities: vec![0.0; rows * TILE_N],
            dscores: vec![0.0; rows * TILE_N],
            turned: vec![0.0; head_size * TILE_N],
            lse: vec![0.0; rows],
            delta: vec![0.0; rows],
            prefix: KeyValueGradients::zeros(prefix * head_size),
            own: KeyValueGradients::zeros(part.rows.len() * head_size),
        }
    }

    /// Assigns the part's rows of `dqkv`; returns the gradients of the prefix.
    fn run(mut self, device: &CpuDevice, dqkv: &SharedRows<'_>) -> KeyValueGradients {
        let (columns, head_size) = (self.columns, self.columns.head_size);
        for queries in self.part.query_blocks(columns.group) {
            device.vectorized(
                #[inline(always)]
                || self.load(&queries),
            );
            for (index, keys) in self.part.key_tiles(&queries).enumerate() {
                self.tile(device, &queries, &keys, index > 0);
            }
            let scale = self.inputs.shape.scale();
            let width = columns.group * head_size;
            for (row, values) in queries.zip(self.dqueries.chunks_exact(width)) {
                // SAFETY: each (row, kv head) belongs to one unit; the columns of queries, keys and values are distinct.
                let out = unsafe { dqkv.row_mut(row, columns.query_columns()) };
                out.iter_mut().zip(values).for_each(|(out, value)| *out = value * scale);
            }
        }
        for (values, range) in
            [(&self.own.keys, columns.key_columns()), (&self.own.values, columns.value_columns())]
        {
            for (row, values) in self.part.rows.clone().zip(values.chunks_exact(head_size)) {
                // SAFETY: as above.
                unsafe { dqkv.row_mut(row, range.clone()) }.copy_from_slice(values);
            }
        }
        self.prefix
    }

    /// Packs a block's queries and output gradients, and works out `delta`.
    #[inline(always)]
    fn load(&mut self, queries: &Range<usize>) {
        let Inputs { dout, out, lse, qkv, shape } = self.inputs;
        let (columns, head_size) = (self.columns, self.columns.head_size);
        let width = shape.out_width();
        let query_columns = columns.query_columns();
        tile::pack(
            &mut self.queries,
            qkv,
            columns.row,
            queries.clone(),
            query_columns.clone(),
            shape.scale(),
        );
        tile::pack(&mut self.dout, dout, width, queries.clone(), query_columns, 1.0);
        for m in 0..queries.len() * columns.group {
            let (row, head) = (queries.start + m / columns.group, m % columns.group);
            let out = &out[row * width + columns.query + head * head_size..][..head_size];
            self.delta[m] = simd::dot(&self.dout[m * head_size..][..head_size], out);
            self.lse[m] = lse[row * shape.heads + self.kv_head * columns.group + head];
        }
    }

    /// The five products of one tile.
    fn tile(&mut self, device: &CpuDevice, queries: &Range<usize>, keys: &KeyTile, accumulate: bool) {
        let (columns, head_size) = (self.columns, self.columns.head_size);
        let (rows, count) = (queries.len() * columns.group, keys.keys.len());
        let first = keys.keys.start * columns.row;
        let key_rows = &self.inputs.qkv[first + columns.key..];
        let value_rows = &self.inputs.qkv[first + columns.value..];
        for (out, lhs, rhs) in
            [(&mut self.probabilities, &self.queries, key_rows), (&mut self.dscores, &self.dout, value_rows)]
        {
            // Turned here, because `gemm` would turn it value by value.
            transpose(&mut self.turned, TILE_N, rhs, columns.row, (count, head_size));
            let (lhs, rhs) = (Matrix::rows(lhs, head_size), Matrix::rows(&self.turned, TILE_N));
            multiply(out, TILE_N, false, (rows, head_size, count), lhs, rhs);
        }
        device.vectorized(
            #[inline(always)]
            || self.score_gradients(keys, queries.start, rows),
        );
        let gradients = if keys.causal { &mut self.own } else { &mut self.prefix };
        let origin = if keys.causal { self.part.rows.start } else { self.part.prefix.start };
        let range = (keys.keys.start - origin) * head_size..(keys.keys.end - origin) * head_size;
        for (out, lhs, rhs) in [
            (&mut gradients.values, &self.probabilities, &self.dout),
            (&mut gradients.keys, &self.dscores, &self.queries),
        ] {
            let (lhs, rhs) = (Matrix::transposed(lhs, TILE_N), Matrix::rows(rhs, head_size));
            multiply(&mut out[range.clone()], head_size, true, (count, rows, head_size), lhs, rhs);
        }
        let (lhs, rhs) = (Matrix::rows(&self.dscores, TILE_N), Matrix::rows(key_rows, columns.row));
        multiply(&mut self.dqueries, head_size, accumulate, (rows, count, head_size), lhs, rhs);
    }

    /// Scores become probabilities, `dP` becomes `dS`; both are zero where a query does not see a key.
    #[inline(always)]
    fn score_gradients(&mut self, tile: &KeyTile, first_query: usize, rows: usize) {
        for m in 0..rows {
            let visible = tile.visible(first_query + m / self.columns.group);
            let (scores, hidden) = self.probabilities[m * TILE_N..][..tile.keys.len()].split_at_mut(visible);
            let (dscores, dhidden) = self.dscores[m * TILE_N..][..tile.keys.len()].split_at_mut(visible);
            hidden.fill(0.0);
            dhidden.fill(0.0);
            let (lse, delta) = (self.lse[m], self.delta[m]);
            for (score, dscore) in scores.iter_mut().zip(dscores) {
                let probability = simd::exp(*score - lse);
                *score = probability;
                *dscore = probability * (*dscore - delta);
            }
        }
    }
}
