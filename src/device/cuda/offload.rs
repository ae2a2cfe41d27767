//! Pinned host memory, its copies on queues of their own, and the events that order them.

use std::fmt::{self, Debug};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::backend::{Address, Lane};
use super::memory::DeviceMemory;
use super::{CudaBuffer, CudaDevice};
use crate::device::{Checked, Element, MemoryPart, MemoryUse, Offload};
use crate::error::Result;

impl DeviceMemory {
    /// Waits for all copies beside the computation.
    fn finish_copies(&self) -> Result<()> {
        self.waits.fetch_add(1, Ordering::Relaxed);
        self.backend.finish_copies()
    }
}

/// Bytes of pinned host memory.
pub struct CudaHostBuffer {
    memory: Arc<DeviceMemory>,
    address: Address,
    bytes: usize,
}

impl Debug for CudaHostBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CudaHostBuffer[{}]", self.bytes)
    }
}

impl Drop for CudaHostBuffer {
    fn drop(&mut self) {
        self.memory.host.subtract(self.bytes, MemoryPart::OptimizerStates);
        // SAFETY: the address is this buffer's own, and no one can name it any more.
        unsafe { self.memory.backend.free_host(self.address, self.bytes) };
    }
}

impl Offload for CudaDevice {
    type HostBuffer = CudaHostBuffer;

    fn check_offload(&self) -> Result<()> {
        Ok(())
    }

    fn host_memory(&self) -> MemoryUse {
        self.memory.host.read()
    }

    fn alloc_host(&self, bytes: usize) -> Result<CudaHostBuffer> {
        let address = self.backend().allocate_host(bytes.max(1))?;
        self.memory.host.add(bytes, Some(MemoryPart::OptimizerStates));
        Ok(CudaHostBuffer { memory: Arc::clone(&self.memory), address, bytes })
    }

    fn host_len(&self, buffer: &CudaHostBuffer) -> usize {
        buffer.bytes
    }

    fn run_write_host(
        &self,
        out: &mut CudaHostBuffer,
        offset: usize,
        source: &[u8],
        _: Checked,
    ) -> Result<()> {
        out.memory.finish_copies()?;
        if out.memory.backend.only_counts() {
            return Ok(());
        }
        // SAFETY: the range was checked to lie inside the buffer, which `out` borrows alone, and no copy is under way.
        unsafe {
            std::ptr::copy_nonoverlapping(source.as_ptr(), out.address.offset(offset).cast(), source.len());
        }
        Ok(())
    }

    fn run_read_host(
        &self,
        out: &mut [u8],
        source: &CudaHostBuffer,
        offset: usize,
        _: Checked,
    ) -> Result<()> {
        source.memory.finish_copies()?;
        if source.memory.backend.only_counts() {
            return Ok(());
        }
        let from = source.address.offset(offset).cast_const().cast();
        // SAFETY: the range was checked to lie inside the buffer, no copy is under way, and none begins while `source` is
        // borrowed, but for those that only read it.
        unsafe { std::ptr::copy_nonoverlapping(from, out.as_mut_ptr(), out.len()) };
        Ok(())
    }

    fn run_fetch<T: Element>(
        &self,
        out: &mut CudaBuffer<T>,
        source: &CudaHostBuffer,
        offset: usize,
        len: usize,
        _: Checked,
    ) -> Result<()> {
        let (out, from) = (out.start_mut().cast(), source.address.offset(offset));
        // SAFETY: both ranges were checked to lie inside their buffers; buffers wait for the copies before they are freed.
        unsafe { self.backend().copy_beside(Lane::ToDevice, out, from, len * size_of::<T>()) }
    }

    fn run_store<T: Element>(
        &self,
        out: &mut CudaHostBuffer,
        offset: usize,
        source: &CudaBuffer<T>,
        len: usize,
        _: Checked,
    ) -> Result<()> {
        let (out, from) = (out.address.offset(offset), source.start().cast());
        // SAFETY: as in `run_fetch`.
        unsafe { self.backend().copy_beside(Lane::ToHost, out, from, len * size_of::<T>()) }
    }
}

#[cfg(all(test, mmpo_emulated))]
mod tests {
    use super::*;
    use crate::device::Queue;
    use crate::device::cuda::{CudaQueueEvent, EmulatorVariant};
    use crate::device::prelude::*;

    /// One of the waits of [`visit`].
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Wait {
        SlotIsFree,
        Fetched,
        Updated,
        Stored,
    }

    const LEN: usize = 600;

    /// Numbers from host memory visit a slot of the device twice, are added to there, and go back; without the wait `missing`.
    fn visit(variant: EmulatorVariant, missing: Option<Wait>) -> Vec<f32> {
        let device = CudaDevice::emulated(variant);
        let bytes = LEN * size_of::<f32>();
        let mut host = device.alloc_host(2 * bytes).unwrap();
        let start: Vec<f32> = (0..2 * LEN).map(|index| index as f32).collect();
        device.write_host(&mut host, 0, bytemuck::cast_slice(&start)).unwrap();
        let mut slot = device.alloc::<f32>(LEN).unwrap();
        let mut used = device.alloc::<f32>(2 * LEN).unwrap();
        let mut ones = device.alloc::<f32>(LEN).unwrap();
        device.upload(&mut ones, 0, &[1.0; LEN]).unwrap();
        let wait = |which: Wait, queue, event: &CudaQueueEvent| {
            if missing != Some(which) {
                device.wait(queue, event).unwrap();
            }
        };
        let [mut free, mut fetched, mut updated, mut stored] = [(); 4].map(|()| device.new_event().unwrap());
        device.record(&mut free, Queue::Compute).unwrap();
        wait(Wait::SlotIsFree, Queue::ToDevice, &free);
        device.fetch(&mut slot, &host, 0, LEN).unwrap();
        device.record(&mut fetched, Queue::ToDevice).unwrap();
        for half in 0..2 {
            wait(Wait::Fetched, Queue::Compute, &fetched);
            device.copy(&mut used, half * LEN, &slot, 0, LEN).unwrap();
            device.copy(&mut slot, 0, &ones, 0, LEN).unwrap();
            device.record(&mut updated, Queue::Compute).unwrap();
            wait(Wait::Updated, Queue::ToHost, &updated);
            device.store(&mut host, half * bytes, &slot, LEN).unwrap();
            device.record(&mut stored, Queue::ToHost).unwrap();
            wait(Wait::Stored, Queue::ToDevice, &stored);
            device.fetch(&mut slot, &host, (1 - half) * bytes, LEN).unwrap();
            device.record(&mut fetched, Queue::ToDevice).unwrap();
        }
        let mut values = vec![0.0; 2 * LEN];
        device.download(&mut values, &used, 0).unwrap();
        let mut back = vec![0.0_f32; 2 * LEN];
        device.read_host(bytemuck::cast_slice_mut(&mut back), &host, 0).unwrap();
        values.extend(back);
        values
    }

    /// With all waits the numbers are right; each wait that is missing shows as wrong ones.
    #[test]
    fn a_missing_wait_shows_as_wrong_numbers() {
        for variant in [EmulatorVariant::Plain, EmulatorVariant::Checked] {
            let wanted: Vec<f32> = (0..2 * LEN).map(|index| index as f32).chain(vec![1.0; 2 * LEN]).collect();
            assert_eq!(visit(variant, None), wanted, "{variant:?}");
            for wait in [Wait::SlotIsFree, Wait::Fetched, Wait::Updated, Wait::Stored] {
                assert_ne!(visit(variant, Some(wait)), wanted, "{variant:?}: without {wait:?}");
            }
        }
    }

    #[test]
    fn ranges_outside_a_buffer_are_refused() {
        let device = CudaDevice::emulated(EmulatorVariant::Plain);
        let (mut host, mut slot) = (device.alloc_host(64).unwrap(), device.alloc::<f32>(8).unwrap());
        assert!(device.write_host(&mut host, 60, &[0; 5]).is_err());
        assert!(device.read_host(&mut [0; 65], &host, 0).is_err());
        assert!(device.fetch(&mut slot, &host, 36, 8).is_err());
        assert!(device.fetch(&mut slot, &host, 0, 9).is_err());
        assert!(device.store(&mut host, 36, &slot, 8).is_err());
        assert!(device.store(&mut host, usize::MAX, &slot, 8).is_err());
        assert_eq!(device.host_memory().now, 64);
    }
}
