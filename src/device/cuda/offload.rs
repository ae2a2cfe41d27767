//! Pinned host memory, its copies on queues of their own, and the events that order them.

use std::fmt::{self, Debug};
use std::sync::Arc;

use super::backend::{Address, EventHandle, Lane};
use super::memory::DeviceMemory;
use super::{CudaBuffer, CudaDevice};
use crate::device::{Checked, Element, MemoryUse, Offload, Queue};
use crate::error::Result;

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
        self.memory.host.remove(self.bytes);
        // SAFETY: the address is this buffer's own, and no one can name it any more.
        unsafe { self.memory.backend.free_host(self.address, self.bytes) };
    }
}

/// A moment in the work of a queue.
#[derive(Debug)]
pub struct CudaQueueEvent {
    memory: Arc<DeviceMemory>,
    handle: EventHandle,
}

impl Drop for CudaQueueEvent {
    fn drop(&mut self) {
        // SAFETY: the handle is this event's own, and no one can name it any more.
        unsafe { self.memory.backend.free_event(self.handle) };
    }
}

impl Offload for CudaDevice {
    type HostBuffer = CudaHostBuffer;
    type Event = CudaQueueEvent;

    fn check_offload(&self) -> Result<()> {
        Ok(())
    }

    fn host_memory(&self) -> MemoryUse {
        self.memory.host.read()
    }

    fn alloc_host(&self, bytes: usize) -> Result<CudaHostBuffer> {
        let address = self.backend().allocate_host(bytes.max(1))?;
        self.memory.host.add(bytes);
        Ok(CudaHostBuffer { memory: Arc::clone(&self.memory), address, bytes })
    }

    fn host_len(&self, buffer: &CudaHostBuffer) -> usize {
        buffer.bytes
    }

    fn new_event(&self) -> Result<CudaQueueEvent> {
        let handle = self.backend().new_event()?;
        Ok(CudaQueueEvent { memory: Arc::clone(&self.memory), handle })
    }

    fn record(&self, event: &mut CudaQueueEvent, queue: Queue) -> Result<()> {
        // SAFETY: the event's own backend made it.
        unsafe { event.memory.backend.record(event.handle, queue) }
    }

    fn wait(&self, queue: Queue, event: &CudaQueueEvent) -> Result<()> {
        // SAFETY: the event's own backend made it.
        unsafe { event.memory.backend.wait(queue, event.handle) }
    }

    fn run_write_host(
        &self,
        out: &mut CudaHostBuffer,
        offset: usize,
        source: &[u8],
        _: Checked,
    ) -> Result<()> {
        out.memory.backend.finish_copies()?;
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
        source.memory.backend.finish_copies()?;
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
