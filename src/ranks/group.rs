//! The group of a run's ranks, on the device of this one.

use std::sync::Arc;

use crate::device::{Collectives, GroupPlace};

/// The ranks of a run, as the device of one of them reaches the others.
#[derive(Debug)]
pub struct RankGroup<D: Collectives> {
    /// This rank's device.
    pub device: Arc<D>,
    /// Its end of the group.
    pub communicator: D::Communicator,
}

impl<D: Collectives> RankGroup<D> {
    /// Where this rank stands.
    pub fn place(&self) -> GroupPlace {
        self.device.place(&self.communicator)
    }
}
