// SPDX-License-Identifier: MIT OR Apache-2.0
//! Information of the kernel and the system about this host, below a folder that stands for `/`: tests make one.
//!
//! Unreadable files are collected, and the rest is shown all the same.

pub(crate) mod block;
pub(crate) mod shared_storage;
pub(crate) mod task;
pub(crate) mod vbd;
pub(crate) mod xenstore;
pub(crate) mod xl_copies;
pub(crate) mod xl_files;

use serde::Serialize;
use std::cell::RefCell;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::AtomicBool;
use std::sync::Arc;

/// A file that could not be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Unread {
    /// The file.
    pub(crate) path: PathBuf,
    /// Reason of the failure.
    pub(crate) why: String,
}

/// The files of a host.
#[derive(Debug)]
pub(crate) struct Host {
    root: PathBuf,
    unread: RefCell<Vec<Unread>>,
    /// True while a thread asks xenstore for names of guests.
    asks_names: Arc<AtomicBool>,
}

impl Host {
    /// The host whose files are below `root`.
    pub(crate) fn at(root: impl Into<PathBuf>) -> Host {
        Host {
            root: root.into(),
            unread: RefCell::default(),
            asks_names: Arc::default(),
        }
    }

    /// Where a file of the host is.
    pub(crate) fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// Returns the files that could not be read since the last call.
    pub(crate) fn take_unread(&self) -> Vec<Unread> {
        self.unread.take()
    }

    /// Forgets what could not be read below a folder that has gone meanwhile.
    pub(crate) fn forget(&self, folder: &Path) {
        let mut unread = self.unread.borrow_mut();
        unread.retain(|file| !file.path.starts_with(folder));
    }

    /// Notes that a file could not be read.
    pub(crate) fn note(&self, path: &Path, why: impl ToString) {
        let (path, why) = (path.to_owned(), why.to_string());
        self.unread.borrow_mut().push(Unread { path, why });
    }

    /// The text of a file that must be there, without the white space around it.
    pub(crate) fn text(&self, path: &Path) -> Option<String> {
        self.noted(path, read(path))
    }

    /// The text of a file that need not be there.
    pub(crate) fn optional(&self, path: &Path) -> Option<String> {
        match read(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            result => self.noted(path, result),
        }
    }

    /// The number in a file that must be there.
    pub(crate) fn number(&self, path: &Path) -> Option<u64> {
        let text = self.text(path)?;
        let number = text.parse();
        self.noted(
            path,
            number.map_err(|_| format!("`{text}` is not a number")),
        )
    }

    /// The names in a folder, in order; none if it is not there.
    pub(crate) fn names(&self, folder: &Path) -> Vec<String> {
        let entries = match fs::read_dir(folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Vec::new(),
            Err(error) => {
                self.note(folder, error);
                return Vec::new();
            }
        };
        let names = entries.filter_map(|entry| self.noted(folder, entry));
        let mut names: Vec<String> = names
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    fn noted<T, E: ToString>(&self, path: &Path, result: Result<T, E>) -> Option<T> {
        result.map_err(|error| self.note(path, error)).ok()
    }
}

fn read(path: &Path) -> io::Result<String> {
    // The name of a disk may have any bytes.
    let bytes = fs::read(path)?;
    Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
}

/// The numbers of a line with white space between them, as many as there are.
pub(crate) fn numbers<T: FromStr>(line: &str) -> Vec<T> {
    line.split_whitespace()
        .map_while(|word| word.parse().ok())
        .collect()
}

/// The last name of what a link leads to.
pub(crate) fn link_name(link: &Path) -> Option<String> {
    let target = fs::read_link(link).ok()?;
    Some(target.file_name()?.to_string_lossy().into_owned())
}

/// The memory that the disks of guests may have, and have, in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Memory {
    /// The disks of all guests have so much.
    pub(crate) used_kib: u64,
    /// Limit of all guests' disks; nothing if it is unknown.
    pub(crate) host_kib: Option<u64>,
    /// The disks of one guest may have so much.
    pub(crate) guest_kib: u64,
}

/// Where our module shows its parameters.
const PARAMETERS: &str = "/sys/module/xen_blkback_rs/parameters";

impl Memory {
    /// Reads the figures of our module; nothing if it is not loaded.
    pub(crate) fn read(host: &Host) -> Option<Memory> {
        let folder = host.path(PARAMETERS);
        if !folder.exists() {
            return None;
        }
        let number = |name: &str| host.number(&folder.join(name));
        let host_kib = match number("host_memory_mib")? {
            // A quarter of this domain's memory.
            0 => total_kib(host).map(|total| total / 4),
            mib => Some(mib.saturating_mul(1024)),
        };
        Some(Memory {
            used_kib: number("memory_kib")?,
            host_kib,
            guest_kib: number("domain_memory_mib")?.saturating_mul(1024),
        })
    }
}

fn total_kib(host: &Host) -> Option<u64> {
    let text = host.text(&host.path("/proc/meminfo"))?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    numbers(line).first().copied()
}

/// How long the processors of this domain have run, and waited while others had the real ones. In ticks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Processors {
    /// Everything, the waiting too.
    pub(crate) all: u64,
    /// The hypervisor ran another domain.
    pub(crate) stolen: u64,
}

impl Processors {
    /// Since the start of this domain.
    pub(crate) fn read(host: &Host) -> Processors {
        let text = host.text(&host.path("/proc/stat")).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("cpu "));
        let ticks: Vec<u64> = line.map(numbers).unwrap_or_default();
        // user, nice, system, idle, iowait, irq, softirq, steal; what follows is part of user.
        Processors {
            all: ticks.iter().take(8).sum(),
            stolen: ticks.get(7).copied().unwrap_or(0),
        }
    }

    /// The part of the time since `before` that was stolen, of 1.
    pub(crate) fn stolen_since(&self, before: &Processors) -> f64 {
        let all = self.all.saturating_sub(before.all);
        match all {
            0 => 0.0,
            all => self.stolen.saturating_sub(before.stolen) as f64 / all as f64,
        }
    }
}

#[cfg(test)]
pub(crate) mod made {
    //! A host that a test makes.

    use super::Host;
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::Path;

    /// Files below a folder that goes with this.
    pub(crate) struct Made {
        folder: tempfile::TempDir,
    }

    impl Made {
        pub(crate) fn new() -> Made {
            let folder = tempfile::tempdir().expect("a folder");
            Made { folder }
        }

        pub(crate) fn host(&self) -> Host {
            Host::at(self.folder.path())
        }

        pub(crate) fn root(&self) -> &Path {
            self.folder.path()
        }

        /// Writes a file, with the folders above it.
        pub(crate) fn file(&self, path: &str, text: &str) -> &Made {
            let path = self.host().path(path);
            fs::create_dir_all(path.parent().expect("a folder")).expect("made");
            fs::write(path, text).expect("written");
            self
        }

        /// Makes a link, with the folders above it.
        pub(crate) fn link(&self, path: &str, target: &str) -> &Made {
            let path = self.host().path(path);
            fs::create_dir_all(path.parent().expect("a folder")).expect("made");
            let _ = fs::remove_file(&path);
            symlink(target, path).expect("linked");
            self
        }

        /// Makes a path that cannot be read as a file.
        pub(crate) fn unreadable(&self, path: &str) -> &Made {
            let path = self.host().path(path);
            let _ = fs::remove_file(&path);
            fs::create_dir_all(path).expect("made");
            self
        }
    }

    /// A guest's disk on a block device, whose numbers the test then changes.
    pub(crate) fn phy(made: &Made, name: &str, major_minor: &str) {
        let device = format!("/sys/bus/xen-backend/devices/{name}");
        let file = |path: &str, text: &str| {
            made.file(&format!("{device}/{path}"), text);
        };
        made.link(
            &format!("{device}/driver"),
            "../../../bus/xen-backend/drivers/xen-blkback-rs",
        );
        file("state", "Connected\n");
        file("mode", "w\n");
        file("physical_device", &format!("{major_minor}\n"));
        let counters = [
            "oo_req",
            "rd_req",
            "wr_req",
            "f_req",
            "ds_req",
            "rd_sect",
            "wr_sect",
            "refused",
            "failed",
            "memory_kib",
        ];
        for counter in counters {
            file(&format!("statistics/{counter}"), "0\n");
        }
    }

    /// A block device: requests done, the milliseconds that they took, requests in flight.
    pub(crate) fn block(made: &Made, number: &str, name: &str, [done, ms, now]: [u64; 3]) {
        let device = format!("/sys/devices/virtual/block/{name}");
        made.link(
            &format!("/sys/dev/block/{number}"),
            &format!("../../devices/virtual/block/{name}"),
        );
        made.file(&format!("{device}/inflight"), &format!("  0  {now}\n"));
        let line = format!("{done} 0 0 {ms} 0 0 0 0 {now} 0 {ms} 0 0 0 0 0 0\n");
        made.file(&format!("{device}/stat"), &line);
    }
}

#[cfg(test)]
mod tests {
    use super::made::Made;
    use super::{Memory, Processors};

    #[test]
    fn what_cannot_be_read_is_noted_with_its_reason() {
        let made = Made::new();
        made.file("/sys/a", "12\n").file("/sys/b", "many\n");
        made.unreadable("/sys/c");
        let host = made.host();
        assert_eq!(host.number(&host.path("/sys/a")), Some(12));
        assert_eq!(host.number(&host.path("/sys/b")), None);
        assert_eq!(host.text(&host.path("/sys/c")), None);
        assert_eq!(host.optional(&host.path("/sys/d")), None);
        let unread = host.take_unread();
        let names: Vec<_> = unread.iter().map(|file| file.path.file_name()).collect();
        assert_eq!(names, [Some("b".as_ref()), Some("c".as_ref())]);
        assert_eq!(unread[0].why, "`many` is not a number");
        assert_eq!(host.take_unread(), []);
    }

    #[test]
    fn the_hosts_limit_is_a_quarter_of_its_memory_unless_it_is_set() {
        let made = Made::new();
        assert_eq!(Memory::read(&made.host()), None);
        let parameters = "/sys/module/xen_blkback_rs/parameters";
        made.file("/proc/meminfo", "MemTotal:        4096 kB\n");
        for (name, text) in [("memory_kib", "7"), ("domain_memory_mib", "2")] {
            made.file(&format!("{parameters}/{name}"), text);
        }
        for (mib, kib) in [("0", 1024), ("3", 3072)] {
            made.file(&format!("{parameters}/host_memory_mib"), mib);
            let memory = Memory::read(&made.host()).expect("it is loaded");
            assert_eq!((memory.used_kib, memory.guest_kib), (7, 2048));
            assert_eq!(memory.host_kib, Some(kib));
        }
    }

    #[test]
    fn stolen_time_is_a_part_of_all_time() {
        let made = Made::new();
        let at = |line: &str| {
            made.file("/proc/stat", line);
            Processors::read(&made.host())
        };
        let before = at("cpu  10 0 10 80 0 0 0 0 5 5\ncpu0 1 2\n");
        let now = at("cpu  20 0 20 130 0 0 0 30 5 5\n");
        assert_eq!(now.stolen_since(&before), 0.3);
        assert_eq!(now.stolen_since(&now), 0.0);
    }
}
