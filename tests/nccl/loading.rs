//! Looking for NCCL where there is none, or half of one.

use std::path::Path;
use std::process::Command;

use miette::Diagnostic as _;
use mmpo_fast::device::Collectives;
use mmpo_fast::device::cuda::libraries;

use crate::ranks::{self, On};

/// What a rank says that looks for NCCL in `folder`.
fn report_in(folder: &Path) -> String {
    let ended =
        ranks::start("loading", On::Cpu, 1, &[("LD_LIBRARY_PATH", folder.to_str().unwrap())]).finish();
    assert!(ended[0].success, "{}", ended[0].output);
    ended[0].output.clone()
}

/// The scenario of a rank.
pub fn report<D: Collectives>(device: &D) {
    println!("version {:?}", libraries::nccl_version());
    match device.new_group() {
        Ok(_) => println!("a group"),
        Err(error) => {
            assert_eq!(error.exit_code(), 6);
            println!("{error}; help: {}", error.help().unwrap());
        }
    }
}

#[test]
fn the_library_of_the_tests_is_found_by_the_programs_own_loader() {
    let report = report_in(crate::support::nccl::folder());
    assert!(report.contains("version Some(\"2.27.3\")"), "{report}");
    assert!(report.contains("a group"), "{report}");
}

#[test]
fn a_missing_library_is_one_error_that_says_which_package_has_it() {
    let folder = tempfile::tempdir().unwrap();
    let report = report_in(folder.path());
    if report.contains("version Some") {
        return eprintln!("NCCL is installed here");
    }
    for part in [
        "is not found: libnccl.so.2: ",
        "; libnccl.so: ",
        "help: install NVIDIA's package libnccl2",
        "LD_LIBRARY_PATH",
    ] {
        assert!(report.contains(part), "no `{part}` in:\n{report}");
    }
}

#[test]
fn a_library_without_a_function_is_one_error_that_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake_driver/libnccl.c");
    let mut command = Command::new("cc");
    command.args(["-shared", "-fPIC", "-o"]).arg(folder.path().join("libnccl.so.2")).arg(source);
    assert!(command.status().unwrap().success());
    let report = report_in(folder.path());
    assert!(report.contains("the NCCL 2.27.5 that is found has no ncclGetErrorString"), "{report}");
}
