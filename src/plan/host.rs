//! The computer's own memory, where a device has no limit of its own.

use std::path::Path;

/// Bytes of the computer's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostMemory {
    /// In all, or the limit of the control group that the process is in, if that is less.
    pub total: usize,
    /// Of these, what is not in use, or can be given up by caches.
    pub available: usize,
}

/// What the system says of its memory; `None` where it does not say it as Linux does.
pub fn memory() -> Option<HostMemory> {
    let read = |path: &str| std::fs::read_to_string(Path::new(path)).ok();
    let group =
        |name: &str| read(&format!("/sys/fs/cgroup/memory.{name}")).and_then(|text| text.trim().parse().ok());
    parse(&read("/proc/meminfo")?, group("max"), group("current"))
}

fn parse(text: &str, limit: Option<usize>, used: Option<usize>) -> Option<HostMemory> {
    let field = |name: &str| {
        let line = text.lines().find(|line| line.split(':').next() == Some(name))?;
        let kibibytes: usize = line.split_whitespace().nth(1)?.parse().ok()?;
        kibibytes.checked_mul(1 << 10)
    };
    let (total, available) = (field("MemTotal")?, field("MemAvailable")?);
    let Some(limit) = limit.filter(|&limit| limit < total) else {
        return Some(HostMemory { total, available });
    };
    let left = limit.saturating_sub(used.unwrap_or(0));
    Some(HostMemory { total: limit, available: available.min(left) })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str =
        "MemTotal:       16000000 kB\nMemFree:  1 kB\nMemAvailable:    8000000 kB\nSwapTotal: 0 kB\n";

    #[test]
    fn the_smaller_of_machine_and_control_group_counts() {
        let (total, available) = (16_000_000 << 10, 8_000_000 << 10);
        assert_eq!(parse(TEXT, None, None), Some(HostMemory { total, available }));
        let limited = parse(TEXT, Some(1 << 30), Some(1 << 29));
        assert_eq!(limited, Some(HostMemory { total: 1 << 30, available: 1 << 29 }));
        assert_eq!(parse(TEXT, Some(usize::MAX), Some(5)), Some(HostMemory { total, available }));
        assert_eq!(parse("MemTotal: 1 kB\n", None, None), None);
    }
}
