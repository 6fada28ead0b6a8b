// SPDX-License-Identifier: MIT OR Apache-2.0
//! The file of a lease: read and written past the page cache, and durable when a write returns.

use super::layout::{encode, place, Area, Cell, CellDamage, LeaseRecord, CELL, SIZE};
use super::rules::LeaseWorld;
use control::{Code, Failure};
use rustix::fs::{FallocateFlags, FileType, Mode, OFlags};
use rustix::io::Errno;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The file, or a block device that holds nothing else.
#[derive(Debug)]
pub(super) struct LeaseStore {
    path: PathBuf,
    fd: OwnedFd,
}

impl LeaseStore {
    /// Opens it; nothing if it is not there.
    pub(super) fn open(path: &Path) -> Result<Option<LeaseStore>, Failure> {
        match open(path, OFlags::empty()) {
            Ok(fd) => {
                let store = LeaseStore {
                    path: path.into(),
                    fd,
                };
                store.check_kind()?;
                Ok((store.size()? > 0).then_some(store))
            }
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(cannot("open", path, error)),
        }
    }

    /// Opens it, and makes it if it is not there. Hosts that do this at the same time make the same file:
    /// one of zeroes.
    pub(super) fn make(path: &Path) -> Result<LeaseStore, Failure> {
        let fd = open(path, OFlags::CREATE).map_err(|error| cannot("make", path, error))?;
        let store = LeaseStore {
            path: path.into(),
            fd,
        };
        store.check_kind()?;
        if store.size()? == 0 {
            store
                .reserve()
                .map_err(|error| cannot("make", path, error))?;
        }
        Ok(store)
    }

    /// The place is there whatever else fills the file system, and after a crash of this host.
    fn reserve(&self) -> Result<(), Errno> {
        // CAST: a quarter of a megabyte.
        let size = SIZE as u64;
        match rustix::fs::fallocate(&self.fd, FallocateFlags::empty(), 0, size) {
            // Some network file systems cannot.
            Err(Errno::OPNOTSUPP) => rustix::fs::ftruncate(&self.fd, size)?,
            result => result?,
        }
        rustix::fs::fsync(&self.fd)?;
        let folder = self.path.parent().unwrap_or(Path::new("/"));
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::fsync(rustix::fs::open(folder, flags, Mode::empty())?)
    }

    fn check_kind(&self) -> Result<(), Failure> {
        let stat =
            rustix::fs::fstat(&self.fd).map_err(|error| cannot("look at", &self.path, error))?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile | FileType::BlockDevice => Ok(()),
            _ => Err(Failure::new(
                Code::Image,
                format!(
                    "{} can hold no lease: it is neither a file nor a block device",
                    self.path.display()
                ),
            )),
        }
    }

    fn size(&self) -> Result<u64, Failure> {
        rustix::fs::seek(&self.fd, rustix::fs::SeekFrom::End(0))
            .map_err(|error| cannot("look at", &self.path, error))
    }

    /// All cells, as the storage has them now.
    pub(super) fn read(&self) -> Result<Area, Failure> {
        let mut memory = vec![0; SIZE + CELL];
        let bytes = aligned(&mut memory, SIZE);
        let mut done = 0;
        while done < SIZE {
            // CAST: a quarter of a megabyte.
            let got = rustix::io::pread(&self.fd, &mut bytes[done..], done as u64)
                .map_err(|error| cannot("read", &self.path, error))?;
            if got == 0 {
                return Err(self.damaged(CellDamage::Foreign));
            }
            done += got;
        }
        Area::read(bytes).map_err(|damage| self.damaged(damage))
    }

    fn write(&self, cell: Cell, record: &LeaseRecord) -> Result<(), Failure> {
        let mut memory = vec![0; 2 * CELL];
        let bytes = aligned(&mut memory, CELL);
        let encoded = encode(record);
        bytes[..encoded.len()].copy_from_slice(&encoded);
        // CAST: within a quarter of a megabyte.
        let at = (place(record.generation, cell) * CELL) as u64;
        let short = io::ErrorKind::WriteZero.into();
        match rustix::io::pwrite(&self.fd, bytes, at) {
            Ok(CELL) => Ok(()),
            Ok(_) => Err(Failure::system(self.what("write"), &short)),
            Err(error) => Err(cannot("write", &self.path, error)),
        }
    }

    fn what(&self, what: &str) -> String {
        format!("cannot {what} the lease {}", self.path.display())
    }

    fn damaged(&self, damage: CellDamage) -> Failure {
        let path = self.path.display();
        match damage {
            CellDamage::Version(version) => Failure::new(
                Code::Version,
                format!(
                    "the lease {path} is of version {version}, which this program does not know: install on \
                     this host what the holder's host has"
                ),
            ),
            CellDamage::Foreign => Failure::new(
                Code::Image,
                format!(
                    "{path} is no lease, or is damaged: if no host has its image open, remove it (write \
                     zeroes if it is a block device)"
                ),
            ),
        }
    }
}

impl LeaseWorld for LeaseStore {
    fn now(&self) -> Duration {
        crate::now()
    }

    fn date(&self) -> u64 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        // A clock before 1970 tells people nothing.
        since.map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(0))
    }

    async fn read(&self) -> Result<Area, Failure> {
        LeaseStore::read(self)
    }

    async fn write(&self, cell: Cell, record: &LeaseRecord) -> Result<(), Failure> {
        LeaseStore::write(self, cell, record)
    }

    async fn sleep(&self, time: Duration) {
        sleep(time);
    }
}

/// The number of the file of an image, which all hosts see; 0 of a block device.
pub(super) fn number(image: &Path) -> Result<u64, Failure> {
    let stat = rustix::fs::stat(image).map_err(|error| {
        Failure::system(
            format!("cannot find the image {}", image.display()),
            &error.into(),
        )
    })?;
    Ok(match FileType::from_raw_mode(stat.st_mode) {
        FileType::BlockDevice => 0,
        _ => stat.st_ino,
    })
}

fn open(path: &Path, more: OFlags) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDWR | OFlags::DIRECT | OFlags::DSYNC | OFlags::CLOEXEC | more;
    rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)
}

fn cannot(what: &str, path: &Path, error: Errno) -> Failure {
    let remedy = match error {
        Errno::INVAL => ": its file system cannot be read past the page cache, so put the lease elsewhere with lease=record:/PATH",
        _ => "",
    };
    let what = format!("cannot {what} the lease {}{remedy}", path.display());
    Failure::system(what, &error.into())
}

/// `length` bytes of memory that begin at a multiple of a cell.
fn aligned(memory: &mut [u8], length: usize) -> &mut [u8] {
    let at = memory.as_ptr().align_offset(CELL);
    &mut memory[at..at + length]
}
