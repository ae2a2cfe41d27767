//! What the attention passes share: which keys a query sees, where heads lie in a row, and packing of queries.
//!
//! The query heads of one key/value head are stacked: row `m` of a tile is query row `m / G`, head `m % G` of the
//! group (`G = H / K`), so that a tile of keys is read once for the whole group.

use std::ops::Range;

use super::CpuDevice;
use super::storage::Storage;
use crate::data::PairSpan;
use crate::device::{AttentionShape, StorageType};

/// Rows of a tile of queries, heads included: a multiple of the gemm's register block, small enough that scores
/// `[TILE_M, TILE_N]` stay in the first-level cache beside the operands.
const TILE_M: usize = 96;
/// Keys of a tile.
pub(super) const TILE_N: usize = 128;

/// Query rows that see the same keys but for causality: a prompt, a chosen or a rejected response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// The queries; a query also sees the keys of these rows up to itself.
    pub rows: Range<usize>,
    /// Keys that every query of the part sees: the prompt, for a response.
    pub prefix: Range<usize>,
}

/// A tile of keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct KeyTile {
    pub keys: Range<usize>,
    /// Whether a query sees only the keys up to its own row.
    pub causal: bool,
}

impl KeyTile {
    /// How many of the tile's keys, from its first on, the query of `row` sees.
    #[inline(always)]
    pub(super) fn visible(&self, row: usize) -> usize {
        if self.causal {
            (row + 1).saturating_sub(self.keys.start).min(self.keys.len())
        } else {
            self.keys.len()
        }
    }
}

impl Part {
    /// The parts of a pair, in the order prompt, chosen, rejected.
    pub(super) fn of(span: &PairSpan) -> [Part; 3] {
        let prompt = span.prompt_rows();
        [
            Part { rows: prompt.clone(), prefix: prompt.start..prompt.start },
            Part { rows: span.chosen_rows(), prefix: prompt.clone() },
            Part { rows: span.rejected_rows(), prefix: prompt },
        ]
    }

    /// Number of [`Part::query_blocks`].
    pub(super) fn block_count(&self, group: usize) -> usize {
        self.rows.len().div_ceil(block_rows(group))
    }

    /// The part's queries in blocks that make tiles of about [`TILE_M`] rows.
    pub(super) fn query_blocks(&self, group: usize) -> impl Iterator<Item = Range<usize>> {
        (0..self.block_count(group)).map(move |index| self.query_block(group, index))
    }

    /// Block `index` of [`Part::query_blocks`].
    fn query_block(&self, group: usize, index: usize) -> Range<usize> {
        let start = self.rows.start + index * block_rows(group);
        start..(start + block_rows(group)).min(self.rows.end)
    }

    /// The keys that `queries` see, in tiles, prefix first; no tile is empty or hidden from the whole block.
    pub(super) fn key_tiles(&self, queries: &Range<usize>) -> impl Iterator<Item = KeyTile> {
        let own = self.rows.start..queries.end;
        tiles(self.prefix.clone(), false).chain(tiles(own, true))
    }
}

/// Finds a block of queries by its number, counted through the blocks of all `parts` in order: its part and its rows.
pub(super) fn find_block(
    parts: impl Iterator<Item = Part>,
    group: usize,
    mut index: usize,
) -> Option<(Part, Range<usize>)> {
    for part in parts {
        let count = part.block_count(group);
        if index < count {
            let queries = part.query_block(group, index);
            return Some((part, queries));
        }
        index -= count;
    }
    None
}

/// Query rows of a block.
fn block_rows(group: usize) -> usize {
    (TILE_M / group).max(1)
}

fn tiles(keys: Range<usize>, causal: bool) -> impl Iterator<Item = KeyTile> {
    let end = keys.end;
    keys.step_by(TILE_N).map(move |start| KeyTile { keys: start..(start + TILE_N).min(end), causal })
}

/// Columns of one key/value head and its query heads in a row of `qkv`.
#[derive(Clone, Copy, Debug)]
pub(super) struct HeadColumns {
    /// First column of the group's query heads, in `qkv` and in the attention's output alike.
    pub query: usize,
    pub key: usize,
    pub value: usize,
    /// Query heads of the group, `G`.
    pub group: usize,
    pub head_size: usize,
    /// Width of a row of `qkv`.
    pub row: usize,
}

impl HeadColumns {
    pub(super) fn new(shape: AttentionShape, kv_head: usize) -> Self {
        let AttentionShape { heads, kv_heads, head_size } = shape;
        let group = heads / kv_heads;
        HeadColumns {
            query: kv_head * group * head_size,
            key: (heads + kv_head) * head_size,
            value: (heads + kv_heads + kv_head) * head_size,
            group,
            head_size,
            row: shape.qkv_width(),
        }
    }

    /// Columns of the group's query heads.
    pub(super) fn query_columns(&self) -> Range<usize> {
        self.query..self.query + self.group * self.head_size
    }

    pub(super) fn key_columns(&self) -> Range<usize> {
        self.key..self.key + self.head_size
    }

    pub(super) fn value_columns(&self) -> Range<usize> {
        self.value..self.value + self.head_size
    }
}

/// Copies `rows` of `values[.., width]`, columns `columns`, times `scale`, to the front of `out`.
#[inline(always)]
pub(super) fn pack<C: Storage>(
    out: &mut [C],
    values: &[C],
    width: usize,
    rows: Range<usize>,
    columns: Range<usize>,
    scale: f32,
) {
    for (out, row) in out.chunks_exact_mut(columns.len()).zip(rows) {
        let source = &values[row * width..][..width][columns.clone()];
        for (out, value) in out.iter_mut().zip(source) {
            *out = C::round(value.widen() * scale);
        }
    }
}

/// The part of the softmax scale that scores are multiplied by: queries carry the rest.
pub(super) fn score_scale<C: Storage>(shape: AttentionShape) -> f32 {
    shape.scale() / C::query_scale(shape.scale())
}

/// f32 values that make room for `count` values of the storage type.
pub(super) fn floats_for<C: Storage>(count: usize) -> usize {
    (count * size_of::<C>()).div_ceil(size_of::<f32>())
}

/// f32 values that make room for a tile of weights or of their gradients, rounded for the next product; none where they are
/// f32 already.
pub(super) fn narrow_floats<C: Storage>(rows: usize) -> usize {
    if C::TYPE == StorageType::F32 { 0 } else { floats_for::<C>(rows * TILE_N) }
}

/// f32 values of memory for the products of a tile of `rows` queries, backward included.
pub(super) fn product_memory<C: Storage>(device: &CpuDevice<C>, rows: usize, head_size: usize) -> usize {
    let products = [(rows, head_size, TILE_N), (rows, TILE_N, head_size), (TILE_N, rows, head_size)];
    products.map(|sizes| C::tile_memory(device, sizes)).into_iter().max().unwrap_or(0)
}

/// Rows of a tile of queries, heads included.
pub(super) fn tile_rows(group: usize) -> usize {
    block_rows(group) * group
}
