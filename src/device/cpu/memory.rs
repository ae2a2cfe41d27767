//! Buffers of the CPU device, their count of bytes, and copies into and out of them.

use std::ops::{Deref, DerefMut, Range};
use std::sync::Arc;

use half::{bf16, f16};
use rayon::prelude::*;

use super::{BLOCK_ELEMENTS, CpuDevice};
use crate::device::{Checked, Element, Memory, MemoryCounter, MemoryPart, RawValues, StorageType};
use crate::error::{Error, Result};

/// A buffer of the CPU device; it reads as a slice, which is empty on a device that is only planned for.
#[derive(Debug)]
pub struct CpuBuffer<T> {
    values: Vec<T>,
    len: usize,
    part: MemoryPart,
    memory: Arc<MemoryCounter>,
}

impl<T: Element> CpuBuffer<T> {
    /// `len` zeros; with `only_counted` none of them exists.
    pub(super) fn new(len: usize, memory: &Arc<MemoryCounter>, only_counted: bool) -> Result<Self> {
        let bytes = len.saturating_mul(size_of::<T>());
        let out_of_memory = || {
            Error::device(
                format!("cpu: no memory for a buffer of {len} values ({bytes} bytes)"),
                "lower the token budget of a micro-batch, or use a smaller model",
            )
        };
        // `try_reserve` first, so that an impossible size is an error and not an abort; `vec![0; len]` then asks the
        // system for pages that are already zero, which is much faster than writing zeros.
        let values = match only_counted {
            true => Vec::new(),
            false => {
                Vec::<T>::new().try_reserve_exact(len).map_err(|_| out_of_memory())?;
                vec![T::default(); len]
            }
        };
        let part = memory.add(bytes, None);
        Ok(CpuBuffer { values, len, part, memory: Arc::clone(memory) })
    }
}

impl<T> Drop for CpuBuffer<T> {
    fn drop(&mut self) {
        self.memory.subtract(self.len.saturating_mul(size_of::<T>()), self.part);
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

impl Memory for CpuDevice {
    type Compute = f32;
    type Buffer<T: Element> = CpuBuffer<T>;

    fn memory_counter(&self) -> &MemoryCounter {
        &self.memory
    }

    fn planned(&self, limit: Option<usize>) -> Result<Self> {
        let planned = CpuDevice::planned_for(Some(self.threads))?;
        planned.memory.set_limit(limit);
        Ok(planned)
    }

    fn free_memory(&self) -> Result<Option<usize>> {
        Ok(self.memory.left())
    }

    fn alloc<T: Element>(&self, len: usize) -> Result<CpuBuffer<T>> {
        CpuBuffer::new(len, &self.memory, self.only_counts)
    }

    fn len<T: Element>(&self, buffer: &CpuBuffer<T>) -> usize {
        buffer.len
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
        if self.only_counts {
            return Ok(());
        }
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
        if !self.only_counts {
            out.copy_from_slice(&source[offset..][..out.len()]);
        }
        Ok(())
    }

    fn run_upload_values(
        &self,
        out: &mut CpuBuffer<f32>,
        offset: usize,
        source: RawValues<'_>,
        _: Checked,
    ) -> Result<()> {
        if self.only_counts {
            return Ok(());
        }
        self.traced("upload_values", || {
            let size = source.storage.size();
            let blocks = out[offset..][..source.len()].par_chunks_mut(BLOCK_ELEMENTS);
            let blocks = blocks.zip(source.bytes.par_chunks(BLOCK_ELEMENTS * size));
            self.parallel(|| {
                blocks.for_each(|(out, bytes)| {
                    self.vectorized(
                        #[inline(always)]
                        || widen(out, bytes, source.storage),
                    )
                });
            });
            Ok(())
        })
    }

    fn run_download_compute(
        &self,
        out: &mut [f32],
        source: &CpuBuffer<f32>,
        offset: usize,
        checked: Checked,
    ) -> Result<()> {
        self.run_download(out, source, offset, checked)
    }

    fn run_zero<T: Element>(&self, out: &mut CpuBuffer<T>, range: Range<usize>, _: Checked) -> Result<()> {
        if self.only_counts {
            return Ok(());
        }
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
        if self.only_counts {
            return Ok(());
        }
        self.traced("copy", || {
            out[out_offset..][..range.len()].copy_from_slice(&source[range]);
            Ok(())
        })
    }
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
