//! NVIDIA's libraries beside the driver: whether they are found, and which version, asked without touching a GPU.

use cudarc::cublaslt::sys as cublaslt;
use libloading::Library;

/// Names of NCCL's library: the one that packages install, then the one for developers.
const NCCL: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// The version of cuBLASLt that the loader finds, such as `13.1.0`; `None` where it finds none.
pub fn cublaslt_version() -> Option<String> {
    // SAFETY: asking loads the library and runs its initialisers, nothing else.
    if !unsafe { cublaslt::is_culib_present() } {
        return None;
    }
    // SAFETY: the library is present.
    let number = unsafe { cublaslt::cublasLtGetVersion() };
    Some(format!("{}.{}.{}", number / 10_000, number / 100 % 100, number % 100))
}

/// The version of NCCL that the loader finds, such as `2.27.5`; `None` where it finds none.
pub fn nccl_version() -> Option<String> {
    // SAFETY: loading runs the library's initialisers, which start nothing.
    let library = NCCL.iter().find_map(|name| unsafe { Library::new(*name) }.ok())?;
    type GetVersion = unsafe extern "C" fn(*mut i32) -> i32;
    // SAFETY: nccl.h declares `ncclResult_t ncclGetVersion(int *version)`; the result is an enumeration.
    let get_version = unsafe { library.get::<GetVersion>(b"ncclGetVersion") }.ok()?;
    let mut number = 0;
    // SAFETY: the pointer is valid for the call, which writes the number.
    let code = unsafe { get_version(&mut number) };
    (code == 0).then(|| format!("{}.{}.{}", number / 10_000, number / 100 % 100, number % 100))
}
