//! NVIDIA's libraries beside the driver: whether they are found, and which version, asked without touching a GPU.

use cudarc::cublaslt::sys as cublaslt;

pub use crate::device::nccl::version as nccl_version;

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
