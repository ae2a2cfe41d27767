//! The kernels' PTX, executed: this program's own tests for a GPU, in processes of their own whose GPU is the PTX machine of
//! `tests/ptx_machine`. Every entry of the fat binary is launched by one of them.
//!
//! Matrix instructions compute in f32 there; the tests of gemms run with the rounding of tensor cores too. `MMPO_FAST_PTX_LONG=1` runs
//! all tests with that rounding, and under more timings and schedules.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::ptx_machine;

/// One run of tests for a GPU.
struct Run {
    target: &'static str,
    mode: &'static str,
    tests: Tests,
    /// Whether every change runs it, or only `MMPO_FAST_PTX_LONG`.
    always: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Tests {
    All,
    /// Those of gemms but [`LARGE`]: every sum of theirs is one that matrix instructions round.
    Gemms,
}
use Tests::{All, Gemms};

const RUNS: &[Run] = &[
    Run { target: "sm_90a", mode: "late", tests: All, always: true },
    Run { target: "sm_80", mode: "late", tests: All, always: true },
    Run { target: "sm_90a", mode: "late measured", tests: Gemms, always: true },
    Run { target: "sm_80", mode: "late measured", tests: Gemms, always: true },
    Run { target: "sm_90a", mode: "late measured", tests: All, always: false },
    Run { target: "sm_80", mode: "late measured", tests: All, always: false },
    // On a GPU this small each block takes several tiles.
    Run { target: "sm_90a", mode: "late multiprocessors=3", tests: All, always: false },
    Run { target: "sm_80", mode: "late multiprocessors=3", tests: All, always: false },
    Run { target: "sm_90a", mode: "early", tests: All, always: false },
    Run { target: "sm_80", mode: "early", tests: All, always: false },
    Run { target: "sm_90a", mode: "random seed=1", tests: All, always: false },
    Run { target: "sm_90a", mode: "random seed=2", tests: All, always: false },
    Run { target: "sm_80", mode: "random seed=3", tests: All, always: false },
];

/// Their moments start as the zeros of a buffer's creation, which kernels of all other tests must not read.
const FROM_ZEROS: &str = "adamw::";
/// Repeats show nothing on a machine that always runs blocks in the same order.
const POINTLESS: &str = "again_and_again";
/// A thousand problems of every length, for `MMPO_FAST_PTX_LONG`; the others have each kind of tile among them.
const LONG: &str = "every_boundary_of_the_tiles";

/// Gemms that take most of the time of all, and round as the others do.
const LARGE: [&str; 2] = ["large_products", "every_tile_of_hopper"];

/// Runs tests of this program on the PTX machine, which appends what it launched to a file; how many have passed.
fn tests_on_ptx(run: &Run, mode: &str, filters: &[&str], launches: &Path) -> usize {
    let output = Command::new(std::env::current_exe().expect("this program"))
        .args(filters)
        .env(ptx_machine::TARGET, run.target)
        .env(ptx_machine::MODE, mode)
        .env(ptx_machine::LAUNCHES, launches)
        .env("MMPO_FAST_REQUIRE_GPU", "1")
        .output()
        .expect("this program runs");
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{} {mode}:\n{text}{errors}", run.target);
    let passed = text.split("test result: ok. ").nth(1).and_then(|rest| rest.split(' ').next());
    passed.and_then(|count| count.parse().ok()).unwrap_or(0)
}

/// One run; how many tests have passed, of how many at least there must be.
fn execute(run: &Run, long: bool, launches: &Path) -> (usize, usize) {
    let strict = format!("{} strict_reads", run.mode);
    // The other devices' variants of the same tests.
    let elsewhere = ["--skip", "::cpu", "--skip", "::emulated", "--skip", "::checked", "--skip", POINTLESS];
    let short = if long { &[][..] } else { &["--skip", LONG][..] };
    if run.tests == Gemms {
        let gemms = ["linear::", "--skip", LARGE[0], "--skip", LARGE[1]];
        return (tests_on_ptx(run, &strict, &[&gemms[..], &elsewhere[..], short].concat(), launches), 12);
    }
    let most = [&["gpu", "--skip", FROM_ZEROS, "--skip", POINTLESS][..], short].concat();
    let passed = tests_on_ptx(run, &strict, &most, launches)
        + tests_on_ptx(run, run.mode, &[&[FROM_ZEROS][..], &elsewhere[..]].concat(), launches);
    (passed, 100)
}

/// In a process that a test here started, or without the means to take the PTX out of the kernels, there is nothing to do.
fn skipped() -> bool {
    std::env::var_os(ptx_machine::TARGET).is_some() || !ptx_machine::available()
}

#[test]
fn all_tests_for_devices_pass_on_the_ptx_and_launch_every_entry() {
    if skipped() {
        return;
    }
    let long = std::env::var_os("MMPO_FAST_PTX_LONG").is_some();
    let mut launched: BTreeMap<(String, String, String), u64> = BTreeMap::new();
    for (number, run) in RUNS.iter().enumerate().filter(|(_, run)| run.always || long) {
        let path: PathBuf = Path::new(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("ptx-launches-{}-{number}", std::process::id()));
        let start = std::time::Instant::now();
        let (passed, least) = execute(run, long, &path);
        // A filter that finds no test would pass as well.
        assert!(passed >= least, "{} {}: {passed} tests", run.target, run.mode);
        eprintln!("{} {}: {passed} tests, {:.0?}", run.target, run.mode, start.elapsed());
        for (entry, count) in ptx_machine::read_launches(&path) {
            *launched.entry(entry).or_default() += count;
        }
        std::fs::remove_file(&path).expect("the file goes");
    }
    let never: Vec<String> = launched
        .iter()
        .filter(|&(_, &count)| count == 0)
        .map(|((target, file, entry), _)| format!("{target} {file} {entry}"))
        .collect();
    assert!(launched.len() > 100, "{} entries", launched.len());
    assert!(
        never.is_empty(),
        "{} of {} entries are never launched:\n{}",
        never.len(),
        launched.len(),
        never.join("\n")
    );
}

/// The files of the emulated device's own cases that GPUs run too, planted faults in their right form among them.
const CASES: [&str; 11] = [
    "gemm",
    "layouts",
    "tensors",
    "collectives",
    "instructions",
    "programs",
    "multicast",
    "faults_memory",
    "faults_order",
    "faults_hopper",
    "faults_clusters",
];
/// It indexes an array in local memory, which the program's kernels do not have and this machine does not know.
const NOT_HERE: &str = "local_array";

/// The PTX that nvcc makes of the cases by which the emulated device is tested, so that each of the two checks the other's
/// reading of the PTX ISA.
#[test]
fn the_emulated_devices_cases_pass_on_the_ptx() {
    if skipped() {
        return;
    }
    let Some(cases) = ptx_machine::cases::Cases::build(&CASES) else { return };
    let mut names: Vec<String> = CASES.iter().flat_map(|file| ptx_machine::cases::names(file)).collect();
    names.retain(|name| name != NOT_HERE);
    assert!(names.len() > 120, "{} cases", names.len());
    for words in ["late", "early", "random seed=7", "late measured"] {
        let (mode, _) = ptx_machine::Mode::from_words(words);
        let outcomes = cases.run(mode, &names);
        let passed: Vec<&String> = outcomes.iter().map(|(name, _)| name).collect();
        assert_eq!(passed, names.iter().collect::<Vec<_>>(), "each case has an outcome");
        let failed: Vec<String> = outcomes
            .iter()
            .filter_map(|(name, what)| what.as_ref().map(|what| format!("{name}: {what}")))
            .collect();
        assert!(failed.is_empty(), "{words}:\n{}", failed.join("\n"));
    }
}
