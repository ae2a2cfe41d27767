//! The rows that the log-prob head scores, and their gradient: `kernels/gather_rows.cu`.

use half::bf16;

use super::{CudaBuffer, CudaDevice, check_sizes, launch_sizes};
use crate::device::BatchBuffers;
use crate::error::Result;

pub(super) fn forward(
    device: &CudaDevice,
    out: &mut CudaBuffer<bf16>,
    hidden: &CudaBuffer<bf16>,
    batch: &BatchBuffers<CudaDevice>,
    scored: usize,
    width: usize,
) -> Result<()> {
    let name = "gather_rows";
    let sizes = [("out", out.len(), scored * width), ("scored_rows", batch.scored_rows.len(), scored)];
    check_sizes(name, &[scored, width], &sizes)?;
    let [scored, width] = launch_sizes(name, [scored, width])?;
    // SAFETY: the buffers cover the sizes, and scored rows are rows of the batch that `hidden` was computed for.
    device.launch(name, &[scored, width], |kernels, stream| unsafe {
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

pub(super) fn backward(
    device: &CudaDevice,
    dhidden: &mut CudaBuffer<bf16>,
    dout: &CudaBuffer<bf16>,
    batch: &BatchBuffers<CudaDevice>,
    rows: usize,
    width: usize,
) -> Result<()> {
    let name = "gather_rows_backward";
    let sizes = [("dhidden", dhidden.len(), rows * width), ("row_scores", batch.row_scores.len(), 2 * rows)];
    check_sizes(name, &[rows, width], &sizes)?;
    let [rows, width] = launch_sizes(name, [rows, width])?;
    // SAFETY: the buffers cover the sizes, and `row_scores` names scored tokens of the batch that `dout` belongs to.
    device.launch(name, &[rows, width], |kernels, stream| unsafe {
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
