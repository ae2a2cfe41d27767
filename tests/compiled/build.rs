//! What the build promises: a binary without CUDA libraries that starts anywhere, objects that are compiled again only
//! when their input changed, a complaint for every spill, and a table of what each kernel takes.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Mutex;

use mmpo_fast::device::cuda::{build_info, emulated_info};

use crate::choices::{GpuKernels, without_emulated};
use crate::objects::{Cache, Compiled, Job};
use crate::ptxas;

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

/// The driver's absence shows when a GPU is asked for, not before `main`; the version says which kernels there are.
#[test]
fn starts_without_a_gpu_and_names_its_kernels() {
    let output = run(env!("CARGO_BIN_EXE_mmpo-fast"), &["--version", "--verbose"]);
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains(build_info()), "{text}");
    let kernels = build_info().starts_with("nvcc ") && build_info().contains("sm_80, sm_90a, PTX");
    let none = build_info().starts_with("none (") && build_info().len() > "none ()".len();
    assert!(kernels || none, "{text}");
    assert!(text.contains(emulated_info()), "{text}");
    assert_eq!(emulated_info() == "built in", cfg!(mmpo_emulated), "{text}");
}

/// The emulated device is built on x86-64 Linux, left out elsewhere or when asked, and says why.
#[test]
fn the_emulated_device_is_left_out_where_it_cannot_run() {
    for setting in [None, Some(""), Some("auto")] {
        assert_eq!(without_emulated(setting, "x86_64", "linux"), Ok(None));
        for (arch, os) in [("aarch64", "linux"), ("x86_64", "macos"), ("x86_64", "windows")] {
            let why = without_emulated(setting, arch, os).unwrap().unwrap();
            assert!(why.contains(arch) && why.contains(os), "{why}");
        }
    }
    let why = without_emulated(Some("off"), "x86_64", "linux").unwrap().unwrap();
    assert!(why.contains("MMPO_FAST_EMULATED=off"), "{why}");
    let error = without_emulated(Some("on"), "x86_64", "linux").unwrap_err();
    assert!(error.contains("`on`") && error.contains("auto or off"), "{error}");
    // This very binary was built by that decision.
    let setting = if emulated_info().contains("MMPO_FAST_EMULATED=off") { Some("off") } else { None };
    let without = without_emulated(setting, std::env::consts::ARCH, std::env::consts::OS).unwrap();
    assert_eq!(without.is_none(), cfg!(mmpo_emulated), "{}", emulated_info());
}

#[test]
fn what_nvcc_is_asked_for() {
    for (setting, asked) in [
        (None, GpuKernels::Auto),
        (Some(""), GpuKernels::Auto),
        (Some("auto"), GpuKernels::Auto),
        (Some("require"), GpuKernels::Require),
        (Some("off"), GpuKernels::Off),
    ] {
        assert_eq!(GpuKernels::of(setting), Ok(asked));
    }
    let error = GpuKernels::of(Some("yes")).unwrap_err();
    assert!(error.contains("`yes`") && error.contains("auto, require or off"), "{error}");
}

/// Compiles `sources` of `folder` under `fingerprint`, and returns which of them were really compiled.
fn compile(folder: &Path, sources: &[PathBuf], fingerprint: &str) -> Vec<String> {
    let compiled = Mutex::new(Vec::new());
    let jobs: Vec<Job<'_>> = sources
        .iter()
        .map(|source| {
            let compiled = &compiled;
            let compile = move |object: &Path| {
                let name = source.file_name().unwrap().to_string_lossy().into_owned();
                std::fs::write(object, "object").map_err(|error| error.to_string())?;
                compiled.lock().unwrap().push(name.clone());
                Ok(format!("report of {name}"))
            };
            Job { source: source.clone(), fingerprint: fingerprint.into(), compile: Box::new(compile) }
        })
        .collect();
    let cache = Cache::new(&folder.join("out"), &[folder.join("common.cuh")]).unwrap();
    let results = cache.compile("gpu", &jobs).unwrap();
    for (result, source) in results.iter().zip(sources) {
        assert!(result.object.exists(), "{}", result.object.display());
        let name = source.file_name().unwrap().to_string_lossy();
        assert_eq!(result.output, format!("report of {name}"), "kept when nothing is compiled");
    }
    drop(jobs);
    let mut compiled = compiled.into_inner().unwrap();
    compiled.sort();
    compiled
}

#[test]
fn a_touched_kernel_is_compiled_alone() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let sources = ["rope.cu", "swiglu.cu"].map(|name| folder.join(name));
    for file in sources.iter().chain(&[folder.join("common.cuh")]) {
        std::fs::write(file, "first").unwrap();
    }
    let all = ["rope.cu", "swiglu.cu"];
    assert_eq!(compile(folder, &sources, "-O3"), all);
    assert!(compile(folder, &sources, "-O3").is_empty());
    std::fs::write(&sources[1], "second").unwrap();
    assert_eq!(compile(folder, &sources, "-O3"), ["swiglu.cu"]);
    assert_eq!(compile(folder, &sources, "-O2"), all, "other flags");
    std::fs::write(folder.join("common.cuh"), "second").unwrap();
    assert_eq!(compile(folder, &sources, "-O2"), all, "another header");
}

/// What nvcc prints of a clean kernel, of one that spills, and a warning.
#[test]
fn spills_stack_frames_and_warnings_are_found() {
    let clean = "ptxas info    : Compiling entry function 'clean' for 'sm_80'\n\
        ptxas info    : Function properties for clean\n    \
        0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
        ptxas info    : Used 32 registers, used 1 barriers\n";
    let spilled = "ptxas info    : Compiling entry function 'spilled' for 'sm_90a'\n    \
        16 bytes stack frame, 12 bytes spill stores, 12 bytes spill loads\n";
    let warning = "kernels/rope.cu(7): warning #177-D: variable \"x\" was declared but never referenced\n";
    let folder = tempfile::tempdir().unwrap();
    let review = |output: String| {
        let compiled = Compiled { source: "kernels/rope.cu".into(), object: "rope.o".into(), output };
        ptxas::review(&[compiled], folder.path()).unwrap()
    };
    assert!(review(clean.to_owned()).is_empty());
    assert_eq!(std::fs::read_to_string(folder.path().join("rope.txt")).unwrap(), clean);
    let findings = review([clean, spilled, warning].concat());
    assert_eq!(findings.len(), 2, "{findings:?}");
    assert!(
        findings[0].starts_with("kernels/rope.cu: 'spilled' for 'sm_90a': 16 bytes stack"),
        "{findings:?}"
    );
    assert!(findings[1].contains("#177-D"), "{findings:?}");
}

/// Kernel names without hashes and parameters, and the numbers of each.
#[test]
fn resources_are_read_from_what_ptxas_prints() {
    let entry = |name: &str, used: &str| {
        format!(
            "ptxas info    : Compiling entry function '{name}' for 'sm_90a'\n\
             ptxas info    : Function properties for {name}\n    \
             8 bytes stack frame, 4 bytes spill stores, 2 bytes spill loads\n\
             ptxas info    : Used {used}\n"
        )
    };
    let hash = "_ZN44_GLOBAL__N__af19f3eb_11_rms_norm_cu_0360fd70";
    let output = [
        entry(&format!("{hash}10add_kernelILb0EEEvP9mmpo_bf16PKS1_S4_l"), "29 registers, used 0 barriers"),
        entry(
            &format!("{hash}23rms_norm_forward_kernelINS_9RowLayoutILi2ELi4ELb1EEELb1EEEvP9mmpo_bf16"),
            "52 registers, used 1 barriers, 1056 bytes smem, 440 bytes cmem[0]",
        ),
        entry("_ZN4mmpo3gpu19add_partials_kernelEPfPKfii", "24 registers, used 0 barriers"),
        entry("no_mangled_name", "7 registers"),
    ]
    .concat();
    let folder = tempfile::tempdir().unwrap();
    let compiled = Compiled { source: "kernels/rms_norm.cu".into(), object: "rms_norm.o".into(), output };
    ptxas::write_resources(&[compiled], "13.0.88", folder.path()).unwrap();
    let text = std::fs::read_to_string(folder.path().join("resources.csv")).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(
        lines,
        [
            "# nvcc 13.0.88",
            "file,kernel,target,registers,stack,spill_stores,spill_loads,shared",
            "rms_norm.cu,\"add_kernel<false>\",sm_90a,29,8,4,2,0",
            "rms_norm.cu,\"add_partials_kernel\",sm_90a,24,8,4,2,0",
            "rms_norm.cu,\"no_mangled_name\",sm_90a,7,8,4,2,0",
            "rms_norm.cu,\"rms_norm_forward_kernel<RowLayout<2, 4, true>, true>\",sm_90a,52,8,4,2,1056",
        ]
    );
}
