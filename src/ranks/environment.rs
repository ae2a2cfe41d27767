//! Which rank a process is, from the variables that launchers leave in its environment.

use std::fmt;

use super::Ranks;
use super::address::{self, Address};
use crate::device::GroupPlace;
use crate::error::{Error, Result};

/// Names of this program's own variables.
pub mod variable {
    /// Set by `--gpus`: the rank.
    pub const RANK: &str = "MMPO_FAST_RANK";
    /// Set by `--gpus`: how many ranks there are.
    pub const RANKS: &str = "MMPO_FAST_RANKS";
    /// Set by `--gpus`: the process that started the ranks, which end with it.
    pub const LAUNCHER: &str = "MMPO_FAST_LAUNCHER";
    /// The port on which rank 0 listens.
    pub const PORT: &str = "MMPO_FAST_PORT";
    /// Seconds within which all ranks must be there.
    pub const JOIN: &str = "MMPO_FAST_JOIN_SECONDS";
    /// Seconds after which a rank that others wait for counts as hanging.
    pub const HANG: &str = "MMPO_FAST_HANG_SECONDS";
}

/// Who started the ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LauncherKind {
    /// `train --gpus N`.
    Own,
    /// PyTorch's torchrun.
    Torchrun,
    /// Slurm's srun.
    Slurm,
    /// Open MPI's mpirun.
    OpenMpi,
}

impl fmt::Display for LauncherKind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            LauncherKind::Own => "--gpus",
            LauncherKind::Torchrun => "torchrun",
            LauncherKind::Slurm => "srun",
            LauncherKind::OpenMpi => "mpirun",
        })
    }
}

const TORCH: [&str; 5] = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"];
const OPEN_MPI: [&str; 4] = [
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
];
const SLURM: [&str; 4] = ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_NODELIST"];
/// What Slurm calls the step of a batch script, which is one process however many tasks the job has.
const BATCH_STEP: &str = "4294967291";

/// Which rank a process is whose environment has what `lookup` gives. A variable that is empty counts as absent.
///
/// # Errors
/// [`Error::Config`] naming the variables where they are half set, are no numbers, or contradict each other.
pub fn read(lookup: &dyn Fn(&str) -> Option<String>) -> Result<Ranks> {
    let has = |name: &str| lookup(name).is_some_and(|value| !value.is_empty());
    let slurm = is_slurm_task(lookup);
    let mpi = has(OPEN_MPI[0]) || has(OPEN_MPI[1]);
    // Batch scripts often export WORLD_SIZE alone, for programs that srun starts.
    let torch = has("RANK") || has("LOCAL_RANK") || (has("WORLD_SIZE") && !mpi && !slurm);
    let ranks = if has(variable::RANK) || has(variable::RANKS) {
        own(&Variables { lookup, kind: LauncherKind::Own, names: &[variable::RANK, variable::RANKS] })?
    } else if torch {
        torchrun(&Variables { lookup, kind: LauncherKind::Torchrun, names: &TORCH }, slurm)?
    } else if mpi {
        open_mpi(&Variables { lookup, kind: LauncherKind::OpenMpi, names: &OPEN_MPI })?
    } else if slurm {
        srun(&Variables { lookup, kind: LauncherKind::Slurm, names: &SLURM })?
    } else {
        return Ok(Ranks::alone());
    };
    Ok(if ranks.is_alone() { Ranks::alone() } else { ranks })
}

/// Whether srun started this process. `sbatch` sets SLURM_NTASKS and SLURM_PROCID for its script too, which runs once.
fn is_slurm_task(lookup: &dyn Fn(&str) -> Option<String>) -> bool {
    let step = lookup("SLURM_STEP_ID").or_else(|| lookup("SLURM_STEPID"));
    let is_step = step.is_some_and(|step| !step.is_empty() && step != BATCH_STEP);
    is_step && lookup("SLURM_STEP_NUM_TASKS").is_some_and(|tasks| !tasks.is_empty() && tasks != "1")
}

/// The variables of a launcher.
struct Variables<'a> {
    lookup: &'a dyn Fn(&str) -> Option<String>,
    kind: LauncherKind,
    /// Those that belong together, for messages.
    names: &'a [&'static str],
}

impl Variables<'_> {
    fn text(&self, name: &str) -> Option<String> {
        (self.lookup)(name).filter(|value| !value.is_empty())
    }

    /// What the launcher's variables hold: `RANK = 1, WORLD_SIZE is not set`.
    fn held(&self, others: &[&str]) -> String {
        let names = self.names.iter().chain(others);
        let shown = names.map(|name| match self.text(name) {
            Some(value) => format!("{name} = {value}"),
            None => format!("{name} is not set"),
        });
        shown.collect::<Vec<_>>().join(", ")
    }

    fn wrong(&self, what: impl fmt::Display) -> Error {
        let kind = self.kind;
        let help = match kind {
            LauncherKind::Own => {
                "leave these variables to `train --gpus N`, which sets them for the processes that it starts"
            }
            LauncherKind::Torchrun => {
                "start all ranks with torchrun (`torchrun --nproc-per-node N --no-python mmpo-fast train ..`), which sets all of \
                 them; for a run of one process unset RANK, WORLD_SIZE and LOCAL_RANK"
            }
            LauncherKind::Slurm => "start all ranks with one `srun`, which sets all of them",
            LauncherKind::OpenMpi => {
                "start all ranks with one `mpirun`, which sets all of them; across machines pass `-x MASTER_ADDR`, the machine of \
                 rank 0"
            }
        };
        Error::config(format!("the environment of {kind} {what}: {}", self.held(&[])), help)
    }

    fn number(&self, name: &str) -> Result<Option<usize>> {
        let Some(text) = self.text(name) else { return Ok(None) };
        let number = text.trim().parse();
        number.map(Some).map_err(|_| self.wrong(format_args!("has {name} = {text}, which is not a count")))
    }

    fn required(&self, name: &str) -> Result<usize> {
        self.number(name)?.ok_or_else(|| self.wrong(format_args!("is half set, without {name}")))
    }

    fn port(&self, name: &str) -> Result<Option<u16>> {
        let Some(text) = self.text(name) else { return Ok(None) };
        let port: Option<u16> = text.trim().parse().ok().filter(|&port| port > 0);
        let wrong = || {
            Error::config(
                format!("{name} = {text} is not a port"),
                format!("set {name} to a free port of rank 0's machine, from 1 to 65535"),
            )
        };
        port.map(Some).ok_or_else(wrong)
    }

    /// Our port: the one that was asked for, else the one after MASTER_PORT, else one that follows from the job's name.
    fn our_port(&self, job: &str) -> Result<u16> {
        if let Some(port) = self.port(variable::PORT)? {
            return Ok(port);
        }
        Ok(self.port("MASTER_PORT")?.map_or_else(|| address::of_job(job), address::after))
    }

    /// The ranks, once the numbers go together.
    fn ranks(
        &self,
        (rank, ranks): (usize, usize),
        (local_rank, local_ranks): (usize, usize),
        host: Option<String>,
        job: String,
    ) -> Result<Ranks> {
        if ranks == 0 || rank >= ranks {
            return Err(self.wrong(format_args!("contradicts itself: there is no rank {rank} among {ranks}")));
        }
        if local_ranks > ranks || local_rank >= local_ranks {
            return Err(self.wrong(format_args!(
                "contradicts itself: there is no local rank {local_rank} among {local_ranks} of {ranks}"
            )));
        }
        let address = match (local_ranks == ranks, host) {
            (true, _) => Address::LOOPBACK.to_string(),
            (false, Some(host)) => host,
            (false, None) => {
                return Err(self.wrong(
                    "does not say where rank 0 is, and the ranks are on several machines: MASTER_ADDR is not set",
                ));
            }
        };
        Ok(Ranks {
            place: GroupPlace { rank, ranks },
            local_rank,
            local_ranks,
            launcher: Some(self.kind),
            address: Address { host: address, port: self.our_port(&job)? },
            job,
        })
    }
}

fn own(own: &Variables<'_>) -> Result<Ranks> {
    let (rank, ranks) = (own.required(variable::RANK)?, own.required(variable::RANKS)?);
    let launcher = own.text(variable::LAUNCHER).unwrap_or_default();
    own.ranks((rank, ranks), (rank, ranks), None, format!("launcher {launcher}"))
}

fn torchrun(torch: &Variables<'_>, is_slurm_task: bool) -> Result<Ranks> {
    if torch.number("WORLD_SIZE")? == Some(1) {
        return match torch.number("RANK")?.unwrap_or(0) {
            0 => Ok(Ranks::alone()),
            rank => Err(torch.wrong(format_args!("contradicts itself: there is no rank {rank} among 1"))),
        };
    }
    let (rank, ranks) = (torch.required("RANK")?, torch.required("WORLD_SIZE")?);
    let local = (torch.required("LOCAL_RANK")?, torch.required("LOCAL_WORLD_SIZE")?);
    let host = torch.text("MASTER_ADDR");
    if host.is_none() || torch.port("MASTER_PORT")?.is_none() {
        let port = torch.held(&["MASTER_PORT"]);
        return Err(Error::config(
            format!("the environment of torchrun does not say where rank 0 is: {port}"),
            "start all ranks with torchrun, which sets MASTER_ADDR and MASTER_PORT",
        ));
    }
    let run = torch.text("TORCHELASTIC_RUN_ID");
    // torchrun itself may be a task of srun, one on each machine.
    if run.is_none() && is_slurm_task {
        let slurm = (torch.number("SLURM_PROCID")?, torch.number("SLURM_STEP_NUM_TASKS")?);
        if slurm != (Some(rank), Some(ranks)) {
            let both = torch.held(&["SLURM_PROCID", "SLURM_STEP_NUM_TASKS"]);
            return Err(Error::config(
                format!("torchrun's variables and Slurm's contradict each other: {both}"),
                "unset RANK, WORLD_SIZE and LOCAL_RANK before `srun`, whose own variables say the same",
            ));
        }
    }
    let restart = torch.text("TORCHELASTIC_RESTART_COUNT").unwrap_or_default();
    let job = format!("torchrun {} {restart}", run.unwrap_or_default());
    torch.ranks((rank, ranks), local, host, job)
}

fn open_mpi(mpi: &Variables<'_>) -> Result<Ranks> {
    let [rank, ranks, local_rank, local_ranks] = OPEN_MPI;
    let (rank, ranks) = (mpi.required(rank)?, mpi.required(ranks)?);
    let local = (mpi.required(local_rank)?, mpi.required(local_ranks)?);
    agree_on_world_size(mpi, ranks)?;
    let job = mpi.text("PMIX_NAMESPACE").or_else(|| mpi.text("OMPI_MCA_ess_base_jobid"));
    mpi.ranks((rank, ranks), local, mpi.text("MASTER_ADDR"), format!("mpirun {}", job.unwrap_or_default()))
}

fn srun(slurm: &Variables<'_>) -> Result<Ranks> {
    let (rank, ranks) = (slurm.required("SLURM_PROCID")?, slurm.required("SLURM_STEP_NUM_TASKS")?);
    let local_rank = slurm.required("SLURM_LOCALID")?;
    agree_on_world_size(slurm, ranks)?;
    let node = slurm.number("SLURM_NODEID")?.unwrap_or(0);
    let tasks = slurm.text("SLURM_STEP_TASKS_PER_NODE");
    let local_ranks = tasks.and_then(|tasks| address::tasks_of_node(&tasks, node));
    let local_ranks = local_ranks.ok_or_else(|| {
        slurm.wrong(
            "does not say how many tasks this node has: SLURM_STEP_TASKS_PER_NODE is not set or not a list",
        )
    })?;
    let nodes = slurm.text("SLURM_STEP_NODELIST").or_else(|| slurm.text("SLURM_JOB_NODELIST"));
    let first = nodes.as_deref().and_then(address::first_host);
    // The launch node is that of `srun` itself, which need not be rank 0's: it comes last.
    let host = slurm.text("MASTER_ADDR").or(first).or_else(|| slurm.text("SLURM_LAUNCH_NODE_IPADDR"));
    let [job, step, restart] = ["SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"]
        .map(|name| slurm.text(name).unwrap_or_default());
    slurm.ranks((rank, ranks), (local_rank, local_ranks), host, format!("slurm {job} {step} {restart}"))
}

/// Batch scripts export WORLD_SIZE for other programs; it must not say something else.
fn agree_on_world_size(variables: &Variables<'_>, ranks: usize) -> Result<()> {
    match variables.number("WORLD_SIZE")? {
        Some(size) if size != ranks => {
            Err(variables.wrong(format_args!("has {ranks} ranks, and WORLD_SIZE = {size} contradicts that")))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
