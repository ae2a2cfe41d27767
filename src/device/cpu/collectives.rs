//! NCCL on this device.

use std::ops::Range;
use std::sync::Arc;

use super::storage::Storage;
use super::{CpuBuffer, CpuDevice};
use crate::device::{Abort, Checked, Collectives, Element, GroupId, GroupPlace, Summand};
use crate::error::{Error, Result};

/// A rank's end of a group.
#[derive(Debug)]
pub struct Communicator {
    place: GroupPlace,
}

fn missing() -> Error {
    Error::bug("collectives are not there yet")
}

impl<C: Storage> Collectives for CpuDevice<C> {
    type Communicator = Communicator;

    fn new_group(&self) -> Result<GroupId> {
        Err(missing())
    }

    fn join_group(&self, _: &GroupId, _: GroupPlace) -> Result<Communicator> {
        Err(missing())
    }

    fn place(&self, group: &Communicator) -> GroupPlace {
        group.place
    }

    fn abort(&self, _: &Communicator) -> Abort {
        Arc::new(|| ())
    }

    fn check_group(&self, _: &Communicator) -> Result<()> {
        Err(missing())
    }

    fn grouped(&self, _: &Communicator, _: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        Err(missing())
    }

    fn run_all_reduce<T: Summand>(
        &self,
        _: &Communicator,
        _: &mut CpuBuffer<T>,
        _: Range<usize>,
        _: Checked,
    ) -> Result<()> {
        Err(missing())
    }

    fn run_reduce_scatter<T: Summand>(
        &self,
        _: &Communicator,
        _: &mut CpuBuffer<T>,
        _: Range<usize>,
        _: Checked,
    ) -> Result<()> {
        Err(missing())
    }

    fn run_all_gather<T: Element>(
        &self,
        _: &Communicator,
        _: &mut CpuBuffer<T>,
        _: Range<usize>,
        _: Checked,
    ) -> Result<()> {
        Err(missing())
    }

    fn run_reduce<T: Summand>(
        &self,
        _: &Communicator,
        _: &mut CpuBuffer<T>,
        _: Range<usize>,
        _: usize,
        _: Checked,
    ) -> Result<()> {
        Err(missing())
    }

    fn run_broadcast<T: Element>(
        &self,
        _: &Communicator,
        _: &mut CpuBuffer<T>,
        _: Range<usize>,
        _: usize,
        _: Checked,
    ) -> Result<()> {
        Err(missing())
    }
}
