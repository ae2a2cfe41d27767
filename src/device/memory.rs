//! Buffers of a device, and copies into, out of and between them.

use std::fmt::Debug;
use std::ops::Range;

use super::check::check_sizes;
use super::{Checked, Hardware, MappedValues, MemoryCounter, MemoryPart, Sum};
use crate::error::Result;

/// A number that a buffer may hold.
pub trait Element: bytemuck::Pod + Default + Send + Sync + Debug {}
impl Element for f32 {}
impl Element for u32 {}
impl Element for half::bf16 {}
impl Element for u16 {}
impl Element for u8 {}

/// Buffer of weights or activations.
pub type ComputeBuffer<D> = <D as Memory>::Buffer<<D as Memory>::Compute>;
/// Buffer of statistics, weight gradients or optimiser states.
pub type Floats<D> = <D as Memory>::Buffer<f32>;
/// Buffer of token ids, positions or row numbers.
pub type Indices<D> = <D as Memory>::Buffer<u32>;

/// Storage type of numbers in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StorageType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an f32.
    Bf16,
}

impl StorageType {
    /// Bytes of one value.
    pub fn size(self) -> usize {
        match self {
            StorageType::F32 => 4,
            StorageType::F16 | StorageType::Bf16 => 2,
        }
    }
}

/// Little-endian numbers as they lie in a file or memory map, of any alignment.
#[derive(Clone, Copy, Debug)]
pub struct RawValues<'a> {
    /// Type of each value.
    pub storage: StorageType,
    /// The values, one after the other.
    pub bytes: &'a [u8],
}

impl<'a> RawValues<'a> {
    /// The values of a slice, without a copy.
    pub fn from_f32(values: &'a [f32]) -> Self {
        RawValues { storage: StorageType::F32, bytes: bytemuck::cast_slice(values) }
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.bytes.len() / self.storage.size()
    }

    /// Whether there is no value.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}

/// Bytes held by a device's buffers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUse {
    /// Bytes held now.
    pub now: usize,
    /// The most bytes that were ever held at once.
    pub peak: usize,
    /// How often memory was taken since the device was opened: a training step takes none.
    pub allocations: usize,
}

/// Buffers. A method checks its ranges and calls the device's `run_` method of the same name.
///
/// # Errors
/// All methods return [`crate::Error::Bug`] for a range outside its buffer, and
/// [`crate::Error::Device`] where the device fails.
pub trait Memory: Hardware {
    /// Storage of weights and activations: f32 or bf16 on the CPU, bf16 on CUDA.
    type Compute: Sum;
    /// `len` values in the device's memory.
    type Buffer<T: Element>: Send + Sync + Debug;

    /// The count of the device's bytes.
    fn memory_counter(&self) -> &MemoryCounter;

    /// Bytes in use on the device now, and the most so far.
    fn memory(&self) -> MemoryUse {
        self.memory_counter().read()
    }

    /// Counts the buffers that `work` makes as `part`, unless it is called inside another such call, which counts then.
    fn as_part<R>(&self, part: MemoryPart, work: impl FnOnce() -> R) -> R {
        let before = self.memory_counter().begin(part);
        let result = work();
        self.memory_counter().end(before);
        result
    }

    /// A device that is planned for: like this one, but that its buffers hold nothing and are only counted, that transfers do
    /// nothing, and that nothing may be computed on it. The same calls that make a run's buffers on this device, made there, say how
    /// much memory the run takes. `limit` is the memory that it is planned with, as [`MemoryCounter::set_limit`] has it; more may be
    /// taken, and is counted.
    ///
    /// # Errors
    /// [`crate::Error::Device`] where the system refuses what even that takes.
    fn planned(&self, limit: Option<usize>) -> Result<Self>;

    /// The most bytes that were taken from the machine at once: [`MemoryUse::peak`], and what lies idle between buffers.
    fn taken_at_peak(&self) -> usize {
        self.memory().peak
    }

    /// Bytes that one large buffer may still take; `None` where there is no fixed limit, as in a computer's main
    /// memory, unless [`MemoryCounter::set_limit`] set one.
    fn free_memory(&self) -> Result<Option<usize>>;

    /// A buffer of `len` zeros.
    fn alloc<T: Element>(&self, len: usize) -> Result<Self::Buffer<T>>;

    /// A buffer that reads these values, one part after the other, where they lie in mapped files: nothing is copied until
    /// something writes to it. `None` where the device cannot: the values are of another type than [`Memory::Compute`],
    /// begin between two of its addresses, or would have to go to a memory of the device's own.
    fn borrow_mapped(&self, _: &[MappedValues]) -> Option<ComputeBuffer<Self>> {
        None
    }

    /// On a device that is planned for: what [`Memory::borrow_mapped`] gives for `parts` tensors of a checkpoint of this storage
    /// type, with `len` values together.
    fn borrow_planned(
        &self,
        _storage: StorageType,
        _parts: usize,
        _len: usize,
    ) -> Option<ComputeBuffer<Self>> {
        None
    }

    /// Values that `buffer` holds.
    fn len<T: Element>(&self, buffer: &Self::Buffer<T>) -> usize;

    /// Copies `source` to `out[offset..]`.
    fn upload<T: Element>(&self, out: &mut Self::Buffer<T>, offset: usize, source: &[T]) -> Result<()> {
        let checked = check_range("upload", "out", self.len(out), offset, source.len())?;
        self.run_upload(out, offset, source, checked)
    }

    /// Copies `source[offset..][..out.len()]` to the host, after all work that was queued before.
    fn download<T: Element>(&self, out: &mut [T], source: &Self::Buffer<T>, offset: usize) -> Result<()> {
        let checked = check_range("download", "source", self.len(source), offset, out.len())?;
        self.run_download(out, source, offset, checked)
    }

    /// As [`Memory::upload`], converted to [`Memory::Compute`] by rounding to the nearest even value or by widening.
    /// Reads straight from a memory map.
    fn upload_values(
        &self,
        out: &mut ComputeBuffer<Self>,
        offset: usize,
        source: RawValues<'_>,
    ) -> Result<()> {
        let checked = check_range("upload_values", "out", self.len(out), offset, source.len())?;
        self.run_upload_values(out, offset, source, checked)
    }

    /// As [`Memory::download`], widened to f32.
    fn download_compute(&self, out: &mut [f32], source: &ComputeBuffer<Self>, offset: usize) -> Result<()> {
        let checked = check_range("download_compute", "source", self.len(source), offset, out.len())?;
        self.run_download_compute(out, source, offset, checked)
    }

    /// Assigns zero to `out[range]`.
    fn zero<T: Element>(&self, out: &mut Self::Buffer<T>, range: Range<usize>) -> Result<()> {
        let sizes = [("out", self.len(out), range.end), ("range", range.end, range.start)];
        let checked = check_sizes("zero", &range, &sizes)?;
        self.run_zero(out, range, checked)
    }

    /// Assigns zero to all of `outs`, in a few launches however many they are.
    fn zero_all(&self, outs: &mut [&mut Floats<Self>]) -> Result<()>;

    /// `out[out_offset..][..len] = source[offset..][..len]`.
    fn copy<T: Element>(
        &self,
        out: &mut Self::Buffer<T>,
        out_offset: usize,
        source: &Self::Buffer<T>,
        offset: usize,
        len: usize,
    ) -> Result<()> {
        let sizes = [
            ("out", self.len(out), out_offset.saturating_add(len)),
            ("source", self.len(source), offset.saturating_add(len)),
        ];
        let checked = check_sizes("copy", &len, &sizes)?;
        self.run_copy(out, out_offset, source, offset..offset + len, checked)
    }

    /// The device's part of [`Memory::upload`].
    fn run_upload<T: Element>(
        &self,
        out: &mut Self::Buffer<T>,
        offset: usize,
        source: &[T],
        checked: Checked,
    ) -> Result<()>;

    /// The device's part of [`Memory::download`].
    fn run_download<T: Element>(
        &self,
        out: &mut [T],
        source: &Self::Buffer<T>,
        offset: usize,
        checked: Checked,
    ) -> Result<()>;

    /// The device's part of [`Memory::upload_values`].
    fn run_upload_values(
        &self,
        out: &mut ComputeBuffer<Self>,
        offset: usize,
        source: RawValues<'_>,
        checked: Checked,
    ) -> Result<()>;

    /// The device's part of [`Memory::download_compute`].
    fn run_download_compute(
        &self,
        out: &mut [f32],
        source: &ComputeBuffer<Self>,
        offset: usize,
        checked: Checked,
    ) -> Result<()>;

    /// The device's part of [`Memory::zero`].
    fn run_zero<T: Element>(
        &self,
        out: &mut Self::Buffer<T>,
        range: Range<usize>,
        checked: Checked,
    ) -> Result<()>;

    /// The device's part of [`Memory::copy`]: `source[range]` goes to `out[out_offset..]`.
    fn run_copy<T: Element>(
        &self,
        out: &mut Self::Buffer<T>,
        out_offset: usize,
        source: &Self::Buffer<T>,
        range: Range<usize>,
        checked: Checked,
    ) -> Result<()>;
}

/// Checks that a buffer of `holds` values has `len` of them from `offset` on.
fn check_range(operation: &str, name: &str, holds: usize, offset: usize, len: usize) -> Result<Checked> {
    let end = offset.saturating_add(len);
    check_sizes(operation, &(offset..end), &[(name, holds, end)])
}
