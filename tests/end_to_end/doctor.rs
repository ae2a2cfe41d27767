//! `mmpo-fast doctor` and `--version --verbose` where there is no driver, a pretended one, and NCCL or none.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::device_choice::fake_driver;
use crate::harness::{Finished, finish};

/// An old GPU, an old driver: what the pretended driver is told to be.
type Pretended<'a> = [(&'a str, &'a str)];

fn doctor(arguments: &[&str], libraries: &[&Path], pretended: &Pretended) -> Finished {
    let cache = tempfile::tempdir().unwrap();
    let folders: Vec<_> = libraries.iter().map(|folder| folder.to_str().unwrap()).collect();
    let mut command = Command::new(env!("CARGO_BIN_EXE_mmpo-fast"));
    command
        .args(arguments)
        .env("LD_LIBRARY_PATH", folders.join(":"))
        .env("MMPO_FAST_CACHE", cache.path())
        .env("HF_HUB_CACHE", cache.path().join("hub"))
        .env("NO_COLOR", "1")
        .env_remove("RUST_LOG")
        .envs(pretended.iter().copied());
    finish(command)
}

/// The findings of `doctor --json` by name.
fn findings(libraries: &[&Path], pretended: &Pretended) -> impl Fn(&str) -> Value + use<> {
    let finished = doctor(&["doctor", "--json"], libraries, pretended);
    assert_eq!(finished.code, Some(0), "{}", finished.stderr);
    let object: Value = serde_json::from_str(&finished.stdout).unwrap();
    move |name| {
        let all = object["findings"].as_array().unwrap();
        all.iter().find(|finding| finding["name"] == name).cloned().unwrap_or_default()
    }
}

#[test]
fn the_report_names_every_part_and_times_the_disk() {
    let finished = doctor(&["doctor"], &[], &[]);
    assert_eq!(finished.code, Some(0), "{}", finished.stderr);
    for name in ["kernels", "driver", "cublaslt", "nccl", "processor", "memory", "cache", "hub", "a run"] {
        let line =
            finished.stdout.lines().find(|line| line.get(6..).is_some_and(|rest| rest.starts_with(name)));
        assert!(line.is_some(), "{name} is missing in:\n{}", finished.stdout);
    }
    let finding = findings(&[], &[]);
    assert!(finding("cache")["write_bytes_per_second"].as_f64().unwrap() > 0.0);
    assert!(finding("memory")["available_bytes"].as_u64().unwrap() > 0);
    assert!(finding("hub")["found"].as_str().unwrap().contains("not there"));
}

#[test]
fn a_driver_and_its_gpus_are_found() {
    let finding = findings(&[fake_driver()], &[("FAKE_CUDA_GPUS", "2")]);
    assert_eq!(finding("driver")["cuda"], "13.0");
    let gpus = &finding("gpus")["gpus"];
    assert_eq!(gpus.as_array().unwrap().len(), 2);
    assert_eq!(gpus[1]["name"], "Pretended GPU");
    assert_eq!(gpus[1]["compute_capability"], "9.0");
    assert_eq!(gpus[1]["memory_bytes"], 16_u64 << 30);
    let taken = finding("a run")["found"].as_str().unwrap().to_string();
    let expected = if cfg!(mmpo_gpu_kernels) { "cuda:0 (Pretended GPU" } else { "the CPU, because" };
    assert!(taken.contains(expected), "{taken}");
}

#[test]
fn what_is_too_old_says_what_to_do() {
    let old = findings(&[fake_driver()], &[("FAKE_CUDA_VERSION", "11080"), ("FAKE_CUDA_CAPABILITY", "75")]);
    let driver = old("driver");
    assert_eq!(driver["state"], "lack");
    assert!(driver["found"].as_str().unwrap().contains("CUDA 11.8"), "{driver}");
    assert!(driver["advice"].as_str().unwrap().contains("update the driver"), "{driver}");
    let gpus = old("gpus");
    assert_eq!(gpus["gpus"][0]["usable"], false);
    assert!(gpus["advice"].as_str().unwrap().contains("8.0 (Ampere)"), "{gpus}");
}

#[test]
fn a_job_that_needs_a_gpu_ends_with_6_where_there_is_none() {
    let finished = doctor(&["doctor", "--device", "cuda"], &[fake_driver()], &[("FAKE_CUDA_GPUS", "0")]);
    assert_eq!(finished.code, Some(6), "{}", finished.stdout);
    assert!(finished.stdout.contains("the driver lists none"), "{}", finished.stdout);
    assert!(finished.stderr.contains("help: "), "{}", finished.stderr);
}

#[test]
fn nccl_is_found_with_its_version() {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("fake_nccl");
    std::fs::create_dir_all(&folder).unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake_driver/libnccl.c");
    let compiled = Command::new("cc")
        .args(["-shared", "-fPIC", "-o"])
        .arg(folder.join("libnccl.so.2"))
        .arg(source)
        .output();
    assert!(compiled.as_ref().unwrap().status.success(), "{compiled:?}");
    assert_eq!(findings(&[&folder], &[])("nccl")["version"], "2.27.5");
}

#[test]
fn the_version_in_full_says_what_is_found() {
    let full = doctor(&["--version", "--verbose"], &[fake_driver()], &[]).stdout;
    for part in
        ["driver    found, knows CUDA 13.0", "Pretended GPU", "processor", "memory", "`mmpo-fast doctor`"]
    {
        assert!(full.contains(part), "no `{part}` in:\n{full}");
    }
    assert!(!full.contains("MB/s"), "the disk was timed:\n{full}");
}
