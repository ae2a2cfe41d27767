//! The processor and the memory that this process may use.

use std::path::Path;

use super::{Finding, bytes};
use crate::device::Hardware;
use crate::device::cpu::CpuDevice;

/// Processor and memory.
pub(super) fn findings() -> Vec<Finding> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    vec![processor(), memory(&meminfo, group_limit(Path::new("/sys/fs/cgroup"), &groups))]
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

/// A value of `/proc/meminfo` in bytes.
fn value(meminfo: &str, name: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let kibibytes: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kibibytes << 10)
}

/// The least limit on memory of this process's control groups, in bytes: a container's, or a job's. `mount` is where the
/// groups are seen, `groups` the text of `/proc/self/cgroup`.
fn group_limit(mount: &Path, groups: &str) -> Option<u64> {
    let mut limits = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?);
        let (root, file) = match controllers {
            "" => (mount.to_path_buf(), "memory.max"),
            _ if controllers.split(',').any(|name| name == "memory") => {
                (mount.join("memory"), "memory.limit_in_bytes")
            }
            _ => continue,
        };
        // A limit of any group above holds too.
        for group in Path::new(path.trim_start_matches('/')).ancestors() {
            let text = std::fs::read_to_string(root.join(group).join(file)).unwrap_or_default();
            limits.extend(text.trim().parse::<u64>());
        }
    }
    limits.into_iter().min()
}

/// Too little for the demo and a small model beside the system.
const LITTLE: u64 = 2 << 30;

fn memory(meminfo: &str, limit: Option<u64>) -> Finding {
    let (Some(total), Some(available)) = (value(meminfo, "MemTotal"), value(meminfo, "MemAvailable")) else {
        return Finding::note("memory", "unknown: /proc/meminfo does not say");
    };
    // Version 1 of control groups writes an absurd number for none.
    let limit = limit.filter(|limit| *limit < total);
    let available = limit.unwrap_or(total).min(available);
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

    const MEMINFO: &str =
        "MemTotal:       16777216 kB\nMemFree:         1048576 kB\nMemAvailable:    8388608 kB\n";

    #[test]
    fn memory_is_what_the_job_may_have() {
        let all = memory(MEMINFO, None);
        assert_eq!(all.found, "16.0 GiB, 8.0 GiB of it available");
        let job = memory(MEMINFO, Some(4 << 30));
        assert!(
            job.found.ends_with("4.0 GiB of it available; the container or job may have 4.0 GiB"),
            "{job:?}"
        );
        assert_eq!(memory(MEMINFO, Some(u64::MAX)), all.clone().with("limit_bytes", None::<u64>));
        assert!(memory(MEMINFO, Some(1 << 30)).advice.is_some());
        assert!(memory("", None).found.contains("unknown"));
    }

    #[test]
    fn the_least_limit_of_all_groups_above_counts() {
        let mount = tempfile::tempdir().unwrap();
        let job = mount.path().join("slurm/job_7");
        std::fs::create_dir_all(&job).unwrap();
        std::fs::write(job.join("memory.max"), "max\n").unwrap();
        assert_eq!(group_limit(mount.path(), "0::/slurm/job_7\n"), None);
        std::fs::write(mount.path().join("slurm/memory.max"), "1024\n").unwrap();
        assert_eq!(group_limit(mount.path(), "0::/slurm/job_7\n"), Some(1024));
        let old = mount.path().join("memory/job");
        std::fs::create_dir_all(&old).unwrap();
        std::fs::write(old.join("memory.limit_in_bytes"), "512").unwrap();
        assert_eq!(group_limit(mount.path(), "3:cpu:/job\n2:memory:/job\n"), Some(512));
    }

    #[test]
    fn the_processor_of_this_machine_is_named() {
        let finding = processor();
        assert!(finding.found.contains("thread"), "{finding:?}");
        assert!(finding.details["threads"].as_u64().unwrap_or(0) >= 1, "{finding:?}");
    }
}
