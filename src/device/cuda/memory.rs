//! Buffers in device memory, the count of their bytes, scratch memory, and copies between host and device.

use std::fmt::{self, Debug};
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use half::bf16;

use super::backend::{Address, Backend};
use super::backend_planned::PlannedBackend;
use super::bindings::{MMPO_STORAGE_BF16, MMPO_STORAGE_F16, MMPO_STORAGE_F32, mmpo_floats};
use super::{CudaDevice, launch_sizes};
use crate::device::nccl::Group;
use crate::device::{Checked, Element, Memory, MemoryCounter, MemoryPart, RawValues, StorageType};
use crate::error::{Error, Result};

/// Bytes that pass through scratch memory at once when numbers are converted on their way to the device.
const CONVERSION_CHUNK: usize = 16 << 20;

/// A backend, and the bytes that are allocated on it.
#[derive(Debug)]
pub(super) struct DeviceMemory {
    pub(super) backend: Box<dyn Backend>,
    pub(super) counter: MemoryCounter,
    /// Counts pinned host memory.
    pub(super) host: MemoryCounter,
    /// How often the host waited for the device.
    pub(super) waits: AtomicUsize,
    /// The groups whose collectives may be on the device's streams.
    pub(super) groups: Mutex<Vec<Weak<Group>>>,
}

impl DeviceMemory {
    pub(super) fn new(backend: Box<dyn Backend>) -> Arc<Self> {
        let (counter, host) = (MemoryCounter::default(), MemoryCounter::default());
        let waits = AtomicUsize::new(0);
        Arc::new(DeviceMemory { backend, counter, host, waits, groups: Mutex::default() })
    }

    /// Fails where a group did. The streams of a group that was aborted go on with numbers that mean nothing, so whoever brings numbers
    /// to the host asks.
    fn check_groups(&self) -> Result<()> {
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        groups.retain(|group| group.strong_count() > 0);
        groups.iter().filter_map(Weak::upgrade).try_for_each(|group| group.check())
    }
}

/// Bytes of device memory, given back when dropped.
struct Allocation {
    memory: Arc<DeviceMemory>,
    address: Address,
    bytes: usize,
    part: MemoryPart,
}

impl Allocation {
    /// `part` is what the bytes are for, where that does not depend on who asks.
    fn new(memory: &Arc<DeviceMemory>, bytes: usize, part: Option<MemoryPart>) -> Result<Self> {
        // At least one byte, so that an empty buffer has an address too.
        let address = memory.backend.allocate(bytes.max(1))?;
        let part = memory.counter.add(bytes, part);
        Ok(Allocation { memory: Arc::clone(memory), address, bytes, part })
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        self.memory.counter.subtract(self.bytes, self.part);
        // SAFETY: the address is this allocation's own, and no one can name it any more.
        unsafe { self.memory.backend.free(self.address) };
    }
}

/// A buffer of the CUDA device: `len` values of `T` on a 256-byte boundary.
pub struct CudaBuffer<T> {
    allocation: Allocation,
    len: usize,
    values: PhantomData<T>,
}

impl<T> Debug for CudaBuffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CudaBuffer<{}>[{}]", std::any::type_name::<T>(), self.len)
    }
}

impl<T> CudaBuffer<T> {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Address of value `index`.
    pub(super) fn at(&self, index: usize) -> *const T {
        self.allocation.address.offset(index * size_of::<T>()).cast_const().cast()
    }

    /// The address of value `index`, to be written to.
    pub(super) fn at_mut(&mut self, index: usize) -> *mut T {
        self.allocation.address.offset(index * size_of::<T>()).cast()
    }

    pub(super) fn start(&self) -> *const T {
        self.at(0)
    }

    pub(super) fn start_mut(&mut self) -> *mut T {
        self.at_mut(0)
    }
}

impl CudaBuffer<f32> {
    /// The buffer as an entry of the list of tensors that a launcher takes.
    pub(super) fn as_tensor(&self) -> mmpo_floats {
        mmpo_floats { values: self.start().cast_mut(), length: self.len as i64 }
    }
}

/// Scratch memory of the launches, shared by all of them because one stream runs them one after another. It only grows. A
/// training run reserves what its launches take before the first step, so that no step allocates any.
#[derive(Default)]
pub(super) struct Workspace {
    allocation: Mutex<Option<Allocation>>,
}

impl Workspace {
    /// Makes sure that no launch that takes up to `bytes` bytes allocates.
    pub(super) fn reserve(&self, memory: &Arc<DeviceMemory>, bytes: usize) -> Result<()> {
        if bytes == 0 { Ok(()) } else { self.with(memory, bytes, |_| Ok(())) }
    }

    /// Runs `use_it` with at least `bytes` bytes of scratch memory.
    pub(super) fn with<R>(
        &self,
        memory: &Arc<DeviceMemory>,
        bytes: usize,
        use_it: impl FnOnce(*mut std::ffi::c_void) -> Result<R>,
    ) -> Result<R> {
        // The lock is held while the launch is queued, so that another thread cannot free what it uses.
        let mut held = self.allocation.lock().unwrap_or_else(PoisonError::into_inner);
        let allocation = match held.take() {
            Some(allocation) if allocation.bytes >= bytes => allocation,
            // The old one goes first: both at once may not fit.
            smaller => {
                drop(smaller);
                Allocation::new(memory, bytes, Some(MemoryPart::Scratch))?
            }
        };
        use_it(held.insert(allocation).address.pointer())
    }
}

impl Memory for CudaDevice {
    type Compute = bf16;
    type Buffer<T: Element> = CudaBuffer<T>;

    fn memory_counter(&self) -> &MemoryCounter {
        &self.memory.counter
    }

    fn planned(&self, limit: Option<usize>) -> Result<Self> {
        let backend =
            PlannedBackend::new(self.backend().takes_pieces(), self.backend().has_gemm_library(), limit);
        let planned = Self::new(Box::new(backend), self.path);
        planned.memory.counter.set_limit(limit);
        Ok(CudaDevice { gemm_choice: self.gemm_choice, attention_order: self.attention_order, ..planned })
    }

    fn taken_at_peak(&self) -> usize {
        self.backend().taken_at_peak().unwrap_or_else(|| self.memory().peak)
    }

    fn free_memory(&self) -> Result<Option<usize>> {
        let both = [self.backend().free_memory()?, self.memory.counter.left()];
        Ok(both.into_iter().flatten().min())
    }

    fn alloc<T: Element>(&self, len: usize) -> Result<CudaBuffer<T>> {
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(|| {
            Error::device(
                format!("no memory for a buffer of {len} values"),
                "use a smaller model or token budget",
            )
        })?;
        let allocation = Allocation::new(&self.memory, bytes, None)?;
        let mut buffer = CudaBuffer { allocation, len, values: PhantomData };
        self.zero(&mut buffer, 0..len)?;
        Ok(buffer)
    }

    fn len<T: Element>(&self, buffer: &CudaBuffer<T>) -> usize {
        buffer.len()
    }

    fn zero_all(&self, outs: &mut [&mut CudaBuffer<f32>]) -> Result<()> {
        let tensors: Vec<_> = outs.iter().map(|out| out.as_tensor()).collect();
        let [count] = launch_sizes("zero_all", [tensors.len()])?;
        // SAFETY: each tensor is a whole buffer, which `outs` borrows to be written.
        self.launch("zero_all", &count, |kernels, stream| unsafe {
            (kernels.zero_all)(tensors.as_ptr(), count, stream)
        })
    }

    fn run_upload<T: Element>(
        &self,
        out: &mut CudaBuffer<T>,
        offset: usize,
        source: &[T],
        _: Checked,
    ) -> Result<()> {
        // SAFETY: the range was checked to lie inside the buffer.
        self.traced("upload", || unsafe {
            self.backend().copy_in(out.at_mut(offset).cast(), bytemuck::cast_slice(source))
        })
    }

    fn run_download<T: Element>(
        &self,
        out: &mut [T],
        source: &CudaBuffer<T>,
        offset: usize,
        _: Checked,
    ) -> Result<()> {
        self.memory.waits.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the range was checked to lie inside the buffer.
        unsafe { self.backend().copy_out(bytemuck::cast_slice_mut(out), source.at(offset).cast())? };
        self.memory.check_groups()
    }

    /// bf16 goes straight from the file's map to the device; other types are converted there, a chunk at a time.
    fn run_upload_values(
        &self,
        out: &mut CudaBuffer<bf16>,
        offset: usize,
        source: RawValues<'_>,
        _: Checked,
    ) -> Result<()> {
        let storage = match source.storage {
            StorageType::Bf16 => MMPO_STORAGE_BF16,
            StorageType::F16 => MMPO_STORAGE_F16,
            StorageType::F32 => MMPO_STORAGE_F32,
        };
        if storage == MMPO_STORAGE_BF16 {
            // SAFETY: the range was checked to lie inside the buffer.
            return unsafe { self.backend().copy_in(out.at_mut(offset).cast(), source.bytes) };
        }
        let mut first = offset;
        for chunk in source.bytes.chunks(CONVERSION_CHUNK) {
            let len = chunk.len() / source.storage.size();
            self.workspace.with(&self.memory, CONVERSION_CHUNK, |scratch| {
                // SAFETY: the scratch memory holds a chunk, and is next written by work queued after the conversion.
                unsafe { self.backend().copy_in(scratch, chunk)? };
                let out = out.at_mut(first);
                // SAFETY: `len` values of `scratch` were just written, and the range of `out` was checked.
                self.launch("cast_to_bf16", &source.storage, |kernels, stream| unsafe {
                    (kernels.cast_to_bf16)(out, scratch, storage as i32, len as i64, stream)
                })
            })?;
            first += len;
        }
        Ok(())
    }

    fn run_download_compute(
        &self,
        out: &mut [f32],
        source: &CudaBuffer<bf16>,
        offset: usize,
        checked: Checked,
    ) -> Result<()> {
        if self.backend().only_counts() {
            return Ok(());
        }
        let mut values = vec![bf16::ZERO; out.len().min(CONVERSION_CHUNK)];
        let mut first = offset;
        for out in out.chunks_mut(CONVERSION_CHUNK) {
            let values = &mut values[..out.len()];
            self.run_download(values, source, first, checked)?;
            for (out, value) in out.iter_mut().zip(values) {
                *out = value.to_f32();
            }
            first += out.len();
        }
        Ok(())
    }

    fn run_zero<T: Element>(&self, out: &mut CudaBuffer<T>, range: Range<usize>, _: Checked) -> Result<()> {
        let bytes = range.len() * size_of::<T>();
        // SAFETY: the range was checked to lie inside the buffer, and zero bytes are a value of every element type.
        self.launch("zero", &range, |kernels, stream| unsafe {
            (kernels.zero)(out.at_mut(range.start).cast(), bytes as i64, stream)
        })
    }

    fn run_copy<T: Element>(
        &self,
        out: &mut CudaBuffer<T>,
        out_offset: usize,
        source: &CudaBuffer<T>,
        range: Range<usize>,
        _: Checked,
    ) -> Result<()> {
        let out = out.at_mut(out_offset).cast();
        // SAFETY: both ranges were checked to lie inside their buffers, which are different ones.
        self.traced("copy", || unsafe {
            self.backend().copy(out, source.at(range.start).cast(), range.len() * size_of::<T>())
        })
    }
}
