//! The processes of a run on several GPUs, one for each, which are called ranks.
//!
//! [`Ranks`] says which of them this process is, as its launcher's environment has it. [`Team`] is what the ranks tell each
//! other on the control line: who is there, who died, where the run begins. [`RankGroup`] are the collectives of their
//! devices, which carry all tensors.

mod address;
mod control;
mod device;
mod environment;
mod group;
#[cfg(unix)]
pub mod launcher;
mod messages;
pub mod progress;
mod team;
mod verdict;

pub use address::Address;
pub use device::device_of;
pub use environment::{LauncherKind, variable};
pub use group::RankGroup;
pub use messages::Fingerprints;
pub use team::{Requests, Team};
pub use verdict::Verdict;

use crate::device::GroupPlace;
use crate::error::Result;

/// This process among the ranks of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ranks {
    /// Which one it is, and how many there are.
    pub place: GroupPlace,
    /// Which one it is on its machine: the ordinal of its GPU.
    pub local_rank: usize,
    /// How many there are on its machine.
    pub local_ranks: usize,
    /// Who started them; `None` for a run of one process.
    pub launcher: Option<LauncherKind>,
    /// Where rank 0 listens.
    pub address: Address,
    /// What all ranks of one start of one job have in common, and no others: a rank of another job that comes to the same
    /// port is turned away.
    pub job: String,
}

impl Ranks {
    /// A run of one process.
    pub fn alone() -> Self {
        Ranks {
            place: GroupPlace { rank: 0, ranks: 1 },
            local_rank: 0,
            local_ranks: 1,
            launcher: None,
            address: Address { host: Address::LOOPBACK.to_string(), port: 0 },
            job: String::new(),
        }
    }

    /// Which rank this process is, from its environment.
    ///
    /// # Errors
    /// [`crate::Error::Config`] where the environment is half set or contradicts itself.
    pub fn of_this_process() -> Result<Self> {
        environment::read(&|name| std::env::var(name).ok())
    }

    /// Whether this process writes the run's files and messages: rank 0 does.
    pub fn is_first(&self) -> bool {
        self.place.rank == 0
    }

    /// Whether the run has one process.
    pub fn is_alone(&self) -> bool {
        self.place.ranks == 1
    }

    /// Whether all ranks are on this machine.
    pub fn is_one_machine(&self) -> bool {
        self.local_ranks == self.place.ranks
    }

    /// CPU threads of this rank where `asked` says none: the machine's cores are divided among its ranks, unless the batch
    /// system gave each of them cores of its own.
    pub fn threads(&self, asked: Option<usize>) -> Option<usize> {
        if self.is_alone() || asked.is_some() {
            return asked;
        }
        let has_own_cores = std::env::var_os("SLURM_CPUS_PER_TASK").is_some();
        if self.launcher == Some(LauncherKind::Slurm) && has_own_cores {
            return None;
        }
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Some((cores / self.local_ranks.max(1)).max(1))
    }
}

/// This machine's name; `this machine` where the system does not tell.
pub fn host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim() {
        "" => "this machine".to_string(),
        name => name.to_string(),
    }
}
