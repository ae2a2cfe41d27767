//! Rotary positions (Su et al. 2021), half-split pairs as in Hugging Face checkpoints.

use super::check::check_sizes;
use super::{AttentionShape, Checked, ComputeBuffer, Floats, Indices, Memory};
use crate::error::Result;

/// Direction of [`RotaryPositions::rope`]: the backward pass of a rotation is the inverse rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeDirection {
    /// Rotates by the position's angle.
    Forward,
    /// Rotates by the negative of that angle.
    Backward,
}

/// Rotation of queries and keys by their positions.
///
/// # Errors
/// All methods return [`crate::Error::Bug`] for buffers that are smaller than the sizes, and [`crate::Error::Device`]
/// where the device fails; the CPU also for a position outside the table.
pub trait RotaryPositions: Memory {
    /// Rotates the query and key heads of `qkv[T, (H + 2K) * E]` in place. `table[positions, E]` holds `E/2` cosines,
    /// then `E/2` sines, of each position.
    fn rope(
        &self,
        qkv: &mut ComputeBuffer<Self>,
        table: &Floats<Self>,
        positions: &Indices<Self>,
        rows: usize,
        shape: AttentionShape,
        direction: RopeDirection,
    ) -> Result<()> {
        let sizes =
            [("qkv", self.len(qkv), rows * shape.qkv_width()), ("positions", self.len(positions), rows)];
        let checked = check_sizes("rope", &(rows, shape), &sizes)?;
        self.run_rope(qkv, table, positions, (rows, shape), direction, checked)
    }

    /// The device's part of [`RotaryPositions::rope`].
    fn run_rope(
        &self,
        qkv: &mut ComputeBuffer<Self>,
        table: &Floats<Self>,
        positions: &Indices<Self>,
        sizes: (usize, AttentionShape),
        direction: RopeDirection,
        checked: Checked,
    ) -> Result<()>;
}
