//! Buffers of the CPU device, their count of bytes, and copies into and out of them.

use std::ops::{Deref, DerefMut, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::{bf16, f16};
use rayon::prelude::*;

use super::storage::{Storage, widen};
use super::{BLOCK_ELEMENTS, CpuDevice};
use crate::device::{Checked, Element, Memory, MemoryUse, RawValues, StorageType};
use crate::error::{Error, Result};

/// Bytes held by all buffers of a device.
#[derive(Debug, Default)]
pub(super) struct MemoryCounter {
    now: AtomicUsize,
    peak: AtomicUsize,
    allocations: AtomicUsize,
}

impl MemoryCounter {
    pub(super) fn read(&self) -> MemoryUse {
        MemoryUse {
            now: self.now.load(Ordering::Relaxed),
            peak: self.peak.load(Ordering::Relaxed),
            allocations: self.allocations.load(Ordering::Relaxed),
        }
    }

    /// Notes that `bytes` bytes were taken at once.
    pub(super) fn add(&self, bytes: usize) {
        let now = self.now.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.peak.fetch_max(now, Ordering::Relaxed);
        self.allocations.fetch_add(1, Ordering::Relaxed);
    }
}

/// A buffer of the CPU device; it reads as a slice.
#[derive(Debug)]
pub struct CpuBuffer<T> {
    values: Vec<T>,
    memory: Arc<MemoryCounter>,
}

impl<T> CpuBuffer<T> {
    /// The values in the pieces in which they lie, in order.
    pub(super) fn parts(&self) -> impl ExactSizeIterator<Item = &[T]> {
        std::iter::once(&self.values[..])
    }
}

impl<T: Element> CpuBuffer<T> {
    pub(super) fn new(len: usize, memory: &Arc<MemoryCounter>) -> Result<Self> {
        let bytes = len.saturating_mul(size_of::<T>());
        let out_of_memory = || {
            Error::device(
                format!("cpu: no memory for a buffer of {len} values ({bytes} bytes)"),
                "lower the token budget of a micro-batch, or use a smaller model",
            )
        };
        // `try_reserve` first, so that an impossible size is an error and not an abort; `vec![0; len]` then asks the
        // system for pages that are already zero, which is much faster than writing zeros.
        Vec::<T>::new().try_reserve_exact(len).map_err(|_| out_of_memory())?;
        let values = vec![T::default(); len];
        memory.add(bytes);
        Ok(CpuBuffer { values, memory: Arc::clone(memory) })
    }
}

impl<T> Drop for CpuBuffer<T> {
    fn drop(&mut self) {
        self.memory.now.fetch_sub(self.values.len() * size_of::<T>(), Ordering::Relaxed);
    }
}

impl<T> Deref for CpuBuffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.values
    }
}

impl<T> DerefMut for CpuBuffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.values
    }
}

impl<C: Storage> Memory for CpuDevice<C> {
    type Compute = C;
    type Buffer<T: Element> = CpuBuffer<T>;

    fn memory(&self) -> MemoryUse {
        self.memory.read()
    }

    fn free_memory(&self) -> Result<Option<usize>> {
        Ok(None)
    }

    fn alloc<T: Element>(&self, len: usize) -> Result<CpuBuffer<T>> {
        CpuBuffer::new(len, &self.memory)
    }

    fn len<T: Element>(&self, buffer: &CpuBuffer<T>) -> usize {
        buffer.values.len()
    }

    fn zero_all(&self, outs: &mut [&mut CpuBuffer<f32>]) -> Result<()> {
        self.traced("zero_all", || {
            self.parallel(|| {
                outs.par_iter_mut()
                    .flat_map(|out| out.par_chunks_mut(BLOCK_ELEMENTS))
                    .for_each(|block| block.fill(0.0));
            });
            Ok(())
        })
    }

    fn run_upload<T: Element>(
        &self,
        out: &mut CpuBuffer<T>,
        offset: usize,
        source: &[T],
        _: Checked,
    ) -> Result<()> {
        self.traced("upload", || {
            out[offset..][..source.len()].copy_from_slice(source);
            Ok(())
        })
    }

    fn run_download<T: Element>(
        &self,
        out: &mut [T],
        source: &CpuBuffer<T>,
        offset: usize,
        _: Checked,
    ) -> Result<()> {
        out.copy_from_slice(&source[offset..][..out.len()]);
        Ok(())
    }

    fn run_upload_values(
        &self,
        out: &mut CpuBuffer<C>,
        offset: usize,
        source: RawValues<'_>,
        _: Checked,
    ) -> Result<()> {
        self.traced("upload_values", || {
            let size = source.storage.size();
            let blocks = out[offset..][..source.len()].par_chunks_mut(BLOCK_ELEMENTS);
            let blocks = blocks.zip(source.bytes.par_chunks(BLOCK_ELEMENTS * size));
            self.parallel(|| {
                blocks.for_each(|(out, bytes)| {
                    self.vectorized(
                        #[inline(always)]
                        || convert(out, bytes, source.storage),
                    )
                });
            });
            Ok(())
        })
    }

    fn run_download_compute(
        &self,
        out: &mut [f32],
        source: &CpuBuffer<C>,
        offset: usize,
        _: Checked,
    ) -> Result<()> {
        widen(out, &source[offset..][..out.len()]);
        Ok(())
    }

    fn run_zero<T: Element>(&self, out: &mut CpuBuffer<T>, range: Range<usize>, _: Checked) -> Result<()> {
        self.traced("zero", || {
            let out = &mut out[range];
            self.parallel(|| out.par_chunks_mut(BLOCK_ELEMENTS).for_each(|block| block.fill(T::default())));
            Ok(())
        })
    }

    fn run_copy<T: Element>(
        &self,
        out: &mut CpuBuffer<T>,
        out_offset: usize,
        source: &CpuBuffer<T>,
        range: Range<usize>,
        _: Checked,
    ) -> Result<()> {
        self.traced("copy", || {
            out[out_offset..][..range.len()].copy_from_slice(&source[range]);
            Ok(())
        })
    }
}

/// `out = bytes`, little-endian values of any alignment, rounded where `C` is narrower.
#[inline(always)]
fn convert<C: Storage>(out: &mut [C], bytes: &[u8], storage: StorageType) {
    match storage {
        StorageType::F32 => {
            for (out, &value) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *out = C::round(f32::from_le_bytes(value));
            }
        }
        StorageType::Bf16 => {
            for (out, &value) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *out = C::round(bf16::from_le_bytes(value).widen());
            }
        }
        StorageType::F16 => {
            for (out, &value) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *out = C::round(f16::from_le_bytes(value).to_f32());
            }
        }
    }
}
