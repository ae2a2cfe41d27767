//! `train --gpus N`: starts N ranks of this program on this machine, and ends them together.

use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, getppid, kill_process, set_parent_process_death_signal};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;

use super::variable;
use crate::config::RunConfig;
use crate::device::{DeviceChoice, cuda};
use crate::error::{Error, Result};
use crate::interrupt;

/// How long the other ranks may take to end by themselves after one has failed, before they get SIGTERM; they learn of the
/// failure on the control line.
const TERMINATE_AFTER: Duration = Duration::from_secs(15);
/// And before they get SIGKILL.
const KILL_AFTER: Duration = Duration::from_secs(30);
/// How often the launcher looks at its ranks and for signals.
const LOOK: Duration = Duration::from_millis(20);
/// The exit code of a rank that ended because of another one.
const BECAUSE_OF_ANOTHER: i32 = 9;

/// Runs `count` ranks of this program with this command line.
///
/// # Errors
/// [`Error::Device`] where there are fewer GPUs; [`Error::RankEnded`] of the rank that failed first, or [`Error::Rank`] where
/// a signal killed it; [`Error::Io`] where the ranks cannot be started.
pub fn run(config: &RunConfig, count: usize) -> Result<()> {
    check_devices(config.device, count)?;
    let mut signals = watch_signals()?;
    let mut ranks = Launched::start(count)?;
    loop {
        for signal in signals.pending() {
            ranks.forward(signal);
        }
        if ranks.look() {
            return ranks.result();
        }
        ranks.end_late_ones();
        std::thread::sleep(LOOK);
    }
}

/// Makes this process, which [`run`] started, end when its launcher does, however that ends.
///
/// # Errors
/// [`Error::Rank`] where the launcher has ended already.
pub fn end_with_launcher() -> Result<()> {
    let Ok(launcher) = std::env::var(variable::LAUNCHER) else { return Ok(()) };
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(|error| {
        Error::device(
            format!("cannot follow the end of the launcher: {error}"),
            "leave --gpus out, and start the ranks with torchrun",
        )
    })?;
    let parent = getppid().map(|pid| pid.as_raw_nonzero().get().to_string());
    if parent.as_deref() == Some(launcher.as_str()) {
        return Ok(());
    }
    Err(Error::rank(
        format!("the launcher of this rank, process {launcher}, has ended"),
        format!("unset {} and the other variables of `--gpus`, and start the run again", variable::LAUNCHER),
    ))
}

/// Fails where there are not `count` GPUs to compute on.
fn check_devices(choice: DeviceChoice, count: usize) -> Result<()> {
    let help = "give a smaller --gpus; `mmpo-fast doctor` tells which GPUs there are, and --device cpu starts ranks on the CPU";
    match choice {
        DeviceChoice::Cpu | DeviceChoice::Emulated => return Ok(()),
        DeviceChoice::Cuda(0) | DeviceChoice::Auto => {}
        DeviceChoice::Cuda(ordinal) => {
            return Err(Error::config(
                format!(
                    "`--gpus` = {count} starts ranks on several GPUs, and `--device` = cuda:{ordinal} names one"
                ),
                "give --device cuda; CUDA_VISIBLE_DEVICES chooses the GPUs",
            ));
        }
    }
    let gpus = cuda::gpus()
        .map_err(|error| Error::device(format!("`--gpus` = {count}, and there is no GPU: {error}"), help))?;
    match gpus.len() >= count {
        true => Ok(()),
        false => {
            Err(Error::device(format!("`--gpus` = {count}, and the driver lists {} GPUs", gpus.len()), help))
        }
    }
}

fn watch_signals() -> Result<Signals> {
    let mut numbers = vec![SIGINT, SIGTERM, SIGUSR1];
    if interrupt::hangup_is_heard() {
        numbers.push(SIGHUP);
    }
    Signals::new(numbers).map_err(|error| {
        Error::device(
            format!("cannot watch for Ctrl-C: {error}"),
            "run outside a sandbox that forbids signals",
        )
    })
}

/// The ranks that were started.
struct Launched {
    children: Vec<Running>,
    /// When the first rank failed.
    failed: Option<Instant>,
    /// The last signal that was sent because of that.
    sent: Option<Signal>,
    /// Ranks that failed, in the order in which that was seen, but for those that this process ended.
    failures: Vec<(usize, ExitStatus)>,
}

struct Running {
    child: Child,
    status: Option<ExitStatus>,
}

impl Launched {
    fn start(count: usize) -> Result<Self> {
        let cannot = |error| Error::io("the ranks of --gpus".as_ref(), "start", error);
        let program = std::env::current_exe().map_err(cannot)?;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(cannot)?;
        let port = listener.local_addr().map_err(cannot)?.port();
        let mut listener = Some(listener);
        let mut launched = Launched { children: Vec::new(), failed: None, sent: None, failures: Vec::new() };
        for rank in 0..count {
            let mut command = Command::new(&program);
            command
                .args(std::env::args_os().skip(1))
                .env(variable::RANK, rank.to_string())
                .env(variable::RANKS, count.to_string())
                .env(variable::PORT, port.to_string())
                .env(variable::LAUNCHER, std::process::id().to_string())
                // Ctrl-C of a terminal comes to this process alone, which passes it on once.
                .process_group(0)
                .stdin(match listener.take() {
                    Some(listener) => Stdio::from(OwnedFd::from(listener)),
                    None => Stdio::null(),
                });
            match command.spawn() {
                Ok(child) => launched.children.push(Running { child, status: None }),
                Err(error) => {
                    launched.signal_all(Signal::KILL);
                    launched.children.iter_mut().for_each(|running| _ = running.child.wait());
                    return Err(cannot(error));
                }
            }
        }
        Ok(launched)
    }

    fn signal_all(&self, signal: Signal) {
        for running in self.children.iter().filter(|running| running.status.is_none()) {
            // A process that ended meanwhile was not waited for yet, so that its number is nobody else's.
            let _ = kill_process(Pid::from_child(&running.child), signal);
        }
    }

    /// Passes a signal on: to all ranks what ends the run, to rank 0 what asks it to save.
    fn forward(&self, number: i32) {
        match number {
            SIGINT => self.signal_all(Signal::INT),
            SIGHUP => self.signal_all(Signal::HUP),
            SIGUSR1 => {
                let first = self.children.first().filter(|running| running.status.is_none());
                let _ = first.map(|running| kill_process(Pid::from_child(&running.child), Signal::USR1));
            }
            _ => self.signal_all(Signal::TERM),
        }
    }

    /// Looks which ranks have ended; whether all have.
    fn look(&mut self) -> bool {
        for (rank, running) in self.children.iter_mut().enumerate() {
            if running.status.is_some() {
                continue;
            }
            let Ok(status) = running.child.try_wait() else { continue };
            running.status = status;
            let Some(status) = status.filter(|status| !status.success()) else { continue };
            if self.sent.is_none() {
                self.failures.push((rank, status));
            }
            self.failed.get_or_insert_with(Instant::now);
        }
        self.children.iter().all(|running| running.status.is_some())
    }

    /// Ends the ranks that are still there some time after one has failed.
    fn end_late_ones(&mut self) {
        let Some(since) = self.failed.map(|failed| failed.elapsed()) else { return };
        let (due, step) = match self.sent {
            None => (since >= TERMINATE_AFTER, Signal::TERM),
            Some(Signal::TERM) => (since >= KILL_AFTER, Signal::KILL),
            Some(_) => return,
        };
        if due {
            self.sent = Some(step);
            self.signal_all(step);
        }
    }

    /// How the run ended: by the first rank that failed for a reason of its own.
    fn result(&self) -> Result<()> {
        let of_its_own = self.failures.iter().find(|(_, status)| status.code() != Some(BECAUSE_OF_ANOTHER));
        let Some((rank, status)) = of_its_own.or(self.failures.first()) else { return Ok(()) };
        if let Some(signal) = status.signal() {
            return Err(Error::rank(
                format!("rank {rank} was killed by signal {signal}, and the run ended with it"),
                "where nobody did that, the system was out of memory; the last checkpoint is whole: start the run again with \
                 --resume",
            ));
        }
        let exit_code = status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1);
        Err(Error::RankEnded { rank: *rank, exit_code })
    }
}
