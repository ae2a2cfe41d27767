//! Buffers of the CPU device, their count of bytes, and copies into and out of them.

use std::ops::{Deref, DerefMut, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::{bf16, f16};
use rayon::prelude::*;

use super::{BLOCK_ELEMENTS, CpuDevice, check_sizes};
use crate::device::{Element, MemoryUse, RawValues, StorageType};
use crate::error::{Error, Result};

/// Bytes held by all buffers of a device.
#[derive(Debug, Default)]
pub(super) struct MemoryCounter {
    now: AtomicUsize,
    peak: AtomicUsize,
}

impl MemoryCounter {
    pub(super) fn read(&self) -> MemoryUse {
        MemoryUse { now: self.now.load(Ordering::Relaxed), peak: self.peak.load(Ordering::Relaxed) }
    }

    pub(super) fn add(&self, bytes: usize) {
        let now = self.now.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.peak.fetch_max(now, Ordering::Relaxed);
    }
}

/// A buffer of the CPU device; it reads as a slice.
#[derive(Debug)]
pub struct CpuBuffer<T> {
    values: Vec<T>,
    memory: Arc<MemoryCounter>,
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

pub(super) fn upload<T: Element>(out: &mut CpuBuffer<T>, offset: usize, source: &[T]) -> Result<()> {
    let end = offset.saturating_add(source.len());
    check_sizes("upload", &(offset..end), &[("out", out.len(), end)])?;
    out[offset..end].copy_from_slice(source);
    Ok(())
}

pub(super) fn download<T: Element>(out: &mut [T], source: &CpuBuffer<T>, offset: usize) -> Result<()> {
    let end = offset.saturating_add(out.len());
    check_sizes("download", &(offset..end), &[("source", source.len(), end)])?;
    out.copy_from_slice(&source[offset..end]);
    Ok(())
}

pub(super) fn zero<T: Element>(
    device: &CpuDevice,
    out: &mut CpuBuffer<T>,
    range: Range<usize>,
) -> Result<()> {
    check_sizes("zero", &range, &[("out", out.len(), range.end), ("range", range.end, range.start)])?;
    let out = &mut out[range];
    device.parallel(|| out.par_chunks_mut(BLOCK_ELEMENTS).for_each(|block| block.fill(T::default())));
    Ok(())
}

pub(super) fn zero_all(device: &CpuDevice, outs: &mut [&mut CpuBuffer<f32>]) -> Result<()> {
    device.parallel(|| {
        outs.par_iter_mut()
            .flat_map(|out| out.par_chunks_mut(BLOCK_ELEMENTS))
            .for_each(|block| block.fill(0.0));
    });
    Ok(())
}

pub(super) fn copy<T: Element>(
    out: &mut CpuBuffer<T>,
    out_offset: usize,
    source: &CpuBuffer<T>,
    offset: usize,
    len: usize,
) -> Result<()> {
    let (out_end, end) = (out_offset.saturating_add(len), offset.saturating_add(len));
    check_sizes("copy", &len, &[("out", out.len(), out_end), ("source", source.len(), end)])?;
    out[out_offset..out_end].copy_from_slice(&source[offset..end]);
    Ok(())
}

pub(super) fn upload_values(
    device: &CpuDevice,
    out: &mut CpuBuffer<f32>,
    offset: usize,
    source: RawValues<'_>,
) -> Result<()> {
    let end = offset.saturating_add(source.len());
    check_sizes("upload_values", &(offset..end), &[("out", out.len(), end)])?;
    let size = source.storage.size();
    let blocks = out[offset..end].par_chunks_mut(BLOCK_ELEMENTS);
    let blocks = blocks.zip(source.bytes.par_chunks(BLOCK_ELEMENTS * size));
    device.parallel(|| {
        blocks.for_each(|(out, bytes)| {
            device.vectorized(
                #[inline(always)]
                || widen(out, bytes, source.storage),
            )
        });
    });
    Ok(())
}

/// `out = bytes`, little-endian values of any alignment, as f32.
#[inline(always)]
fn widen(out: &mut [f32], bytes: &[u8], storage: StorageType) {
    match storage {
        StorageType::F32 => {
            for (out, &value) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *out = f32::from_le_bytes(value);
            }
        }
        StorageType::Bf16 => {
            for (out, &value) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *out = bf16::from_le_bytes(value).to_f32();
            }
        }
        StorageType::F16 => {
            for (out, &value) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *out = f16::from_le_bytes(value).to_f32();
            }
        }
    }
}
