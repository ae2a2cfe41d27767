//! Attention with the shared-prefix mask, backward. Probabilities are computed again from `lse`, tile by tile
//! (FlashAttention-2, Dao 2023), so each thread needs memory only for a few tiles and for the gradients of one part's
//! keys and values.
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
use super::scratch::split;
use super::shared_rows::SharedRows;
use super::storage::{Storage, round};
use super::transpose::transpose;
use super::{CpuDevice, simd};
use crate::data::PairSpan;
use crate::device::{
    Attention, AttentionBackward, AttentionCapacity, AttentionGradient, AttentionShape, Checked,
};
use crate::error::Result;

/// What a unit reads.
#[derive(Clone, Copy)]
struct Inputs<'a, C> {
    dout: &'a [C],
    out: &'a [C],
    lse: &'a [f32],
    qkv: &'a [C],
    shape: AttentionShape,
}

impl<C: Storage> AttentionBackward for CpuDevice<C> {
    fn reserve_attention(&self, capacity: AttentionCapacity, shape: AttentionShape) -> Result<()> {
        self.reserve_attention_forward(shape)?;
        let prefixes = self.scratch.take::<f32>(prefix_rows_of(capacity.rows, shape) * shape.head_size);
        self.scratch.reserve::<f32>(self.threads, Unit::<C>::len(shape, capacity.longest_part));
        drop(prefixes);
        Ok(())
    }

    fn run_attention_backward(&self, operands: AttentionGradient<'_, Self>, _: Checked) -> Result<()> {
        self.traced("attention_backward", || {
            let AttentionGradient { dqkv, dout, out, lse, qkv, batch, shape } = operands;
            let inputs = Inputs { dout, out, lse, qkv, shape };
            let (spans, kv_heads) = (&batch.host_spans[..], shape.kv_heads);
            let rows = spans.last().map_or(0, |span| span.rows().end);
            let mut memory = self.scratch.take::<f32>(prefix_rows_of(rows, shape) * shape.head_size);
            let prefixes = SharedRows::new(&mut memory, shape.head_size);
            let dqkv = SharedRows::new(dqkv, shape.qkv_width());
            self.parallel(|| {
                (0..spans.len() * 3 * kv_heads).into_par_iter().with_max_len(1).for_each(|index| {
                    let (pair, part, head) = (index / (3 * kv_heads), index / kv_heads % 3, index % kv_heads);
                    // SAFETY: each unit has prefix rows of its own.
                    let prefix = unsafe { prefixes.rows_mut(prefix_rows(&spans[pair], part, head, shape)) };
                    let part = &Part::of(&spans[pair])[part];
                    let mut memory = self.scratch.take::<f32>(Unit::<C>::len(shape, part.rows.len()));
                    Unit::new(inputs, part, head, prefix, &mut memory).run(self, &dqkv);
                });
                (0..spans.len() * kv_heads).into_par_iter().for_each(|index| {
                    let (span, head) = (&spans[index / kv_heads], index % kv_heads);
                    let parts = Part::of(span);
                    let responses = [1, 2].map(|part| {
                        if parts[part].rows.is_empty() {
                            return None;
                        }
                        // SAFETY: all units have ended, and each (pair, kv head) is one work item.
                        let prefix = unsafe { prefixes.rows_mut(prefix_rows(span, part, head, shape)) };
                        Some(KeyValueGradients::new(prefix))
                    });
                    add_to_prompt(&dqkv, &parts[0], HeadColumns::new(shape, head), &responses);
                });
            });
            Ok(())
        })
    }
}

/// Number of rows of `E` values that the responses' gradients of their prompts' keys and values take, for a batch of
/// `rows` rows. Each response and key/value head has rows of its own, and no prompt is longer than its pair.
fn prefix_rows_of(rows: usize, shape: AttentionShape) -> usize {
    rows * 2 * shape.kv_heads * 2
}

/// The rows, keys before values, where a unit collects the gradients of its prefix; none for a prompt, part 0.
fn prefix_rows(span: &PairSpan, part: usize, kv_head: usize, shape: AttentionShape) -> Range<usize> {
    let start = prefix_rows_of(span.rows().start, shape);
    let Some(response) = part.checked_sub(1) else { return start..start };
    let rows = 2 * span.prompt_rows().len();
    let start = start + (response * shape.kv_heads + kv_head) * rows;
    start..start + rows
}

/// Gradients of consecutive keys and values, `[keys, E]` each.
struct KeyValueGradients<'a> {
    keys: &'a mut [f32],
    values: &'a mut [f32],
}

impl<'a> KeyValueGradients<'a> {
    /// `memory` holds the keys' gradients, then the values'.
    fn new(memory: &'a mut [f32]) -> Self {
        let (keys, values) = memory.split_at_mut(memory.len() / 2);
        KeyValueGradients { keys, values }
    }
}

/// Adds the responses' gradients of the prompt's keys and values to what the prompt's own queries left in `dqkv`. The sum
/// is rounded once.
fn add_to_prompt<C: Storage>(
    dqkv: &SharedRows<'_, C>,
    prompt: &Part,
    columns: HeadColumns,
    responses: &[Option<KeyValueGradients<'_>>; 2],
) {
    let head_size = columns.head_size;
    let keys = responses.each_ref().map(|part| part.as_ref().map(|part| &*part.keys));
    let values = responses.each_ref().map(|part| part.as_ref().map(|part| &*part.values));
    for (parts, range) in [(keys, columns.key_columns()), (values, columns.value_columns())] {
        for (index, row) in prompt.rows.clone().enumerate() {
            // SAFETY: each (pair, kv head) is one work item, all units have ended, and keys and values are distinct
            // columns.
            let out = unsafe { dqkv.row_mut(row, range.clone()) };
            for (column, out) in out.iter_mut().enumerate() {
                let parts = parts.iter().flatten().map(|part| part[index * head_size + column]);
                *out = C::round(parts.fold(out.widen(), |sum, value| sum + value));
            }
        }
    }
}

/// One part of a pair for one key/value head, with the tiles it works on.
struct Unit<'a, C> {
    inputs: Inputs<'a, C>,
    part: &'a Part,
    columns: HeadColumns,
    kv_head: usize,
    /// `[rows, E]`, times the softmax scale.
    queries: &'a mut [f32],
    /// `[rows, E]`
    dout: &'a mut [f32],
    /// `[rows, E]`
    dqueries: &'a mut [f32],
    /// `[rows, TILE_N]`: scores, then probabilities.
    probabilities: &'a mut [f32],
    /// `[rows, TILE_N]`: `dP`, then `dS`.
    dscores: &'a mut [f32],
    /// `[E, TILE_N]`: keys, then values of a tile.
    turned: &'a mut [f32],
    lse: &'a mut [f32],
    delta: &'a mut [f32],
    /// `[TILE_N, E]` each: keys and values of a tile, where they are not stored in f32.
    wide_keys: &'a mut [f32],
    wide_values: &'a mut [f32],
    /// Gradients of the prefix's keys and values, and of the part's own.
    prefix: KeyValueGradients<'a>,
    own: KeyValueGradients<'a>,
}

impl<'a, C: Storage> Unit<'a, C> {
    /// Length of each buffer for a part of `part_rows` rows, in the order of the fields. `prefix` is not among them:
    /// its memory is separate.
    fn sizes(shape: AttentionShape, part_rows: usize) -> [usize; 11] {
        let rows = tile::tile_rows(shape.heads / shape.kv_heads);
        let (by_head, by_key) = (rows * shape.head_size, rows * TILE_N);
        let (turned, own) = (shape.head_size * TILE_N, 2 * part_rows * shape.head_size);
        let widened = tile::widened_values::<C>(shape.head_size);
        [by_head, by_head, by_head, by_key, by_key, turned, rows, rows, widened, widened, own]
    }

    /// Length of all buffers together.
    fn len(shape: AttentionShape, part_rows: usize) -> usize {
        Self::sizes(shape, part_rows).iter().sum()
    }

    /// `memory` holds [`Unit::len`] values.
    fn new(
        inputs: Inputs<'a, C>,
        part: &'a Part,
        kv_head: usize,
        prefix: &'a mut [f32],
        memory: &'a mut [f32],
    ) -> Self {
        let sizes = Self::sizes(inputs.shape, part.rows.len());
        let [
            queries,
            dout,
            dqueries,
            probabilities,
            dscores,
            turned,
            lse,
            delta,
            wide_keys,
            wide_values,
            own,
        ] = split(memory, sizes);
        prefix.fill(0.0);
        own.fill(0.0);
        let columns = HeadColumns::new(inputs.shape, kv_head);
        let (prefix, own) = (KeyValueGradients::new(prefix), KeyValueGradients::new(own));
        Unit {
            inputs,
            part,
            columns,
            kv_head,
            queries,
            dout,
            dqueries,
            probabilities,
            dscores,
            turned,
            lse,
            delta,
            wide_keys,
            wide_values,
            prefix,
            own,
        }
    }

    /// Assigns the part's rows of `dqkv`, and leaves the gradients of the prefix in `prefix`.
    fn run(mut self, device: &CpuDevice<C>, dqkv: &SharedRows<'_, C>) {
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
                out.iter_mut().zip(values).for_each(|(out, value)| *out = C::round(value * scale));
            }
        }
        for (values, range) in
            [(&self.own.keys, columns.key_columns()), (&self.own.values, columns.value_columns())]
        {
            for (row, values) in self.part.rows.clone().zip(values.chunks_exact(head_size)) {
                // SAFETY: as above.
                round(unsafe { dqkv.row_mut(row, range.clone()) }, values);
            }
        }
    }

    /// Packs a block's queries and output gradients, and works out `delta`.
    #[inline(always)]
    fn load(&mut self, queries: &Range<usize>) {
        let Inputs { dout, out, lse, qkv, shape } = self.inputs;
        let (columns, head_size) = (self.columns, self.columns.head_size);
        let width = shape.out_width();
        let query_columns = columns.query_columns();
        tile::pack(self.queries, qkv, columns.row, queries.clone(), query_columns.clone(), shape.scale());
        tile::pack(self.dout, dout, width, queries.clone(), query_columns, 1.0);
        for m in 0..queries.len() * columns.group {
            let (row, head) = (queries.start + m / columns.group, m % columns.group);
            let out = &out[row * width + columns.query + head * head_size..][..head_size];
            self.delta[m] = simd::dot(&self.dout[m * head_size..][..head_size], out);
            self.lse[m] = lse[row * shape.heads + self.kv_head * columns.group + head];
        }
    }

    /// The five gemms of one tile.
    fn tile(&mut self, device: &CpuDevice<C>, queries: &Range<usize>, keys: &KeyTile, accumulate: bool) {
        let (columns, head_size) = (self.columns, self.columns.head_size);
        let (rows, count) = (queries.len() * columns.group, keys.keys.len());
        let first = keys.keys.start * columns.row;
        let size = (count, head_size);
        let qkv = self.inputs.qkv;
        // Taken out of `self`, whose other buffers are written while these are read.
        let (wide_keys, wide_values) =
            (std::mem::take(&mut self.wide_keys), std::mem::take(&mut self.wide_values));
        let ((key_rows, stride), (value_rows, _)) = device.vectorized(
            #[inline(always)]
            || {
                (
                    C::wide_rows(&qkv[first + columns.key..], columns.row, size, wide_keys),
                    C::wide_rows(&qkv[first + columns.value..], columns.row, size, wide_values),
                )
            },
        );
        for (out, lhs, rhs) in [
            (&mut *self.probabilities, &*self.queries, key_rows),
            (&mut *self.dscores, &*self.dout, value_rows),
        ] {
            // Transposed here, because `gemm` would transpose it value by value.
            transpose(self.turned, TILE_N, rhs, stride, size);
            let (lhs, rhs) = (Matrix::rows(lhs, head_size), Matrix::rows(self.turned, TILE_N));
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
        let (lhs, rhs) = (Matrix::rows(self.dscores, TILE_N), Matrix::rows(key_rows, stride));
        multiply(self.dqueries, head_size, accumulate, (rows, count, head_size), lhs, rhs);
        (self.wide_keys, self.wide_values) = (wide_keys, wide_values);
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
