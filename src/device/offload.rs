//! Pinned memory of the host, and copies between it and the device that run beside the computation.

use std::fmt::Debug;

use super::check::check_sizes;
use super::{Checked, Element, MemoryUse, Queues};
use crate::error::Result;

/// Buffers in pinned host memory, for a device whose own memory is smaller than the host's.
///
/// A copy must be ordered by events ([`Queues`]) after everything that the compute queue was given before it: record an event on
/// [`Queue::Compute`](super::Queue::Compute), let the copy's queue wait for it, then queue the copy. Likewise the compute queue must wait for a
/// fetch before it uses what was fetched. The emulated device lets a copy land as late as it may, and gives a copy that is
/// not ordered after the computation bytes that mean nothing, so that a missing wait shows in the numbers.
///
/// # Errors
/// All methods return [`crate::Error::Bug`] for a range outside its buffer, and [`crate::Error::Device`] where the device
/// fails.
pub trait Offload: Queues {
    /// Bytes of pinned host memory.
    type HostBuffer: Send + Sync + Debug;

    /// Whether there is anything to gain.
    ///
    /// # Errors
    /// [`crate::Error::Config`] where the device computes in the host's memory.
    fn check_offload(&self) -> Result<()>;

    /// Bytes of pinned memory now, and the most so far.
    fn host_memory(&self) -> MemoryUse;

    /// `bytes` zeros of pinned memory.
    fn alloc_host(&self, bytes: usize) -> Result<Self::HostBuffer>;

    /// Bytes that `buffer` holds.
    fn host_len(&self, buffer: &Self::HostBuffer) -> usize;

    /// Copies `source` to the bytes of `out` from `offset` on, after all copies that are under way.
    fn write_host(&self, out: &mut Self::HostBuffer, offset: usize, source: &[u8]) -> Result<()> {
        let sizes = [("out", self.host_len(out), offset.saturating_add(source.len()))];
        let checked = check_sizes("write_host", &offset, &sizes)?;
        self.run_write_host(out, offset, source, checked)
    }

    /// Copies the bytes of `source` from `offset` on to `out`, after all copies that are under way.
    fn read_host(&self, out: &mut [u8], source: &Self::HostBuffer, offset: usize) -> Result<()> {
        let sizes = [("source", self.host_len(source), offset.saturating_add(out.len()))];
        let checked = check_sizes("read_host", &offset, &sizes)?;
        self.run_read_host(out, source, offset, checked)
    }

    /// Queues on [`Queue::ToDevice`](super::Queue::ToDevice): `out[..len]` = the values of `source` from byte `offset` on.
    fn fetch<T: Element>(
        &self,
        out: &mut Self::Buffer<T>,
        source: &Self::HostBuffer,
        offset: usize,
        len: usize,
    ) -> Result<()> {
        let end = len.saturating_mul(size_of::<T>()).saturating_add(offset);
        let sizes = [("out", self.len(out), len), ("source", self.host_len(source), end)];
        let checked = check_sizes("fetch", &len, &sizes)?;
        self.run_fetch(out, source, offset, len, checked)
    }

    /// Queues on [`Queue::ToHost`](super::Queue::ToHost): the bytes of `out` from `offset` on = `source[..len]`.
    fn store<T: Element>(
        &self,
        out: &mut Self::HostBuffer,
        offset: usize,
        source: &Self::Buffer<T>,
        len: usize,
    ) -> Result<()> {
        let end = len.saturating_mul(size_of::<T>()).saturating_add(offset);
        let sizes = [("source", self.len(source), len), ("out", self.host_len(out), end)];
        let checked = check_sizes("store", &len, &sizes)?;
        self.run_store(out, offset, source, len, checked)
    }

    /// The device's part of [`Offload::write_host`].
    fn run_write_host(
        &self,
        out: &mut Self::HostBuffer,
        offset: usize,
        source: &[u8],
        checked: Checked,
    ) -> Result<()>;

    /// The device's part of [`Offload::read_host`].
    fn run_read_host(
        &self,
        out: &mut [u8],
        source: &Self::HostBuffer,
        offset: usize,
        checked: Checked,
    ) -> Result<()>;

    /// The device's part of [`Offload::fetch`].
    fn run_fetch<T: Element>(
        &self,
        out: &mut Self::Buffer<T>,
        source: &Self::HostBuffer,
        offset: usize,
        len: usize,
        checked: Checked,
    ) -> Result<()>;

    /// The device's part of [`Offload::store`].
    fn run_store<T: Element>(
        &self,
        out: &mut Self::HostBuffer,
        offset: usize,
        source: &Self::Buffer<T>,
        len: usize,
        checked: Checked,
    ) -> Result<()>;
}
