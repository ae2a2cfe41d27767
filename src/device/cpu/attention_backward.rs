//! Attention with the shared-prefix mask, backward. Probabilities are computed again from `lse`, tile by tile
//! (FlashAttention-2, Dao 2023), so each thread needs memory only for a few tiles and for the gradients of one part's
//! keys and values.
//!
//! For each tile: `P = e^(S - lse)`, `dP = dO V^T`, `dS = P (dP - delta)` with `delta = dot(dO, O)`, then `dV += P^T dO`,
//! `dK += dS^T Q scale`, `dQ += dS K scale`.
//!
//! A unit of work is one part of a pair (prompt, chosen, rejected) for one key/value head. All three parts have gradients
//! for the prompt's keys and values; they are kept apart, in f32, and added afterwards in the order prompt, chosen,
//! rejected, whichever unit ended first. So each gradient is rounded once.

use std::ops::Range;

use rayon::prelude::*;

use super::attention_tile::{self as tile, HeadColumns, KeyTile, Part, TILE_N, score_scale};
use super::products::Operand;
use super::scratch::split;
use super::shared_rows::SharedRows;
use super::storage::Storage;
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
        let prompts = self.scratch.take::<f32>(prompt_rows_of(capacity.rows, shape) * shape.head_size);
        self.scratch.reserve::<f32>(self.threads, Unit::len(self, shape, capacity.longest_part));
        drop(prompts);
        Ok(())
    }

    fn run_attention_backward(&self, operands: AttentionGradient<'_, Self>, _: Checked) -> Result<()> {
        self.traced("attention_backward", || {
            let AttentionGradient { dqkv, dout, out, lse, qkv, batch, shape } = operands;
            let inputs = Inputs { dout, out, lse, qkv, shape };
            let (spans, kv_heads) = (&batch.host_spans[..], shape.kv_heads);
            let rows = spans.last().map_or(0, |span| span.rows().end);
            let mut memory = self.scratch.take::<f32>(prompt_rows_of(rows, shape) * shape.head_size);
            let prompts = SharedRows::new(&mut memory, shape.head_size);
            let dqkv = SharedRows::new(dqkv, shape.qkv_width());
            self.parallel(|| {
                (0..spans.len() * 3 * kv_heads).into_par_iter().with_max_len(1).for_each(|index| {
                    let (pair, part, head) = (index / (3 * kv_heads), index / kv_heads % 3, index % kv_heads);
                    // SAFETY: each unit has prompt rows of its own.
                    let prompt = unsafe { prompts.rows_mut(prompt_rows(&spans[pair], part, head, shape)) };
                    let is_prompt = part == 0;
                    let part = &Part::of(&spans[pair])[part];
                    let own_rows = if is_prompt { 0 } else { part.rows.len() };
                    let mut memory = self.scratch.take::<f32>(Unit::len(self, shape, own_rows));
                    Unit::new(self, inputs, (part, own_rows), head, prompt, &mut memory).run(self, &dqkv);
                });
                (0..spans.len() * kv_heads).into_par_iter().for_each(|index| {
                    let (span, head) = (&spans[index / kv_heads], index % kv_heads);
                    let parts = Part::of(span);
                    let contributions = [0, 1, 2].map(|part| {
                        // A part without rows has no unit's values there.
                        if parts[part].rows.is_empty() {
                            return None;
                        }
                        // SAFETY: all units have ended, and each (pair, kv head) is one work item.
                        let prompt = unsafe { prompts.rows_mut(prompt_rows(span, part, head, shape)) };
                        Some(KeyValueGradients::new(prompt))
                    });
                    let columns = (HeadColumns::new(shape, head), score_scale::<C>(shape));
                    assign_prompt(self, &dqkv, &parts[0], columns, &contributions);
                });
            });
            Ok(())
        })
    }
}

/// Number of rows of `E` values that the gradients of the prompts' keys and values take, for a batch of `rows` rows. Each
/// part of a pair and key/value head has rows of its own, and no prompt is longer than its pair.
fn prompt_rows_of(rows: usize, shape: AttentionShape) -> usize {
    rows * 3 * shape.kv_heads * 2
}

/// The rows, keys before values, where a unit collects the gradients of its pair's prompt.
fn prompt_rows(span: &PairSpan, part: usize, kv_head: usize, shape: AttentionShape) -> Range<usize> {
    let rows = 2 * span.prompt_rows().len();
    let start = prompt_rows_of(span.rows().start, shape) + (part * shape.kv_heads + kv_head) * rows;
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

/// Assigns the gradients of the prompt's keys and values in `dqkv`: the sum of what its parts contributed, in order, with
/// the keys' times `key_scale`.
fn assign_prompt<C: Storage>(
    device: &CpuDevice<C>,
    dqkv: &SharedRows<'_, C>,
    prompt: &Part,
    (columns, key_scale): (HeadColumns, f32),
    contributions: &[Option<KeyValueGradients<'_>>; 3],
) {
    let head_size = columns.head_size;
    let keys = contributions.each_ref().map(|part| part.as_ref().map(|part| &*part.keys));
    let values = contributions.each_ref().map(|part| part.as_ref().map(|part| &*part.values));
    for (parts, range, scale) in
        [(keys, columns.key_columns(), key_scale), (values, columns.value_columns(), 1.0)]
    {
        for (index, row) in prompt.rows.clone().enumerate() {
            // SAFETY: each (pair, kv head) is one work item, all units have ended, and keys and values are distinct
            // columns.
            let out = unsafe { dqkv.row_mut(row, range.clone()) };
            let parts = parts.map(|part| part.map(|part| &part[index * head_size..][..head_size]));
            device.vectorized(
                #[inline(always)]
                || {
                    for (column, out) in out.iter_mut().enumerate() {
                        let parts = parts.iter().flatten().map(|part| part[column]);
                        *out = C::round(scale * parts.fold(0.0, |sum, value| sum + value));
                    }
                },
            );
        }
    }
}

/// One part of a pair for one key/value head, with the tiles it works on.
struct Unit<'a, C> {
    inputs: Inputs<'a, C>,
    part: &'a Part,
    columns: HeadColumns,
    kv_head: usize,
    /// `[rows, E]`, times the part of the softmax scale that queries carry.
    queries: &'a mut [C],
    /// `[rows, E]`
    dout: &'a mut [C],
    /// `[rows, E]`
    dqueries: &'a mut [f32],
    /// `[rows, TILE_N]`: scores, then probabilities.
    probabilities: &'a mut [f32],
    /// `[rows, TILE_N]`: `dP`, then `dS`.
    dscores: &'a mut [f32],
    /// `[rows, TILE_N]` each: probabilities and `dS` as the products read them, where that is not f32.
    narrow_probabilities: &'a mut [C],
    narrow_dscores: &'a mut [C],
    lse: &'a mut [f32],
    delta: &'a mut [f32],
    /// Memory of the products.
    packed: &'a mut [f32],
    /// Gradients of the prompt's keys and values; those of keys lack the scores' part of the softmax scale.
    prompt: KeyValueGradients<'a>,
    /// As `prompt`, of a response's own keys and values; nothing for a prompt, whose own are in `prompt`.
    own: KeyValueGradients<'a>,
}

impl<'a, C: Storage> Unit<'a, C> {
    /// Length of each buffer in f32 values, with `own_rows` rows in each half of `own`, in the order of the fields. `prompt` is
    /// not among them: its memory is separate.
    fn sizes(device: &CpuDevice<C>, shape: AttentionShape, own_rows: usize) -> [usize; 11] {
        let rows = tile::tile_rows(shape.heads / shape.kv_heads);
        let (by_head, by_key) = (rows * shape.head_size, rows * TILE_N);
        let (stored, narrow) = (tile::floats_for::<C>(by_head), tile::narrow_floats::<C>(rows));
        let packed = tile::product_memory(device, rows, shape.head_size);
        let own = 2 * own_rows * shape.head_size;
        [stored, stored, by_head, by_key, by_key, narrow, narrow, rows, rows, packed, own]
    }

    /// Length of all buffers together.
    fn len(device: &CpuDevice<C>, shape: AttentionShape, own_rows: usize) -> usize {
        Self::sizes(device, shape, own_rows).iter().sum()
    }

    /// `memory` holds [`Unit::len`] values.
    fn new(
        device: &CpuDevice<C>,
        inputs: Inputs<'a, C>,
        (part, own_rows): (&'a Part, usize),
        kv_head: usize,
        prompt: &'a mut [f32],
        memory: &'a mut [f32],
    ) -> Self {
        let sizes = Self::sizes(device, inputs.shape, own_rows);
        let [
            queries,
            dout,
            dqueries,
            probabilities,
            dscores,
            narrow_probabilities,
            narrow_dscores,
            lse,
            delta,
            packed,
            own,
        ] = split(memory, sizes);
        prompt.fill(0.0);
        own.fill(0.0);
        let columns = HeadColumns::new(inputs.shape, kv_head);
        let (prompt, own) = (KeyValueGradients::new(prompt), KeyValueGradients::new(own));
        Unit {
            inputs,
            part,
            columns,
            kv_head,
            queries: bytemuck::cast_slice_mut(queries),
            dout: bytemuck::cast_slice_mut(dout),
            dqueries,
            probabilities,
            dscores,
            narrow_probabilities: bytemuck::cast_slice_mut(narrow_probabilities),
            narrow_dscores: bytemuck::cast_slice_mut(narrow_dscores),
            lse,
            delta,
            packed,
            prompt,
            own,
        }
    }

    /// Assigns the part's rows of `dqkv` but for a prompt's keys and values, whose gradients it leaves in `prompt`.
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
                device.vectorized(
                    #[inline(always)]
                    || round_scaled(out, values, scale),
                );
            }
        }
        let scale = score_scale::<C>(self.inputs.shape);
        for (values, range, scale) in
            [(&self.own.keys, columns.key_columns(), scale), (&self.own.values, columns.value_columns(), 1.0)]
        {
            for (row, values) in self.part.rows.clone().zip(values.chunks_exact(head_size)) {
                // SAFETY: as above.
                let out = unsafe { dqkv.row_mut(row, range.clone()) };
                device.vectorized(
                    #[inline(always)]
                    || round_scaled(out, values, scale),
                );
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
        let scale = C::query_scale(shape.scale());
        tile::pack(self.queries, qkv, columns.row, queries.clone(), query_columns.clone(), scale);
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
        let first = &self.inputs.qkv[keys.keys.start * columns.row..];
        let (key_rows, value_rows) = (&first[columns.key..], &first[columns.value..]);
        for (out, lhs, rhs) in [
            (&mut *self.probabilities, &*self.queries, key_rows),
            (&mut *self.dscores, &*self.dout, value_rows),
        ] {
            let (lhs, rhs) = (Operand::along(lhs, head_size), Operand::along(rhs, columns.row));
            let sizes = (rows, head_size, count);
            C::multiply_tile(device, (out, TILE_N), false, sizes, lhs, rhs, self.packed);
        }
        device.vectorized(
            #[inline(always)]
            || self.score_gradients(keys, queries.start, rows),
        );
        let ((probabilities, stride), (dscores, _)) = device.vectorized(
            #[inline(always)]
            || {
                let size = (rows, count);
                (
                    C::narrow_rows(self.probabilities, TILE_N, size, self.narrow_probabilities),
                    C::narrow_rows(self.dscores, TILE_N, size, self.narrow_dscores),
                )
            },
        );
        // A prompt's own gradients are collected in `prompt`.
        let is_own = keys.causal && !self.own.keys.is_empty();
        let gradients = if is_own { &mut self.own } else { &mut self.prompt };
        let origin = if keys.causal { self.part.rows.start } else { self.part.prefix.start };
        let range = (keys.keys.start - origin) * head_size..(keys.keys.end - origin) * head_size;
        for (out, lhs, rhs) in [
            (&mut gradients.values, probabilities, &*self.dout),
            (&mut gradients.keys, dscores, &*self.queries),
        ] {
            let (lhs, rhs) = (Operand::down(lhs, stride), Operand::down(rhs, head_size));
            let out = (&mut out[range.clone()], head_size);
            C::multiply_tile(device, out, true, (count, rows, head_size), lhs, rhs, self.packed);
        }
        let (lhs, rhs) = (Operand::along(dscores, stride), Operand::down(key_rows, columns.row));
        let out = (&mut *self.dqueries, head_size);
        C::multiply_tile(device, out, accumulate, (rows, count, head_size), lhs, rhs, self.packed);
    }

    /// Scores become probabilities, `dP` becomes `dS`; both are zero where a query does not see a key.
    #[inline(always)]
    fn score_gradients(&mut self, tile: &KeyTile, first_query: usize, rows: usize) {
        let scale = score_scale::<C>(self.inputs.shape);
        for m in 0..rows {
            let visible = tile.visible(first_query + m / self.columns.group);
            let (scores, hidden) = self.probabilities[m * TILE_N..][..tile.keys.len()].split_at_mut(visible);
            let (dscores, dhidden) = self.dscores[m * TILE_N..][..tile.keys.len()].split_at_mut(visible);
            hidden.fill(0.0);
            dhidden.fill(0.0);
            let (lse, delta) = (self.lse[m], self.delta[m]);
            for (score, dscore) in scores.iter_mut().zip(dscores) {
                let probability = simd::exp(score.mul_add(scale, -lse));
                *score = probability;
                *dscore = probability * (*dscore - delta);
            }
        }
    }
}

/// `out = values * scale`, rounded.
#[inline(always)]
fn round_scaled<C: Storage>(out: &mut [C], values: &[f32], scale: f32) {
    for (out, value) in out.iter_mut().zip(values) {
        *out = C::round(value * scale);
    }
}
