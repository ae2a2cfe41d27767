//! What compilers make of the kernels: the build script's promises, the machine code for GPUs, and the emulated device's
//! own tests.

// Parts of the build script, tried here as it runs them.
#[path = "../../build/choices.rs"]
mod choices;
#[path = "../../build/objects.rs"]
mod objects;
#[path = "../../build/ptxas.rs"]
mod ptxas;

mod build;
#[cfg(mmpo_emulated)]
mod emulator;
#[cfg(mmpo_gpu_kernels)]
mod sass;

/// As the build script's.
type Result<T> = std::result::Result<T, String>;
