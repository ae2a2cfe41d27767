//! Buffers of the CPU device, their count of bytes, and copies into and out of them.

use std::ops::{Deref, DerefMut, Range};
use std::sync::{Arc, OnceLock};

use half::{bf16, f16};
use rayon::prelude::*;

use super::storage::{Storage, widen};
use super::{BLOCK_ELEMENTS, CpuDevice};
use crate::device::{
    Checked, Element, MappedValues, Memory, MemoryCounter, MemoryPart, RawValues, StorageType,
};
use crate::error::{Error, Result};

/// A buffer of the CPU device; it reads as a slice, which is empty on a device that is only planned for. One that was borrowed from mapped files becomes a copy when it is written
/// to, or when values of several parts are read as one slice: `CpuBuffer::parts` reads them in place.
#[derive(Debug)]
pub struct CpuBuffer<T> {
    values: Values<T>,
    len: usize,
    part: MemoryPart,
    memory: Arc<MemoryCounter>,
}

/// Where the values of a buffer are.
#[derive(Debug)]
enum Values<T> {
    Owned(Vec<T>),
    Mapped {
        parts: Vec<MappedValues>,
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
        let values = Values::Mapped { parts: parts.to_vec(), joined: OnceLock::new() };
        // No bytes of the device's own, until they are copied.
        let part = memory.add(0, None);
        Some(CpuBuffer { values, len, part, memory: Arc::clone(memory) })
    }

    /// A copy of all parts, whose bytes are counted.
    fn joined(&self) -> Vec<T> {
        let mut values = Vec::with_capacity(self.len);
        self.parts().for_each(|part| values.extend_from_slice(part));
        self.memory.add(values.len() * size_of::<T>(), Some(self.part));
        values
    }
}

/// Whether weights of this storage type are read where they lie. Files are little-endian, and the f32 products read a weight as one
/// slice, which several parts are not.
fn can_borrow<C: Storage>(storage: StorageType, parts: usize) -> bool {
    cfg!(target_endian = "little") && storage == C::TYPE && (C::TYPE == StorageType::Bf16 || parts == 1)
}

/// The values of a mapped part, which [`CpuBuffer::mapped`] has checked to be whole and aligned.
fn in_place<T: Element>(part: &MappedValues) -> &[T] {
    bytemuck::cast_slice(&part.file[part.bytes.clone()])
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
        Ok(CpuBuffer { values: Values::Owned(values), len, part, memory: Arc::clone(memory) })
    }
}

impl<T> Drop for CpuBuffer<T> {
    fn drop(&mut self) {
        let held = match &self.values {
            Values::Owned(_) => self.len,
            Values::Mapped { joined, .. } => joined.get().map_or(0, Vec::len),
        };
        self.memory.subtract(held.saturating_mul(size_of::<T>()), self.part);
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

    fn memory_counter(&self) -> &MemoryCounter {
        &self.memory
    }

    fn planned(&self, limit: Option<usize>) -> Result<Self> {
        let planned = CpuDevice { has_bf16: self.has_bf16, ..CpuDevice::open_planned(Some(self.threads))? };
        planned.memory.set_limit(limit);
        Ok(planned)
    }

    fn free_memory(&self) -> Result<Option<usize>> {
        Ok(self.memory.left())
    }

    fn alloc<T: Element>(&self, len: usize) -> Result<CpuBuffer<T>> {
        CpuBuffer::new(len, &self.memory, self.only_counts)
    }

    fn borrow_mapped(&self, parts: &[MappedValues]) -> Option<CpuBuffer<C>> {
        let can = |part: &MappedValues| can_borrow::<C>(part.storage, parts.len());
        if parts.iter().all(can) { CpuBuffer::mapped(parts, &self.memory) } else { None }
    }

    fn borrow_planned(&self, storage: StorageType, parts: usize, len: usize) -> Option<CpuBuffer<C>> {
        can_borrow::<C>(storage, parts).then(|| {
            let values = Values::Mapped { parts: Vec::new(), joined: OnceLock::new() };
            let part = self.memory.add(0, None);
            CpuBuffer { values, len, part, memory: Arc::clone(&self.memory) }
        })
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
        out: &mut CpuBuffer<C>,
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
        if !self.only_counts {
            widen(out, &source[offset..][..out.len()]);
        }
        Ok(())
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
