//! Starts the ranks of a test as processes, and tells a process which of them it is.

use std::cell::Cell;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use mmpo_fast::device::{Collectives, GroupId, GroupPlace};

use crate::support::nccl;

const SCENARIO: &str = "TEST_RANK_SCENARIO";
/// Longer than any scenario takes on a busy machine; a rank that hangs ends here.
const LIMIT: Duration = Duration::from_secs(120);

/// The device of a test's ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum On {
    Cpu,
    CpuBf16,
    Emulated,
    /// The emulated device that watches every access.
    Checked,
    /// A GPU for each rank, and NVIDIA's own NCCL.
    Gpu,
}

/// The devices that this build has.
pub const DEVICES: &[On] =
    if cfg!(mmpo_emulated) { &[On::Cpu, On::CpuBf16, On::Emulated] } else { &[On::Cpu, On::CpuBf16] };

/// This process as a rank of a test.
pub struct Rank {
    pub place: GroupPlace,
    /// Shared by the ranks of the test.
    folder: PathBuf,
    /// Groups that were named so far.
    groups: Cell<usize>,
}

/// The scenario of this process, where a test started it as a rank.
pub fn this_process() -> Option<(String, On, Rank)> {
    let words = std::env::var(SCENARIO).ok()?;
    let words: Vec<&str> = words.split_whitespace().collect();
    let [scenario, on, rank, ranks, folder] = words[..] else { panic!("{words:?}") };
    let on = *[On::Cpu, On::CpuBf16, On::Emulated, On::Checked, On::Gpu]
        .iter()
        .find(|one| format!("{one:?}") == on)
        .unwrap();
    let place = GroupPlace { rank: rank.parse().unwrap(), ranks: ranks.parse().unwrap() };
    Some((scenario.to_owned(), on, Rank { place, folder: PathBuf::from(folder), groups: Cell::new(0) }))
}

impl Rank {
    /// The id of the next group, which rank 0 makes, through a file.
    pub fn id(&self, make: impl FnOnce() -> GroupId) -> GroupId {
        let number = self.groups.replace(self.groups.get() + 1);
        let path = self.folder.join(format!("id-{number}"));
        if self.place.rank == 0 {
            let unfinished = self.folder.join("unfinished");
            std::fs::write(&unfinished, make().0).unwrap();
            std::fs::rename(&unfinished, &path).unwrap();
        }
        wait_for(&path);
        GroupId(std::fs::read(&path).unwrap().try_into().unwrap())
    }

    /// Joins the group of all ranks.
    pub fn join<D: Collectives>(&self, device: &D) -> D::Communicator {
        let id = self.id(|| device.new_group().unwrap());
        device.join_group(&id, self.place).unwrap()
    }

    /// Tells the other ranks, and the test, that this one has come to `point`.
    pub fn reach(&self, point: &str) {
        File::create(self.folder.join(format!("{point}-{}", self.place.rank))).unwrap();
    }

    /// Waits until `rank` has come to `point`.
    pub fn wait_for(&self, rank: usize, point: &str) {
        wait_for(&self.folder.join(format!("{point}-{rank}")));
    }
}

fn wait_for(path: &Path) {
    let started = Instant::now();
    while !path.exists() {
        assert!(started.elapsed() < LIMIT, "{} does not come", path.display());
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Ranks that were started.
pub struct Started {
    children: Vec<Child>,
    folder: tempfile::TempDir,
}

/// A rank that has ended.
pub struct Ended {
    pub success: bool,
    pub output: String,
    pub at: Instant,
}

/// Starts the ranks of a scenario.
pub fn start(scenario: &str, on: On, ranks: usize, environment: &[(&str, &str)]) -> Started {
    let folder = tempfile::tempdir().unwrap();
    let own = on == On::Gpu || environment.iter().any(|(name, _)| *name == "LD_LIBRARY_PATH");
    let library = (!own).then(nccl::folder);
    let start_one = |rank: usize| {
        let output = File::create(folder.path().join(format!("output-{rank}"))).unwrap();
        let words = format!("{scenario} {on:?} {rank} {ranks} {}", folder.path().display());
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", "rank_of_a_group", "--nocapture"])
            .env(SCENARIO, words)
            .env("RUST_BACKTRACE", "0")
            .envs(library.map(|library| ("LD_LIBRARY_PATH", library)))
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output);
        command.spawn().unwrap()
    };
    let children = (0..ranks).map(start_one).collect();
    Started { children, folder }
}

impl Started {
    /// Waits until `rank` has come to `point`.
    pub fn wait_for(&self, rank: usize, point: &str) {
        wait_for(&self.folder.path().join(format!("{point}-{rank}")));
    }

    /// Ends a rank as `kill -9` does.
    pub fn kill(&mut self, rank: usize) {
        self.children[rank].kill().unwrap();
    }

    /// Waits for all ranks.
    pub fn finish(mut self) -> Vec<Ended> {
        let started = Instant::now();
        let mut ended: Vec<Option<Ended>> = self.children.iter().map(|_| None).collect();
        while ended.iter().any(Option::is_none) {
            for (rank, child) in self.children.iter_mut().enumerate() {
                if ended[rank].is_some() {
                    continue;
                }
                if started.elapsed() > LIMIT {
                    child.kill().unwrap();
                }
                if let Some(status) = child.try_wait().unwrap() {
                    let output = std::fs::read(self.folder.path().join(format!("output-{rank}"))).unwrap();
                    let output = String::from_utf8_lossy(&output).into_owned();
                    ended[rank] = Some(Ended { success: status.success(), output, at: Instant::now() });
                }
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        ended.into_iter().flatten().collect()
    }
}

/// Runs a scenario whose ranks must all succeed.
pub fn succeed(scenario: &str, on: On, ranks: usize, environment: &[(&str, &str)]) {
    for (rank, ended) in start(scenario, on, ranks, environment).finish().iter().enumerate() {
        assert!(ended.success, "{scenario} on {on:?}, rank {rank} of {ranks}:\n{}", ended.output);
    }
}
