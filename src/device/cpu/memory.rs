//! Buffers of the CPU device, their count of bytes, and copies into and out of them.

use std::ops::{Deref, DerefMut, Range};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use half::{bf16, f16};
use rayon::prelude::*;

use super::storage::{Storage, widen};
use super::{BLOCK_ELEMENTS, CpuDevice};
use crate::device::{Checked, Element, MappedValues, Memory, MemoryUse, RawValues, StorageType};
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

/// A buffer of the CPU device; it reads as a slice. One that was borrowed from mapped files becomes a copy when it is written
/// to, or when values of several parts are read as one slice: [`CpuBuffer::parts`] reads them in place.
#[derive(Debug)]
pub struct CpuBuffer<T> {
    values: Values<T>,
    memory: Arc<MemoryCounter>,
}

/// Where the values of a buffer are.
#[derive(Debug)]
enum Values<T> {
    Owned(Vec<T>),
    Mapped {
        parts: Vec<MappedValues>,
        len: usize,
        /// All parts in one slice, once somebody has asked for it.
        joined: OnceLock<Vec<T>>,
    },
}

impl<T: Element> CpuBuffer<T> {
    /// The values in the pieces in which they lie, in order.
    pub(super) fn parts(&self) -> impl ExactSizeIterator<Item = &[T]> {
        let (owned, parts) = match &self.values {
            Values::Owned(values) => (Some(&values[..]), &[][..]),
            Values::Mapped { parts, .. } => (None, &parts[..]),
        };
        (0..parts.len().max(1)).map(move |index| owned.unwrap_or_else(|| in_place(&parts[index])))
    }

    /// A buffer over mapped values; `None` where they do not begin at an address of `T`.
    fn mapped(parts: &[MappedValues], memory: &Arc<MemoryCounter>) -> Option<Self> {
        let bytes =
            parts.iter().map(|part| bytemuck::try_cast_slice::<u8, T>(&part.file[part.bytes.clone()]));
        let len = bytes.map(|values| values.map(<[T]>::len)).sum::<std::result::Result<_, _>>().ok()?;
        let values = Values::Mapped { parts: parts.to_vec(), len, joined: OnceLock::new() };
        Some(CpuBuffer { values, memory: Arc::clone(memory) })
    }

    /// A copy of all parts, whose bytes are counted.
    fn joined(&self) -> Vec<T> {
        let mut values = Vec::with_capacity(self.values.len());
        self.parts().for_each(|part| values.extend_from_slice(part));
        self.memory.add(values.len() * size_of::<T>());
        values
    }
}

/// The values of a mapped part, which [`CpuBuffer::mapped`] has checked to be whole and aligned.
fn in_place<T: Element>(part: &MappedValues) -> &[T] {
    bytemuck::cast_slice(&part.file[part.bytes.clone()])
}

impl<T> Values<T> {
    fn len(&self) -> usize {
        match self {
            Values::Owned(values) => values.len(),
            Values::Mapped { len, .. } => *len,
        }
    }

    /// How many values are in memory of the process's own.
    fn owned(&self) -> usize {
        match self {
            Values::Owned(values) => values.len(),
            Values::Mapped { joined, .. } => joined.get().map_or(0, Vec::len),
        }
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
        Ok(CpuBuffer { values: Values::Owned(values), memory: Arc::clone(memory) })
    }
}

impl<T> Drop for CpuBuffer<T> {
    fn drop(&mut self) {
        self.memory.now.fetch_sub(self.values.owned() * size_of::<T>(), Ordering::Relaxed);
    }
}

impl<T: Element> Deref for CpuBuffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match &self.values {
            Values::Owned(values) => values,
            Values::Mapped { parts, .. } if parts.len() == 1 => in_place(&parts[0]),
            Values::Mapped { joined, .. } => joined.get_or_init(|| self.joined()),
        }
    }
}

impl<T: Element> DerefMut for CpuBuffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        if let Values::Mapped { joined, .. } = &mut self.values {
            let values = joined.take();
            self.values = Values::Owned(values.unwrap_or_else(|| self.joined()));
        }
        match &mut self.values {
            Values::Owned(values) => values,
            Values::Mapped { .. } => unreachable!("a mapped buffer has just been copied"),
        }
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

    fn borrow_mapped(&self, parts: &[MappedValues]) -> Option<CpuBuffer<C>> {
        // Files are little-endian. The f32 products read a weight as one slice, which several parts are not.
        let is_readable =
            cfg!(target_endian = "little") && (C::TYPE == StorageType::Bf16 || parts.len() == 1);
        let is_same = parts.iter().all(|part| part.storage == C::TYPE);
        if is_readable && is_same { CpuBuffer::mapped(parts, &self.memory) } else { None }
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
