//! What this build and this machine offer, asked without touching a GPU's memory.

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use crate::error::{Error, Result};

/// The oldest architecture with bf16 tensor cores and asynchronous copies: Ampere.
const OLDEST_CAPABILITY: (i32, i32) = (8, 0);

/// The oldest driver that has every function that the program looks up in it (`cuEventElapsedTime_v2` is the youngest).
const OLDEST_DRIVER: i32 = 12080;

/// The version of CUDA that the kernels were built with, such as `13.0`; `0` without kernels.
const RUNTIME_VERSION: &str = env!("MMPO_FAST_CUDA_VERSION");

/// What `mmpo-fast --version --verbose` says of the GPU kernels in this binary: the compiler and the targets, or why
/// there are none.
pub fn build_info() -> &'static str {
    env!("MMPO_FAST_GPU_KERNELS")
}

/// What `mmpo-fast --version --verbose` says of the emulated device: that it is built in, or why not.
pub fn emulated_info() -> &'static str {
    env!("MMPO_FAST_EMULATED_DEVICE")
}

/// A GPU that the driver lists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// The driver's number of the GPU, as in `--device cuda:N`.
    pub ordinal: usize,
    /// The driver's name of it.
    pub name: String,
    /// Compute capability, major and minor.
    pub capability: (i32, i32),
    /// Bytes of memory in all, used or not.
    pub memory: usize,
}

impl Gpu {
    /// Checks that the kernels run on this GPU.
    ///
    /// # Errors
    /// [`Error::Device`] that says why they do not.
    pub fn check(&self) -> Result<()> {
        if self.capability >= OLDEST_CAPABILITY {
            return Ok(());
        }
        let (major, minor) = self.capability;
        Err(Error::device(
            format!("cuda:{} ({}) has compute capability {major}.{minor}", self.ordinal, self.name),
            "8.0 (Ampere) or later is needed; `--device cpu` runs anywhere",
        ))
    }
}

impl std::fmt::Display for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (major, minor) = self.capability;
        let gib = self.memory as f64 / f64::from(1 << 30);
        write!(f, "{}, compute capability {major}.{minor}, {gib:.0} GiB", self.name)
    }
}

/// All GPUs of the machine, in the driver's order.
///
/// # Errors
/// [`Error::Device`] if the program has no GPU kernels, or the driver is absent, too old or refuses.
pub fn gpus() -> Result<Vec<Gpu>> {
    check_kernels()?;
    check_driver_version(start_driver()?)?;
    listed_gpus()
}

/// All GPUs that the driver lists, whether or not this build has kernels for them. [`start_driver`] must have succeeded.
///
/// # Errors
/// [`Error::Device`] if the driver refuses.
pub fn listed_gpus() -> Result<Vec<Gpu>> {
    let count = result::device::get_count().map_err(|error| driver_error("counting the GPUs", error))?;
    (0..count).map(|ordinal| gpu(ordinal).map_err(|error| driver_error("asking a GPU", error))).collect()
}

/// The GPU of this ordinal, if the kernels run on it.
pub(super) fn usable(ordinal: usize) -> Result<Gpu> {
    let gpus = gpus()?;
    let count = gpus.len();
    let gpu = gpus.into_iter().nth(ordinal).ok_or_else(|| {
        Error::device(
            format!("there is no GPU {ordinal}: the driver lists {count}"),
            "use a smaller number after `cuda:`, and look at CUDA_VISIBLE_DEVICES",
        )
    })?;
    gpu.check()?;
    Ok(gpu)
}

fn gpu(ordinal: i32) -> std::result::Result<Gpu, DriverError> {
    use sys::CUdevice_attribute_enum::{
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
    };
    let device = result::device::get(ordinal)?;
    // SAFETY: the device was just handed out by the driver.
    let (major, minor, memory) = unsafe {
        (
            result::device::get_attribute(device, MAJOR)?,
            result::device::get_attribute(device, MINOR)?,
            result::device::total_mem(device)?,
        )
    };
    Ok(Gpu {
        ordinal: ordinal as usize,
        name: result::device::get_name(device)?,
        capability: (major, minor),
        memory,
    })
}

pub(super) fn no_kernels() -> Error {
    Error::device(
        format!("this binary has no GPU kernels {}", build_info().trim_start_matches("none ")),
        "run tools/setup_cuda.sh (or set NVCC), then build again; `--device cpu` works without",
    )
}

/// The error of asking for the emulated device in a build without it.
#[cfg(not(mmpo_emulated))]
pub fn no_emulated_device() -> Error {
    Error::device(
        format!("this binary has no emulated device {}", emulated_info().trim_start_matches("none ")),
        "`--device cpu` runs anywhere; the emulated device is for tests of the kernels",
    )
}

/// Checks that this build has GPU kernels.
///
/// # Errors
/// [`Error::Device`] with why it has none.
pub fn check_kernels() -> Result<()> {
    if cfg!(mmpo_gpu_kernels) { Ok(()) } else { Err(no_kernels()) }
}

/// Loads and starts NVIDIA's driver; its answer is the version of CUDA that it knows: 13020 is 13.2.
///
/// # Errors
/// [`Error::Device`] if the driver is absent or refuses.
pub fn start_driver() -> Result<i32> {
    // SAFETY: asking loads the library and runs its initialisers, nothing else.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::device(
            "no CUDA driver: libcuda.so.1 was not found",
            "install NVIDIA's driver, or use `--device cpu`",
        ));
    }
    result::init().map_err(|error| driver_error("starting the CUDA driver", error))?;
    let mut version = 0;
    // SAFETY: the call writes the number, and the driver's library is present.
    unsafe { sys::cuDriverGetVersion(&mut version) }
        .result()
        .map_err(|error| driver_error("asking the driver's version", error))?;
    Ok(version)
}

/// Checks that a driver of this version runs the kernels of this build.
///
/// # Errors
/// [`Error::Device`] if it is too old.
pub fn check_driver_version(driver: i32) -> Result<()> {
    check_versions(driver, RUNTIME_VERSION)
}

/// Within a major version of CUDA, older drivers run newer runtimes.
fn check_versions(driver: i32, runtime: &str) -> Result<()> {
    let needed: i32 = runtime.split('.').next().and_then(|major| major.parse().ok()).unwrap_or(0);
    if driver >= OLDEST_DRIVER.max(1000 * needed) {
        return Ok(());
    }
    Err(Error::device(
        format!("the NVIDIA driver is too old: it knows CUDA {}.{}", driver / 1000, driver % 1000 / 10),
        format!(
            "the kernels were built with CUDA {runtime}: update the driver, or build with an older nvcc; 12.8 is the least"
        ),
    ))
}

/// An error of the driver, with what was being done.
pub(super) fn driver_error(doing: &str, error: DriverError) -> Error {
    let text = error.error_string().map(|text| text.to_string_lossy().into_owned());
    let text = text.unwrap_or_else(|_| format!("{error:?}"));
    Error::device(format!("{doing}: {text}"), advice(error.0 as i32))
}

/// What to do about an error of the driver or of the runtime, which share these numbers.
pub(super) fn advice(code: i32) -> &'static str {
    // Codes from an illegal address to a failed launch: whatever asks the GPU next reports them.
    if (700..720).contains(&code) {
        "a kernel queued earlier may be the one that failed: CUDA_LAUNCH_BLOCKING=1 shows which; please report it"
    } else {
        "`nvidia-smi` shows whether driver and GPU are well; if they are, please report this"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_driver_is_told_apart() {
        assert!(check_versions(13000, "13.0").is_ok());
        assert!(check_versions(13020, "13.0").is_ok());
        assert!(check_versions(13000, "13.2").is_ok());
        assert!(check_versions(12080, "12.6").is_ok());
        assert!(check_versions(12060, "12.6").is_err());
        let error = check_versions(12080, "13.0").unwrap_err().to_string();
        assert!(error.contains("CUDA 12.8"), "{error}");
    }

    #[test]
    fn an_old_gpu_is_told_apart() {
        let gpu = |capability| Gpu { ordinal: 1, name: "Tesla T4".into(), capability, memory: 16 << 30 };
        assert!(gpu((8, 0)).check().is_ok());
        assert!(gpu((12, 0)).check().is_ok());
        let error = gpu((7, 5)).check().unwrap_err().to_string();
        assert!(error.contains("cuda:1 (Tesla T4)") && error.contains("7.5"), "{error}");
    }
}
