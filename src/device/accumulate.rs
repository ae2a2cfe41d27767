//! Adding one array to another, where a sum is kept in another type or another place than what is added to it.

use super::check::check_sizes;
use super::cpu::Storage;
use super::{Checked, Floats, Memory};
use crate::error::Result;

/// A number in which a sum may be kept. The sum of a bf16 and an f32 is formed in f32 and rounded to the nearest bf16; of two
/// equally near ones, the even one.
pub trait Sum: Storage {}
impl<T: Storage> Sum for T {}

/// Sums that are added to.
///
/// # Errors
/// All methods return [`crate::Error::Bug`] for a range outside its buffer, and [`crate::Error::Device`] where the device
/// fails.
pub trait Accumulate: Memory {
    /// Accumulates `out[out_offset..] += source[offset..]` over `len` values.
    fn accumulate<T: Sum>(
        &self,
        out: &mut Self::Buffer<T>,
        out_offset: usize,
        source: &Floats<Self>,
        offset: usize,
        len: usize,
    ) -> Result<()> {
        let sizes = [
            ("out", self.len(out), out_offset.saturating_add(len)),
            ("source", self.len(source), offset.saturating_add(len)),
        ];
        let checked = check_sizes("accumulate", &[out_offset, offset, len], &sizes)?;
        self.run_accumulate(out, out_offset, source, offset, len, checked)
    }

    /// The device's part of [`Accumulate::accumulate`].
    fn run_accumulate<T: Sum>(
        &self,
        out: &mut Self::Buffer<T>,
        out_offset: usize,
        source: &Floats<Self>,
        offset: usize,
        len: usize,
        checked: Checked,
    ) -> Result<()>;
}
