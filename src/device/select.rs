//! `--device`: which device a run uses, and why.

use std::str::FromStr;
use std::sync::Arc;

use super::Device;
use super::cpu::CpuDevice;
use crate::error::{Error, Result};

/// What `--device` asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// A CUDA GPU of compute capability 8.0 or later, else the CPU.
    #[default]
    Auto,
    Cpu,
    /// The CUDA device of this ordinal.
    Cuda(usize),
    /// The CUDA kernels on the emulated device: for tests, not for speed.
    Emulated,
}

/// What `auto` found, for people: `cpu: no CUDA driver (libcuda.so.1 not found)`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceReport {
    pub chosen: DeviceChoice,
    pub reason: String,
}

/// Work that runs on whatever device was chosen; a closure cannot be generic, so it is a trait.
pub trait DeviceTask {
    type Output;
    fn run<D: Device>(self, device: Arc<D>) -> Result<Self::Output>;
}

/// Opens the chosen device (`threads`: CPU threads, `None` is all cores) and runs `task` on it.
pub fn run_on<T: DeviceTask>(choice: DeviceChoice, threads: Option<usize>, task: T) -> Result<T::Output> {
    match choice {
        DeviceChoice::Auto | DeviceChoice::Cpu => {
            let device = CpuDevice::new(threads)?;
            tracing::info!("device: {}", device.describe());
            task.run(Arc::new(device))
        }
        DeviceChoice::Cuda(_) | DeviceChoice::Emulated => {
            Err(Error::device(format!("this build has no `{choice}` device"), "use --device cpu"))
        }
    }
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "auto" => Ok(DeviceChoice::Auto),
            "cpu" => Ok(DeviceChoice::Cpu),
            "cuda" => Ok(DeviceChoice::Cuda(0)),
            "emulated" => Ok(DeviceChoice::Emulated),
            _ => text
                .strip_prefix("cuda:")
                .and_then(|ordinal| ordinal.parse().ok())
                .map(DeviceChoice::Cuda)
                .ok_or_else(|| format!("`{text}` is not a device; use auto, cpu, cuda, cuda:N or emulated")),
        }
    }
}

impl std::fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            DeviceChoice::Auto => write!(f, "auto"),
            DeviceChoice::Cpu => write!(f, "cpu"),
            DeviceChoice::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
            DeviceChoice::Emulated => write!(f, "emulated"),
        }
    }
}
