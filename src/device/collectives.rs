//! Sums and exchanges over the ranks of a run, by NCCL.
//!
//! A run has one process, a *rank*, for each GPU. Ranks that joined a group call the same collectives with the same sizes in the
//! same order. Every collective is queued on [`Queue::Collectives`](super::Queue::Collectives), and events ([`Queues`]) order that queue with the
//! computation: what a collective reads must be recorded on the compute queue and waited for, and the other way around before
//! the computation uses a result. The emulated device lets a collective finish as late as it may, so that a missing wait shows in
//! the numbers.
//!
//! All forms work in place, so that no rank needs a second buffer. A range that is *cut among the ranks* has a length that is a
//! multiple of their number; piece `r` belongs to rank `r`.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use super::check::check_sizes;
use super::{Checked, Element, Queues, StorageType};
use crate::error::{Error, Result};

/// The name of a group, which one rank makes and sends to all others: NCCL's unique id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupId(pub [u8; 128]);

impl GroupId {
    /// What a device names its groups that is only planned for: none of them is joined.
    pub(super) const PLANNED: GroupId = GroupId([0; 128]);
}

/// Where a rank stands in its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupPlace {
    /// From 0.
    pub rank: usize,
    /// How many ranks there are.
    pub ranks: usize,
}

/// What a collective does with a range of values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Collective {
    /// [`Collectives::all_reduce`]
    AllReduce,
    /// [`Collectives::reduce_scatter`]
    ReduceScatter,
    /// [`Collectives::all_gather`]
    AllGather,
    /// [`Collectives::reduce`], to this rank.
    Reduce(usize),
    /// [`Collectives::broadcast`], from this rank.
    Broadcast(usize),
}

/// A number that a sum over ranks may have; the sum of two bf16 values is rounded to bf16.
pub trait Summand: Element {
    /// Its type.
    const TYPE: StorageType;
}

impl Summand for f32 {
    const TYPE: StorageType = StorageType::F32;
}

impl Summand for half::bf16 {
    const TYPE: StorageType = StorageType::Bf16;
}

/// Bytes of a GPU's memory that NCCL takes for a group: assumed, because NCCL does not tell. It has buffers of 4 MiB for each channel and
/// each neighbour, of which a GPU with NVLink has some dozens, and as much again for multicast between NVLink switches. The stand-in of the
/// tests takes none.
pub const NCCL_MEMORY: usize = 1 << 30;

/// Ends a group from any thread: whoever waits for one of its collectives gets an error, in the call that waits or, where a GPU's
/// stream is waited for, in the next [`Memory::download`](super::Memory::download) or [`Collectives::check_group`]. It does nothing once the
/// group is gone.
pub type Abort = Arc<dyn Fn() + Send + Sync>;

/// NCCL's collectives, on the library that is loaded at run time.
///
/// The first failure is the end of a group on its rank: NCCL's communicator is aborted, and everything after that fails with the same message.
/// One thread uses a communicator; any thread may call its [`Abort`]. A rank that gives up for a reason of its own must abort too,
/// before it drops its buffers: they wait for the collectives that use them, and so for the other ranks.
///
/// # Errors
/// All methods return [`crate::Error::Bug`] for a range outside its buffer or that cannot be cut among the ranks, and
/// [`crate::Error::Device`] where the library, another rank or the device fails.
pub trait Collectives: Queues {
    /// A rank's end of a group.
    type Communicator: Send + Sync + Debug;

    /// Names a new group, for all ranks to join.
    fn new_group(&self) -> Result<GroupId>;

    /// Joins the group `id`; returns when all ranks have.
    fn join_group(&self, id: &GroupId, place: GroupPlace) -> Result<Self::Communicator>;

    /// Where this rank stands.
    fn place(&self, group: &Self::Communicator) -> GroupPlace;

    /// What ends the group when it is called.
    fn abort(&self, group: &Self::Communicator) -> Abort;

    /// Fails where a collective of the group failed in the background since it was queued.
    fn check_group(&self, group: &Self::Communicator) -> Result<()>;

    /// Assigns `values[range]`, on every rank, the sum over all ranks.
    fn all_reduce<T: Summand>(
        &self,
        group: &Self::Communicator,
        values: &mut Self::Buffer<T>,
        range: Range<usize>,
    ) -> Result<()> {
        let checked = check_range(self, "all_reduce", self.len(values), &range)?;
        self.run_collective(group, Collective::AllReduce, values, range, Some(T::TYPE), checked)
    }

    /// Assigns to this rank's piece of `values[range]` the sum over all ranks; the other pieces are undefined after that.
    fn reduce_scatter<T: Summand>(
        &self,
        group: &Self::Communicator,
        values: &mut Self::Buffer<T>,
        range: Range<usize>,
    ) -> Result<()> {
        let checked = check_pieces(self, group, "reduce_scatter", self.len(values), &range)?;
        self.run_collective(group, Collective::ReduceScatter, values, range, Some(T::TYPE), checked)
    }

    /// Assigns to each piece of `values[range]` what its rank holds there.
    fn all_gather<T: Element>(
        &self,
        group: &Self::Communicator,
        values: &mut Self::Buffer<T>,
        range: Range<usize>,
    ) -> Result<()> {
        let checked = check_pieces(self, group, "all_gather", self.len(values), &range)?;
        self.run_collective(group, Collective::AllGather, values, range, None, checked)
    }

    /// Assigns `values[range]` on rank `root` the sum over all ranks; the others' are undefined after that.
    fn reduce<T: Summand>(
        &self,
        group: &Self::Communicator,
        values: &mut Self::Buffer<T>,
        range: Range<usize>,
        root: usize,
    ) -> Result<()> {
        check_root(self.place(group), root)?;
        let checked = check_range(self, "reduce", self.len(values), &range)?;
        self.run_collective(group, Collective::Reduce(root), values, range, Some(T::TYPE), checked)
    }

    /// Assigns `values[range]` what rank `root` holds there.
    fn broadcast<T: Element>(
        &self,
        group: &Self::Communicator,
        values: &mut Self::Buffer<T>,
        range: Range<usize>,
        root: usize,
    ) -> Result<()> {
        check_root(self.place(group), root)?;
        let checked = check_range(self, "broadcast", self.len(values), &range)?;
        self.run_collective(group, Collective::Broadcast(root), values, range, None, checked)
    }

    /// Starts the collectives that `work` asks for together, which costs as much as one large one. They are queued when `work` has returned: what
    /// `work` records or waits for comes before all of them. No result of one may enter another, and the buffers must live until
    /// this returns. Where `work` fails, nothing is queued. A group inside another one belongs to it.
    fn grouped(&self, group: &Self::Communicator, work: &mut dyn FnMut() -> Result<()>) -> Result<()>;

    /// The device's part of every collective. `numbers` is the type of what is summed; `None` where bytes are only moved.
    fn run_collective<T: Element>(
        &self,
        group: &Self::Communicator,
        collective: Collective,
        values: &mut Self::Buffer<T>,
        range: Range<usize>,
        numbers: Option<StorageType>,
        checked: Checked,
    ) -> Result<()>;
}

fn check_range<D: Queues>(_: &D, name: &str, len: usize, range: &Range<usize>) -> Result<Checked> {
    check_sizes(name, range, &[("values", len, range.end), ("range", range.end, range.start)])
}

fn check_pieces<D: Collectives>(
    device: &D,
    group: &D::Communicator,
    name: &str,
    len: usize,
    range: &Range<usize>,
) -> Result<Checked> {
    let ranks = device.place(group).ranks;
    if !range.len().is_multiple_of(ranks) {
        return Err(Error::bug(format!("{name}: {} values cannot be cut among {ranks} ranks", range.len())));
    }
    check_range(device, name, len, range)
}

fn check_root(place: GroupPlace, root: usize) -> Result<()> {
    if root < place.ranks {
        return Ok(());
    }
    Err(Error::bug(format!("there is no rank {root} among {}", place.ranks)))
}
