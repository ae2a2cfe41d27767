//! Rows by index: the embedding table and its gradient, and the gather of scored rows before the head.

use rayon::prelude::*;

use super::shared_rows::SharedRows;
use super::storage::Storage;
use super::{CpuBuffer, CpuDevice, check_indices};
use crate::device::{BatchBuffers, Checked, Embedding};
use crate::error::Result;

impl<C: Storage> Embedding for CpuDevice<C> {
    fn run_embedding_forward(
        &self,
        out: &mut CpuBuffer<C>,
        table: &CpuBuffer<C>,
        token_ids: &CpuBuffer<u32>,
        [rows, width]: [usize; 2],
        _: Checked,
    ) -> Result<()> {
        self.traced("embedding_forward", || {
            let operation = "embedding_forward";
            check_indices(operation, "token id", &token_ids[..rows], table.len() / width.max(1))?;
            gather(self, &mut out[..rows * width], table, &token_ids[..rows], width);
            Ok(())
        })
    }

    fn run_embedding_backward(
        &self,
        dtable: &mut CpuBuffer<f32>,
        dout: &CpuBuffer<C>,
        batch: &BatchBuffers<CpuDevice<C>>,
        [rows, width]: [usize; 2],
        _: Checked,
    ) -> Result<()> {
        self.traced("embedding_backward", || {
            let operation = "embedding_backward";
            let order = &batch.rows_by_token[..rows];
            let tokens = batch.token_ids.len().min(dout.len() / width.max(1));
            check_indices(operation, "row by token", order, tokens)?;
            let token_of = |row: &u32| batch.token_ids[*row as usize];
            let limit = dtable.len() / width.max(1);
            if let Some(token) = order.iter().map(token_of).find(|&token| token as usize >= limit) {
                return Err(super::index_error(operation, "token id", token, limit));
            }
            // One group of rows for each token, so that each row of the table belongs to one task.
            if let Some(pair) = order.windows(2).find(|pair| token_of(&pair[0]) > token_of(&pair[1])) {
                let (token, before) = (token_of(&pair[1]), token_of(&pair[0]) as usize);
                return Err(super::index_error(operation, "token out of order: token id", token, before));
            }
            let dtable = SharedRows::new(&mut dtable[..], width);
            self.parallel(|| {
                order.par_chunk_by(|one, other| token_of(one) == token_of(other)).for_each(|group| {
                    let token = token_of(&group[0]) as usize;
                    // SAFETY: tokens ascend, so no other group has this one.
                    let sum = unsafe { dtable.row_mut(token, 0..width) };
                    self.vectorized(
                        #[inline(always)]
                        || {
                            for &row in group {
                                accumulate(sum, &dout[row as usize * width..][..width]);
                            }
                        },
                    )
                });
            });
            Ok(())
        })
    }

    fn run_gather_rows(
        &self,
        out: &mut CpuBuffer<C>,
        hidden: &CpuBuffer<C>,
        batch: &BatchBuffers<CpuDevice<C>>,
        [scored, width]: [usize; 2],
        _: Checked,
    ) -> Result<()> {
        self.traced("gather_rows", || {
            let operation = "gather_rows";
            let indices = &batch.scored_rows[..scored];
            check_indices(operation, "scored row", indices, hidden.len() / width.max(1))?;
            gather(self, &mut out[..scored * width], hidden, indices, width);
            Ok(())
        })
    }

    fn run_gather_rows_backward(
        &self,
        dhidden: &mut CpuBuffer<C>,
        dout: &CpuBuffer<C>,
        batch: &BatchBuffers<CpuDevice<C>>,
        [rows, width]: [usize; 2],
        _: Checked,
    ) -> Result<()> {
        self.traced("gather_rows_backward", || {
            if width == 0 {
                return Ok(());
            }
            let row_scores = batch.row_scores[..rows * 2].as_chunks::<2>().0;
            let limit = dout.len() / width;
            if let Some(&score) =
                row_scores.iter().flatten().find(|&&score| score != u32::MAX && score as usize >= limit)
            {
                return Err(super::index_error("gather_rows_backward", "scored token", score, limit));
            }
            let block_rows = self.block_rows(width);
            self.parallel(|| {
                dhidden[..rows * width]
                    .par_chunks_mut(block_rows * width)
                    .zip(row_scores.par_chunks(block_rows))
                    .for_each(|(dhidden, row_scores)| {
                        self.vectorized(
                            #[inline(always)]
                            || {
                                for (sum, scores) in dhidden.chunks_exact_mut(width).zip(row_scores) {
                                    sum.fill(C::default());
                                    for &score in scores.iter().filter(|&&score| score != u32::MAX) {
                                        accumulate(sum, &dout[score as usize * width..][..width]);
                                    }
                                }
                            },
                        )
                    });
            });
            Ok(())
        })
    }
}

/// `out[i] = table[indices[i]]`; indices and sizes were checked.
fn gather<C: Storage>(device: &CpuDevice<C>, out: &mut [C], table: &[C], indices: &[u32], width: usize) {
    if width == 0 {
        return;
    }
    let block_rows = device.block_rows(width);
    device.parallel(|| {
        out.par_chunks_mut(block_rows * width).zip(indices.par_chunks(block_rows)).for_each(
            |(out, indices)| {
                for (out, &index) in out.chunks_exact_mut(width).zip(indices) {
                    out.copy_from_slice(&table[index as usize * width..][..width]);
                }
            },
        );
    });
}

#[inline(always)]
fn accumulate<S: Storage, C: Storage>(sum: &mut [S], values: &[C]) {
    for (sum, value) in sum.iter_mut().zip(values) {
        *sum = S::round(sum.widen() + value.widen());
    }
}
