//! Rows by index: the embedding table and its gradient, and the gather of scored rows in front of the head.

use rayon::prelude::*;

use super::{CpuBuffer, CpuDevice, check_indices, check_sizes};
use crate::device::BatchBuffers;
use crate::error::Result;

pub(super) fn forward(
    device: &CpuDevice,
    out: &mut CpuBuffer<f32>,
    table: &CpuBuffer<f32>,
    token_ids: &CpuBuffer<u32>,
    rows: usize,
    width: usize,
) -> Result<()> {
    let operation = "embedding_forward";
    let needs = [("out", out.len(), rows * width), ("token_ids", token_ids.len(), rows)];
    check_sizes(operation, &(rows, width), &needs)?;
    check_indices(operation, "token id", &token_ids[..rows], table.len() / width.max(1))?;
    gather(device, &mut out[..rows * width], table, &token_ids[..rows], width);
    Ok(())
}

pub(super) fn gather_rows(
    device: &CpuDevice,
    out: &mut CpuBuffer<f32>,
    hidden: &CpuBuffer<f32>,
    batch: &BatchBuffers<CpuDevice>,
    scored: usize,
    width: usize,
) -> Result<()> {
    let operation = "gather_rows";
    let needs = [("out", out.len(), scored * width), ("scored_rows", batch.scored_rows.len(), scored)];
    check_sizes(operation, &(scored, width), &needs)?;
    let indices = &batch.scored_rows[..scored];
    check_indices(operation, "scored row", indices, hidden.len() / width.max(1))?;
    gather(device, &mut out[..scored * width], hidden, indices, width);
    Ok(())
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

pub(super) fn backward(
    device: &CpuDevice,
    dtable: &mut CpuBuffer<f32>,
    dout: &CpuBuffer<f32>,
    batch: &BatchBuffers<CpuDevice>,
    rows: usize,
    width: usize,
) -> Result<()> {
    let operation = "embedding_backward";
    check_sizes(operation, &(rows, width), &[("rows_by_token", batch.rows_by_token.len(), rows)])?;
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
            return Err(super::index_error(operation, "token out of order: token id", token as u32, first));
        };
        let (row, tail) = rest[skipped * width..].split_at_mut(width);
        work.push((row, group));
        (rest, first) = (tail, token + 1);
    }
    device.parallel(|| {
        work.into_par_iter().with_min_len(device.block_rows(width)).for_each(|(sum, group)| {
            device.vectorized(
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
}

pub(super) fn gather_rows_backward(
    device: &CpuDevice,
    dhidden: &mut CpuBuffer<f32>,
    dout: &CpuBuffer<f32>,
    batch: &BatchBuffers<CpuDevice>,
    rows: usize,
    width: usize,
) -> Result<()> {
    let operation = "gather_rows_backward";
    let needs = [("dhidden", dhidden.len(), rows * width), ("row_scores", batch.row_scores.len(), rows * 2)];
    check_sizes(operation, &(rows, width), &needs)?;
    if width == 0 {
        return Ok(());
    }
    let row_scores = batch.row_scores[..rows * 2].as_chunks::<2>().0;
    let limit = dout.len() / width;
    if let Some(&score) =
        row_scores.iter().flatten().find(|&&score| score != u32::MAX && score as usize >= limit)
    {
        return Err(super::index_error(operation, "scored token", score, limit));
    }
    let block_rows = device.block_rows(width);
    device.parallel(|| {
        dhidden[..rows * width]
            .par_chunks_mut(block_rows * width)
            .zip(row_scores.par_chunks(block_rows))
            .for_each(|(dhidden, row_scores)| {
                device.vectorized(
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
}

#[inline(always)]
fn accumulate(sum: &mut [f32], values: &[f32]) {
    for (sum, value) in sum.iter_mut().zip(values) {
        *sum += value;
    }
}
