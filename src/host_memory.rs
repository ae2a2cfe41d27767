//! The memory of this computer, and how much of it this process may use: a container or a job has a limit of its own.

use std::fs;
use std::path::Path;

/// Bytes of this computer's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostMemory {
    /// All that the computer has.
    pub installed: usize,
    /// The least limit of the control groups that this process is in, where that is less: a container's, or a job's.
    pub limit: Option<usize>,
    /// What is not in use, or can be given up by caches, and no group's limit forbids.
    pub available: usize,
}

impl HostMemory {
    /// As Linux and its control groups say it now; `None` on a system that does not say it.
    pub fn read() -> Option<Self> {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let groups = groups(Path::new("/sys/fs/cgroup"), &text("/proc/self/cgroup"));
        Self::of(&text("/proc/meminfo"), &groups)
    }

    /// All that this process may have, whether it is free or not.
    pub fn total(&self) -> usize {
        self.limit.unwrap_or(self.installed)
    }

    fn of(meminfo: &str, groups: &[Group]) -> Option<Self> {
        let (installed, free) = (value(meminfo, "MemTotal")?, value(meminfo, "MemAvailable")?);
        // Version 1 of control groups writes an absurd number for none.
        let limited = || groups.iter().filter(|group| group.limit < installed);
        Some(HostMemory {
            installed,
            limit: limited().map(|group| group.limit).min(),
            available: limited().map(|group| group.limit.saturating_sub(group.used)).fold(free, usize::min),
        })
    }
}

/// A value of `/proc/meminfo` in bytes.
fn value(meminfo: &str, name: &str) -> Option<usize> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let kibibytes: usize = line.split_whitespace().next()?.parse().ok()?;
    kibibytes.checked_mul(1 << 10)
}

/// A control group with a limit on memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Group {
    /// Bytes.
    limit: usize,
    /// Bytes that its processes use, without the files that the system keeps for them and can give up.
    used: usize,
}

/// The names of a group's files, and of the files' bytes in `memory.stat`.
struct Names {
    limit: &'static str,
    used: &'static str,
    files: &'static str,
}

const VERSION_1: Names =
    Names { limit: "memory.limit_in_bytes", used: "memory.usage_in_bytes", files: "total_inactive_file" };
const VERSION_2: Names = Names { limit: "memory.max", used: "memory.current", files: "inactive_file" };

impl Group {
    fn read(folder: &Path, names: &Names) -> Option<Self> {
        let text = |name: &str| fs::read_to_string(folder.join(name)).unwrap_or_default();
        let number = |name: &str| text(name).trim().parse::<usize>().ok();
        let limit = number(names.limit)?;
        let stat = text("memory.stat");
        let files = stat.lines().find_map(|line| line.strip_prefix(names.files)?.trim().parse().ok());
        let used = number(names.used).unwrap_or(0).saturating_sub(files.unwrap_or(0));
        Some(Group { limit, used })
    }
}

/// This process's control groups that limit memory. `mount` is where groups are seen, `own` the text of `/proc/self/cgroup`.
fn groups(mount: &Path, own: &str) -> Vec<Group> {
    let mut found = Vec::new();
    for line in own.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let (root, names) = match controllers {
            "" => (mount.to_path_buf(), VERSION_2),
            _ if controllers.split(',').any(|name| name == "memory") => (mount.join("memory"), VERSION_1),
            _ => continue,
        };
        // A limit of any group above holds too.
        let above = Path::new(path.trim_start_matches('/')).ancestors();
        found.extend(above.filter_map(|group| Group::read(&root.join(group), &names)));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMINFO: &str =
        "MemTotal:       16777216 kB\nMemFree:  1 kB\nMemAvailable:    8388608 kB\nSwapTotal: 0 kB\n";
    const GIB: usize = 1 << 30;

    #[test]
    fn the_smaller_of_machine_and_control_group_counts() {
        let of = |limit, used| HostMemory::of(MEMINFO, &[Group { limit, used }]).unwrap();
        let all = HostMemory { installed: 16 * GIB, limit: None, available: 8 * GIB };
        assert_eq!(HostMemory::of(MEMINFO, &[]), Some(all));
        assert_eq!(all.total(), 16 * GIB);
        let limited = HostMemory { limit: Some(4 * GIB), available: 3 * GIB, ..all };
        assert_eq!((of(4 * GIB, GIB), limited.total()), (limited, 4 * GIB));
        assert_eq!(of(10 * GIB, GIB), HostMemory { limit: Some(10 * GIB), ..all });
        assert_eq!(of(usize::MAX, 5), all);
        assert_eq!(HostMemory::of("MemTotal: 1 kB\n", &[]), None);
        assert_eq!(HostMemory::of("", &[]), None);
    }

    #[test]
    fn the_tightest_of_several_groups_counts() {
        let groups = [Group { limit: 4 * GIB, used: 0 }, Group { limit: 6 * GIB, used: 5 * GIB }];
        let found = HostMemory::of(MEMINFO, &groups).unwrap();
        assert_eq!((found.limit, found.available), (Some(4 * GIB), GIB));
    }

    #[test]
    fn groups_above_are_read_and_kept_files_are_not_used() {
        let mount = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(mount.path().join(name), text).unwrap();
        fs::create_dir_all(mount.path().join("slurm/job_7")).unwrap();
        write("slurm/job_7/memory.max", "max\n");
        assert!(groups(mount.path(), "0::/slurm/job_7\n").is_empty());
        write("slurm/memory.max", "1024\n");
        assert_eq!(groups(mount.path(), "0::/slurm/job_7\n"), [Group { limit: 1024, used: 0 }]);
        write("slurm/memory.current", "700\n");
        write("slurm/memory.stat", "anon 100\nactive_file 50\ninactive_file 500\n");
        assert_eq!(groups(mount.path(), "0::/slurm/job_7\n"), [Group { limit: 1024, used: 200 }]);
        fs::create_dir_all(mount.path().join("memory/job")).unwrap();
        write("memory/job/memory.limit_in_bytes", "512");
        write("memory/job/memory.usage_in_bytes", "12");
        let old = groups(mount.path(), "3:cpu:/job\n2:memory:/job\nnonsense\n");
        assert_eq!(old, [Group { limit: 512, used: 12 }]);
    }
}
