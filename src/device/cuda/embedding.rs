//! Rows by index: the embedding table (`kernels/embedding.cu`), and the rows that the log-prob head scores
//! (`kernels/gather_rows.cu`).

use half::bf16;

use super::{CudaBuffer, CudaDevice, launch_sizes};
use crate::device::{BatchBuffers, Checked, Embedding};
use crate::error::Result;

impl Embedding for CudaDevice {
    fn run_embedding_forward(
        &self,
        out: &mut CudaBuffer<bf16>,
        table: &CudaBuffer<bf16>,
        token_ids: &CudaBuffer<u32>,
        [rows, width]: [usize; 2],
        _: Checked,
    ) -> Result<()> {
        let name = "embedding_forward";
        let [rows, width] = launch_sizes(name, [rows, width])?;
        // SAFETY: buffers cover the sizes; token ids are below the table's rows, as the tokenizer's vocabulary was checked
        // against the model's when both were loaded.
        self.launch(name, &[rows, width], |kernels, stream| unsafe {
            (kernels.embedding_forward)(
                out.start_mut(),
                table.start(),
                token_ids.start(),
                rows,
                width,
                stream,
            )
        })
    }

    fn run_embedding_backward(
        &self,
        dtable: &mut CudaBuffer<f32>,
        dout: &CudaBuffer<bf16>,
        batch: &BatchBuffers<CudaDevice>,
        [rows, width]: [usize; 2],
        _: Checked,
    ) -> Result<()> {
        let name = "embedding_backward";
        let [rows, width] = launch_sizes(name, [rows, width])?;
        // SAFETY: as in `forward`; `rows_by_token` is a permutation of the rows.
        self.launch(name, &[rows, width], |kernels, stream| unsafe {
            (kernels.embedding_backward)(
                dtable.start_mut(),
                dout.start(),
                batch.token_ids.start(),
                batch.rows_by_token.start(),
                rows,
                width,
                stream,
            )
        })
    }

    fn run_gather_rows(
        &self,
        out: &mut CudaBuffer<bf16>,
        hidden: &CudaBuffer<bf16>,
        batch: &BatchBuffers<CudaDevice>,
        [scored, width]: [usize; 2],
        _: Checked,
    ) -> Result<()> {
        let name = "gather_rows";
        let [scored, width] = launch_sizes(name, [scored, width])?;
        // SAFETY: the buffers cover the sizes, and scored rows are rows of the batch that `hidden` was computed for.
        self.launch(name, &[scored, width], |kernels, stream| unsafe {
            (kernels.gather_rows)(
                out.start_mut(),
                hidden.start(),
                batch.scored_rows.start(),
                scored,
                width,
                stream,
            )
        })
    }

    fn run_gather_rows_backward(
        &self,
        dhidden: &mut CudaBuffer<bf16>,
        dout: &CudaBuffer<bf16>,
        batch: &BatchBuffers<CudaDevice>,
        [rows, width]: [usize; 2],
        _: Checked,
    ) -> Result<()> {
        let name = "gather_rows_backward";
        let [rows, width] = launch_sizes(name, [rows, width])?;
        // SAFETY: the buffers cover the sizes, and `row_scores` names scored tokens of the batch that `dout` belongs to.
        self.launch(name, &[rows, width], |kernels, stream| unsafe {
            (kernels.gather_rows_backward)(
                dhidden.start_mut(),
                dout.start(),
                batch.row_scores.start(),
                rows,
                width,
                stream,
            )
        })
    }
}
