//! What the build promises of the binary: no CUDA library at load time, and a start on any machine.

use std::process::{Command, Output};

fn run(program: &str, arguments: &[&str]) -> Output {
    Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"))
}

/// The dynamic libraries the loader would need, as `ldd` lists them.
#[test]
#[cfg(target_os = "linux")]
fn links_no_cuda_library() {
    let output = run("ldd", &[env!("CARGO_BIN_EXE_mmpo-fast")]);
    let libraries = String::from_utf8_lossy(&output.stdout).to_lowercase();
    assert!(libraries.contains("libc.so"), "ldd lists nothing: {libraries}");
    for forbidden in ["cuda", "cublas", "nvidia", "nccl"] {
        assert!(!libraries.contains(forbidden), "{forbidden} is linked:\n{libraries}");
    }
}

/// The driver's absence shows when a GPU is asked for, not before `main`.
#[test]
fn starts_without_a_gpu() {
    let output = run(env!("CARGO_BIN_EXE_mmpo-fast"), &["--version"]);
    assert!(output.status.success(), "{output:?}");
}

/// Without an nvcc the library says so; with one it names the compiler and its targets.
#[test]
fn build_info_says_which_kernels_there_are() {
    let info = mmpo_fast::device::cuda::build_info();
    let kernels = info.starts_with("nvcc ") && info.contains("sm_80") && info.contains("sm_90a");
    let none = info.starts_with("none (") && info.len() > "none ()".len();
    assert!(kernels || none, "{info}");
}
