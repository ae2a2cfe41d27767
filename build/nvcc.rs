//! The kernels for real GPUs: finding nvcc, and what it is asked for.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::objects::{Cache, Compiled, Job};
use crate::{Result, Sources, archive, environment};

/// Machine code for A100 and H100, and PTX from which the driver compiles for any other GPU since Ampere. The PTX for
/// sm_90a is for tests, which execute it on the host; no driver asks for it where there is machine code.
const TARGETS: [&str; 3] = [
    "arch=compute_80,code=sm_80",
    "arch=compute_90a,code=[compute_90a,sm_90a]",
    "arch=compute_80,code=compute_80",
];
pub const TARGETS_FOR_PEOPLE: &str = "sm_80, sm_90a, PTX for later GPUs";

/// Where tools/setup_cuda.sh puts nvcc.
pub const PROJECT_NVCC: &str = ".toolchain/nvidia/cu13/bin/nvcc";

/// The oldest toolkit that knows sm_90a in full and has `cudaGetDriverEntryPointByVersion`.
const OLDEST: (u32, u32) = (12, 5);

pub struct Toolkit {
    nvcc: PathBuf,
    /// What holds `bin`, `include` and the libraries.
    root: PathBuf,
    /// Where libcudart_static.a lies.
    libraries: PathBuf,
    /// `major.minor`.
    pub version: String,
    /// `major.minor.build`: another compiler gives other registers.
    pub build: String,
}

impl Toolkit {
    /// The first usable nvcc of `NVCC`, `CUDA_HOME`, `CUDA_PATH`, `.toolchain/`, `PATH` and the usual folder; the error
    /// says what was wrong with those that were found.
    pub fn find() -> Result<Self> {
        let mut rejected = Vec::new();
        for candidate in candidates()? {
            // nvcc reads nvcc.profile beside the path it is called by: a symlink from elsewhere does not work.
            let Ok(nvcc) = candidate.canonicalize() else { continue };
            match Toolkit::at(nvcc) {
                Ok(toolkit) => return Ok(toolkit),
                Err(why) => rejected.push(why),
            }
        }
        Err(if rejected.is_empty() { "no nvcc was found".to_owned() } else { rejected.join("; ") })
    }

    fn at(nvcc: PathBuf) -> Result<Self> {
        let shown = nvcc.display();
        let output = Command::new(&nvcc).arg("--version").output();
        let output = output.map_err(|error| format!("{shown} does not run: {error}"))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let version =
            text.split("release ").nth(1).and_then(|rest| rest.split(',').next()).unwrap_or_default();
        let number = |index| version.split('.').nth(index).and_then(|part| part.parse().ok()).unwrap_or(0);
        let (major, minor) = (number(0), number(1));
        if (major, minor) < OLDEST {
            let (oldest_major, oldest_minor) = OLDEST;
            return Err(format!(
                "{shown} is CUDA `{version}`, {oldest_major}.{oldest_minor} or later is needed"
            ));
        }
        let root = nvcc.parent().and_then(Path::parent).unwrap_or(Path::new("/"));
        let libraries = ["lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"]
            .map(|folder| root.join(folder))
            .into_iter()
            .find(|folder| folder.join("libcudart_static.a").exists())
            .ok_or_else(|| format!("{shown} comes without libcudart_static.a"))?;
        let build = text.split(", V").nth(1).and_then(|rest| rest.split_whitespace().next());
        let build = build.unwrap_or(version).to_owned();
        let root = root.to_owned();
        Ok(Toolkit { version: format!("{major}.{minor}"), build, nvcc, root, libraries })
    }

    /// Compiles and archives every kernel.
    pub fn compile(&self, sources: &Sources, cache: &Cache) -> Result<Vec<Compiled>> {
        let host_compiler = cc::Build::new()
            .cpp(true)
            .try_get_compiler()
            .map_err(|error| format!("no C++ compiler for nvcc: {error}"))?;
        let jobs: Vec<Job<'_>> = sources
            .kernels
            .iter()
            .map(|source| {
                let arguments = self.arguments(source, host_compiler.path());
                Job {
                    source: source.clone(),
                    fingerprint: format!("{:?} {} {arguments:?}", self.nvcc, self.version),
                    compile: Box::new(move |object| self.run(&arguments, source, object)),
                }
            })
            .collect();
        let compiled = cache.compile("gpu", &jobs)?;
        archive("mmpo_kernels_gpu", &compiled)?;
        Ok(compiled)
    }

    fn run(&self, arguments: &[OsString], source: &Path, object: &Path) -> Result<String> {
        let mut command = Command::new(&self.nvcc);
        command.args(arguments).arg("-c").arg(source).arg("-o").arg(object);
        let output = command.output().map_err(|error| format!("{}: {error}", self.nvcc.display()))?;
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        if output.status.success() {
            return Ok(text);
        }
        Err(format!("nvcc does not compile {}:\n{text}", source.display()))
    }

    fn arguments(&self, source: &Path, host_compiler: &Path) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = ["-std=c++17", "-O3", "-lineinfo", "-Ikernels", "-Xptxas", "-v"]
            .iter()
            .chain(&["-Xcompiler", "-fPIC,-Wall,-Wextra", "-ccbin"])
            .map(OsString::from)
            .collect();
        arguments.push(host_compiler.into());
        for target in TARGETS.iter().filter(|target| !hopper_only(source) || target.contains("compute_90a")) {
            arguments.extend(["-gencode".into(), target.into()]);
        }
        arguments
    }

    /// The static runtime and what it needs of the system; no CUDA shared library.
    pub fn link(&self) {
        println!("cargo:rustc-link-search=native={}", self.libraries.display());
        println!("cargo:rustc-link-lib=static=cudart_static");
        // For tests that compile against the same headers and take the kernels apart.
        println!("cargo:rustc-env=MMPO_FAST_TOOLKIT={}", self.root.display());
        for library in ["dl", "rt", "pthread"] {
            println!("cargo:rustc-link-lib={library}");
        }
    }
}

/// Kernels on wgmma or TMA are named `*_sm90.cu`: no other target has those instructions.
fn hopper_only(source: &Path) -> bool {
    source.file_stem().is_some_and(|stem| stem.to_string_lossy().ends_with("_sm90"))
}

fn candidates() -> Result<Vec<PathBuf>> {
    let package = PathBuf::from(environment("CARGO_MANIFEST_DIR")?);
    let mut paths: Vec<PathBuf> = std::env::var_os("NVCC").map(PathBuf::from).into_iter().collect();
    for name in ["CUDA_HOME", "CUDA_PATH"] {
        paths.extend(std::env::var_os(name).map(|folder| Path::new(&folder).join("bin/nvcc")));
    }
    paths.push(package.join(PROJECT_NVCC));
    let search_path = std::env::var_os("PATH").unwrap_or_default();
    paths.extend(std::env::split_paths(&search_path).map(|folder| folder.join("nvcc")));
    paths.push("/usr/local/cuda/bin/nvcc".into());
    Ok(paths)
}
