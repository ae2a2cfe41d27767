//! The emulated device's own tests: kernels with planted faults, each of which must be caught at its line; fragment
//! layouts against the PTX ISA's tables; whole kernels under every timing and schedule; counters.
//!
//! The cases are C++ (`tests/emulator/*.cu`). They are compiled here for both variants into one program, which runs them
//! by name. Objects are kept between runs and rebuilt when their source or any header is newer.

#[path = "../../kernels/emulator/compile.rs"]
mod compile;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::SystemTime;

use compile::{Compiler, Family, Variant};

const VARIANTS: [Variant; 2] = [Variant::Plain, Variant::Checked];

/// When asynchronous operations take effect, and who runs next; as `emulator_api.h` numbers them.
#[derive(Clone, Copy, Debug)]
struct Mode {
    asynchronous: u32,
    schedule: u32,
    seed: u64,
}

const LATE: Mode = Mode { asynchronous: 0, schedule: 0, seed: 1 };
const EARLY: Mode = Mode { asynchronous: 1, schedule: 0, seed: 1 };
const SHUFFLED: Mode = Mode { asynchronous: 0, schedule: 1, seed: 5 };
const RANDOM: Mode = Mode { asynchronous: 2, schedule: 1, seed: 9 };
const MODES: [Mode; 6] =
    [LATE, EARLY, SHUFFLED, RANDOM, Mode { seed: 10, ..RANDOM }, Mode { schedule: 1, ..EARLY }];

/// The planted faults of `faults_*.cu`: what must be said of each, by which variant, under which mode. `file` and `line`
/// in a report are checked where the source marks a line with `FAULT name`.
#[rustfmt::skip]
const FAULTS: &[(&str, Variant, Mode, &str)] = &[
    // Memory.
    ("global_read", Variant::Checked, LATE, "reads 4 bytes at offset 256 of an allocation of 256 bytes, out of bounds"),
    ("global_write", Variant::Checked, LATE, "writes 4 bytes at offset 256 of an allocation of 256 bytes, out of bounds"),
    ("global_write", Variant::Plain, LATE, "global_access_kernel wrote outside an allocation of 256 bytes, at offset 256"),
    ("global_write_before", Variant::Checked, LATE, "writes 4 bytes 4 before an allocation of 256 bytes, out of bounds"),
    ("global_write_before", Variant::Plain, LATE, "wrote outside an allocation of 256 bytes, 4 bytes before its start"),
    ("use_after_free", Variant::Checked, LATE, "reads 4 bytes at offset 0 of a freed allocation of 256 bytes"),
    ("use_after_free", Variant::Plain, LATE, "wrong data"),
    ("uninitialised_global", Variant::Checked, LATE, "that nothing has written"),
    ("uninitialised_global", Variant::Plain, LATE, "wrong data"),
    ("wild_pointer", Variant::Checked, LATE, "reads 4 bytes at 0x1000, which is no memory of the device"),
    ("wild_pointer", Variant::Plain, LATE, "block (0, 0, 0), thread (0, 0, 0): accesses 0x1000, which is not memory at all"),
    ("misaligned_vector", Variant::Checked, LATE, "misaligned access"),
    ("misaligned_load_128", Variant::Checked, LATE, "load of 16 bytes at"),
    ("misaligned_load_128", Variant::Plain, LATE, "is misaligned"),
    ("misaligned_ldmatrix", Variant::Plain, LATE, "ldmatrix: shared 0x5f8 is not aligned to 16 bytes"),
    ("shared_write", Variant::Checked, LATE, "thread (63, 0, 0), faults_memory.cu"),
    ("uninitialised_shared", Variant::Checked, LATE, "thread (5, 0, 0), faults_memory.cu"),
    ("uninitialised_shared", Variant::Plain, LATE, "wrong data: element 5 is"),
    ("static_shared_read", Variant::Checked, LATE, "reads 4 bytes at shared offset -4, out of bounds"),
    ("offset_overflow", Variant::Checked, LATE, "signed overflow in a multiplication"),
    ("local_array", Variant::Checked, LATE, "index past the end of an array"),
    ("stack_overflow", Variant::Plain, LATE, "the thread's stack overflows"),
    ("stack_overflow", Variant::Checked, LATE, "the thread's stack overflows"),
    // Order.
    ("missing_syncthreads", Variant::Checked, LATE, "which nothing has written"),
    ("missing_syncthreads", Variant::Plain, LATE, "wrong data"),
    ("write_after_read", Variant::Checked, LATE, "race in shared memory"),
    ("overwritten_too_soon", Variant::Checked, LATE, "not ordered after the read by thread"),
    ("two_writers", Variant::Checked, LATE, "race in shared memory at offset 0: write by thread 32, not ordered after the write by thread 0"),
    ("missing_syncwarp", Variant::Checked, LATE, "which nothing has written"),
    ("missing_syncwarp", Variant::Plain, LATE, "wrong data"),
    ("exited_lane", Variant::Plain, LATE, "mask ffffffff names lanes that have exited (alive: ffffffdf)"),
    ("divergent_collective", Variant::Plain, LATE, "divergent collective: vote.sync"),
    ("divergent_elect", Variant::Plain, LATE, "divergent collective: elect.sync"),
    ("shuffle_outside_mask", Variant::Plain, LATE, "reads lane 20, which is not in mask 0000ffff"),
    ("barrier_deadlock", Variant::Plain, LATE, "deadlock:\n  waiting for barrier 0, where 32 of 64 threads have arrived, at faults_order.cu:"),
    ("barrier_deadlock", Variant::Checked, RANDOM, "waiting for barrier 1, where 32 of 64 threads have arrived"),
    ("named_barrier_count", Variant::Plain, LATE, "bar.sync 1 of 96 threads, but others wait there for 64"),
    ("missing_copy_wait", Variant::Plain, LATE, "the thread exits without waiting for this cp.async"),
    ("missing_copy_commit", Variant::Plain, LATE, "the thread exits without waiting for this cp.async"),
    ("missing_copy_sync", Variant::Plain, LATE, "wrong data"),
    ("missing_copy_sync", Variant::Checked, LATE, "which nothing has written"),
    ("lax_copy_wait", Variant::Plain, LATE, "wrong data"),
    ("lax_copy_wait", Variant::Checked, EARLY, "which nothing has written"),
    ("tail_without_zero_fill", Variant::Checked, LATE, "reads 16 bytes at offset 400 of an allocation of 400 bytes, out of bounds"),
    ("block_order", Variant::Plain, SHUFFLED, "wrong data"),
    ("block_order", Variant::Checked, LATE, "that another block wrote in the same launch: the result depends on the order of blocks"),
    ("warp_order", Variant::Plain, SHUFFLED, "wrong data"),
    ("turn_too_late", Variant::Plain, LATE, "of the counter at 0x"),
    ("turn_too_late", Variant::Checked, RANDOM, "which stands at 0, while no running block can move it, at faults_order.cu:"),
    ("turn_taken_twice", Variant::Plain, SHUFFLED, "waits for turn 2 of a counter that stands at 3 already"),
    ("turn_of_unstarted_block", Variant::Plain, LATE, "which stands at 0, while no running block can move it, at faults_order.cu:"),
    ("turn_without_wait", Variant::Plain, LATE, "of a counter that stands at 0"),
    // Hopper.
    ("register_pool", Variant::Plain, LATE, "want 65536 registers, of 64512 that it can be launched with"),
    ("turn_without_fence", Variant::Plain, LATE, "a bulk store after wait_for_turn without a fence.proxy.async.global"),
    ("turn_passed_early", Variant::Plain, LATE, "the thread passes its turn without waiting for this bulk store"),
    ("load_without_wait", Variant::Plain, LATE, "the block ends without waiting for this load to shared memory"),
    ("wrong_parity", Variant::Checked, LATE, "which nothing has written"),
    ("wrong_byte_count", Variant::Plain, LATE, "which is in phase 0 with 0 of 1 arrivals and 16 bytes to come"),
    ("missing_arrival", Variant::Plain, LATE, "which is in phase 0 with 1 of 2 arrivals and 0 bytes to come"),
    ("uninitialised_mbarrier", Variant::Plain, LATE, "is not an initialised mbarrier"),
    ("unordered_mbarrier_init", Variant::Checked, LATE, "race in shared memory at offset 8192"),
    ("swizzle_mismatch", Variant::Plain, LATE, "wrong data"),
    ("missing_full_wait", Variant::Checked, LATE, "which nothing has written"),
    ("missing_empty_wait", Variant::Plain, LATE, "mbarrier.arrive: shared 0xc00 expects 0 more arrivals"),
    ("missing_empty_wait", Variant::Checked, EARLY, "pipeline_kernel"),
    ("empty_parity", Variant::Plain, LATE, "deadlock:\n  waiting for parity 0 of the mbarrier"),
    ("missing_proxy_fence", Variant::Checked, LATE, "missing fence.proxy.async in shared memory"),
    ("missing_store_commit", Variant::Plain, LATE, "the thread exits without waiting for this bulk store"),
    ("missing_store_wait", Variant::Plain, LATE, "the thread exits without waiting for this bulk store"),
    ("missing_store_sync", Variant::Plain, LATE, "wrong data"),
    ("missing_store_sync", Variant::Checked, EARLY, "which nothing has written"),
    ("wgmma_without_fence", Variant::Plain, LATE, "wgmma without a wgmma.fence"),
    ("missing_wgmma_commit", Variant::Plain, LATE, "the thread exits without waiting for this wgmma"),
    ("missing_wgmma_wait", Variant::Plain, LATE, "the thread exits without waiting for this wgmma"),
    ("wgmma_proxy_fence", Variant::Checked, LATE, "missing fence.proxy.async in shared memory"),
    ("accumulator_read_early", Variant::Checked, LATE, "reads an accumulator of wgmma before the wgmma.wait_group"),
    ("operand_overwritten", Variant::Checked, LATE, "not ordered after the read by wgmma of warpgroup 0"),
    ("operand_overwritten", Variant::Plain, LATE, "wrong data"),
    ("descriptor_stride", Variant::Plain, LATE, "wrong data"),
    // Clusters.
    ("unordered_cluster_init", Variant::Plain, EARLY, "is not an initialised mbarrier"),
    ("unordered_cluster_init", Variant::Checked, RANDOM, "faults_clusters.cu"),
    ("missing_init_fence", Variant::Checked, LATE, "race in shared memory"),
    ("missing_cluster_exit", Variant::Plain, LATE, "mbarrier.arrive: the cluster's block 0 has exited, and its shared memory with it"),
    ("cluster_barrier", Variant::Plain, LATE, "waiting for the cluster's barrier, where 160 of 192 threads have arrived"),
    ("missing_peer_release", Variant::Plain, LATE, "with 2 of 4 arrivals and 0 bytes to come"),
    ("missing_peer_wait", Variant::Checked, LATE, "which nothing has written"),
    ("missing_peer_wait", Variant::Checked, EARLY, "write by an asynchronous load, not ordered after the read by thread"),
    ("missing_peer_wait", Variant::Plain, RANDOM, "wrong data"),
    ("multicast_outside", Variant::Plain, LATE, "TMA multicast: mask 5 names blocks that a cluster of 2 has not"),
];

/// The files of planted faults.
const FAULT_SOURCES: [&str; 4] =
    ["faults_memory.cu", "faults_order.cu", "faults_hopper.cu", "faults_clusters.cu"];

#[test]
fn fragments_lie_where_the_isa_says() {
    expect_sound(&["layouts.cu"], &[LATE, EARLY]);
}

#[test]
fn tensor_copies_swizzles_and_edges() {
    expect_sound(&["tensors.cu"], &[LATE, EARLY, RANDOM]);
}

#[test]
fn collectives_conversions_and_atomics() {
    expect_sound(&["collectives.cu", "instructions.cu"], &[LATE, RANDOM]);
}

#[test]
fn whole_kernels_under_every_timing_and_schedule() {
    expect_sound(&["programs.cu"], &MODES);
}

#[test]
fn hopper_gemms_under_every_timing_and_schedule() {
    expect_sound(&["gemm.cu"], &[LATE, EARLY, RANDOM, Mode { schedule: 1, ..EARLY }]);
}

#[test]
fn clusters_under_every_timing_and_schedule() {
    expect_sound(&["multicast.cu"], &MODES);
}

#[test]
fn counters_count() {
    expect_sound(&["counters.cu"], &[LATE]);
}

#[test]
fn right_forms_of_the_faulty_kernels_pass() {
    expect_sound(&FAULT_SOURCES, &MODES);
}

#[test]
fn planted_faults_are_caught() {
    expect_faults_caught(program());
}

/// The instrumentation of g++ and of clang differ; both must find the same. The files that fault, and the one of the sound
/// case between them, are enough to tell.
#[test]
fn planted_faults_are_caught_when_clang_compiles() {
    if chosen_compiler().is_ok_and(|compiler| compiler.family == Family::Clang) {
        return eprintln!("clang compiles all tests here: skipped");
    }
    let versions = (14..30).rev().map(|version| format!("clang++-{version}"));
    let names = std::iter::once("clang++".to_owned()).chain(versions);
    let Some(clang) = names.into_iter().find_map(|name| Compiler::new(name).ok()) else {
        return eprintln!("no clang++ here: skipped");
    };
    let wanted =
        |source: &str| FAULT_SOURCES.contains(&source) || ["programs.cu", "registry.cu"].contains(&source);
    let program = build(&clang, "emulator_clang", wanted);
    expect_faults_caught(&program.unwrap_or_else(|error| panic!("{error}")));
}

fn expect_faults_caught(program: &Path) {
    let marks = marked_lines();
    let mut missed = Vec::new();
    for &(case, variant, mode, expected) in FAULTS {
        let name = format!("{case}!");
        // A sound case afterwards: the device must stay usable.
        let outcomes = run_cases(program, variant, mode, &[&name, "softmax"]);
        let report = &outcomes[&name];
        if !report.contains(expected) {
            missed.push(format!("{case}, {variant:?}, {mode:?}: expected '{expected}' in: {report}"));
        }
        // Reports that name a line must name a marked one.
        let named =
            marks.get(case).is_some_and(|lines| !lines.iter().any(|line| report.contains(line.as_str())));
        if report.contains(".cu:") && named {
            missed.push(format!("{case}: expected one of the lines {:?} in: {report}", marks[case]));
        }
        if !outcomes["softmax"].is_empty() {
            missed.push(format!(
                "{case}, {variant:?}: the device is not usable afterwards: {}",
                outcomes["softmax"]
            ));
        }
    }
    assert!(missed.is_empty(), "{}", missed.join("\n\n"));
}

#[test]
fn every_planted_fault_is_expected_to_be_caught() {
    for case in FAULT_SOURCES.iter().flat_map(|source| case_names(source)) {
        assert!(FAULTS.iter().any(|(name, ..)| *name == case), "the table of faults lacks {case}");
    }
}

/// The same cases compile for GPUs without a word from nvcc, and pass on a Hopper GPU; without one they say so.
#[cfg(mmpo_gpu_kernels)]
#[test]
fn the_same_cases_on_a_gpu() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("layouts");
    let script = root.join("tools/gpu/build_layouts.sh");
    let built = Command::new("bash").arg(script).arg(&program).output().unwrap();
    let words = [built.stdout, built.stderr].concat();
    assert!(built.status.success() && words.is_empty(), "{}", String::from_utf8_lossy(&words));

    let sources =
        ["layouts.cu", "tensors.cu", "collectives.cu", "instructions.cu", "programs.cu", "multicast.cu"];
    // These are about the emulated device's own memory and limits.
    let emulated_only = ["memory_calls", "refused_launches"];
    let expected: Vec<String> = sources
        .iter()
        .flat_map(|source| case_names(source))
        .filter(|name| !emulated_only.contains(&name.as_str()))
        .collect();
    let output = Command::new(&program).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let hopper = mmpo_fast::device::cuda::gpus()
        .is_ok_and(|gpus| gpus.first().is_some_and(|gpu| gpu.capability == (9, 0)));
    for name in &expected {
        let outcome = if hopper { format!("ok {name}\n") } else { format!("FAILED {name}: ") };
        assert!(text.contains(&outcome), "`{outcome}` is missing in:\n{text}");
    }
    assert_eq!(output.status.code(), Some(i32::from(!hopper)), "{text}");
    let passed = if hopper { expected.len() } else { 0 };
    assert!(
        text.ends_with(&format!("{passed} of {} cases are as on the emulated device\n", expected.len())),
        "{text}"
    );
}

#[test]
fn random_schedules_repeat_with_their_seed() {
    let run = |seed| {
        run_cases(program(), Variant::Plain, Mode { seed, ..RANDOM }, &["warp_order!", "block_order!"])
    };
    assert_eq!(run(3), run(3));
    let different = (4..12).any(|seed| run(seed) != run(3));
    assert!(different, "eight other seeds gave the same orders");
}

/// Every case of the files reports nothing, in both variants.
fn expect_sound(sources: &[&str], modes: &[Mode]) {
    let names: Vec<String> = sources.iter().flat_map(|source| case_names(source)).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    for variant in VARIANTS {
        for &mode in modes {
            let outcomes = run_cases(program(), variant, mode, &names);
            assert_eq!(outcomes.len(), names.len(), "each case has an outcome");
            for (name, report) in outcomes {
                assert!(report.is_empty(), "{name}, {variant:?}, {mode:?}: {report}");
            }
        }
    }
}

/// Runs cases in one process; a report for each name.
fn run_cases(program: &Path, variant: Variant, mode: Mode, names: &[&str]) -> BTreeMap<String, String> {
    let settings = [mode.asynchronous.to_string(), mode.schedule.to_string(), mode.seed.to_string()];
    let output = Command::new(program).arg(variant.name()).args(settings).args(names).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{variant:?} {mode:?} {names:?}: {}\n{text}\n{output:?}", output.status);
    let parts = text.split("== ").skip(1);
    parts
        .filter_map(|part| part.split_once('\n'))
        .map(|(name, report)| (name.to_owned(), report.trim().to_owned()))
        .collect()
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/emulator")
}

fn case_names(source: &str) -> Vec<String> {
    let text = fs::read_to_string(folder().join(source)).unwrap();
    let starts = text.lines().filter_map(|line| line.strip_prefix("CASE("));
    let names: Vec<String> = starts.filter_map(|rest| rest.split(')').next()).map(str::to_owned).collect();
    assert!(!names.is_empty(), "{source} has cases");
    names
}

/// `file:line` of every `FAULT` mark, by the cases it names.
fn marked_lines() -> BTreeMap<String, Vec<String>> {
    let mut marks: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for source in FAULT_SOURCES {
        let text = fs::read_to_string(folder().join(source)).unwrap();
        for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.starts_with("//")) {
            let Some((_, names)) = line.split_once("// FAULT ") else { continue };
            for name in names.split_whitespace() {
                marks.entry(name.to_owned()).or_default().push(format!("{source}:{}", index + 1));
            }
        }
    }
    marks
}

/// The test program of all cases, built once.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let build = || {
        let compiler = chosen_compiler()?;
        let name = format!("emulator_{:?}", compiler.family).to_lowercase();
        build(&compiler, &name, |_| true)
    };
    PROGRAM.get_or_init(build).as_ref().unwrap_or_else(|error| panic!("{error}"))
}

fn chosen_compiler() -> Result<Compiler, String> {
    Compiler::new(std::env::var_os("CXX").unwrap_or_else(|| "c++".into()))
}

/// Builds a program of the cases of these files that `wanted` chooses by name, in a folder called `name`.
fn build(compiler: &Compiler, name: &str, wanted: impl Fn(&str) -> bool) -> Result<PathBuf, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let kernels = root.join("kernels");
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::create_dir_all(&out).map_err(|error| format!("{}: {error}", out.display()))?;
    let shared = [kernels.join("common"), kernels.join("emulator"), folder(), kernels.clone()];
    let headers = shared.iter().filter_map(|folder| newest_header(folder)).max();
    let is_wanted = |path: &PathBuf| {
        path.extension().is_some_and(|e| e == "cu")
            && path.file_name().is_some_and(|n| wanted(&n.to_string_lossy()))
    };
    let cases: Vec<PathBuf> = files_in(&folder()).into_iter().filter(is_wanted).collect();
    let mut jobs: Vec<(PathBuf, Variant, PathBuf)> = Vec::new();
    for variant in VARIANTS {
        let object = |source: &Path| {
            out.join(format!("{}_{}.o", variant.name(), source.file_stem().unwrap().display()))
        };
        jobs.extend(cases.iter().map(|source| (object(source), variant, source.clone())));
        let runtime = compile::RUNTIME_SOURCES.iter().map(|source| kernels.join("emulator").join(source));
        jobs.extend(runtime.map(|source| (object(&source), variant, source)));
    }
    in_parallel(&jobs, |(object, variant, source)| {
        if modified(object) >= headers.max(modified(source)) {
            return Ok(());
        }
        if source.extension().is_some_and(|extension| extension == "cu") {
            return compiler.kernel(*variant, &kernels, source, object);
        }
        compiler.runtime(*variant, &kernels, &source.file_name().unwrap().display().to_string(), object)
    })?;
    let program = out.join("emulator_test");
    let mut link = compiler.command();
    link.args(["-std=c++17", "-I"]).arg(&kernels).arg(folder().join("main.cpp"));
    link.args(jobs.iter().map(|(object, ..)| object)).args(["-lpthread", "-o"]).arg(&program);
    let output = link.output().map_err(|error| format!("{link:?}: {error}"))?;
    if !output.status.success() {
        return Err(format!("{link:?}: {}", String::from_utf8_lossy(&output.stderr)));
    }
    Ok(program)
}

/// Runs `work` on every item, on all cores; the first error if any.
fn in_parallel<T: Sync>(items: &[T], work: impl Fn(&T) -> Result<(), String> + Sync) -> Result<(), String> {
    let next = AtomicUsize::new(0);
    let errors = Mutex::new(Vec::new());
    let cores = std::thread::available_parallelism().map_or(2, |count| count.get());
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(error) = work(item) {
                        errors.lock().unwrap().push(error);
                    }
                }
            });
        }
    });
    errors.into_inner().unwrap().into_iter().next().map_or(Ok(()), Err)
}

fn files_in(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap();
    entries.map(|entry| entry.unwrap().path()).filter(|path| path.is_file()).collect()
}

/// The time of the last change of a header, or of the compile steps.
fn newest_header(folder: &Path) -> Option<SystemTime> {
    let included = |path: &PathBuf| path.extension().is_some_and(|e| e == "h" || e == "cuh" || e == "rs");
    files_in(folder).iter().filter(|path| included(path)).filter_map(|path| modified(path)).max()
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|metadata| metadata.modified()).ok()
}
