//! The Dockerfile and the examples of jobs, as far as they can be tried without a container, a cluster or a GPU.
//! `tools/check_jobs.sh` lints them.

use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::pages::repository;
use crate::workplace::Workplace;

fn read(name: &str) -> String {
    std::fs::read_to_string(repository().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn value_after<'a>(text: &'a str, before: &str, after: char) -> &'a str {
    text.split_once(before).unwrap_or_else(|| panic!("no `{before}`")).1.split(after).next().unwrap()
}

#[test]
fn the_image_is_built_by_the_rust_of_cargo_toml_and_copies_what_there_is() {
    let (docker, cargo) = (read("Dockerfile"), read("Cargo.toml"));
    assert_eq!(value_after(&docker, "FROM rust:", '-'), value_after(&cargo, "rust-version = \"", '"'));
    let copies = docker.lines().filter_map(|line| line.strip_prefix("COPY "));
    for copied in copies.filter(|copied| !copied.starts_with("--from=")) {
        let source = copied.split(' ').next().unwrap();
        assert!(repository().join(source).exists(), "the Dockerfile copies {source}");
    }
    assert!(repository().join("LICENSE").exists(), "the Dockerfile copies LICENSE from its first stage");
}

/// User, version and limits stand in several files.
#[test]
fn the_job_has_the_user_of_the_image_and_exit_codes_that_exist() {
    let (docker, job) = (read("Dockerfile"), read("examples/jobs/train-job.yaml"));
    let user = value_after(&docker, "USER ", ':');
    assert_eq!(value_after(&job, "runAsUser: ", '\n'), user);
    assert_eq!(value_after(&job, "fsGroup: ", '\n'), user);
    assert_eq!(value_after(&job, "image: registry.example/mmpo-fast:", '\n'), env!("CARGO_PKG_VERSION"));
    assert!(docker.contains(&format!("useradd --uid {user} ")), "{user}");
}

/// A script of the examples as Slurm runs it: `scontrol` is pretended, and writes down what it was asked.
fn job(workplace: &Workplace) -> Child {
    let scontrol = workplace.path("scontrol");
    std::fs::write(&scontrol, "#!/bin/sh\necho \"$@\" >> asked\n").unwrap();
    std::fs::set_permissions(&scontrol, std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut shell = workplace.shell();
    shell
        .arg(repository().join("examples/jobs/train.slurm"))
        .args(["--pairs-per-step", "2", "--epochs", "4"])
        .env("DEVICE", "cpu")
        .env("SLURM_JOB_ID", "42")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    shell.spawn().unwrap()
}

#[track_caller]
fn ended_well(child: Child) {
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
}

#[test]
fn the_slurm_job_saves_before_its_time_limit_is_queued_again_and_goes_on() {
    let workplace = Workplace::new(48);
    let first = job(&workplace);
    let waiting = Instant::now();
    let has_begun = || {
        std::fs::read_to_string(workplace.path("run/metrics.jsonl"))
            .is_ok_and(|text| text.contains("\"step\":1,"))
    };
    while !has_begun() {
        assert!(waiting.elapsed() < Duration::from_secs(300), "no step in 300 s");
        std::thread::sleep(Duration::from_millis(10));
    }
    let sent = Command::new("kill").args(["-USR1", &first.id().to_string()]).status().unwrap();
    assert!(sent.success(), "the job had ended");
    ended_well(first);
    assert_eq!(std::fs::read_to_string(workplace.path("asked")).unwrap(), "requeue 42\n");
    assert!(!workplace.path("run/model").exists(), "the run was over before it was stopped");

    ended_well(job(&workplace));
    assert!(workplace.path("run/model/model.safetensors").exists());
    assert_eq!(
        std::fs::read_to_string(workplace.path("asked")).unwrap(),
        "requeue 42\n",
        "a run that is done"
    );
    let steps = workplace.metrics().iter().filter(|line| line.contains("\"loss\"")).count();
    assert_eq!(steps, 96, "every step once");
}
