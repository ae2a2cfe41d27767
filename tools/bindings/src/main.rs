//! Generates `src/device/cuda/bindings/` from the kernels' C headers: `cargo run -p bindings [-- --check]`.
//!
//! bindgen reads the headers once, under the names of the nvcc build; `src/device/cuda/bindings.rs` says what becomes of
//! its output.
//!
//! libclang: `LIBCLANG_PATH`, else the one that `tools/setup_cuda.sh` puts into `.toolchain/`.

mod output;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

const HEADERS: &str = "#include <api.h>\n#include <emulator/emulator_api.h>\n";

const FOLDER: &str = "src/device/cuda/bindings";

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
    let headers = output::Headers::split(&parse_headers(&root)?)?;
    let api = root.join("kernels/api.h");
    let api = std::fs::read_to_string(&api).map_err(|error| format!("{}: {error}", api.display()))?;
    for (name, wanted) in [("types.rs", headers.types()?), ("functions.rs", headers.functions(&api)?)] {
        let path = root.join(FOLDER).join(name);
        let failed = |error| format!("{FOLDER}/{name}: {error}");
        if !check {
            std::fs::write(&path, wanted).map_err(failed)?;
        } else if std::fs::read_to_string(&path).map_err(failed)? != wanted {
            return Err(format!("{FOLDER}/{name} does not match kernels/*.h; run `cargo run -p bindings`"));
        }
    }
    Ok(format!("{FOLDER} {}", if check { "is up to date" } else { "written" }))
}

/// What bindgen makes of the headers, as Rust source.
fn parse_headers(root: &Path) -> Result<String, String> {
    let libclang = libclang_folder(root)?;
    // SAFETY: this program has one thread, and nothing has read the environment concurrently.
    #[allow(unsafe_code, reason = "bindgen takes the folder of libclang from the environment alone")]
    unsafe {
        std::env::set_var("LIBCLANG_PATH", libclang)
    };
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
