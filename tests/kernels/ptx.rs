//! The kernels' PTX, executed: this program's own tests for a GPU, in processes of their own whose GPU is the PTX machine of
//! `tests/ptx_machine`. Every entry of the fat binary is launched by one of them.
//!
//! `MMPO_FAST_PTX_LONG=1` runs them under more timings and schedules, and with the rounding of tensor cores.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::ptx_machine;

/// One run of all tests for a GPU.
struct Run {
    target: &'static str,
    mode: &'static str,
    /// Whether every change runs it, or only `MMPO_FAST_PTX_LONG`.
    always: bool,
}

const RUNS: &[Run] = &[
    Run { target: "sm_90a", mode: "late", always: true },
    Run { target: "sm_80", mode: "late", always: true },
    // A GPU this small is filled by few tiles, so that plans choose the large ones and blocks take several.
    Run { target: "sm_90a", mode: "late multiprocessors=3", always: true },
    Run { target: "sm_80", mode: "late multiprocessors=3", always: false },
    Run { target: "sm_90a", mode: "early", always: false },
    Run { target: "sm_80", mode: "early", always: false },
    Run { target: "sm_90a", mode: "random seed=1", always: false },
    Run { target: "sm_90a", mode: "random seed=2", always: false },
    Run { target: "sm_80", mode: "random seed=3", always: false },
    Run { target: "sm_90a", mode: "late measured", always: false },
    Run { target: "sm_80", mode: "late measured", always: false },
];

/// Entries that no call of the program reaches: launchers choose them for pointers that are not aligned to 16 bytes, where all
/// buffers of the program are, and for bf16 as a type to cast from, which the program copies as it is.
const UNREACHED: &[&str] = &["10add_kernelILb0E", "11cast_kernelILi2E"];

/// Runs tests of this program on the PTX machine.
fn tests_on_ptx(
    target: &str,
    mode: &str,
    filters: &[&str],
    launches: Option<&Path>,
    edit: Option<&str>,
) -> Output {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command
        .args(filters)
        .env(ptx_machine::TARGET, target)
        .env(ptx_machine::MODE, mode)
        .env("MMPO_FAST_REQUIRE_GPU", "1")
        .env_remove(ptx_machine::LAUNCHES)
        .env_remove(ptx_machine::EDIT);
    if let Some(path) = launches {
        command.env(ptx_machine::LAUNCHES, path);
    }
    if let Some(edit) = edit {
        command.env(ptx_machine::EDIT, edit);
    }
    command.output().expect("this program runs")
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
        let output = tests_on_ptx(run.target, run.mode, &["gpu"], Some(&path), None);
        let text = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{} {}:\n{text}{errors}", run.target, run.mode);
        // A filter that finds no test would pass as well.
        let passed = text.split("test result: ok. ").nth(1).and_then(|rest| rest.split(' ').next());
        let passed: usize = passed.and_then(|count| count.parse().ok()).unwrap_or(0);
        assert!(passed > 100, "{} {}: {passed} tests\n{text}", run.target, run.mode);
        eprintln!("{} {}: {passed} tests, {:.0?}", run.target, run.mode, start.elapsed());
        for (entry, count) in ptx_machine::read_launches(&path) {
            *launched.entry(entry).or_default() += count;
        }
        std::fs::remove_file(&path).expect("the file goes");
    }
    let never: Vec<String> = launched
        .iter()
        .filter(|&((_, _, entry), &count)| count == 0 && !UNREACHED.iter().any(|name| entry.contains(name)))
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
