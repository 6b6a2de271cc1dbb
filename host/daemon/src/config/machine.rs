//! What the machine has, as far as it decides a default.

use std::fs;
use std::path::{Path, PathBuf};

/// Three quarters of the memory that this process can have: the machine's, or less if its control groups say so. None if neither is
/// known.
pub(super) fn memory_share() -> Option<u64> {
    let system = rustix::system::sysinfo();
    let machine = (system.totalram as u64).saturating_mul(u64::from(system.mem_unit));
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limit = limit_of(&groups, Path::new("/sys/fs/cgroup"));
    limit.into_iter().chain(Some(machine)).min().filter(|bytes| *bytes > 0).map(|bytes| bytes / 4 * 3)
}

/// The least limit of the control groups that a process is in, from its `/proc/self/cgroup`: of version 2 (`0::PATH`) and 1 (`N:memory:PATH`).
/// A group's limit binds those below it. Within a container the path may be one of the machine's, which is not there; the root then is.
fn limit_of(groups: &str, mount: &Path) -> Option<u64> {
    let mut limits = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else { continue };
        let (root, file) = match controllers {
            "" => (mount.to_path_buf(), "memory.max"),
            _ if controllers.split(',').any(|name| name == "memory") => (mount.join("memory"), "memory.limit_in_bytes"),
            _ => continue,
        };
        let group: PathBuf = root.join(path.trim_start_matches('/'));
        let above = group.ancestors().take_while(|folder| folder.starts_with(&root));
        let limit = |folder: &Path| fs::read_to_string(folder.join(file)).ok()?.trim().parse::<u64>().ok();
        limits.extend(above.filter_map(limit));
    }
    limits.into_iter().min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_is_less_than_the_machine_has() {
        let system = rustix::system::sysinfo();
        let machine = system.totalram as u64 * u64::from(system.mem_unit);
        assert!(memory_share().is_some_and(|share| share > 0 && share < machine));
    }

    #[test]
    fn the_least_limit_of_all_groups_above_counts() {
        let mount = tempfile::tempdir().expect("a folder");
        let write = |file: &str, text: &str| {
            let path = mount.path().join(file);
            fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
            fs::write(path, text).expect("written");
        };
        write("system.slice/memory.max", "2000\n");
        write("system.slice/laelaps.service/memory.max", "max\n");
        let limit = |groups: &str| limit_of(groups, mount.path());
        assert_eq!(limit("0::/system.slice/laelaps.service\n"), Some(2000));
        assert_eq!(limit("0::/elsewhere\n"), None);
        write("memory.max", "3000\n");
        assert_eq!(limit("0::/not/there\n"), Some(3000), "within a container");
        write("memory/docker/memory.limit_in_bytes", "1500\n");
        assert_eq!(limit("5:cpu:/x\n4:memory:/docker/abc\n0::/\n"), Some(1500));
    }
}
