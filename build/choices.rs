//! What a build is asked for through the environment, and what it can have on its target.

use crate::Result;

/// `MMPO_FAST_CUDA`: what to do about nvcc.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum GpuKernels {
    Auto,
    Require,
    Off,
}

impl GpuKernels {
    pub fn of(setting: Option<&str>) -> Result<Self> {
        match setting {
            None | Some("" | "auto") => Ok(GpuKernels::Auto),
            Some("require") => Ok(GpuKernels::Require),
            Some("off") => Ok(GpuKernels::Off),
            Some(other) => Err(format!("MMPO_FAST_CUDA is `{other}`; it may be auto, require or off")),
        }
    }
}

/// Why the emulated device is left out, `None` if it is built: of what `MMPO_FAST_EMULATED` says and of the target, in the
/// names of `CARGO_CFG_TARGET_ARCH` and `CARGO_CFG_TARGET_OS`.
pub fn without_emulated(setting: Option<&str>, arch: &str, os: &str) -> Result<Option<String>> {
    match setting {
        None | Some("" | "auto") if (arch, os) == ("x86_64", "linux") => Ok(None),
        None | Some("" | "auto") => {
            Ok(Some(format!("it switches stacks in x86-64 assembly for Linux; this is {arch}, {os}")))
        }
        Some("off") => Ok(Some("built with MMPO_FAST_EMULATED=off".to_owned())),
        Some(other) => Err(format!("MMPO_FAST_EMULATED is `{other}`; it may be auto or off")),
    }
}
