//! Compiles `kernels/*.cu` twice over: by nvcc for real GPUs, where there is one, and as host C++ for the emulated
//! device, on hosts that have one. `MMPO_FAST_CUDA=require|auto|off` says what to do about nvcc:
//!
//! - `auto` (default): without an nvcc, one warning and a program without GPU support;
//! - `require`: without an nvcc, or with a warning, a register spill or a stack frame in any kernel, the build fails;
//! - `off`: nvcc is not looked for.
//!
//! `MMPO_FAST_EMULATED=auto|off`: whether the emulated device is built where it can be, which is on x86-64 Linux.
//!
//! Nothing links against the CUDA driver or a CUDA shared library: the runtime is the static one, and the driver and
//! cuBLASLt are loaded at run time.

#[path = "build/choices.rs"]
mod choices;
#[path = "kernels/emulator/compile.rs"]
mod compile;
#[path = "build/emulated.rs"]
mod emulated;
#[path = "build/nvcc.rs"]
mod nvcc;
#[path = "build/objects.rs"]
mod objects;
#[path = "build/ptxas.rs"]
mod ptxas;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use choices::GpuKernels;

/// What stops the build, or is worth a warning: text for people.
type Result<T> = std::result::Result<T, String>;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    println!("cargo:rustc-check-cfg=cfg(mmpo_gpu_kernels, mmpo_emulated, mmpo_emulated_by_clang)");
    // A path that does not exist would make cargo run this, and compile the crate, every time; so the script that
    // installs the toolchain touches this file.
    for path in ["build.rs", "build", "kernels", nvcc::PROJECT_NVCC] {
        if Path::new(path).exists() {
            println!("cargo:rerun-if-changed={path}");
        }
    }
    for name in
        ["MMPO_FAST_CUDA", "MMPO_FAST_EMULATED", "NVCC", "CUDA_HOME", "CUDA_PATH", "PATH", "CXX", "CXXFLAGS"]
    {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let sources = Sources::find()?;
    let out = PathBuf::from(environment("OUT_DIR")?);
    let objects = objects_folder(&out);
    // Tests take the PTX out of the objects.
    println!("cargo:rustc-env=MMPO_FAST_KERNEL_OBJECTS={}", objects.display());
    build_emulated(&sources, &objects)?;
    build_for_gpus(&sources, &out, &objects)
}

/// The folder of objects that belongs to `out`, the build script's own folder. `cargo build` and `cargo clippy` give the script
/// a folder each and take turns in the profile's folder, so the objects lie there and are compiled once for both.
fn objects_folder(out: &Path) -> PathBuf {
    // target/PROFILE/build/PACKAGE-HASH/out
    let scripts = out.ancestors().nth(2).filter(|folder| folder.ends_with("build"));
    scripts.and_then(Path::parent).unwrap_or(out).join("kernel-objects")
}

fn build_emulated(sources: &Sources, objects: &Path) -> Result<()> {
    let setting = setting("MMPO_FAST_EMULATED");
    let (arch, os) = (environment("CARGO_CFG_TARGET_ARCH")?, environment("CARGO_CFG_TARGET_OS")?);
    let without = choices::without_emulated(setting.as_deref(), &arch, &os)?;
    if without.is_none() {
        emulated::build(sources, &objects::Cache::new(objects, &sources.emulated_headers)?)?;
        println!("cargo:rustc-cfg=mmpo_emulated");
    }
    let described = without.map_or("built in".to_owned(), |why| format!("none ({why})"));
    println!("cargo:rustc-env=MMPO_FAST_EMULATED_DEVICE={described}");
    Ok(())
}

fn build_for_gpus(sources: &Sources, out: &Path, objects: &Path) -> Result<()> {
    let asked = GpuKernels::of(setting("MMPO_FAST_CUDA").as_deref())?;
    if asked == GpuKernels::Off {
        describe("none (built with MMPO_FAST_CUDA=off)", "0");
        return Ok(());
    }
    let toolkit = match nvcc::Toolkit::find() {
        Ok(toolkit) => toolkit,
        Err(why) if asked == GpuKernels::Require => {
            return Err(format!(
                "MMPO_FAST_CUDA=require, but {why}.\nRun tools/setup_cuda.sh, or set NVCC or CUDA_HOME."
            ));
        }
        Err(why) => {
            describe(&format!("none ({why} when this was built)"), "0");
            println!(
                "cargo:warning=built without GPU kernels: {why}. tools/setup_cuda.sh installs one; MMPO_FAST_CUDA=off silences this."
            );
            return Ok(());
        }
    };
    let cache = objects::Cache::new(objects, &sources.headers)?;
    let compiled = toolkit.compile(sources, &cache)?;
    let findings = ptxas::review(&compiled, &out.join("ptxas"))?;
    ptxas::write_resources(&compiled, &toolkit.build, &out.join("ptxas"))?;
    if asked == GpuKernels::Require && !findings.is_empty() {
        return Err(format!(
            "MMPO_FAST_CUDA=require, but nvcc had something to say:\n{}",
            findings.join("\n")
        ));
    }
    for finding in findings {
        println!("cargo:warning={finding}");
    }
    toolkit.link();
    describe(&format!("nvcc {}, {}", toolkit.version, nvcc::TARGETS_FOR_PEOPLE), &toolkit.version);
    println!("cargo:rustc-cfg=mmpo_gpu_kernels");
    Ok(())
}

/// What `mmpo-fast --version --verbose` says of this build, and the CUDA version that the driver must support.
fn describe(kernels: &str, version: &str) {
    println!("cargo:rustc-env=MMPO_FAST_GPU_KERNELS={kernels}");
    println!("cargo:rustc-env=MMPO_FAST_CUDA_VERSION={version}");
}

/// Puts the objects of a build into a static library and tells cargo to link it.
pub fn archive(name: &str, objects: &[objects::Compiled]) -> Result<()> {
    cc::Build::new()
        .cpp(true)
        .objects(objects.iter().map(|compiled| &compiled.object))
        .try_compile(name)
        .map_err(|error| format!("cannot archive lib{name}.a: {error}"))
}

/// What a person may have set; what is not UTF-8 is shown and then refused as an unknown value.
fn setting(name: &str) -> Option<String> {
    std::env::var_os(name).map(|value| value.to_string_lossy().into_owned())
}

fn environment(name: &str) -> Result<String> {
    std::env::var(name).map_err(|error| format!("{name}: {error}"))
}

/// The kernels' files, sorted, relative to the package.
pub struct Sources {
    /// `kernels/*.cu`: both lives.
    pub kernels: Vec<PathBuf>,
    /// What kernels may include; a change of any of them recompiles all.
    pub headers: Vec<PathBuf>,
    /// Those, and the emulated device's.
    pub emulated_headers: Vec<PathBuf>,
}

impl Sources {
    fn find() -> Result<Self> {
        let mut headers = files("kernels", &["h", "cuh"])?;
        headers.extend(files("kernels/common", &["h", "cuh"])?);
        let emulated_headers = [headers.clone(), files("kernels/emulator", &["h"])?].concat();
        Ok(Sources { kernels: files("kernels", &["cu"])?, headers, emulated_headers })
    }
}

fn files(folder: &str, extensions: &[&str]) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).map_err(|error| format!("{folder}: {error}"))?;
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| format!("{folder}: {error}"))?.path();
        let extension = path.extension().and_then(|extension| extension.to_str());
        if extension.is_some_and(|extension| extensions.contains(&extension)) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}
