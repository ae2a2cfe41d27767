//! What the compiler made of the kernels: instructions that must be in the machine code, and some that must not, where
//! cuobjdump is at hand. Registers, spills and ptxas' own complaints are the build's to check.
//!
//! `cargo test --release --test compiled sass -- --nocapture` prints each kernel's instruction mix.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Each kernel of a file whose name holds the second word, for a target, has every one of these instructions.
const EXPECTED: &[(&str, &str, &str, &[&str])] = &[
    // wgmma, TMA, registers handed to the consumers, mbarrier waits, and the exponential.
    (
        "attention_forward_sm90",
        "",
        "sm_90a",
        &["HGMMA", "UTMALDG", "USETMAXREG", "SYNCS.PHASECHK", "MUFU.EX2", "STSM"],
    ),
    // mma.sync, cp.async, ldmatrix.
    ("attention_forward", "", "sm_80", &["HMMA", "LDGSTS", "LDSM", "MUFU.EX2"]),
    ("attention_forward", "", "sm_90a", &["HMMA", "LDGSTS", "LDSM", "MUFU.EX2"]),
    // As forward; dQ's terms are added in bulk.
    (
        "attention_backward_sm90",
        "backward_sm90_kernel",
        "sm_90a",
        &["HGMMA", "UTMALDG", "USETMAXREG", "UBLKRED.G.S.ADD.F32", "STSM"],
    ),
    ("attention_backward", "backward_kernel", "sm_80", &["HMMA", "LDGSTS", "LDSM", "MUFU.EX2"]),
    ("attention_backward", "backward_kernel", "sm_90a", &["HMMA", "LDGSTS", "LDSM", "MUFU.EX2"]),
    // The gemms of the log-prob head, whose epilogues hold exponentials.
    (
        "logp_head_sm90",
        "gemm_sm90_kernel",
        "sm_90a",
        &["HGMMA", "UTMALDG", "USETMAXREG", "SYNCS.PHASECHK", "MUFU.EX2"],
    ),
    ("logp_head", "gemm_kernel", "sm_80", &["HMMA", "LDSM", "MUFU.EX2"]),
    // wgmma, TMA in and out, registers handed to the consumers, panels by stmatrix.
    ("linear_sm90", "gemm_sm90_kernel", "sm_90a", GEMM),
    // Clusters: slices for two blocks at once, and the barrier between them.
    ("linear_sm90", "Paired", "sm_90a", &["UTMALDG.2D.MULTICAST", "UCGABAR_ARV"]),
    ("logp_head_sm90", "Paired", "sm_90a", &["UTMALDG.2D.MULTICAST", "UCGABAR_ARV"]),
];

/// A Hopper gemm, whatever its epilogue.
const GEMM: &[&str] = &["HGMMA", "UTMALDG", "UTMASTG", "USETMAXREG", "SYNCS.PHASECHK"];

/// Accesses of local memory: spills, and arrays that are not in registers.
const FORBIDDEN: &[&str] = &["LDL", "STL"];

/// Instructions that the printed mix has columns for.
const MIX: &[&str] = &[
    "HGMMA", "HMMA", "UTMALDG", "LDGSTS", "LDSM", "STSM", "MUFU.EX2", "FFMA", "FMUL", "FADD", "FMNMX",
    "FSEL", "F2FP", "BAR", "SHFL",
];

/// cuobjdump of tools/setup_cuda.sh, of a toolkit that the environment names, or on the path; says so where there is none.
fn cuobjdump() -> Option<PathBuf> {
    let name = "cuobjdump";
    let mut candidates =
        vec![Path::new(env!("CARGO_MANIFEST_DIR")).join(".toolchain/nvidia/cu13/bin").join(name)];
    if let Some(nvcc) = std::env::var_os("NVCC") {
        candidates.push(PathBuf::from(nvcc).with_file_name(name));
    }
    for variable in ["CUDA_HOME", "CUDA_PATH"] {
        candidates.extend(std::env::var_os(variable).map(|home| Path::new(&home).join("bin").join(name)));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    candidates.extend(std::env::split_paths(&path).map(|folder| folder.join(name)));
    let found = candidates.into_iter().filter_map(|candidate| candidate.canonicalize().ok()).next();
    if found.is_none() {
        eprintln!("no cuobjdump (tools/setup_cuda.sh installs one): the machine code is not looked at");
    }
    found
}

/// The instructions of each kernel of an object, without their predicates: `FFMA R1, R2, R3, R4`.
fn instructions(tool: &Path, stem: &str, target: &str) -> BTreeMap<String, Vec<String>> {
    let object = Path::new(env!("MMPO_FAST_KERNEL_OBJECTS")).join(format!("gpu/kernels-{stem}.o"));
    let output = Command::new(tool).args(["-sass", "-arch", target]).arg(&object).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}: {text}{}", tool.display(), String::from_utf8_lossy(&output.stderr));
    let mut kernels: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut kernel = None;
    for line in text.lines() {
        if let Some((_, name)) = line.split_once("Function : ") {
            kernel = Some(name.trim().to_owned());
        }
        // "        /*0010*/                   @!P0 FFMA R1, R2, R3, R4 ;   /* 0x... */"
        let Some(kernel) = &kernel else { continue };
        let Some((_, code)) = line.trim().strip_prefix("/*").and_then(|rest| rest.split_once("*/")) else {
            continue;
        };
        let words: Vec<&str> = code
            .split(';')
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .skip_while(|word| word.starts_with('@'))
            .collect();
        if words.first().is_some_and(|word| word.starts_with(|c: char| c.is_ascii_uppercase())) {
            kernels.entry(kernel.clone()).or_default().push(words.join(" "));
        }
    }
    kernels
}

fn count(instructions: &[String], name: &str) -> usize {
    instructions.iter().filter(|instruction| instruction.starts_with(name)).count()
}

/// Exponentials between a wait that leaves one group of wgmmas under way and the next wait: they run under the tensor
/// cores. Both compilers would rather have them after the second wait.
fn overlapped(instructions: &[String]) -> usize {
    let wait = "WARPGROUP.DEPBAR.LE gsb0";
    let after = instructions.iter().skip_while(|code| !code.starts_with(&format!("{wait}, 0x1"))).skip(1);
    after.take_while(|code| !code.starts_with(wait)).filter(|code| code.starts_with("MUFU.EX2")).count()
}

#[test]
fn exponentials_run_under_a_product() {
    let Some(tool) = cuobjdump() else { return };
    // A thread's scores: of a block of 128 keys; of 128 queries (E = 64) or 64.
    let forward =
        instructions(&tool, "attention_forward_sm90", "sm_90a").into_iter().map(|kernel| (64, kernel));
    let backward = instructions(&tool, "attention_backward_sm90", "sm_90a").into_iter();
    let backward = backward
        .filter(|(name, _)| name.contains("backward_sm90_kernel"))
        .map(|kernel| (if kernel.0.contains("ILi64E") { 64 } else { 32 }, kernel));
    for (scores, (kernel, instructions)) in forward.chain(backward) {
        let overlapped = overlapped(&instructions);
        assert!(overlapped >= scores, "{overlapped} of {scores} exponentials under the gemms of {kernel}");
    }
}

/// Moves of descriptors from ordinary registers between two wgmmas of a group, where the tensor cores may wait for them.
#[test]
fn descriptors_stay_in_uniform_registers() {
    let Some(tool) = cuobjdump() else { return };
    // Some tiles of the linear layers keep one move per gemm; without uniform registers there would be four, one per
    // operand.
    let most = [
        ("attention_forward_sm90", 0),
        ("attention_backward_sm90", 0),
        ("linear_sm90", 1),
        ("logp_head_sm90", 1),
    ];
    for (stem, most) in most {
        for (kernel, instructions) in instructions(&tool, stem, "sm_90a") {
            let (mut group_open, mut moves) = (false, 0);
            for code in &instructions {
                if code.starts_with("HGMMA") {
                    group_open = !code.ends_with("gsb0");
                }
                moves += usize::from(group_open && code.starts_with("R2UR"));
            }
            assert!(moves <= most, "{moves} moves between the wgmmas of {kernel}");
        }
    }
}

/// Terms of dQ in the fixed order: the first assigned, each after an acquiring load and the fence between its proxy and
/// theirs. Nothing of it is left where any order will do, so that the difference is what the order costs.
#[test]
fn only_the_fixed_order_waits() {
    let Some(tool) = cuobjdump() else { return };
    let mut seen = [0, 0];
    for (kernel, instructions) in instructions(&tool, "attention_backward_sm90", "sm_90a") {
        if !kernel.contains("backward_sm90_kernel") {
            continue;
        }
        let any_order = kernel.contains("AnyOrder");
        seen[usize::from(any_order)] += 1;
        for name in ["UBLKCP.G.S", "LDG.E.STRONG.GPU", "FENCE.VIEW.ASYNC.G", "STG.E.STRONG.GPU"] {
            let found = count(&instructions, name);
            assert_eq!(found == 0, any_order, "{found} of {name} in {kernel}");
        }
    }
    assert_eq!(seen, [2, 2], "two head sizes in each order");
}

/// Stages go from block to block of a cluster without a fence of the whole GPU, which would be a wait for memory at every
/// slice.
#[test]
fn gemms_never_fence_the_whole_gpu() {
    let Some(tool) = cuobjdump() else { return };
    for stem in ["linear_sm90", "logp_head_sm90"] {
        for (kernel, instructions) in instructions(&tool, stem, "sm_90a") {
            let fences = ["MEMBAR.ALL.GPU", "MEMBAR.SC.GPU"].map(|name| count(&instructions, name));
            assert_eq!(fences, [0, 0], "{kernel}");
        }
    }
}

#[test]
fn kernels_have_the_instructions_they_are_written_for() {
    let Some(tool) = cuobjdump() else { return };
    for &(stem, part, target, expected) in EXPECTED {
        let kernels = instructions(&tool, stem, target);
        let wanted = |name: &str| name.contains(part);
        assert!(
            kernels.keys().any(|name| wanted(name)),
            "no {target} code of {part} in the object of {stem}"
        );
        for (kernel, instructions) in &kernels {
            let mix =
                MIX.iter().map(|name| (name, count(instructions, name))).filter(|(_, count)| *count > 0);
            let mix: Vec<String> = mix.map(|(name, count)| format!("{name} {count}")).collect();
            println!("{stem} {target} {kernel}: {} instructions, {}", instructions.len(), mix.join(", "));
            for name in expected.iter().filter(|_| wanted(kernel)) {
                assert!(count(instructions, name) > 0, "no {name} in the {target} code of {kernel} ({stem})");
            }
            for name in FORBIDDEN {
                assert_eq!(count(instructions, name), 0, "{name} in the {target} code of {kernel} ({stem})");
            }
        }
    }
}
