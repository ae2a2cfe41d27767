//! The library that stands in for NCCL in runs of several ranks without GPUs: `tests/nccl/library.cpp`, built once below the target
//! folder. Programs find it as they find NCCL, through `LD_LIBRARY_PATH`.

#![allow(dead_code, reason = "each test program uses a part")]

use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// A file to which each rank appends, at its end, a line of JSON with the calls and bytes of each kind of collective.
pub const COUNTS: &str = "FAKE_NCCL_COUNTS";
/// `RANK:N`: the N-th collective of that rank, from 1, fails in the background.
pub const FAIL: &str = "FAKE_NCCL_FAIL";
/// `RANK:N`: the N-th collective of that rank, from 1, never ends until the rank aborts it.
pub const HANG: &str = "FAKE_NCCL_HANG";
/// `RANK:KIND:N`: the result of the N-th collective of that kind, from 1, with 1024 bytes or more comes to that rank as NaN.
pub const SPOIL: &str = "FAKE_NCCL_SPOIL";
/// `1`: no rank notices that another one died or aborted, as it is over NVLink.
pub const DEAF: &str = "FAKE_NCCL_DEAF";

const FLAGS: [&str; 8] =
    ["-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"];
const FILES: [&str; 3] = ["library.cpp", "exchange.h", "emulated_stream.h"];

/// The folder of `libnccl.so.2`. A program is given it as `LD_LIBRARY_PATH` when it starts: the loader reads that once.
pub fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(build)
}

/// The system's C++ compiler, as the build script chooses it.
fn compiler() -> String {
    std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned())
}

fn build() -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/nccl");
    let mut hasher = DefaultHasher::new();
    (compiler(), FLAGS).hash(&mut hasher);
    for name in FILES {
        let path = source.join(name);
        std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())).hash(&mut hasher);
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("nccl-{:016x}", hasher.finish()));
    std::fs::create_dir_all(&folder).expect("a folder for the library");
    // Test programs may run side by side: one builds, the others wait for it.
    let lock = File::create(folder.join("lock")).expect("a file to lock");
    lock.lock().expect("a lock");
    let library = folder.join("libnccl.so.2");
    if !library.exists() {
        let unfinished = folder.join("unfinished");
        let mut command = Command::new(compiler());
        command.args(FLAGS).arg("-o").arg(&unfinished).arg(source.join(FILES[0])).arg("-lpthread");
        let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        assert!(output.status.success(), "{command:?}:\n{}", String::from_utf8_lossy(&output.stderr));
        std::fs::rename(&unfinished, &library).expect("the library gets its name");
    }
    folder
}
