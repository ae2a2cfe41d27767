//! The kernels as host C++ for the emulated device, in its fast and its instrumented variant.

use std::path::{Path, PathBuf};

use crate::compile::{Compiler, Family, RUNTIME_SOURCES, Variant};
use crate::objects::{Cache, Job};
use crate::{Result, Sources, archive};

/// Where the headers of kernels and device lie.
const KERNELS: &str = "kernels";
/// Its flags and steps are part of what decides an object's content.
const COMPILE_STEPS: &str = include_str!("../kernels/emulator/compile.rs");

pub fn build(sources: &Sources, cache: &Cache) -> Result<()> {
    let tool = cc::Build::new().cpp(true).try_get_compiler().map_err(|error| {
        format!("no C++ compiler for the emulated device: {error}; install g++ or clang++, or set MMPO_FAST_EMULATED=off")
    })?;
    let compiler = Compiler::new(tool.path())?;
    for variant in [Variant::Plain, Variant::Checked] {
        let name = variant.name();
        let kernels = sources.kernels.iter().map(|source| kernel(&compiler, variant, source));
        let runtime = RUNTIME_SOURCES.iter().map(|source| runtime(&compiler, variant, source));
        let compiled = cache.compile(name, &kernels.chain(runtime).collect::<Vec<_>>())?;
        archive(&format!("mmpo_kernels_{name}"), &compiled)?;
    }
    if compiler.family == Family::Clang {
        println!("cargo:rustc-cfg=mmpo_emulated_by_clang");
    }
    println!("cargo:rustc-link-lib=pthread");
    Ok(())
}

fn kernel<'a>(compiler: &'a Compiler, variant: Variant, source: &'a Path) -> Job<'a> {
    let compile = move |object: &Path| {
        compiler.kernel(variant, Path::new(KERNELS), source, object).map(|()| String::new())
    };
    job(compiler, source.to_path_buf(), compile)
}

fn runtime<'a>(compiler: &'a Compiler, variant: Variant, source: &'a str) -> Job<'a> {
    let compile = move |object: &Path| {
        compiler.runtime(variant, Path::new(KERNELS), source, object).map(|()| String::new())
    };
    job(compiler, Path::new(KERNELS).join("emulator").join(source), compile)
}

fn job<'a>(
    compiler: &Compiler,
    source: PathBuf,
    compile: impl Fn(&Path) -> Result<String> + Send + Sync + 'a,
) -> Job<'a> {
    let fingerprint = format!("{compiler:?}\n{COMPILE_STEPS}");
    Job { source, fingerprint, compile: Box::new(compile) }
}
