//! Events of the CUDA device's queues.

use std::sync::Arc;

use super::CudaDevice;
use super::backend::EventHandle;
use super::memory::DeviceMemory;
use crate::device::{Queue, Queues};
use crate::error::Result;

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

impl Queues for CudaDevice {
    type Event = CudaQueueEvent;

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
}
