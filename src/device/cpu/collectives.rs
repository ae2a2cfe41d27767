//! NCCL's collectives over the host's memory, each done when its call returns. NVIDIA's NCCL cannot do that: tests of runs of several
//! ranks load a library of their own in its place.

use std::ops::Range;

use super::storage::Storage;
use super::{CpuBuffer, CpuDevice};
use crate::device::nccl::{self, Group};
use crate::device::{Abort, Checked, Collective, Collectives, Element, GroupId, GroupPlace, StorageType};
use crate::error::Result;

/// A rank's end of a group.
#[derive(Debug)]
pub struct Communicator(nccl::Communicator);

impl<C: Storage> Collectives for CpuDevice<C> {
    type Communicator = Communicator;

    fn new_group(&self) -> Result<GroupId> {
        if self.only_counts { Ok(GroupId::PLANNED) } else { Group::name() }
    }

    fn join_group(&self, id: &GroupId, place: GroupPlace) -> Result<Communicator> {
        let group = if self.only_counts { None } else { Some(Group::join(id, place)?) };
        Ok(Communicator(nccl::Communicator::new(place, group)))
    }

    fn place(&self, group: &Communicator) -> GroupPlace {
        group.0.place()
    }

    fn abort(&self, group: &Communicator) -> Abort {
        group.0.abort()
    }

    fn check_group(&self, group: &Communicator) -> Result<()> {
        group.0.check()
    }

    fn grouped(&self, group: &Communicator, work: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        // SAFETY: the ranges were checked when the calls were made, and the trait asks for buffers that outlive this.
        unsafe { group.0.grouped(work, || Ok(std::ptr::null_mut())) }
    }

    fn run_collective<T: Element>(
        &self,
        group: &Communicator,
        collective: Collective,
        values: &mut CpuBuffer<T>,
        range: Range<usize>,
        numbers: Option<StorageType>,
        _: Checked,
    ) -> Result<()> {
        if self.only_counts {
            return Ok(());
        }
        let call = nccl::call(collective, values.as_mut_ptr(), &range, numbers);
        // SAFETY: the range was checked to lie inside the buffer; the null stream is the host's, so the call is over when it
        // returns, and a group of calls when `grouped` does.
        self.traced("collective", || unsafe { group.0.run(call, || Ok(std::ptr::null_mut())) })
    }
}
