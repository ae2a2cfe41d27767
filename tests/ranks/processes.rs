//! Runs under way: their processes, and how they end.

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::harness::{Finished, Workplace};
use crate::support::nccl;

/// Whatever a test waits for comes within that time, on a busy machine too.
pub const SOON: Duration = Duration::from_secs(180);

/// A port of this machine on which nobody listens. It is below those that systems choose themselves, so that no other listener or
/// connection gets it before the ranks do.
pub fn free_port() -> u16 {
    static ASKED: AtomicU32 = AtomicU32::new(0);
    let number = || ASKED.fetch_add(1, Ordering::Relaxed).wrapping_add(std::process::id().wrapping_mul(37));
    let mut ports = std::iter::repeat_with(|| 10_000 + (number() % 20_000) as u16);
    ports.find(|&port| TcpListener::bind(("127.0.0.1", port)).is_ok()).unwrap()
}

/// Options of a run that is long enough to be disturbed, with a checkpoint every few steps.
pub const LONG: &str = "--max-steps 400 --save-steps 10";

/// A run of `train --gpus`.
pub struct Run {
    pub launcher: Child,
    metrics: PathBuf,
}

/// The command line `arguments` with the stand-in for NCCL.
pub fn command(work: &Workplace, arguments: &str) -> Command {
    let mut command = work.command(arguments);
    // Nothing of the launcher that may have started the tests.
    for variable in ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MMPO_FAST_HANG_SECONDS", "MMPO_FAST_JOIN_SECONDS"] {
        command.env_remove(variable);
    }
    command.env("LD_LIBRARY_PATH", nccl::folder());
    command
}

/// Runs what must succeed on the stand-in for NCCL.
#[track_caller]
pub fn succeed(work: &Workplace, arguments: &str) -> Finished {
    let finished = crate::harness::finish(command(work, arguments));
    assert_eq!(finished.code, Some(0), "{arguments}: {}", finished.stderr);
    finished
}

impl Run {
    /// Starts `command`, whose output folder is `output`.
    pub fn start(work: &Workplace, mut command: Command, output: &str) -> Self {
        Run { launcher: command.spawn().unwrap(), metrics: work.path(&format!("{output}/metrics.jsonl")) }
    }

    /// The lines of metrics that the run has written.
    pub fn lines(&self) -> usize {
        let bytes = std::fs::read(&self.metrics).unwrap_or_default();
        bytes.iter().filter(|&&byte| byte == b'\n').count()
    }

    /// Returns when the run has written `lines` lines of metrics.
    pub fn wait_for_lines(&mut self, lines: usize) {
        let started = Instant::now();
        while self.lines() < lines {
            if let Some(status) = self.launcher.try_wait().unwrap() {
                panic!("the run ended with {status} before it could be disturbed: {}", self.rest());
            }
            assert!(started.elapsed() < SOON, "no {lines} lines of metrics");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn rest(&mut self) -> String {
        let mut text = String::new();
        if let Some(stderr) = &mut self.launcher.stderr {
            std::io::Read::read_to_string(stderr, &mut text).unwrap();
        }
        text
    }

    /// The process of a rank.
    pub fn rank(&self, rank: usize) -> u32 {
        let wanted = format!("MMPO_FAST_RANK={rank}");
        let has_it = |process: &u32| {
            let environment = std::fs::read(format!("/proc/{process}/environ")).unwrap_or_default();
            environment.split(|&byte| byte == 0).any(|variable| variable == wanted.as_bytes())
        };
        self.ranks().into_iter().find(has_it).unwrap_or_else(|| panic!("rank {rank} is not there"))
    }

    /// The processes of all ranks.
    pub fn ranks(&self) -> Vec<u32> {
        children_of(self.launcher.id())
    }

    /// Waits for the end, which must come within `limit`; no rank may be left then.
    #[track_caller]
    pub fn finish(mut self, limit: Duration) -> Finished {
        let ranks = self.ranks();
        let started = Instant::now();
        while self.launcher.try_wait().unwrap().is_none() {
            if started.elapsed() > limit {
                self.launcher.kill().unwrap();
                panic!("the run has not ended within {limit:?}: {}", self.rest());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let output = self.launcher.wait_with_output().unwrap();
        for rank in ranks {
            assert!(!is_there(rank), "process {rank} is left");
        }
        Finished {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

/// Sends a signal, by its name, to a process.
pub fn send(signal: &str, process: u32) {
    let sent = Command::new("kill").args([signal, &process.to_string()]).status().unwrap();
    assert!(sent.success(), "{signal} {process}: {sent}");
}

/// Whether a process is there; one that has ended and that nobody waited for is.
pub fn is_there(process: u32) -> bool {
    std::fs::exists(format!("/proc/{process}")).unwrap()
}

fn children_of(parent: u32) -> Vec<u32> {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    numbers
        .filter(|process| {
            let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
            // The name in brackets may hold anything; the state and the parent come after it.
            let parent_of = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1));
            parent_of.and_then(|number| number.parse().ok()) == Some(parent)
        })
        .collect()
}
