// How kernels and the emulated device are compiled as host C++. Shared, as a module, by the build script and by tests.
//
// The checked variant is instrumented by the compiler's own `-fsanitize` passes, but none of their run-time libraries is
// linked: the calls they insert are renamed in the assembly, and each gets the source line of the access as two more
// arguments. So a report names the kernel's line without debug information, and no symbol clashes with a real sanitizer.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    Plain,
    Checked,
}

impl Variant {
    /// Value of `MMPO_EMULATED_VARIANT`.
    pub fn name(self) -> &'static str {
        match self {
            Variant::Plain => "plain",
            Variant::Checked => "checked",
        }
    }
}

/// Files of the emulated device, in `kernels/emulator/`.
pub const RUNTIME_SOURCES: &[&str] = &[
    "access.cpp",
    "barriers.cpp",
    "context.cpp",
    "copies.cpp",
    "device.cpp",
    "memory.cpp",
    "race.cpp",
    "report.cpp",
    "scheduler.cpp",
    "turns.cpp",
    "undefined.cpp",
    "warp.cpp",
    "wgmma.cpp",
    "workers.cpp",
];

/// Flags of everything. Kernels read thread-local variables all the time, so those need their cheapest model: the objects
/// go into executables, not into shared libraries.
const COMMON: &[&str] = &[
    "-std=c++17",
    "-O2",
    "-fPIE",
    "-ftls-model=initial-exec",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-unknown-pragmas",
];
/// AVX2 makes the emulated matrix products bearable. There is no emulated device but on x86-64.
const MACHINE: &str = "-march=x86-64-v3";

/// Later flags win: less optimisation, so that accesses stay as the source has them. Scalar replacement and
/// vectorisation would change their number and width.
const INSTRUMENTED: &[&str] = &[
    "-O1",
    "-g1",
    "-fno-tree-sra",
    "-fno-tree-vectorize",
    "-fno-optimize-sibling-calls",
    "-fsanitize=thread",
    "-fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero",
];

/// Compiles one kernel file (`.cu`) to `object`. `compiler` makes a command for the C++ compiler; `kernels` is the
/// folder that holds `common/`; `extra` are further flags.
pub fn kernel(
    compiler: &dyn Fn() -> Command,
    variant: Variant,
    kernels: &Path,
    source: &Path,
    object: &Path,
    extra: &[&str],
) -> Result<(), String> {
    let mut command = compile_command(compiler, variant, kernels, extra);
    match variant {
        Variant::Plain => run(command.args(["-x", "c++", "-c"]).arg(source).arg("-o").arg(object)),
        Variant::Checked => {
            let assembly = object.with_extension("s");
            command.args(INSTRUMENTED).args(["-x", "c++", "-S"]).arg(source).arg("-o").arg(&assembly);
            run(&mut command)?;
            let text = std::fs::read_to_string(&assembly)
                .map_err(|error| format!("{}: {error}", assembly.display()))?;
            std::fs::write(&assembly, pass_source_lines(&text))
                .map_err(|error| format!("{}: {error}", assembly.display()))?;
            run(compiler().arg("-c").arg(&assembly).arg("-o").arg(object))
        }
    }
}

/// Compiles one of [`RUNTIME_SOURCES`] to `object`.
pub fn runtime(
    compiler: &dyn Fn() -> Command,
    variant: Variant,
    kernels: &Path,
    source: &str,
    object: &Path,
) -> Result<(), String> {
    let source: PathBuf = kernels.join("emulator").join(source);
    run(compile_command(compiler, variant, kernels, &[]).arg("-c").arg(source).arg("-o").arg(object))
}

fn compile_command(
    compiler: &dyn Fn() -> Command,
    variant: Variant,
    kernels: &Path,
    extra: &[&str],
) -> Command {
    let mut command = compiler();
    command.args(COMMON).arg(MACHINE).arg(format!("-DMMPO_EMULATED_VARIANT={}", variant.name()));
    command.arg("-I").arg(kernels).args(extra);
    command
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{command:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr)))
}

/// Renames the sanitizers' calls in x86-64 assembly, and has each access pass its line and file in the third and fourth
/// argument registers, which it leaves unused.
pub fn pass_source_lines(assembly: &str) -> String {
    let mut out = String::with_capacity(assembly.len() * 2);
    let mut files: Vec<(u32, String)> = Vec::new();
    let mut here = (0, 0);
    for line in assembly.lines() {
        let mut words = line.split_whitespace();
        match (words.next(), words.next()) {
            (Some(".file"), Some(number)) => {
                if let (Ok(number), Some(name)) = (number.parse(), line.split('"').nth_back(1)) {
                    files.push((number, name.to_owned()));
                }
            }
            (Some(".loc"), Some(file)) => {
                let number = words.next().and_then(|number| number.parse().ok());
                here = (file.parse().unwrap_or(0), number.unwrap_or(here.1));
            }
            (Some("call" | "callq" | "jmp"), Some(target)) if is_access(target) => {
                let _ =
                    writeln!(out, "\tmovl\t${}, %edx\n\tleaq\t.Lmmpo_file_{}(%rip), %rcx", here.1, here.0);
            }
            _ => {}
        }
        out.push_str(
            &line
                .replace("__tsan_", "mmpo_checked_access_")
                .replace("__ubsan_handle_", "mmpo_checked_undefined_"),
        );
        out.push('\n');
    }
    out.push_str("\t.section\t.rodata\n.Lmmpo_file_0:\n\t.string\t\"?\"\n");
    files.sort();
    files.dedup_by_key(|(number, _)| *number);
    for (number, name) in files.iter().filter(|(number, _)| *number != 0) {
        let _ = writeln!(out, ".Lmmpo_file_{number}:\n\t.string\t\"{name}\"");
    }
    out
}

fn is_access(target: &str) -> bool {
    target.strip_prefix("__tsan_").is_some_and(|name| name.contains("read") || name.contains("write"))
}
