//! `--device` as a user meets it: what each says where there is no driver, an old one, no GPU, an old one, or no memory.
//!
//! The drivers are pretended ones, made from `tests/fake_driver/libcuda.c` and found through LD_LIBRARY_PATH.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Exit code of a device that cannot be used.
const DEVICE_ERROR: i32 = 6;

/// The folder of the pretended driver.
pub fn fake_driver() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("fake_driver");
        std::fs::create_dir_all(&folder).unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake_driver/libcuda.c");
        let compiled = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o"])
            .arg(folder.join("libcuda.so"))
            .arg(source)
            .output()
            .unwrap();
        assert!(compiled.status.success(), "{compiled:?}");
        folder
    })
}

/// Generates one token with the demo's model, and gives the exit code and standard error.
fn generate(device: &str, libraries: &Path, pretended: &[(&str, &str)]) -> (i32, String) {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/demo/model");
    let output = Command::new(env!("CARGO_BIN_EXE_mmpo-fast"))
        .args(["generate", "--prompt", "What is 3 plus 8?", "--max-new-tokens", "1", "--device", device])
        .arg("--model")
        .arg(model)
        .env("LD_LIBRARY_PATH", libraries)
        .env("NO_COLOR", "1")
        .env_remove("RUST_LOG")
        .envs(pretended.iter().copied())
        .output()
        .unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(!message.contains("panicked"), "{message}");
    (output.status.code().unwrap(), message)
}

#[track_caller]
fn assert_says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "`{part}` is missing in:\n{message}");
    }
}

/// Messages of a binary with GPU kernels.
#[cfg(mmpo_gpu_kernels)]
mod with_gpu_kernels {
    use super::*;

    #[test]
    fn an_old_driver() {
        let (code, message) = generate("cuda", fake_driver(), &[("FAKE_CUDA_VERSION", "11080")]);
        assert_eq!(code, DEVICE_ERROR, "{message}");
        assert_says(&message, &["driver is too old", "CUDA 11.8", "update the driver"]);

        let (code, message) = generate("auto", fake_driver(), &[("FAKE_CUDA_VERSION", "11080")]);
        assert_eq!(code, 0, "auto falls back: {message}");
        assert_says(&message, &["device: cpu (", "no GPU is used, because the NVIDIA driver is too old"]);
    }

    #[test]
    fn an_old_gpu() {
        let old = [("FAKE_CUDA_CAPABILITY", "75")];
        let (code, message) = generate("cuda", fake_driver(), &old);
        assert_eq!(code, DEVICE_ERROR, "{message}");
        assert_says(&message, &["cuda:0 (Pretended GPU)", "compute capability 7.5", "8.0 (Ampere)"]);

        let (code, message) = generate("auto", fake_driver(), &old);
        assert_eq!(code, 0, "auto falls back: {message}");
        assert_says(&message, &["device: cpu (", "no GPU is used, because", "compute capability 7.5"]);
    }

    #[test]
    fn a_gpu_that_is_not_there() {
        let (code, message) = generate("cuda:3", fake_driver(), &[]);
        assert_eq!(code, DEVICE_ERROR, "{message}");
        assert_says(&message, &["no GPU 3", "lists 1", "CUDA_VISIBLE_DEVICES"]);

        let (code, message) = generate("auto", fake_driver(), &[("FAKE_CUDA_GPUS", "0")]);
        assert_eq!(code, 0, "auto falls back: {message}");
        assert_says(&message, &["device: cpu (", "the CUDA driver lists no GPU"]);
    }

    /// The GPU is taken; what it lacks is said before the error: cuBLASLt is not beside a pretended driver.
    #[test]
    fn no_memory_and_no_cublaslt() {
        let (code, message) = generate("cuda", fake_driver(), &[]);
        assert_eq!(code, DEVICE_ERROR, "{message}");
        assert_says(&message, &["cuBLASLt (libcublasLt.so) was not found", "slower portable kernel"]);
        assert_says(&message, &["PyPI's nvidia-cublas", "LD_LIBRARY_PATH"]);
        assert_eq!(message.matches("not found").count(), 1, "said twice: {message}");
        assert_says(&message, &["no GPU memory for", "on cuda:0", "0.00 GiB of 16.00 GiB are free"]);
        assert_says(&message, &["lower the token budget"]);
    }

    /// A fault shows at whatever call comes next.
    #[test]
    fn a_fault_of_an_earlier_kernel() {
        let (code, message) = generate("cuda", fake_driver(), &[("FAKE_CUDA_ALLOCATION", "700")]);
        assert_eq!(code, DEVICE_ERROR, "{message}");
        assert_says(&message, &["allocating GPU memory: pretended error", "CUDA_LAUNCH_BLOCKING=1"]);
    }

    #[test]
    fn no_driver() {
        if mmpo_fast::device::cuda::gpus().is_ok() {
            return eprintln!("this machine has a driver: skipped");
        }
        let nowhere = Path::new("no-such-folder");
        let (code, message) = generate("cuda", nowhere, &[]);
        assert_eq!(code, DEVICE_ERROR, "{message}");
        assert_says(&message, &["no CUDA driver", "--device cpu"]);

        let (code, message) = generate("auto", nowhere, &[]);
        assert_eq!(code, 0, "auto falls back: {message}");
        assert_says(&message, &["device: cpu (", "no GPU is used, because no CUDA driver"]);
    }
}

/// Without GPU kernels no driver is looked for.
#[cfg(not(mmpo_gpu_kernels))]
#[test]
fn without_gpu_kernels() {
    let (code, message) = generate("cuda", fake_driver(), &[]);
    assert_eq!(code, DEVICE_ERROR, "{message}");
    assert_says(&message, &["this binary has no GPU kernels (", "tools/setup_cuda.sh"]);
    assert!(!message.contains("none"), "said twice: {message}");
}

/// Where the emulated device is not built in, asking for it says why; nothing else changes.
#[cfg(not(mmpo_emulated))]
#[test]
fn without_the_emulated_device() {
    let (code, message) = generate("emulated", Path::new("no-such-folder"), &[]);
    assert_eq!(code, DEVICE_ERROR, "{message}");
    assert_says(&message, &["this binary has no emulated device (", "--device cpu"]);
    assert!(!message.contains("none"), "said twice: {message}");
}

#[cfg(mmpo_emulated)]
#[test]
fn the_emulated_gpu_generates_as_it_says() {
    let (code, message) = generate("emulated", Path::new("no-such-folder"), &[]);
    assert_eq!(code, 0, "{message}");
    assert_says(&message, &["device: cuda (emulated", "asked for"]);
}
