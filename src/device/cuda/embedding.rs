//! Embedding gather and its gradient: `kernels/embedding.cu`.

use half::bf16;

use super::{CudaBuffer, CudaDevice, check_sizes, launch_sizes};
use crate::device::BatchBuffers;
use crate::error::Result;

pub(super) fn forward(
    device: &CudaDevice,
    out: &mut CudaBuffer<bf16>,
    table: &CudaBuffer<bf16>,
    token_ids: &CudaBuffer<u32>,
    rows: usize,
    width: usize,
) -> Result<()> {
    let name = "embedding_forward";
    check_sizes(
        name,
        &[rows, width],
        &[("out", out.len(), rows * width), ("token_ids", token_ids.len(), rows)],
    )?;
    let [rows, width] = launch_sizes(name, [rows, width])?;
    // SAFETY: buffers cover the sizes; token ids are below the table's rows, as the tokenizer's vocabulary was checked
    // against the model's when both were loaded.
    device.launch(name, &[rows, width], |kernels, stream| unsafe {
        (kernels.embedding_forward)(out.start_mut(), table.start(), token_ids.start(), rows, width, stream)
    })
}

pub(super) fn backward(
    device: &CudaDevice,
    dtable: &mut CudaBuffer<f32>,
    dout: &CudaBuffer<bf16>,
    batch: &BatchBuffers<CudaDevice>,
    rows: usize,
    width: usize,
) -> Result<()> {
    let name = "embedding_backward";
    let sizes = [
        ("dout", dout.len(), rows * width),
        ("token_ids", batch.token_ids.len(), rows),
        ("rows_by_token", batch.rows_by_token.len(), rows),
    ];
    check_sizes(name, &[rows, width], &sizes)?;
    let [rows, width] = launch_sizes(name, [rows, width])?;
    // SAFETY: as in `forward`; `rows_by_token` is a permutation of the rows.
    device.launch(name, &[rows, width], |kernels, stream| unsafe {
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
