//! The kernels as host C++ for the emulated device, in its fast and its instrumented variant.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::objects::{Cache, Job, archive};
use crate::{Result, Sources};

/// A variant, and what its kernels (not the device below them) are compiled with beside [`COMMON`].
struct Variant {
    name: &'static str,
    kernels: &'static [&'static str],
}

const VARIANTS: [Variant; 2] = [
    Variant { name: "plain", kernels: &[] },
    // GCC's instrumentation calls __tsan_* for every load and store; the emulated device implements those itself.
    Variant {
        name: "checked",
        kernels: &["-fsanitize=thread", "-fno-tree-vectorize", "-fno-tree-slp-vectorize"],
    },
];

const COMMON: [&str; 8] = [
    "-std=c++17",
    "-O2",
    "-march=x86-64-v3",
    "-fPIC",
    "-Ikernels",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
];

pub fn build(sources: &Sources, cache: &Cache) -> Result<()> {
    let compiler = cc::Build::new().cpp(true).try_get_compiler().map_err(|error| {
        format!("no C++ compiler for the emulated device: {error}; install g++ or clang++")
    })?;
    for variant in &VARIANTS {
        let kernels = sources.kernels.iter().map(|source| (source, variant.kernels));
        let device = sources.emulator.iter().map(|source| (source, &[][..]));
        let jobs: Vec<Job> = kernels
            .chain(device)
            .map(|(source, flags)| job(compiler.path(), source, variant.name, flags))
            .collect();
        archive(&format!("mmpo_kernels_{}", variant.name), &cache.compile(variant.name, &jobs)?)?;
    }
    println!("cargo:rustc-link-lib=pthread");
    Ok(())
}

fn job(compiler: &Path, source: &PathBuf, variant: &str, flags: &[&str]) -> Job {
    let mut arguments: Vec<OsString> = COMMON.iter().chain(flags).map(OsString::from).collect();
    arguments.push(format!("-DMMPO_EMULATED_VARIANT={variant}").into());
    // After -x every file is C++, .cu too.
    arguments.extend(["-x".into(), "c++".into()]);
    Job { source: source.clone(), program: compiler.to_path_buf(), arguments, environment: Vec::new() }
}
