// SPDX-License-Identifier: MIT OR Apache-2.0
//! The device of a reservation: which it may be, and its commands, by the kernel's `pr_ops`.

use super::rules::ReservationStorage;
use control::{Code, Failure};
use diskio::reservation::{self, Reservation, ReservationKind, StorageAnswer};
use diskio::Errno;
use rustix::fs::{major, minor, FileType, Mode, OFlags};
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

/// Remedy where there are no reservations.
const ELSE: &str = "use lease=record:/PATH, with the record on a file system that all hosts have";

/// A device whose reservation is its own.
#[derive(Debug)]
pub(super) struct ReservedDevice {
    path: PathBuf,
    kind: CommandSet,
    /// All ways from this host to its storage.
    ways: Vec<OwnedFd>,
}

/// Command set of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CommandSet {
    /// A SCSI disk, of which nothing is known but one path.
    Scsi,
    /// An NVMe namespace: its storage knows hosts, and not paths.
    Nvme,
    /// A map of dm-multipath, whose paths are SCSI disks. This code sends commands to each of them, because the map
    /// itself always sends a preempt without an abort (`dm_pr_preempt`), and registers no path if one was registered
    /// before.
    Map,
}

impl ReservedDevice {
    /// The device at a path.
    pub(super) fn open(path: &Path) -> Result<ReservedDevice, Failure> {
        let fd = open(path)?;
        let stat = rustix::fs::fstat(&fd).map_err(|error| cannot_open(path, error))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::BlockDevice {
            return Err(refused(path, "is no block device", ELSE));
        }
        let number = format!("{}:{}", major(stat.st_rdev), minor(stat.st_rdev));
        let folder = Path::new("/sys/dev/block").join(number);
        let kind = kind(path, &folder)?;
        let ways = match kind {
            CommandSet::Scsi | CommandSet::Nvme => vec![fd],
            CommandSet::Map => paths(path, &folder)?,
        };
        Ok(ReservedDevice {
            path: path.into(),
            kind,
            ways,
        })
    }

    fn reserved_as(&self) -> ReservationKind {
        match self.kind {
            CommandSet::Scsi | CommandSet::Nvme => ReservationKind::WriteExclusive,
            CommandSet::Map => ReservationKind::WriteExclusiveRegistrants,
        }
    }

    /// Returns the answer of the first way that does not fail. All ways lead to one device, so any of them will do.
    fn any<T>(
        &self,
        what: &str,
        ask: impl Fn(BorrowedFd<'_>) -> io::Result<T>,
    ) -> Result<T, Failure> {
        let mut last = io::ErrorKind::NotFound.into();
        for way in &self.ways {
            match ask(way.as_fd()) {
                Ok(answer) => return Ok(answer),
                Err(error) => last = error,
            }
        }
        Err(self.explain(what, &last))
    }

    fn explain(&self, what: &str, error: &io::Error) -> Failure {
        let path = self.path.display();
        match Errno::from_io_error(error) {
            Some(Errno::NOTTY | Errno::OPNOTSUPP) => Failure::unsupported(format!(
                "cannot {what} {path}: its driver has no reservations, or this host's kernel does not say who has one, as those before Linux 7.0; {ELSE}"
            )),
            Some(Errno::PERM) => Failure::new(
                Code::Denied,
                format!("cannot {what} {path}: reservations are for who has CAP_SYS_ADMIN, as root has"),
            ),
            _ => Failure::system(
                format!("cannot {what} {path} (see whether its storage answers, and has persistent reservations)"),
                error,
            ),
        }
    }

    /// Registers one way; with an `old`, it may be new to the storage, or have got its key already.
    fn register_way(&self, way: BorrowedFd<'_>, old: u64, new: u64) -> io::Result<StorageAnswer> {
        let first = match (self.kind, new) {
            (CommandSet::Nvme, 0) => return reservation::unregister_from_nvme(way, old),
            _ => reservation::register(way, old, new)?,
        };
        if self.kind != CommandSet::Map || old == 0 || new == 0 || first == StorageAnswer::Done {
            return Ok(first);
        }
        match reservation::register(way, 0, new)? {
            StorageAnswer::Done => Ok(StorageAnswer::Done),
            StorageAnswer::Conflict => reservation::register(way, new, new),
        }
    }

    /// Registers all ways, or none if one conflicts or fails.
    fn register_all(&self, old: u64, new: u64) -> io::Result<StorageAnswer> {
        for (done, way) in self.ways.iter().enumerate() {
            let answer = self.register_way(way.as_fd(), old, new);
            if !matches!(answer, Ok(StorageAnswer::Done)) {
                for way in &self.ways[..done] {
                    self.register_way(way.as_fd(), new, 0)?;
                }
                return answer;
            }
        }
        Ok(StorageAnswer::Done)
    }

    /// Registers no way any more that is registered so; one that is not, as one that is new, need not be.
    fn unregister_all(&self, key: u64) -> io::Result<StorageAnswer> {
        let answers: Vec<_> = self
            .ways
            .iter()
            .map(|way| self.register_way(way.as_fd(), key, 0))
            .collect::<io::Result<_>>()?;
        Ok(match answers.contains(&StorageAnswer::Done) {
            true => StorageAnswer::Done,
            false => StorageAnswer::Conflict,
        })
    }
}

fn cannot_open(path: &Path, error: Errno) -> Failure {
    Failure::system(format!("cannot open {}", path.display()), &error.into())
}

fn open(path: &Path) -> Result<OwnedFd, Failure> {
    // This descriptor is only for commands, and udev does not read a device again that was open for reading.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).map_err(|error| cannot_open(path, error))
}

/// The paths of a map of dm-multipath.
fn paths(map: &Path, folder: &Path) -> Result<Vec<OwnedFd>, Failure> {
    let unknown = |error: io::Error| {
        Failure::system(format!("cannot see the paths of {}", map.display()), &error)
    };
    let mut ways = Vec::new();
    for entry in fs::read_dir(folder.join("slaves")).map_err(unknown)? {
        let entry = entry.map_err(unknown)?;
        if bus(&entry.path()).as_deref() != Some("scsi") {
            let what = "has paths that are no SCSI disks";
            let remedy = "let the kernel join the paths of NVMe by itself (nvme_core.multipath=Y)";
            return Err(refused(map, what, remedy));
        }
        ways.push(open(&Path::new("/dev").join(entry.file_name()))?);
    }
    match ways.is_empty() {
        true => Err(refused(map, "has no path", "see multipath -ll")),
        false => Ok(ways),
    }
}

/// Returns the kind of a device with this folder of sysfs.
fn kind(path: &Path, folder: &Path) -> Result<CommandSet, Failure> {
    if folder.join("partition").exists() {
        let remedy = "give the guest the whole disk, or use lease=record:/PATH";
        return Err(refused(
            path,
            "is a partition, and a reservation is of the whole disk",
            remedy,
        ));
    }
    if let Some(uuid) = text(&folder.join("dm/uuid")) {
        if uuid.starts_with("mpath-") {
            return Ok(CommandSet::Map);
        }
        let what = "is a volume of device mapper, and a reservation would be that of everybody on the disk below";
        return Err(refused(path, what, ELSE));
    }
    if let Some(map) = multipath_over(folder) {
        let remedy = format!("use /dev/mapper/{map}");
        return Err(refused(path, "is one path of several to its disk", &remedy));
    }
    match bus(folder) {
        Some(bus) if bus == "scsi" => Ok(CommandSet::Scsi),
        Some(bus) if bus.starts_with("nvme") => Ok(CommandSet::Nvme),
        _ => Err(refused(
            path,
            "is neither a SCSI disk nor an NVMe namespace",
            ELSE,
        )),
    }
}

/// The name of the map of dm-multipath of which this device is a path.
fn multipath_over(folder: &Path) -> Option<String> {
    let holders = fs::read_dir(folder.join("holders")).ok()?;
    holders.flatten().find_map(|holder| {
        let dm = holder.path().join("dm");
        let is_multipath = text(&dm.join("uuid"))?.starts_with("mpath-");
        is_multipath.then(|| text(&dm.join("name")))?
    })
}

/// The kind of device that the disk belongs to.
fn bus(folder: &Path) -> Option<String> {
    let bus = fs::read_link(folder.join("device/subsystem")).ok()?;
    Some(bus.file_name()?.to_string_lossy().into_owned())
}

fn text(path: &Path) -> Option<String> {
    fs::read_to_string(path)
        .ok()
        .map(|text| text.trim().to_owned())
}

fn refused(path: &Path, what: &str, remedy: &str) -> Failure {
    Failure::unsupported(format!(
        "{} cannot have lease=reservation, because it {what}: {remedy}",
        path.display()
    ))
}

impl ReservationStorage for ReservedDevice {
    fn now(&self) -> Duration {
        crate::now()
    }

    async fn sleep(&self, time: Duration) {
        sleep(time);
    }

    async fn register(&self, old: u64, new: u64) -> Result<StorageAnswer, Failure> {
        let answer = match new {
            0 => self.unregister_all(old),
            _ => self.register_all(old, new),
        };
        answer.map_err(|error| self.explain("register at", &error))
    }

    async fn reserve(&self, key: u64) -> Result<StorageAnswer, Failure> {
        self.any("reserve", |way| {
            reservation::reserve(way, key, self.reserved_as())
        })
    }

    async fn preempt(
        &self,
        own: u64,
        victim: u64,
        _aborts: bool,
    ) -> Result<StorageAnswer, Failure> {
        self.any("take away the reservation of", |way| {
            reservation::preempt_and_abort(way, own, victim, self.reserved_as())
        })
    }

    async fn keys(&self) -> Result<(u32, Vec<u64>), Failure> {
        self.any("see who is registered at", reservation::keys)
    }

    async fn reservation(&self) -> Result<Option<Reservation>, Failure> {
        self.any("see who has reserved", reservation::reservation)
    }
}

#[cfg(test)]
mod tests {
    use super::{kind, CommandSet, ReservedDevice};
    use control::Code;
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::Path;

    /// A folder as sysfs has one of a device.
    fn sysfs(files: &[(&str, &str)], bus: Option<&str>) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, content) in files {
            let file = dir.path().join(name);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, content).unwrap();
        }
        if let Some(bus) = bus {
            fs::create_dir_all(dir.path().join("device")).unwrap();
            symlink(
                format!("/sys/bus/{bus}"),
                dir.path().join("device/subsystem"),
            )
            .unwrap();
        }
        dir
    }

    fn said(files: &[(&str, &str)], bus: Option<&str>) -> Result<CommandSet, String> {
        let folder = sysfs(files, bus);
        kind(Path::new("/dev/x"), folder.path()).map_err(|failure| {
            assert_eq!(failure.code, Code::Unsupported);
            failure.message
        })
    }

    #[test]
    fn what_a_reservation_belongs_to_is_taken_and_all_else_refused_with_a_remedy() {
        assert_eq!(said(&[], Some("scsi")), Ok(CommandSet::Scsi));
        assert_eq!(said(&[], Some("nvme")), Ok(CommandSet::Nvme));
        assert_eq!(said(&[], Some("nvme-subsystem")), Ok(CommandSet::Nvme));
        assert_eq!(
            said(&[("dm/uuid", "mpath-3600\n")], None),
            Ok(CommandSet::Map)
        );
        let path_of_a_map = [
            ("holders/dm-0/dm/uuid", "mpath-3600\n"),
            ("holders/dm-0/dm/name", "lun7\n"),
        ];
        for (files, bus, words) in [
            (
                &[("partition", "1\n")][..],
                None,
                ["is a partition", "whole disk"],
            ),
            (
                &[("dm/uuid", "LVM-abc\n")],
                None,
                ["device mapper", "lease=record:/PATH"],
            ),
            (
                &path_of_a_map,
                Some("scsi"),
                ["one path", "/dev/mapper/lun7"],
            ),
            (
                &[],
                Some("virtio"),
                ["neither a SCSI disk", "lease=record:/PATH"],
            ),
            (&[], None, ["neither a SCSI disk", "lease=record:/PATH"]),
        ] {
            let refused = said(files, bus).unwrap_err();
            for word in words {
                assert!(refused.contains(word), "{refused}");
            }
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        let refused = ReservedDevice::open(file.path()).unwrap_err();
        assert!(refused.message.contains("is no block device"), "{refused}");
    }
}
