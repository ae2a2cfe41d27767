//! Rows by index: the embedding table, and the rows that the log-prob head scores.

use super::check::check_sizes;
use super::{BatchBuffers, Checked, ComputeBuffer, Floats, Indices, Memory};
use crate::error::Result;

/// Gathers and scatters rows of `D` values.
///
/// # Errors
/// All methods return [`crate::Error::Bug`] for buffers that are smaller than the sizes, and [`crate::Error::Device`]
/// where the device fails; the CPU also for an index outside its table.
pub trait Embedding: Memory {
    /// Assigns `out[T, D] = table[token_ids, :]`.
    fn embedding_forward(
        &self,
        out: &mut ComputeBuffer<Self>,
        table: &ComputeBuffer<Self>,
        token_ids: &Indices<Self>,
        rows: usize,
        width: usize,
    ) -> Result<()> {
        let sizes = [("out", self.len(out), rows * width), ("token_ids", self.len(token_ids), rows)];
        let checked = check_sizes("embedding_forward", &[rows, width], &sizes)?;
        self.run_embedding_forward(out, table, token_ids, [rows, width], checked)
    }

    /// Accumulates `dtable[V, D] += scatter(dout[T, D])` over the first `rows` entries of `rows_by_token`, in their
    /// order.
    fn embedding_backward(
        &self,
        dtable: &mut Floats<Self>,
        dout: &ComputeBuffer<Self>,
        batch: &BatchBuffers<Self>,
        rows: usize,
        width: usize,
    ) -> Result<()> {
        let sizes = [
            ("dout", self.len(dout), rows * width),
            ("token_ids", self.len(&batch.token_ids), rows),
            ("rows_by_token", self.len(&batch.rows_by_token), rows),
        ];
        let checked = check_sizes("embedding_backward", &[rows, width], &sizes)?;
        self.run_embedding_backward(dtable, dout, batch, [rows, width], checked)
    }

    /// Assigns `out[N, D] = hidden[scored_rows, :]`.
    fn gather_rows(
        &self,
        out: &mut ComputeBuffer<Self>,
        hidden: &ComputeBuffer<Self>,
        batch: &BatchBuffers<Self>,
        scored: usize,
        width: usize,
    ) -> Result<()> {
        let sizes =
            [("out", self.len(out), scored * width), ("scored_rows", self.len(&batch.scored_rows), scored)];
        let checked = check_sizes("gather_rows", &[scored, width], &sizes)?;
        self.run_gather_rows(out, hidden, batch, [scored, width], checked)
    }

    /// Assigns `dhidden[T, D]`: the sum of `dout[N, D]` over the scored tokens that each row predicts, zero where there
    /// are none.
    fn gather_rows_backward(
        &self,
        dhidden: &mut ComputeBuffer<Self>,
        dout: &ComputeBuffer<Self>,
        batch: &BatchBuffers<Self>,
        rows: usize,
        width: usize,
    ) -> Result<()> {
        let sizes = [
            ("dhidden", self.len(dhidden), rows * width),
            ("row_scores", self.len(&batch.row_scores), rows * 2),
        ];
        let checked = check_sizes("gather_rows_backward", &[rows, width], &sizes)?;
        self.run_gather_rows_backward(dhidden, dout, batch, [rows, width], checked)
    }

    /// The device's part of [`Embedding::embedding_forward`]; sizes are `[T, D]`.
    fn run_embedding_forward(
        &self,
        out: &mut ComputeBuffer<Self>,
        table: &ComputeBuffer<Self>,
        token_ids: &Indices<Self>,
        sizes: [usize; 2],
        checked: Checked,
    ) -> Result<()>;

    /// The device's part of [`Embedding::embedding_backward`]; sizes are `[T, D]`.
    fn run_embedding_backward(
        &self,
        dtable: &mut Floats<Self>,
        dout: &ComputeBuffer<Self>,
        batch: &BatchBuffers<Self>,
        sizes: [usize; 2],
        checked: Checked,
    ) -> Result<()>;

    /// The device's part of [`Embedding::gather_rows`]; sizes are `[N, D]`.
    fn run_gather_rows(
        &self,
        out: &mut ComputeBuffer<Self>,
        hidden: &ComputeBuffer<Self>,
        batch: &BatchBuffers<Self>,
        sizes: [usize; 2],
        checked: Checked,
    ) -> Result<()>;

    /// The device's part of [`Embedding::gather_rows_backward`]; sizes are `[T, D]`.
    fn run_gather_rows_backward(
        &self,
        dhidden: &mut ComputeBuffer<Self>,
        dout: &ComputeBuffer<Self>,
        batch: &BatchBuffers<Self>,
        sizes: [usize; 2],
        checked: Checked,
    ) -> Result<()>;
}
