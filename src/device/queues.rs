//! The queues in which a device's work is done, and the events that order them.

use std::fmt::Debug;

use super::Memory;
use crate::error::Result;

/// One of the queues in which a device's work is done. Each keeps its own order; events order them among each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    /// All operations of the other traits.
    Compute,
    /// Copies of [`Offload::fetch`](super::Offload::fetch).
    ToDevice,
    /// Copies of [`Offload::store`](super::Offload::store).
    ToHost,
    /// Everything of [`Collectives`](super::Collectives).
    Collectives,
}

/// Events of a device's queues. On the CPU every operation is over when its call returns, so that there is nothing to wait for.
///
/// # Errors
/// All methods return [`crate::Error::Device`] where the device fails.
pub trait Queues: Memory {
    /// A moment in the work of a queue.
    type Event: Send + Sync + Debug;

    /// An event that was not recorded yet: a wait for it is over at once.
    fn new_event(&self) -> Result<Self::Event>;

    /// Makes `event` the moment at which everything that `queue` holds now is done.
    fn record(&self, event: &mut Self::Event, queue: Queue) -> Result<()>;

    /// Makes everything that `queue` is given from now on wait for `event` as it was recorded last; the host goes on.
    fn wait(&self, queue: Queue, event: &Self::Event) -> Result<()>;
}
