//! `--device`: which device a run uses, and why.

use std::str::FromStr;
use std::sync::Arc;

use half::bf16;

use super::cpu::CpuDevice;
use super::cuda::{self, CudaDevice};
use super::{Device, Hardware};
use crate::error::{Error, Result};

/// What `--device` asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// A CUDA GPU of compute capability 8.0 or later, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The CUDA device of this ordinal.
    Cuda(usize),
    /// The CUDA kernels on the emulated device: for tests, not for speed.
    Emulated,
}

/// What `--precision` asks for: the numbers that weights and activations are stored in. Sums, softmax, log-probs, losses and
/// gradients of weights are f32 with either.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// IEEE single precision; the CPU alone has it, and takes it unless told otherwise.
    F32,
    /// The upper half of an f32; the only storage of CUDA devices.
    Bf16,
}

/// Which device was taken and why, for people: `cpu (..): no CUDA driver: libcuda.so.1 was not found`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceReport {
    /// Never [`DeviceChoice::Auto`].
    pub chosen: DeviceChoice,
    /// The device's own description.
    pub device: String,
    /// Why this device was taken.
    pub reason: String,
}

impl std::fmt::Display for DeviceReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.device, self.reason)
    }
}

/// Work that runs on whatever device was chosen; a closure cannot be generic, so it is a trait.
pub trait DeviceTask {
    /// What the work returns.
    type Output;
    /// Does the work on `device`.
    ///
    /// # Errors
    /// Those of the work.
    fn run<D: Device>(self, device: Arc<D>) -> Result<Self::Output>;
}

/// Opens the chosen device (`precision`: `None` is the device's own; `threads`: CPU threads, `None` is all cores), says which
/// and why, and runs `task` on it.
///
/// # Errors
/// [`Error::Device`] if a GPU, or the emulated one, was asked for and cannot be used; [`DeviceChoice::Auto`] takes the CPU
/// instead. [`Error::Config`] if f32 was asked of a CUDA device. Otherwise as the task.
pub fn run_on<T: DeviceTask>(
    choice: DeviceChoice,
    precision: Option<Precision>,
    threads: Option<usize>,
    task: T,
) -> Result<T::Output> {
    let (device, report) = open(choice, precision, threads)?;
    tracing::info!("device: {report}");
    match device {
        Opened::Cpu(device) => task.run(Arc::new(device)),
        Opened::CpuBf16(device) => task.run(Arc::new(device)),
        Opened::Cuda(device) => task.run(Arc::new(device)),
    }
}

/// As [`run_on`], for work that comes before the run's own: the device is not announced.
///
/// # Errors
/// As [`run_on`].
pub fn ask_on<T: DeviceTask>(
    choice: DeviceChoice,
    precision: Option<Precision>,
    threads: Option<usize>,
    task: T,
) -> Result<T::Output> {
    match open(choice, precision, threads)?.0 {
        Opened::Cpu(device) => task.run(Arc::new(device)),
        Opened::CpuBf16(device) => task.run(Arc::new(device)),
        Opened::Cuda(device) => task.run(Arc::new(device)),
    }
}

enum Opened {
    Cpu(CpuDevice),
    CpuBf16(CpuDevice<bf16>),
    Cuda(CudaDevice),
}

fn open_cpu(precision: Option<Precision>, threads: Option<usize>) -> Result<Opened> {
    match precision.unwrap_or(Precision::F32) {
        Precision::F32 => Ok(Opened::Cpu(CpuDevice::new(threads)?)),
        Precision::Bf16 => Ok(Opened::CpuBf16(CpuDevice::open(threads)?)),
    }
}

fn open(
    choice: DeviceChoice,
    precision: Option<Precision>,
    threads: Option<usize>,
) -> Result<(Opened, DeviceReport)> {
    let has_f32 = matches!(choice, DeviceChoice::Auto | DeviceChoice::Cpu);
    if precision == Some(Precision::F32) && !has_f32 {
        return Err(Error::config(
            format!("`--precision` = f32: the kernels of `--device {choice}` store bf16 alone"),
            "leave --precision out, or compute with --device cpu",
        ));
    }
    let asked = "asked for".to_owned();
    let (device, chosen, reason) = match choice {
        DeviceChoice::Cpu => (open_cpu(precision, threads)?, choice, asked),
        DeviceChoice::Cuda(ordinal) => (Opened::Cuda(CudaDevice::open(ordinal)?), choice, asked),
        DeviceChoice::Emulated => (Opened::Cuda(emulated()?), choice, asked),
        DeviceChoice::Auto if precision == Some(Precision::F32) => {
            let reason =
                "no GPU is used, because `--precision f32` was asked for, and GPUs store bf16".to_owned();
            (open_cpu(precision, threads)?, DeviceChoice::Cpu, reason)
        }
        DeviceChoice::Auto => match first_gpu() {
            Ok((device, ordinal)) => {
                let reason = "the first GPU of compute capability 8.0 or later".to_owned();
                (Opened::Cuda(device), DeviceChoice::Cuda(ordinal), reason)
            }
            Err(why) => {
                let reason = format!("no GPU is used, because {why}");
                (open_cpu(precision, threads)?, DeviceChoice::Cpu, reason)
            }
        },
    };
    let device_line = match &device {
        Opened::Cpu(device) => device.describe(),
        Opened::CpuBf16(device) => device.describe(),
        Opened::Cuda(device) => device.describe(),
    };
    Ok((device, DeviceReport { chosen, device: device_line, reason }))
}

#[cfg(mmpo_emulated)]
fn emulated() -> Result<CudaDevice> {
    Ok(CudaDevice::emulated(cuda::EmulatorVariant::Plain))
}

#[cfg(not(mmpo_emulated))]
fn emulated() -> Result<CudaDevice> {
    Err(cuda::no_emulated_device())
}

/// The first GPU that the kernels run on; the error says why there is none, as the end of a sentence.
fn first_gpu() -> std::result::Result<(CudaDevice, usize), String> {
    let gpus = cuda::gpus().map_err(|error| error.to_string())?;
    if gpus.is_empty() {
        return Err("the CUDA driver lists no GPU".into());
    }
    let mut refused = Vec::new();
    for gpu in &gpus {
        match gpu.check().and_then(|()| CudaDevice::open(gpu.ordinal)) {
            Ok(device) => return Ok((device, gpu.ordinal)),
            Err(error) => refused.push(error.to_string()),
        }
    }
    Err(refused.join("; "))
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

impl FromStr for Precision {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "f32" => Ok(Precision::F32),
            "bf16" => Ok(Precision::Bf16),
            _ => Err(format!("must be f32 or bf16, not `{text}`")),
        }
    }
}

impl std::fmt::Display for Precision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
        })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_choice_reads_as_it_prints() {
        for text in ["auto", "cpu", "cuda:0", "cuda:3", "emulated"] {
            assert_eq!(text.parse::<DeviceChoice>().map(|choice| choice.to_string()).as_deref(), Ok(text));
        }
        let error = "cuda:x".parse::<DeviceChoice>().unwrap_err();
        assert!(error.contains("cuda:N"), "{error}");
    }

    #[test]
    fn auto_says_what_it_took_and_why() {
        let (device, report) = open(DeviceChoice::Auto, None, Some(1)).unwrap();
        match device {
            Opened::CpuBf16(_) => panic!("bf16 is not the CPU's default"),
            Opened::Cpu(_) => {
                assert_eq!(report.chosen, DeviceChoice::Cpu);
                assert!(report.to_string().contains("no GPU is used, because"), "{report}");
            }
            Opened::Cuda(_) => {
                assert!(matches!(report.chosen, DeviceChoice::Cuda(_)), "{report}");
                assert!(report.to_string().contains("compute capability"), "{report}");
            }
        }
    }

    /// f32 is the CPU's default, bf16 is what was asked for, and a device that has no f32 refuses it.
    #[test]
    fn the_precision_is_the_one_asked_for() {
        for (precision, wanted) in
            [(None, "cpu f32"), (Some(Precision::F32), "cpu f32"), (Some(Precision::Bf16), "cpu bf16")]
        {
            let (device, report) = open(DeviceChoice::Cpu, precision, Some(1)).unwrap();
            let arithmetic = match device {
                Opened::Cpu(device) => device.arithmetic(),
                Opened::CpuBf16(device) => device.arithmetic(),
                Opened::Cuda(device) => device.arithmetic(),
            };
            assert_eq!(arithmetic, wanted);
            assert!(report.device.contains(arithmetic.trim_start_matches("cpu ")), "{report}");
        }
        let (_, report) = open(DeviceChoice::Auto, Some(Precision::F32), Some(1)).unwrap();
        assert_eq!(report.chosen, DeviceChoice::Cpu);
        assert!(report.reason.contains("--precision f32"), "{report}");
        for choice in [DeviceChoice::Cuda(0), DeviceChoice::Emulated] {
            let error = open(choice, Some(Precision::F32), None).err().unwrap();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains("store bf16 alone"), "{error}");
        }
    }

    /// More GPUs than any machine has: the message says what is missing, driver, kernels or that GPU.
    #[test]
    fn a_gpu_that_is_not_there_is_a_clear_error() {
        let error = CudaDevice::open(4096).unwrap_err();
        assert_eq!(error.exit_code(), 6);
        let text = error.to_string();
        let clear = ["no CUDA driver", "no GPU kernels", "no GPU 4096", "too old"];
        assert!(clear.iter().any(|part| text.contains(part)), "{text}");
    }
}
