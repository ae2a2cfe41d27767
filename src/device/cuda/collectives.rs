//! NCCL's collectives on a stream of their own.

use std::ops::Range;
use std::sync::{Arc, PoisonError};

use super::backend::Address;
use super::memory::DeviceMemory;
use super::{CudaBuffer, CudaDevice};
use crate::device::nccl::{self, Group};
use crate::device::{
    Abort, Checked, Collective, Collectives, Element, GroupId, GroupPlace, MemoryPart, NCCL_MEMORY,
    StorageType,
};
use crate::error::Result;

/// A rank's end of a group.
#[derive(Debug)]
pub struct Communicator {
    nccl: nccl::Communicator,
    memory: Arc<DeviceMemory>,
    _reserved: Option<Reserved>,
}

/// What NCCL takes of a GPU's memory, counted; on a device that is planned for also taken.
#[derive(Debug)]
struct Reserved {
    memory: Arc<DeviceMemory>,
    part: MemoryPart,
    planned: Option<Address>,
}

impl Reserved {
    fn new(memory: &Arc<DeviceMemory>) -> Result<Self> {
        let planned = match memory.backend.only_counts() {
            true => Some(memory.backend.allocate(NCCL_MEMORY)?),
            false => None,
        };
        let part = memory.counter.add(NCCL_MEMORY, Some(MemoryPart::Other));
        Ok(Reserved { memory: Arc::clone(memory), part, planned })
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.memory.counter.subtract(NCCL_MEMORY, self.part);
        if let Some(address) = self.planned {
            // SAFETY: the address was allocated for this value alone, and no one can name it any more.
            unsafe { self.memory.backend.free(address) };
        }
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        // The emulated device does what it holds back; a failed group has nothing to wait for.
        if self.nccl.check().is_ok() {
            self.memory.backend.flush_collectives().unwrap_or_else(|error| tracing::debug!("{error}"));
        }
    }
}

impl Collectives for CudaDevice {
    type Communicator = Communicator;

    fn new_group(&self) -> Result<GroupId> {
        if self.backend().only_counts() { Ok(GroupId::PLANNED) } else { Group::name() }
    }

    fn join_group(&self, id: &GroupId, place: GroupPlace) -> Result<Communicator> {
        let memory = Arc::clone(&self.memory);
        let _reserved = if self.backend().takes_pieces() { Some(Reserved::new(&memory)?) } else { None };
        if self.backend().only_counts() {
            return Ok(Communicator { nccl: nccl::Communicator::new(place, None), memory, _reserved });
        }
        // Makes the GPU current on this thread, and its stream.
        self.backend().collectives_stream()?;
        let group = Group::join(id, place)?;
        memory.groups.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(&group));
        Ok(Communicator { nccl: nccl::Communicator::new(place, Some(group)), memory, _reserved })
    }

    fn place(&self, group: &Communicator) -> GroupPlace {
        group.nccl.place()
    }

    fn abort(&self, group: &Communicator) -> Abort {
        group.nccl.abort()
    }

    fn check_group(&self, group: &Communicator) -> Result<()> {
        group.nccl.check()
    }

    fn grouped(&self, group: &Communicator, work: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        // SAFETY: the ranges were checked when the calls were made, and the trait asks for buffers that outlive this.
        unsafe { group.nccl.grouped(work, || self.backend().collectives_stream()) }
    }

    fn run_collective<T: Element>(
        &self,
        group: &Communicator,
        collective: Collective,
        values: &mut CudaBuffer<T>,
        range: Range<usize>,
        numbers: Option<StorageType>,
        _: Checked,
    ) -> Result<()> {
        let call = nccl::call(collective, values.start_mut(), &range, numbers);
        // SAFETY: the range was checked to lie inside the buffer, whose memory is only freed after the work of all streams.
        unsafe { group.nccl.run(call, || self.backend().collectives_stream()) }
    }
}
