//! How the log-prob head cuts its work where it keeps no probabilities, so that its workspace has a bound.

use crate::device::RECOMPUTE_WORKSPACE;

/// Most bytes that the parts of the workspace may take: less than [`RECOMPUTE_WORKSPACE`], to leave room for their
/// alignment.
pub(super) const BUDGET: usize = RECOMPUTE_WORKSPACE - (64 << 10);
/// Chunks are whole tiles of a gemm, which have this many rows and columns, so that only the last tile may be partly
/// empty.
const TILE: usize = 256;
/// Boundary of each part of the workspace.
pub(super) const ALIGNMENT: usize = 256;

/// Sizes of the recompute mode, see [`HeadChunks::new`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct HeadChunks {
    /// Rows whose statistics exist at once in the forward.
    pub forward_rows: usize,
    /// Rows whose f32 gradient exists at once in the backward.
    pub rows: usize,
    /// Columns of the vocabulary whose dlogits exist at once, for `rows` rows.
    pub columns: usize,
}

impl HeadChunks {
    /// The chunks for `rows` rows in all and a workspace of `bytes` bytes, or [`BUDGET`] if that is less; `statistics`
    /// is the number of bytes that the forward leaves for each row. No chunk is smaller than a tile, so the chunks may
    /// be too large for a tiny workspace.
    ///
    /// A backward chunk walks over the whole vocabulary, so the vocabulary matrix and its f32 gradient pass through
    /// memory once per chunk: `12 V D` bytes against `6 V D rows` operations. Its rows' own f32 gradient passes once
    /// for each run of columns: `8 D rows` bytes against `6 D rows columns` operations. So both should be large, and
    /// the budget is cut in halves: at D = 4096 that is 1792 rows and 9984 columns, where an H200 needs about 400 of
    /// each to be busy.
    pub fn new(rows: usize, width: usize, vocab: usize, statistics: usize, bytes: usize) -> Self {
        let bytes = bytes.min(BUDGET);
        let row_bytes = width * size_of::<f32>();
        let forward_rows = even(rows, bytes / statistics.max(1));
        // In narrow models, half a budget of f32 gradients would leave no room for one tile of dlogits for each of
        // these rows.
        let tile_bytes = TILE * size_of::<half::bf16>();
        let rows = even(rows, (bytes / 2 / row_bytes.max(1)).min(bytes / (row_bytes + tile_bytes)));
        let left = bytes.saturating_sub((rows * row_bytes).next_multiple_of(ALIGNMENT));
        let columns = even(vocab, left / (rows * size_of::<half::bf16>()).max(1));
        HeadChunks { forward_rows, rows, columns }
    }

    /// Offset of dlogits, after the rows' f32 gradient.
    pub fn dlogits_offset(&self, width: usize) -> usize {
        (self.rows * width * size_of::<f32>()).next_multiple_of(ALIGNMENT)
    }

    /// Bytes of workspace that the forward of a chunk needs; `statistics` is the number of bytes per row.
    pub fn forward_bytes(&self, statistics: usize) -> usize {
        self.forward_rows * statistics
    }

    /// Bytes of workspace that the backward of a chunk needs, for hidden rows of `width`.
    pub fn backward_bytes(&self, width: usize) -> usize {
        self.dlogits_offset(width) + self.rows * self.columns * size_of::<half::bf16>()
    }
}

/// The size of nearly equal parts of `total`: whole tiles, each part at most `most`, but at least one tile.
fn even(total: usize, most: usize) -> usize {
    let most = (most / TILE * TILE).max(TILE);
    let parts = total.div_ceil(most).max(1);
    total.div_ceil(parts).next_multiple_of(TILE).min(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `D`, `V` of the paper's models, and sizes at which rounding could go wrong.
    const MODELS: [(usize, usize); 7] = [
        (576, 49_152),
        (960, 49_152),
        (2048, 128_256),
        (4096, 128_256),
        (16, 40),
        (8192, 262_147),
        (4096, 1),
    ];

    /// Bytes per row of `logp_head_workspace`.
    fn statistics(vocab: usize) -> usize {
        4 * (3 * vocab.div_ceil(128) + 2)
    }

    #[test]
    fn the_workspace_stays_below_its_bound() {
        for (width, vocab) in MODELS {
            for rows in (1..40).chain([127, 128, 129, 257, 1000, 4095, 4096, 8192, 65_536, 1_000_003]) {
                let chunks = HeadChunks::new(rows, width, vocab, statistics(vocab), usize::MAX);
                let HeadChunks { forward_rows, rows: chunk_rows, columns } = chunks;
                assert!((1..=rows).contains(&forward_rows), "{chunks:?}");
                assert!((1..=rows).contains(&chunk_rows) && (1..=vocab).contains(&columns), "{chunks:?}");
                let bytes = (chunks.forward_bytes(statistics(vocab)), chunks.backward_bytes(width));
                assert!(bytes.0.max(bytes.1) < RECOMPUTE_WORKSPACE, "D = {width}, V = {vocab}: {bytes:?}");
            }
        }
    }

    #[test]
    fn chunks_of_the_largest_model_keep_a_gpu_busy() {
        let chunks = HeadChunks::new(8192, 4096, 128_256, statistics(128_256), usize::MAX);
        assert_eq!(chunks, HeadChunks { forward_rows: 4096, rows: 1792, columns: 9984 });
    }

    #[test]
    fn parts_are_even() {
        assert_eq!(even(1000, 700), 512);
        assert_eq!(even(1000, 10), 256);
        assert_eq!(even(3, 700), 3);
        assert_eq!(even(0, 700), 0);
    }
}
