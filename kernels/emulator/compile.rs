// How kernels and the emulated device are compiled as host C++. Shared, as a module, by the build script and by tests.
//
// The checked variant is instrumented by the compiler's own `-fsanitize` passes, but none of their run-time libraries is
// linked: the calls they insert are renamed in the assembly, and each gets the source line of the access as two more
// arguments. So a report names the kernel's line without debug information, and no symbol clashes with a real sanitizer.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::Path;
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
    "clusters.cpp",
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
/// AVX2 makes emulated gemms fast enough. There is no emulated device but on x86-64.
const MACHINE: &str = "-march=x86-64-v3";

/// Later flags win: less optimisation, so that accesses stay as the source has them. Vectorisation would change their
/// number and width.
const INSTRUMENTED: &[&str] = &[
    "-O1",
    "-g1",
    "-fno-optimize-sibling-calls",
    "-fno-tree-vectorize",
    "-fsanitize=alignment,shift,signed-integer-overflow,integer-divide-by-zero",
];
/// Scalar replacement would split accesses to vector types; `language.h` keeps clang from it.
const INSTRUMENTED_GNU: &[&str] = &["-fno-tree-sra", "-fsanitize=thread,bounds"];
/// clang's thread sanitizer passes over local arrays, and so over wgmma's accumulators; its address sanitizer leaves
/// nothing out, once told to check accesses by calls and to lay out neither stack nor globals. Of `bounds` the part that
/// reports; the other part only traps.
const INSTRUMENTED_CLANG: &[&str] = &[
    "-fno-slp-vectorize",
    "-fno-unroll-loops",
    "-fsanitize=kernel-address,array-bounds",
    "-mllvm",
    "-asan-instrumentation-with-call-threshold=0",
    "-mllvm",
    "-asan-opt=0",
    "-mllvm",
    "-asan-stack=0",
    "-mllvm",
    "-asan-globals=0",
    "-mllvm",
    "-asan-use-after-scope=0",
    "-mllvm",
    "-asan-use-stack-safety=0",
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    Gnu,
    Clang,
}

/// A C++ compiler and whose flags it takes.
#[derive(Clone, Debug)]
pub struct Compiler {
    program: OsString,
    pub family: Family,
}

impl Compiler {
    /// Asks `program` for its predefined macros: its name does not tell whether `c++` is g++ or clang.
    pub fn new(program: impl Into<OsString>) -> Result<Self, String> {
        let program = program.into();
        let macros = run(Command::new(&program).args(["-dM", "-E", "-x", "c++", "/dev/null"]))?;
        let family = if macros.contains("__clang__") { Family::Clang } else { Family::Gnu };
        Ok(Compiler { program, family })
    }

    /// A command that runs the compiler, without arguments yet.
    pub fn command(&self) -> Command {
        Command::new(&self.program)
    }

    /// Compiles one kernel file (`.cu`) to `object`. `kernels` is the folder that holds `common/`.
    pub fn kernel(
        &self,
        variant: Variant,
        kernels: &Path,
        source: &Path,
        object: &Path,
    ) -> Result<(), String> {
        let mut command = self.compile_command(variant, kernels);
        if variant == Variant::Plain {
            return run(command.args(["-x", "c++", "-c"]).arg(source).arg("-o").arg(object)).map(drop);
        }
        let assembly = object.with_extension("s");
        let of_family = match self.family {
            Family::Gnu => INSTRUMENTED_GNU,
            Family::Clang => INSTRUMENTED_CLANG,
        };
        command.args(INSTRUMENTED).args(of_family);
        run(command.args(["-x", "c++", "-S"]).arg(source).arg("-o").arg(&assembly))?;
        let text =
            std::fs::read_to_string(&assembly).map_err(|error| format!("{}: {error}", assembly.display()))?;
        std::fs::write(&assembly, pass_source_lines(&text))
            .map_err(|error| format!("{}: {error}", assembly.display()))?;
        run(self.command().arg("-c").arg(&assembly).arg("-o").arg(object)).map(drop)
    }

    /// Compiles one of [`RUNTIME_SOURCES`] to `object`.
    pub fn runtime(
        &self,
        variant: Variant,
        kernels: &Path,
        source: &str,
        object: &Path,
    ) -> Result<(), String> {
        let source = kernels.join("emulator").join(source);
        run(self.compile_command(variant, kernels).arg("-c").arg(source).arg("-o").arg(object)).map(drop)
    }

    fn compile_command(&self, variant: Variant, kernels: &Path) -> Command {
        let mut command = self.command();
        command.args(COMMON).arg(MACHINE).arg(format!("-DMMPO_EMULATED_VARIANT={}", variant.name()));
        command.arg("-I").arg(kernels);
        command
    }
}

/// What the command prints.
fn run(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(format!("{command:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr)))
}

const ACCESS_PREFIX: &str = "mmpo_checked_access_";
const UNKNOWN_FILE: u32 = u32::MAX;

/// Renames the sanitizers' calls in x86-64 assembly of g++ or clang, and has each access pass its line and file in the
/// argument registers that follow its own: the third and fourth, or the fourth and fifth of `memcpy` and the like.
pub fn pass_source_lines(assembly: &str) -> String {
    let mut out = String::with_capacity(assembly.len() * 2);
    let mut files: Vec<(u32, String)> = Vec::new();
    let mut here = None;
    for line in assembly.lines() {
        let mut words = line.split_whitespace();
        let mut renamed = line
            .replace("__tsan_", ACCESS_PREFIX)
            .replace("__asan_", ACCESS_PREFIX)
            .replace("__ubsan_handle_", "mmpo_checked_undefined_");
        match (words.next(), words.next()) {
            (Some(".file"), Some(number)) => {
                if let (Ok(number), Some(name)) = (number.parse(), line.split('"').nth_back(1)) {
                    files.push((number, name.to_owned()));
                }
            }
            (Some(".loc"), Some(file)) => {
                let place = (file.parse::<u32>().ok()).zip(words.next().and_then(|line| line.parse().ok()));
                // Line 0 is clang's word for code that it moved or merged; the line before is the better guess.
                here = place.filter(|&(_, line): &(u32, u32)| line != 0).or(here);
            }
            (Some("call" | "callq" | "jmp"), Some(target)) => {
                if let Some((function, [line_register, file_register])) = touches_memory(target) {
                    let (file, number) = here.unwrap_or((UNKNOWN_FILE, 0));
                    let _ = writeln!(out, "	movl	${number}, %{line_register}");
                    let _ = writeln!(out, "	leaq	.Lmmpo_file_{file}(%rip), %{file_register}");
                    renamed = line.replace(target, &format!("{ACCESS_PREFIX}{function}@PLT"));
                }
            }
            _ => {}
        }
        out.push_str(&renamed);
        out.push('\n');
    }
    let _ = writeln!(out, "\t.section\t.rodata\n.Lmmpo_file_{UNKNOWN_FILE}:\n\t.string\t\"?\"");
    files.sort();
    files.dedup_by_key(|(number, _)| *number);
    for (number, name) in &files {
        let _ = writeln!(out, ".Lmmpo_file_{number}:\n\t.string\t\"{name}\"");
    }
    out
}

/// If the call stands for an access: its name after the prefix, and the registers that it takes line and file in. Some
/// versions of both compilers have `memcpy` and the like keep their names.
fn touches_memory(target: &str) -> Option<(&str, [&'static str; 2])> {
    let symbol = target.split('@').next().unwrap_or(target);
    let inserted = symbol.strip_prefix("__tsan_").or_else(|| symbol.strip_prefix("__asan_"));
    match inserted.unwrap_or(symbol) {
        name @ ("memcpy" | "memmove" | "memset") => Some((name, ["ecx", "r8"])),
        name if inserted.is_some() && ["read", "write", "load", "store"].iter().any(|w| name.contains(w)) => {
            Some((name, ["edx", "rcx"]))
        }
        _ => None,
    }
}
