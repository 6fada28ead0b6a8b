// SPDX-License-Identifier: MIT OR Apache-2.0
//! The control group (cgroup v2) of a guest: what does the I/O of its disks is in there, so that limits and weights of
//! that group hold for the guest (`io.max`, `io.weight`).
//!
//! The I/O is done by threads of the kernel that serve the rings, of any driver and of phy disks too, and by the
//! processes of tap disks. Both come and go as frontends connect and processes die, so they are placed whenever
//! xenstore tells of either; a process that takes the place of another is placed before it does anything.
//!
//! A guest keeps its group as long as it has disks, with the limits that an administrator has set there, even when the
//! next supervisor creates groups elsewhere, or none. So their locations are recorded (`places`).

mod places;

use places::GroupPlaces;
use rustix::fs::{getxattr, setxattr, XattrFlags};
use rustix::io::Errno;
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Placeholder for the number of a domain.
const NUMBER: &str = "%d";
/// The extended attribute of a group that is ours to remove. It is with the group, so the next supervisor knows it, too.
const OURS: &str = "user.xentap.made";
/// The flag of a thread of the kernel in `/proc/PID/stat` (`PF_KTHREAD`, include/linux/sched.h).
const KERNEL_THREAD: u64 = 0x0020_0000;

/// Where the group of a guest is: a path that ends with a name in which `%d` stands for the domain's number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    parent: PathBuf,
    name: String,
}

impl FromStr for Template {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let path = Path::new(text);
        let name = path.file_name().and_then(|name| name.to_str());
        match (path.parent(), name) {
            (Some(parent), Some(name))
                if parent.is_absolute()
                    && name.matches('%').count() == 1
                    && name.contains(NUMBER) =>
            {
                Ok(Template {
                    parent: parent.into(),
                    name: name.into(),
                })
            }
            _ => Err(format!(
                "`{text}` is no place for the groups of guests: write an absolute path that ends with a name in which \
                 {NUMBER} stands for the number of the domain, such as /sys/fs/cgroup/guests/guest-%d"
            )),
        }
    }
}

impl fmt::Display for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.parent.join(&self.name).display())
    }
}

impl Template {
    fn of(&self, domain: u32) -> PathBuf {
        self.parent
            .join(self.name.replace(NUMBER, &domain.to_string()))
    }

    /// The domain whose group has this name.
    fn domain(&self, name: &str) -> Option<u32> {
        let (before, behind) = self.name.split_once(NUMBER)?;
        let number = name.strip_prefix(before)?.strip_suffix(behind)?;
        let domain = number.parse().ok()?;
        // No sign and no zeroes before it.
        (self.of(domain) == self.parent.join(name)).then_some(domain)
    }

    /// The domains that have a group here which is ours to remove.
    fn ours(&self) -> io::Result<BTreeSet<u32>> {
        let entries = match fs::read_dir(&self.parent) {
            // There are no groups yet, or not any more.
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(BTreeSet::new()),
            entries => entries?,
        };
        let mut ours = BTreeSet::new();
        for entry in entries {
            let name = entry?.file_name();
            let domain = name.to_str().and_then(|name| self.domain(name));
            ours.extend(domain.filter(|domain| is_ours(&self.of(*domain))));
        }
        Ok(ours)
    }
}

/// The groups of guests.
#[derive(Debug)]
pub struct Groups {
    places: GroupPlaces,
    /// The kernel's view of processes.
    proc: PathBuf,
    /// The log has a line that a group cannot be used.
    is_told: Cell<bool>,
}

impl Groups {
    /// Groups that are made at `template`, if that is anywhere, and those that are left of earlier supervisors, of which
    /// `file` tells. Nothing if there are neither.
    #[must_use]
    pub fn open(template: Option<Template>, file: &Path) -> Option<Groups> {
        Groups::seen_in(template, file, Path::new("/proc"))
    }

    /// Makes groups with another view of processes.
    #[must_use]
    pub fn seen_in(template: Option<Template>, file: &Path, proc: &Path) -> Option<Groups> {
        let places = GroupPlaces::open(template, file);
        (!places.all().is_empty()).then(|| Groups {
            places,
            proc: proc.into(),
            is_told: Cell::default(),
        })
    }

    /// The group that a domain has.
    fn there(&self, domain: u32) -> Option<PathBuf> {
        let places = self.places.all();
        let mut groups = places.iter().map(|place| place.of(domain));
        groups.find(|group| group.is_dir())
    }

    /// Puts the kernel's threads of domains into their groups, and these processes. A process that has ended is no
    /// failure; the first failure is logged once, and disks are served all the same.
    pub fn place(&self, domains: &[(u32, Vec<u32>)]) {
        let threads = match self.threads() {
            Ok(threads) => threads,
            Err(error) => return self.tell(&self.proc, &error),
        };
        let mut used = BTreeSet::new();
        for (domain, processes) in domains {
            let threads = threads.get(domain).map_or(&[][..], Vec::as_slice);
            if !threads.is_empty() || !processes.is_empty() {
                used.extend(self.place_in(*domain, threads, processes));
            }
        }
        // After that: the kernel refuses it as long as a process is above the groups, which may be one that was placed now.
        for parent in used {
            if let Err(error) = enable(&parent) {
                self.tell(&parent, &error);
            }
        }
    }

    /// Puts a process into the group of its domain, if that has one. Xenstore tells of it later, or of nothing that has
    /// changed.
    pub fn join(&self, domain: u32, process: u32) {
        if let Some(group) = self.there(domain) {
            self.put(&group, process);
        }
    }

    /// Places threads and processes in the group of the domain, if it has one now, and returns the folder above it.
    fn place_in(&self, domain: u32, threads: &[u32], processes: &[u32]) -> Option<PathBuf> {
        let new = || Some(self.places.template()?.of(domain));
        let group = self.there(domain).or_else(new)?;
        if let Err(error) = make(&group) {
            self.tell(&group, &error);
            return None;
        }
        for pid in threads.iter().chain(processes) {
            self.put(&group, *pid);
        }
        group.parent().map(Path::to_owned)
    }

    fn put(&self, group: &Path, pid: u32) {
        match fs::write(group.join("cgroup.procs"), pid.to_string()) {
            Ok(()) => {}
            // No such process (ESRCH).
            Err(error) if error.raw_os_error() == Some(3) => {}
            Err(error) => self.tell(group, &error),
        }
    }

    /// Removes the group of a domain that has no disks any more; true if it is gone, or not ours. A group cannot be
    /// removed while a process is in it.
    pub fn remove(&self, domain: u32) -> bool {
        let mut is_gone = true;
        for place in self.places.all() {
            is_gone &= is_removed(&place.of(domain));
        }
        self.places.forget_unused();
        is_gone
    }

    /// The domains whose groups are ours to remove, of this supervisor and of those before it.
    #[must_use]
    pub fn ours(&self) -> BTreeSet<u32> {
        let places = self.places.all();
        // A group that cannot be made or used is reported where a process is to enter it.
        let ours = places.iter().filter_map(|place| place.ours().ok());
        ours.flatten().collect()
    }

    /// The threads of the kernel that serve the rings of each domain: a driver calls them `DOMAIN.DISK-QUEUE`.
    fn threads(&self) -> io::Result<BTreeMap<u32, Vec<u32>>> {
        let mut found: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for entry in fs::read_dir(&self.proc)? {
            let name = entry?.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            // It may have ended.
            let Ok(stat) = fs::read_to_string(self.proc.join(&name).join("stat")) else {
                continue;
            };
            if let Some(domain) = domain_of(&stat).filter(|_| is_kernel_thread(&stat)) {
                found.entry(domain).or_default().push(pid);
            }
        }
        Ok(found)
    }

    fn tell(&self, place: &Path, error: &io::Error) {
        if !self.is_told.replace(true) {
            tracing::warn!(
                "the I/O of guests is in no group of theirs, so no limit of one holds: {}: {error}: is it in a tree of \
                 cgroup v2 that was delegated to blktapctrl, and is no process in what is above the groups?",
                place.display(),
            );
        }
    }
}

/// Has groups have the files io.max, io.weight and io.stat. Another program that changes the tree may have disabled
/// that.
fn enable(parent: &Path) -> io::Result<()> {
    let control = parent.join("cgroup.subtree_control");
    let enabled = fs::read_to_string(&control).unwrap_or_default();
    match enabled.split_whitespace().any(|it| it == "io") {
        true => Ok(()),
        false => fs::write(control, "+io"),
    }
}

/// True if a group is gone now, or not ours.
fn is_removed(group: &Path) -> bool {
    if !is_ours(group) {
        return true;
    }
    match fs::remove_dir(group) {
        Ok(()) => true,
        Err(error) => error.kind() == ErrorKind::NotFound,
    }
}

/// Makes a group, if there is none.
fn make(group: &Path) -> io::Result<()> {
    match fs::create_dir(group) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::AlreadyExists => return Ok(()),
        Err(error) => return Err(error),
    }
    // A group without the mark would stay for ever.
    setxattr(group, OURS, b"1", XattrFlags::empty()).or_else(|error| {
        fs::remove_dir(group)?;
        Err(error.into())
    })
}

fn is_ours(group: &Path) -> bool {
    match getxattr(group, OURS, &mut [0; 1][..]) {
        Ok(_) | Err(Errno::RANGE) => true,
        Err(_) => false,
    }
}

/// The domain that a line of `/proc/PID/stat` has before a dot, at the begin of the name.
fn domain_of(stat: &str) -> Option<u32> {
    let (_, name) = stat.split_once(" (")?;
    let (domain, _) = name.split_once('.')?;
    domain.parse().ok()
}

/// Whether a line of `/proc/PID/stat` is that of a thread of the kernel. A name may have any character in it, so the
/// words are counted behind its last bracket.
fn is_kernel_thread(stat: &str) -> bool {
    let flags = stat
        .rsplit_once(')')
        .and_then(|(_, rest)| rest.split_whitespace().nth(6));
    flags
        .and_then(|flags| flags.parse::<u64>().ok())
        .is_some_and(|flags| flags & KERNEL_THREAD != 0)
}

#[cfg(test)]
mod tests {
    use super::{Groups, Template};
    use std::fs;
    use std::path::{Path, PathBuf};

    /// A tree of groups and of processes in files.
    struct HostTree(PathBuf);

    impl HostTree {
        fn new(name: &str) -> HostTree {
            let dir = std::env::temp_dir().join(format!("groups-{name}-{}", std::process::id()));
            fs::create_dir_all(dir.join("proc")).unwrap();
            fs::create_dir_all(dir.join("cgroup")).unwrap();
            HostTree(dir)
        }

        fn process(&self, pid: u32, name: &str, flags: u64) {
            let dir = self.0.join("proc").join(pid.to_string());
            fs::create_dir_all(&dir).unwrap();
            let stat = format!("{pid} ({name}) S 2 0 0 0 -1 {flags} 0 0");
            fs::write(dir.join("stat"), stat).unwrap();
        }

        fn groups(&self) -> Groups {
            let template = self.0.join("cgroup/guest-%d");
            let template: Template = template.to_str().unwrap().parse().unwrap();
            let file = self.0.join("cgroups.json");
            Groups::seen_in(Some(template), &file, &self.0.join("proc")).unwrap()
        }

        fn last_in(&self, group: &str) -> Option<String> {
            fs::read_to_string(self.0.join("cgroup").join(group).join("cgroup.procs")).ok()
        }
    }

    impl Drop for HostTree {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_place_names_the_domain() {
        let template: Template = "/sys/fs/cgroup/xen/guest-%d".parse().unwrap();
        assert_eq!(template.of(7), Path::new("/sys/fs/cgroup/xen/guest-7"));
        assert_eq!(template.domain("guest-7"), Some(7));
        for other in [
            "guest-+7",
            "guest-07",
            "guest-",
            "guest-7x",
            "7",
            "supervisor",
        ] {
            assert_eq!(template.domain(other), None, "{other}");
        }
        for bad in [
            "guest-%d",
            "/sys/fs/cgroup/xen",
            "/%d/x",
            "/a/%d%d",
            "/a/%n-%d",
            "/",
        ] {
            assert!(bad.parse::<Template>().is_err(), "{bad}");
        }
    }

    #[test]
    fn threads_of_the_kernel_and_processes_are_placed_and_no_others() {
        let host = HostTree::new("placed");
        let groups = host.groups();
        // Here are a program of another owner with such a name, another domain's thread, and a name with a bracket.
        host.process(10, "3.xvda-0", 0);
        host.process(11, "33.xvda-0", super::KERNEL_THREAD);
        host.process(12, ") 3.xvda-0", super::KERNEL_THREAD);
        groups.place(&[(3, vec![])]);
        assert_eq!(host.last_in("guest-3"), None);
        host.process(13, "3.xvda-0", super::KERNEL_THREAD | 0x40);
        groups.place(&[(3, vec![])]);
        assert_eq!(host.last_in("guest-3").as_deref(), Some("13"));
        assert_eq!(
            fs::read_to_string(host.0.join("cgroup/cgroup.subtree_control")).unwrap(),
            "+io"
        );
        groups.place(&[(33, vec![99])]);
        assert_eq!(host.last_in("guest-33").as_deref(), Some("99"));
    }

    #[test]
    fn what_was_there_is_not_removed() {
        let host = HostTree::new("removed");
        let groups = host.groups();
        fs::create_dir(host.0.join("cgroup/guest-4")).unwrap();
        groups.place(&[(4, vec![1])]);
        groups.place(&[(5, vec![1])]);
        // A real group is empty when it has no process.
        for group in ["guest-4", "guest-5"] {
            fs::remove_file(host.0.join("cgroup").join(group).join("cgroup.procs")).unwrap();
        }
        assert!(groups.remove(4) && groups.remove(5));
        assert!(host.0.join("cgroup/guest-4").exists());
        assert!(!host.0.join("cgroup/guest-5").exists());
    }

    #[test]
    fn group_of_an_earlier_supervisor_is_removed_like_ones_own() {
        let host = HostTree::new("earlier");
        let earlier = host.groups();
        fs::create_dir(host.0.join("cgroup/guest-4")).unwrap();
        earlier.place(&[(4, vec![1]), (5, vec![1]), (33, vec![2])]);
        drop(earlier);
        let next = host.groups();
        assert_eq!(Vec::from_iter(next.ours()), [5, 33]);
        fs::remove_file(host.0.join("cgroup/guest-5/cgroup.procs")).unwrap();
        assert!(next.remove(5));
        assert_eq!(Vec::from_iter(next.ours()), [33]);
        assert!(!host.0.join("cgroup/guest-5").exists());
    }

    #[test]
    fn no_place_for_groups_has_none() {
        let host = HostTree::new("none");
        fs::remove_dir(host.0.join("cgroup")).unwrap();
        let groups = host.groups();
        groups.place(&[(5, vec![1])]);
        assert!(groups.ours().is_empty() && groups.remove(5));
    }

    /// Systemd takes it from below a unit that is started anew.
    #[test]
    fn controller_that_was_taken_back_is_enabled_again() {
        let host = HostTree::new("again");
        let control = host.0.join("cgroup/cgroup.subtree_control");
        host.groups().place(&[(5, vec![1])]);
        fs::write(&control, "memory pids\n").unwrap();
        host.groups().place(&[(5, vec![1])]);
        assert_eq!(fs::read_to_string(&control).unwrap(), "+io");
        // And left alone where it is.
        fs::write(&control, "cpu io memory\n").unwrap();
        host.groups().place(&[(5, vec![1])]);
        assert_eq!(fs::read_to_string(&control).unwrap(), "cpu io memory\n");
    }

    /// A process that is above the groups would have the kernel refuse the controller.
    #[test]
    fn controller_is_enabled_when_processes_are_where_they_belong() {
        let host = HostTree::new("order");
        let tree = host.0.join("cgroup");
        // The file keeps the last write.
        std::os::unix::fs::symlink("guest-5/cgroup.procs", tree.join("cgroup.subtree_control"))
            .unwrap();
        host.groups().place(&[(5, vec![1])]);
        assert_eq!(host.last_in("guest-5").as_deref(), Some("+io"));
    }

    #[test]
    fn who_is_in_it_keeps_it() {
        let host = HostTree::new("kept");
        let groups = host.groups();
        groups.place(&[(5, vec![1])]);
        assert!(!groups.remove(5));
        fs::remove_file(host.0.join("cgroup/guest-5/cgroup.procs")).unwrap();
        assert!(groups.remove(5));
    }
}
