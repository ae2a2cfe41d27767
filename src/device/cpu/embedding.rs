//! Rows by index: the embedding table and its gradient, and the gather of scored rows in front of the head.

use rayon::prelude::*;

use super::{CpuBuffer, CpuDevice, check_indices};
use crate::device::{BatchBuffers, Checked, Embedding};
use crate::error::Result;

impl Embedding for CpuDevice {
    fn run_embedding_forward(
        &self,
        out: &mut CpuBuffer<f32>,
        table: &CpuBuffer<f32>,
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
        dout: &CpuBuffer<f32>,
        batch: &BatchBuffers<CpuDevice>,
        [rows, width]: [usize; 2],
        _: Checked,
    ) -> Result<()> {
        self.traced("embedding_backward", || {
            let operation = "embedding_backward";
            let order = &batch.rows_by_token[..rows];
            let tokens = batch.token_ids.len().min(dout.len() / width.max(1));
            check_indices(operation, "row by token", order, tokens)?;
            let token_of = |&row: &u32| batch.token_ids[row as usize];
            let token_ids: Vec<u32> = order.iter().map(token_of).collect();
            check_indices(operation, "token id", &token_ids, dtable.len() / width.max(1))?;
            let groups: Vec<&[u32]> = order.chunk_by(|a, b| token_of(a) == token_of(b)).collect();
            // Tokens ascend, so each group's row of the table can be split off the front of what is left.
            let mut work = Vec::with_capacity(groups.len());
            let (mut rest, mut first) = (&mut dtable[..], 0);
            for group in groups {
                let token = token_of(&group[0]) as usize;
                let Some(skipped) = token.checked_sub(first) else {
                    return Err(super::index_error(
                        operation,
                        "token out of order: token id",
                        token as u32,
                        first,
                    ));
                };
                let (row, tail) = rest[skipped * width..].split_at_mut(width);
                work.push((row, group));
                (rest, first) = (tail, token + 1);
            }
            self.parallel(|| {
                work.into_par_iter().with_min_len(self.block_rows(width)).for_each(|(sum, group)| {
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
        out: &mut CpuBuffer<f32>,
        hidden: &CpuBuffer<f32>,
        batch: &BatchBuffers<CpuDevice>,
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
        dhidden: &mut CpuBuffer<f32>,
        dout: &CpuBuffer<f32>,
        batch: &BatchBuffers<CpuDevice>,
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
                                    sum.fill(0.0);
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
fn gather(device: &CpuDevice, out: &mut [f32], table: &[f32], indices: &[u32], width: usize) {
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
fn accumulate(sum: &mut [f32], values: &[f32]) {
    for (sum, value) in sum.iter_mut().zip(values) {
        *sum += value;
    }
}
