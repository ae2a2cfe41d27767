//! Rotary positions, in place: `kernels/rope.cu`.

use half::bf16;

use super::bindings::{MMPO_ROPE_BACKWARD, MMPO_ROPE_FORWARD};
use super::{CudaBuffer, CudaDevice, check_sizes, launch_sizes};
use crate::device::{AttentionShape, RopeDirection};
use crate::error::Result;

pub(super) fn rope(
    device: &CudaDevice,
    qkv: &mut CudaBuffer<bf16>,
    table: &CudaBuffer<f32>,
    positions: &CudaBuffer<u32>,
    rows: usize,
    shape: AttentionShape,
    direction: RopeDirection,
) -> Result<()> {
    let sizes = [("qkv", qkv.len(), rows * shape.qkv_width()), ("positions", positions.len(), rows)];
    check_sizes("rope", &(rows, shape), &sizes)?;
    let [rows, heads, kv_heads, head_size] =
        launch_sizes("rope", [rows, shape.heads, shape.kv_heads, shape.head_size])?;
    let direction = match direction {
        RopeDirection::Forward => MMPO_ROPE_FORWARD,
        RopeDirection::Backward => MMPO_ROPE_BACKWARD,
    };
    // SAFETY: the buffers cover the sizes; positions are below the table's rows, because the table is made for the
    // longest sequence that a batch may hold.
    device.launch("rope", &(rows, shape), |kernels, stream| unsafe {
        (kernels.rope)(
            qkv.start_mut(),
            table.start(),
            positions.start(),
            rows,
            heads,
            kv_heads,
            head_size,
            direction as i32,
            stream,
        )
    })
}
