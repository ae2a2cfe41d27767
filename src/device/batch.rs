//! A packed batch on a device: its buffers, and how they are filled.

use super::{Floats, Indices, Memory, MemoryPart};
use crate::data::{PairBatch, PairSpan};
use crate::error::{Error, Result};
use crate::objective::PairConstants;

/// A packed batch on the device. Capacities are fixed when it is made; [`BatchBuffers::load`] refills it.
#[derive(Debug)]
pub struct BatchBuffers<D: Memory> {
    /// Host copy of the spans: launchers choose their work from it.
    pub host_spans: Vec<PairSpan>,
    lists: HostLists,
    /// The token whose row of the embedding gets no gradient from its use as an input, as with transformers'
    /// `padding_idx`.
    pub padding_token: Option<u32>,
    /// Rows listed in `rows_by_token`: all but those of the padding token.
    pub embedding_rows: usize,
    /// `[pairs, 4]`: start, prompt, chosen, rejected.
    pub spans: Indices<D>,
    /// `[T]`
    pub token_ids: Indices<D>,
    /// `[T]`
    pub positions: Indices<D>,
    /// `[T]` row numbers sorted by token id (ties by row): the fixed order of the embedding's gradient.
    pub rows_by_token: Indices<D>,
    /// `[N]` the row that predicts each target.
    pub scored_rows: Indices<D>,
    /// `[N]`
    pub targets: Indices<D>,
    /// `[T, 2]` the scored tokens each row predicts, `u32::MAX` for none: the inverse of `scored_rows`.
    pub row_scores: Indices<D>,
    /// `[pairs, 4]` the ranges of the scored tokens: chosen start, chosen end, rejected start, rejected end.
    pub scored: Indices<D>,
    /// `[pairs, 4]` constants of each pair for the objective, see [`PairConstants`].
    pub constants: Floats<D>,
}

impl<D: Memory> BatchBuffers<D> {
    /// Room for batches of up to `max_tokens` tokens, `max_pairs` pairs and `max_scored` scored tokens.
    ///
    /// # Errors
    /// [`Error::Device`] where the device has no memory for them.
    pub fn new(device: &D, max_tokens: usize, max_pairs: usize, max_scored: usize) -> Result<Self> {
        device.as_part(MemoryPart::Batch, || Self::of_part(device, max_tokens, max_pairs, max_scored))
    }

    fn of_part(device: &D, max_tokens: usize, max_pairs: usize, max_scored: usize) -> Result<Self> {
        Ok(BatchBuffers {
            host_spans: Vec::with_capacity(max_pairs),
            lists: HostLists::new(max_tokens, max_pairs),
            padding_token: None,
            embedding_rows: 0,
            spans: device.alloc(max_pairs * 4)?,
            token_ids: device.alloc(max_tokens)?,
            positions: device.alloc(max_tokens)?,
            rows_by_token: device.alloc(max_tokens)?,
            scored_rows: device.alloc(max_scored)?,
            targets: device.alloc(max_scored)?,
            row_scores: device.alloc(max_tokens * 2)?,
            scored: device.alloc(max_pairs * 4)?,
            constants: device.alloc(max_pairs * 4)?,
        })
    }

    /// Replaces the contents by `batch`. `constants` has one entry per pair, or is empty where no objective is
    /// evaluated (scoring); zeros take its place then.
    ///
    /// # Errors
    /// [`Error::Device`] if the batch exceeds the capacity; [`Error::Bug`] if `constants` has entries, but not one
    /// per pair, or if three scored tokens share a row. The buffers are untouched then.
    pub fn load(&mut self, device: &D, batch: &PairBatch, constants: &[PairConstants]) -> Result<()> {
        let pairs = batch.spans.len();
        self.check_capacity(device, batch)?;
        if !constants.is_empty() && constants.len() != pairs {
            return Err(Error::bug(format!("load batch: {} constants for {pairs} pairs", constants.len())));
        }
        self.lists.fill(batch, constants, self.padding_token)?;
        let HostLists { row_scores, scored, rows_by_token, constants } = &self.lists;
        device.upload(&mut self.spans, 0, bytemuck::cast_slice(&batch.spans))?;
        device.upload(&mut self.token_ids, 0, &batch.token_ids)?;
        device.upload(&mut self.positions, 0, &batch.positions)?;
        device.upload(&mut self.rows_by_token, 0, rows_by_token)?;
        device.upload(&mut self.scored_rows, 0, &batch.scored_rows)?;
        device.upload(&mut self.targets, 0, &batch.targets)?;
        device.upload(&mut self.row_scores, 0, row_scores.as_flattened())?;
        device.upload(&mut self.scored, 0, scored.as_flattened())?;
        device.upload(&mut self.constants, 0, bytemuck::cast_slice(constants))?;
        self.embedding_rows = rows_by_token.len();
        self.host_spans.clone_from(&batch.spans);
        Ok(())
    }

    fn check_capacity(&self, device: &D, batch: &PairBatch) -> Result<()> {
        let len = |buffer: &Indices<D>| device.len(buffer);
        for (what, holds, needed) in [
            ("pairs", len(&self.spans) / 4, batch.spans.len()),
            ("tokens", len(&self.token_ids), batch.tokens()),
            ("scored tokens", len(&self.targets), batch.scored_tokens()),
        ] {
            if needed > holds {
                return Err(Error::device(
                    format!("load batch: {needed} {what} do not fit into buffers made for {holds}"),
                    "raise the token budget of a micro-batch, or lower max_length",
                ));
            }
        }
        Ok(())
    }
}

/// Lists that [`BatchBuffers::load`] derives from a batch. They are kept between batches, so that no step allocates
/// them.
#[derive(Debug, Default)]
struct HostLists {
    /// `[T]` the scored tokens that each row predicts, ascending, `u32::MAX` for none.
    row_scores: Vec<[u32; 2]>,
    /// `[pairs]` chosen start, chosen end, rejected start, rejected end.
    scored: Vec<[u32; 4]>,
    /// `[T]` at most: rows sorted by token, without those of the padding token.
    rows_by_token: Vec<u32>,
    /// `[pairs]`
    constants: Vec<PairConstants>,
}

impl HostLists {
    fn new(tokens: usize, pairs: usize) -> Self {
        HostLists {
            row_scores: Vec::with_capacity(tokens),
            scored: Vec::with_capacity(pairs),
            rows_by_token: Vec::with_capacity(tokens),
            constants: Vec::with_capacity(pairs),
        }
    }

    fn fill(&mut self, batch: &PairBatch, constants: &[PairConstants], padding: Option<u32>) -> Result<()> {
        self.fill_row_scores(batch)?;
        self.scored.clear();
        let ends = batch.scored.iter().map(|pair| {
            [pair.chosen.start, pair.chosen.end, pair.rejected.start, pair.rejected.end].map(|row| row as u32)
        });
        self.scored.extend(ends);
        let token = |row: u32| batch.token_ids[row as usize];
        self.rows_by_token.clear();
        self.rows_by_token.extend((0..batch.tokens() as u32).filter(|&row| Some(token(row)) != padding));
        // The row breaks ties. A stable sort would do so by itself, but it allocates.
        self.rows_by_token.sort_unstable_by_key(|&row| (token(row), row));
        self.constants.clear();
        self.constants.extend_from_slice(constants);
        self.constants.resize(batch.spans.len(), PairConstants::default());
        Ok(())
    }

    fn fill_row_scores(&mut self, batch: &PairBatch) -> Result<()> {
        self.row_scores.clear();
        self.row_scores.resize(batch.tokens(), [u32::MAX; 2]);
        for (scored, &row) in batch.scored_rows.iter().enumerate() {
            let slots = self.row_scores.get_mut(row as usize);
            let Some(slot) = slots.and_then(|slots| slots.iter_mut().find(|slot| **slot == u32::MAX)) else {
                return Err(Error::bug(format!(
                    "load batch: row {row} of {} is outside the batch or predicts a third token",
                    batch.tokens()
                )));
            };
            *slot = scored as u32;
        }
        Ok(())
    }
}
