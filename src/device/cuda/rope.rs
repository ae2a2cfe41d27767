//! Rotary positions, in place: `kernels/rope.cu`.

use half::bf16;

use super::bindings::{MMPO_ROPE_BACKWARD, MMPO_ROPE_FORWARD};
use super::{CudaBuffer, CudaDevice, launch_sizes};
use crate::device::{AttentionShape, Checked, RopeDirection, RotaryPositions};
use crate::error::Result;

impl RotaryPositions for CudaDevice {
    fn run_rope(
        &self,
        qkv: &mut CudaBuffer<bf16>,
        table: &CudaBuffer<f32>,
        positions: &CudaBuffer<u32>,
        (rows, shape): (usize, AttentionShape),
        direction: RopeDirection,
        _: Checked,
    ) -> Result<()> {
        let [rows, heads, kv_heads, head_size] =
            launch_sizes("rope", [rows, shape.heads, shape.kv_heads, shape.head_size])?;
        let direction = match direction {
            RopeDirection::Forward => MMPO_ROPE_FORWARD,
            RopeDirection::Backward => MMPO_ROPE_BACKWARD,
        };
        // SAFETY: the buffers cover the sizes; positions are below the table's rows, because the table is made for the
        // longest sequence that a batch may hold.
        self.launch("rope", &(rows, shape), |kernels, stream| unsafe {
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
}
