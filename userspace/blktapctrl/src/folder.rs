// SPDX-License-Identifier: MIT OR Apache-2.0
//! The folder of a running host, `/run/xentap`.

use control::{FrozenDevices, GroupName, MemoryName};
use rustix::fs::{flock, FlockOperation};
use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// The extension of memory with a name, so that no name is a disk's number.
pub const NAMED: &str = "named";

/// Where everything of the running host is. Its contents belong to root.
#[derive(Clone, Debug)]
pub struct Folder {
    root: PathBuf,
    frozen: FrozenDevices,
}

impl Folder {
    /// Makes what is missing of the folder. `frozen` are records elsewhere, because they outlive a reboot of the host.
    ///
    /// # Errors
    /// The system refuses to.
    pub fn make(root: &Path, frozen: FrozenDevices) -> io::Result<Folder> {
        let folder = Folder {
            root: root.into(),
            frozen,
        };
        // QEMU, which may not be root, goes through to the sockets of NBD.
        for (name, mode) in [
            ("", 0o711),
            ("tapdisk", 0o700),
            ("nbd", 0o711),
            ("disks", 0o700),
            ("ram", 0o700),
            ("notes", 0o700),
            ("groups", 0o700),
        ] {
            let place = folder.root.join(name);
            let made = DirBuilder::new().recursive(true).mode(mode).create(&place);
            made.and_then(|()| fs::set_permissions(&place, Permissions::from_mode(mode)))?;
        }
        Ok(folder)
    }

    /// Claims the folder for this process; it ends with the file that is returned.
    ///
    /// # Errors
    /// Another supervisor has it.
    pub fn claim(&self) -> Result<File, String> {
        let path = self.root.join("lock");
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(|error| format!("cannot open {}: {error}", path.display()))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(format!(
                "another blktapctrl is running: it holds {}; stop it first",
                path.display()
            )),
            Err(error) => Err(format!("cannot lock {}: {error}", path.display())),
        }
    }

    /// The folder itself.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The records of devices that no disk may write.
    #[must_use]
    pub fn frozen(&self) -> &FrozenDevices {
        &self.frozen
    }

    /// The socket that tap-ctl connects to.
    #[must_use]
    pub fn control(&self) -> PathBuf {
        self.root.join("control.sock")
    }

    /// The folder of the control sockets of tapdisks.
    #[must_use]
    pub fn tapdisks(&self) -> PathBuf {
        self.root.join("tapdisk")
    }

    /// The control socket of the tapdisk of a disk.
    #[must_use]
    pub fn tapdisk(&self, minor: u32) -> PathBuf {
        self.tapdisks().join(format!("{minor}.sock"))
    }

    /// The socket of the process that is to take a disk over.
    #[must_use]
    pub fn successor(&self, minor: u32) -> PathBuf {
        self.tapdisks().join(format!("{minor}.next.sock"))
    }

    /// The socket on which a disk speaks NBD.
    #[must_use]
    pub fn nbd(&self, minor: u32) -> PathBuf {
        self.root.join(format!("nbd/{minor}.sock"))
    }

    /// The folder of the memory of disks.
    #[must_use]
    pub fn memory(&self) -> PathBuf {
        self.root.join("ram")
    }

    /// The memory of a disk.
    #[must_use]
    pub fn memory_of(&self, minor: u32) -> PathBuf {
        self.memory().join(minor.to_string())
    }

    /// The memory of this name, which several disks may have.
    #[must_use]
    pub fn memory_named(&self, name: &MemoryName) -> PathBuf {
        self.memory().join(format!("{name}.{NAMED}"))
    }

    /// The file for a guest's writes over an image (`cow:`): a disk with another target never uses it.
    #[must_use]
    pub fn written_of(&self, minor: u32) -> PathBuf {
        self.memory().join(format!("{minor}.cow"))
    }

    /// The folder of where guests have written.
    #[must_use]
    pub fn notes(&self) -> PathBuf {
        self.root.join("notes")
    }

    /// Where the guest of a disk has written since its mark of this number.
    #[must_use]
    pub fn notes_of(&self, minor: u32, number: u64) -> PathBuf {
        self.notes().join(format!("{minor}.{number}.map"))
    }

    /// The folder of the groups of disks that share limits.
    #[must_use]
    pub fn groups(&self) -> PathBuf {
        self.root.join("groups")
    }

    /// The record of a group.
    #[must_use]
    pub fn group(&self, name: &GroupName) -> PathBuf {
        self.groups().join(format!("{name}.json"))
    }

    /// Where the control groups of guests are.
    #[must_use]
    pub fn cgroups(&self) -> PathBuf {
        self.root.join("cgroups.json")
    }

    /// The newest events.
    #[must_use]
    pub fn events(&self) -> PathBuf {
        self.root.join("events")
    }

    /// The folder of the records.
    #[must_use]
    pub fn disks(&self) -> PathBuf {
        self.root.join("disks")
    }

    /// The record of a disk.
    #[must_use]
    pub fn disk(&self, minor: u32) -> PathBuf {
        self.disks().join(format!("{minor}.json"))
    }
}

/// The files of a folder with an extension, sorted.
///
/// # Errors
/// The folder cannot be read, or not all of it.
pub fn files(folder: &Path, extension: &str) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|found| found == extension) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Writes a file for root alone: after a crash at any time there is the old or the new one.
///
/// # Errors
/// The system refuses to; the old one is still there.
pub fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let beside = path.with_extension("new");
    let written = write(&beside, content).and_then(|()| fs::rename(&beside, path));
    if written.is_err() {
        // A partial file takes room, which may be what is missing.
        let _ = remove(&beside);
    }
    written
}

fn write(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = File::options()
        .create(true)
        .write(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(content)
}

/// Removes a file that may be gone already.
///
/// # Errors
/// The system refuses to.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
