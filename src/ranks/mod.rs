//! The processes of a run on several GPUs, one for each, which are called ranks.
//!
//! [`Ranks`] says which of them this process is. [`RankGroup`] are the collectives of one of its devices.

mod group;

pub use group::RankGroup;

use crate::device::GroupPlace;

/// This process among the ranks of a run.
#[derive(Debug)]
pub struct Ranks {
    /// Which one it is, and how many there are.
    pub place: GroupPlace,
    /// Which one it is on its machine: the ordinal of its GPU.
    pub local_rank: usize,
}

impl Ranks {
    /// A run of one process.
    pub fn alone() -> Self {
        Ranks { place: GroupPlace { rank: 0, ranks: 1 }, local_rank: 0 }
    }

    /// Whether this process writes the run's files and messages: rank 0 does.
    pub fn is_first(&self) -> bool {
        self.place.rank == 0
    }
}
