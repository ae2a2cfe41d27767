//! The processor and the memory that this process may use.

use super::{Finding, bytes};
use crate::device::Hardware;
use crate::device::cpu::CpuDevice;
use crate::host_memory::HostMemory;

/// Processor and memory.
pub(super) fn findings() -> Vec<Finding> {
    vec![processor(), memory(HostMemory::read())]
}

/// Extensions that matter here, in the order of their age. The kernels of the CPU device have a version for AVX2 with
/// FMA and one for AVX-512.
fn features() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    {
        let found = [
            ("avx", is_x86_feature_detected!("avx")),
            ("avx2", is_x86_feature_detected!("avx2")),
            ("fma", is_x86_feature_detected!("fma")),
            ("avx512f", is_x86_feature_detected!("avx512f")),
            ("avx512bw", is_x86_feature_detected!("avx512bw")),
            ("avx512dq", is_x86_feature_detected!("avx512dq")),
            ("avx512vl", is_x86_feature_detected!("avx512vl")),
            ("avx512bf16", is_x86_feature_detected!("avx512bf16")),
        ];
        found.into_iter().filter_map(|(name, there)| there.then_some(name)).collect()
    }
    #[cfg(not(target_arch = "x86_64"))]
    Vec::new()
}

fn processor() -> Finding {
    // The threads that the process may use: an affinity mask and a container's quota count.
    let usable = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    let online = std::fs::read_to_string("/proc/cpuinfo")
        .map(|info| info.lines().filter(|line| line.starts_with("processor")).count())
        .unwrap_or(0);
    let described = match CpuDevice::new(None) {
        Ok(device) => device.describe(),
        Err(error) => return Finding::from_error("processor", &error),
    };
    let named = described.strip_prefix("cpu (").and_then(|rest| rest.strip_suffix(')')).unwrap_or(&described);
    let slow = cfg!(target_arch = "x86_64") && !(features().contains(&"avx2") && features().contains(&"fma"));
    let finding = if slow {
        let advice = "training on this CPU is several times slower than on one with AVX2; a virtual machine may hide it";
        Finding::lack("processor", format!("{named}: neither AVX2 nor AVX-512"), advice)
    } else if online > usable {
        Finding::note("processor", format!("{named}; {usable} of the machine's {online} are this process's"))
    } else {
        Finding::good("processor", named)
    };
    finding.with("threads", usable).with("online", online).with("features", features())
}

/// Too little for the demo and a small model beside the system.
const LITTLE: u64 = 2 << 30;

fn memory(found: Option<HostMemory>) -> Finding {
    let Some(memory) = found else {
        return Finding::note("memory", "unknown: /proc/meminfo does not say");
    };
    let [total, available] = [memory.installed, memory.available].map(|bytes| bytes as u64);
    let limit = memory.limit.map(|limit| limit as u64);
    let mut found = format!("{}, {} of it available", bytes(total), bytes(available));
    if let Some(limit) = limit {
        found.push_str(&format!("; the container or job may have {}", bytes(limit)));
    }
    let finding = if available < LITTLE {
        let advice =
            "full training on the CPU takes 16 bytes per parameter: end other programs, or raise the limit";
        Finding::lack("memory", found, advice)
    } else {
        Finding::good("memory", found)
    };
    finding.with("bytes", total).with("available_bytes", available).with("limit_bytes", limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_what_the_job_may_have() {
        let all = HostMemory { installed: 16 << 30, limit: None, available: 8 << 30 };
        assert_eq!(memory(Some(all)).found, "16.0 GiB, 8.0 GiB of it available");
        let job = memory(Some(HostMemory { limit: Some(4 << 30), available: 3 << 30, ..all }));
        assert!(
            job.found.ends_with("3.0 GiB of it available; the container or job may have 4.0 GiB"),
            "{job:?}"
        );
        assert!(job.advice.is_none(), "{job:?}");
        assert!(memory(Some(HostMemory { available: 1 << 30, ..all })).advice.is_some());
        assert!(memory(None).found.contains("unknown"));
    }

    #[test]
    fn the_processor_of_this_machine_is_named() {
        let finding = processor();
        assert!(finding.found.contains("thread"), "{finding:?}");
        assert!(finding.details["threads"].as_u64().unwrap_or(0) >= 1, "{finding:?}");
    }
}
