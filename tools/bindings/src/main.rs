//! Generates `src/device/cuda/bindings.rs` from the kernels' C headers: `cargo run -p bindings [-- --check]`.
//!
//! bindgen reads the headers once, under the names of the nvcc build. The launchers become a struct of function
//! pointers, and each build of them (nvcc, emulated, checked) a static that fills it; so the Rust above is written
//! once, and a launcher added to a header is bound everywhere or fails to link.
//!
//! libclang: `LIBCLANG_PATH`, else the one that `tools/setup_cuda.sh` puts into `.toolchain/`.

mod tables;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

const HEADERS: &str = "#include <api.h>\n#include <emulator/emulator_api.h>\n";

fn main() -> ExitCode {
    let check = std::env::args().skip(1).any(|argument| argument == "--check");
    match run(check) {
        Ok(message) => {
            println!("{message}");
            ExitCode::SUCCESS
        }
        Err(message) => {
            eprintln!("bindings: {message}");
            ExitCode::FAILURE
        }
    }
}

fn run(check: bool) -> Result<String, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let root = root.canonicalize().map_err(|error| format!("{}: {error}", root.display()))?;
    let wanted = tables::source(&parse_headers(&root)?)?;
    let path = root.join("src/device/cuda/bindings.rs");
    let shown = "src/device/cuda/bindings.rs";
    if check {
        let present = std::fs::read_to_string(&path).map_err(|error| format!("{shown}: {error}"))?;
        if present != wanted {
            return Err(format!("{shown} does not match kernels/*.h; run `cargo run -p bindings`"));
        }
        Ok(format!("{shown} is up to date"))
    } else {
        std::fs::write(&path, wanted).map_err(|error| format!("{shown}: {error}"))?;
        Ok(format!("{shown} written"))
    }
}

/// What bindgen makes of the headers, as Rust source.
fn parse_headers(root: &Path) -> Result<String, String> {
    let libclang = libclang_folder(root)?;
    // SAFETY: this program has one thread, and nothing has read the environment concurrently.
    unsafe { std::env::set_var("LIBCLANG_PATH", libclang) };
    let bindings = bindgen::Builder::default()
        .header_contents("headers.h", HEADERS)
        .clang_arg(format!("-I{}", root.join("kernels").display()))
        // The nvcc build's names, and no header of the compiler: the wheel has none but its library.
        .clang_args(["-x", "c", "-std=c11", "-ffreestanding"])
        .allowlist_item("(mmpo|MMPO)_.*")
        .blocklist_item("MMPO_(EMULATED|VARIANT|CHECKED|IS_CHECKED_.*)")
        // The same two bytes, with arithmetic.
        .blocklist_type("mmpo_bf16")
        .raw_line("pub type mmpo_bf16 = half::bf16;")
        .prepend_enum_name(false)
        .generate_comments(false)
        .layout_tests(true)
        .use_core()
        .formatter(bindgen::Formatter::None)
        .generate()
        .map_err(|error| format!("kernels/*.h: {error}"))?;
    Ok(bindings.to_string())
}

fn libclang_folder(root: &Path) -> Result<PathBuf, String> {
    if let Some(folder) = std::env::var_os("LIBCLANG_PATH") {
        return Ok(PathBuf::from(folder));
    }
    let wheel = root.join(".toolchain/clang/native");
    if wheel.join("libclang.so").exists() {
        return Ok(wheel);
    }
    Err("no libclang: run tools/setup_cuda.sh, or set LIBCLANG_PATH to the folder of libclang.so".into())
}
