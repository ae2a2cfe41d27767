//! Kernels, driver, GPUs, and NVIDIA's libraries beside the driver.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::Finding;
use crate::device::DeviceChoice;
use crate::device::cuda::{self, Gpu, libraries};
use crate::error::{Error, Result};

/// The GPUs of the machine, or why none can be used.
pub(super) struct Gpus(Result<Vec<Gpu>>);

/// Looks for everything that a run on a GPU needs.
pub(super) fn findings() -> (Gpus, Vec<Finding>) {
    let mut findings = vec![kernels()];
    let listed = match cuda::start_driver() {
        Ok(version) => {
            findings.push(driver(version));
            let listed = cuda::listed_gpus();
            findings.push(gpus(&listed));
            listed
        }
        Err(error) => {
            findings.push(Finding::from_error("driver", &error));
            Err(error)
        }
    };
    // Where there is no GPU at all, a library that only GPUs use is no lack.
    let has_gpu = listed.as_ref().is_ok_and(|gpus| !gpus.is_empty());
    findings.push(cublaslt(has_gpu));
    findings.push(nccl());
    let usable = cuda::check_kernels().and(listed);
    (Gpus(usable), findings)
}

impl Gpus {
    /// What a run with this `--device` computes on, in words.
    ///
    /// # Errors
    /// [`Error::Device`] where a GPU is asked for and cannot be used.
    pub(super) fn taken(self, device: DeviceChoice) -> Result<String> {
        let wanted = match device {
            DeviceChoice::Cpu => return Ok("the CPU".to_string()),
            DeviceChoice::Emulated => return Ok("the emulated GPU: for tests, not for speed".to_string()),
            DeviceChoice::Auto => None,
            DeviceChoice::Cuda(ordinal) => Some(ordinal),
        };
        let first = self.0.and_then(|gpus| first_usable(&gpus, wanted));
        match (first, wanted) {
            (Ok(gpu), _) => Ok(format!("cuda:{} ({gpu})", gpu.ordinal)),
            (Err(error), None) => Ok(format!("the CPU, because {error}")),
            (Err(error), Some(_)) => Err(error),
        }
    }
}

/// The GPU of the ordinal, or the first that the kernels run on.
fn first_usable(gpus: &[Gpu], wanted: Option<usize>) -> Result<Gpu> {
    cuda::check_driver_version(cuda::start_driver()?)?;
    let considered: Vec<&Gpu> =
        gpus.iter().filter(|gpu| wanted.is_none_or(|ordinal| gpu.ordinal == ordinal)).collect();
    let checked: Vec<Result<Gpu>> =
        considered.into_iter().map(|gpu| gpu.check().map(|()| gpu.clone())).collect();
    let none = || match wanted {
        None => "the CUDA driver lists no GPU".to_string(),
        Some(ordinal) => format!("there is no GPU {ordinal}: the driver lists {}", gpus.len()),
    };
    let mut refused = Err(Error::device(none(), "look at `nvidia-smi` and at CUDA_VISIBLE_DEVICES"));
    for gpu in checked {
        match gpu {
            Ok(gpu) => return Ok(gpu),
            Err(error) => refused = Err(error),
        }
    }
    refused
}

fn kernels() -> Finding {
    match cuda::check_kernels() {
        Ok(()) => Finding::good("kernels", cuda::build_info()),
        Err(error) => Finding::from_error("kernels", &error),
    }
}

fn driver(version: i32) -> Finding {
    let knows = format!("{}.{}", version / 1000, version % 1000 / 10);
    let finding = match cuda::check_driver_version(version) {
        Ok(()) => Finding::good("driver", format!("found, knows CUDA {knows}")),
        Err(error) => Finding::from_error("driver", &error),
    };
    finding.with("cuda", knows)
}

fn gpus(listed: &Result<Vec<Gpu>>) -> Finding {
    let gpus = match listed {
        Ok(gpus) => gpus,
        Err(error) => return Finding::from_error("gpus", error),
    };
    let shown: Vec<String> = gpus.iter().map(|gpu| format!("cuda:{} {gpu}", gpu.ordinal)).collect();
    let refused = gpus.iter().filter_map(|gpu| gpu.check().err()).next();
    let finding = match (gpus.is_empty(), refused) {
        (true, _) => Finding::lack(
            "gpus",
            "the driver lists none",
            "look at `nvidia-smi` and at CUDA_VISIBLE_DEVICES; in a container, run it with `--gpus all`; in a job, ask for a GPU",
        ),
        (false, None) => Finding::good("gpus", shown.join("; ")),
        (false, Some(error)) => Finding { found: shown.join("; "), ..Finding::from_error("gpus", &error) },
    };
    let details: Vec<_> = gpus
        .iter()
        .map(|gpu| {
            json!({
                "ordinal": gpu.ordinal,
                "name": gpu.name,
                "compute_capability": format!("{}.{}", gpu.capability.0, gpu.capability.1),
                "memory_bytes": gpu.memory,
                "usable": gpu.check().is_ok(),
            })
        })
        .collect();
    finding.with("gpus", details)
}

fn cublaslt(has_gpu: bool) -> Finding {
    let Some(version) = libraries::cublaslt_version() else {
        let found = "libcublasLt.so is not found";
        if !has_gpu {
            return Finding::note("cublaslt", format!("{found}; only a GPU uses it"));
        }
        let advice = match installed("libcublasLt.so") {
            Some(folder) => format!("it is in {0}: export LD_LIBRARY_PATH={0}", folder.display()),
            None => "install CUDA's cuBLAS, for instance PyPI's nvidia-cublas, and add its folder to LD_LIBRARY_PATH"
                .to_string(),
        };
        return Finding::lack(
            "cublaslt",
            format!("{found}: linear layers take this program's own, slower gemms, or end where none fits"),
            advice,
        );
    };
    Finding::good("cublaslt", version.clone()).with("version", version)
}

/// NCCL joins the GPUs of a run on several; a run on one takes none, so that its absence is no lack.
fn nccl() -> Finding {
    match libraries::nccl_version() {
        Some(version) => Finding::note("nccl", format!("{version}; only a run on several GPUs takes it"))
            .with("version", version),
        None => {
            let place = match installed("libnccl.so") {
                Some(folder) => {
                    format!(" by the loader; it is in {0}: export LD_LIBRARY_PATH={0}", folder.display())
                }
                None => String::new(),
            };
            Finding::note("nccl", format!("not found{place}; only a run on several GPUs takes it"))
        }
    }
}

/// The folder in which the active Python or conda environment has a library of NVIDIA's, where the loader does not look.
fn installed(library: &str) -> Option<PathBuf> {
    let environments = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(std::env::var_os);
    environments.map(PathBuf::from).find_map(|environment| installed_in(&environment, library))
}

fn installed_in(environment: &Path, library: &str) -> Option<PathBuf> {
    let entries = |folder: &Path| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
        paths.sort();
        paths
    };
    let holds = |folder: &Path| {
        entries(folder)
            .iter()
            .any(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(library)))
    };
    let pythons = entries(&environment.join("lib")).into_iter();
    let packages = pythons.flat_map(|python| entries(&python.join("site-packages/nvidia")));
    packages.map(|package| package.join("lib")).find(|folder| holds(folder))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(ordinal: usize, capability: (i32, i32)) -> Gpu {
        Gpu { ordinal, name: "Pretended GPU".into(), capability, memory: 24 << 30 }
    }

    #[test]
    fn gpus_are_told_with_memory_and_compute_capability() {
        let finding = gpus(&Ok(vec![gpu(0, (7, 5)), gpu(1, (9, 0))]));
        assert!(
            finding.found.contains("cuda:1 Pretended GPU, compute capability 9.0, 24 GiB"),
            "{finding:?}"
        );
        assert!(finding.advice.as_deref().unwrap_or_default().contains("8.0 (Ampere)"), "{finding:?}");
        let details = finding.to_json();
        assert_eq!(details["gpus"][0]["usable"], false);
        assert_eq!(details["gpus"][1]["compute_capability"], "9.0");
        assert_eq!(details["gpus"][1]["memory_bytes"], 24_u64 << 30);
    }

    #[test]
    fn no_gpu_is_a_lack_with_advice() {
        let finding = gpus(&Ok(Vec::new()));
        assert!(
            finding.advice.as_deref().unwrap_or_default().contains("CUDA_VISIBLE_DEVICES"),
            "{finding:?}"
        );
    }

    #[test]
    fn auto_takes_the_cpu_where_a_gpu_is_refused_and_cuda_fails() {
        let none = || Gpus(Err(Error::device("no CUDA driver", "install it")));
        assert_eq!(none().taken(DeviceChoice::Auto).unwrap(), "the CPU, because no CUDA driver");
        assert_eq!(none().taken(DeviceChoice::Cuda(0)).unwrap_err().exit_code(), 6);
        assert_eq!(none().taken(DeviceChoice::Cpu).unwrap(), "the CPU");
    }

    #[test]
    fn a_library_is_found_in_a_python_environment() {
        let environment = tempfile::tempdir().unwrap();
        let folder = environment.path().join("lib/python3.12/site-packages/nvidia/cu13/lib");
        std::fs::create_dir_all(&folder).unwrap();
        assert_eq!(installed_in(environment.path(), "libcublasLt.so"), None);
        std::fs::write(folder.join("libcublasLt.so.13"), "").unwrap();
        assert_eq!(installed_in(environment.path(), "libcublasLt.so"), Some(folder));
    }
}
