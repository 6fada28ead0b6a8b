// SPDX-License-Identifier: MIT OR Apache-2.0
//! The state of a disk: memory that one process leaves to the next. Its contents concern the processes only; the
//! supervisor sees a number of bytes.
//!
//! The memory is held by the process and by the supervisor, and outlives either of the two, not both: so it is
//! for what a successor would have to find out or count anew, and not for what only it knows.

use crate::image::Identity;
use crate::record::{KnownProcess, NextImage, Record};
use control::{Code, Failure};
use rustix::fs::{fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create};
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};
use std::cell::Cell;
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};

/// Bytes that a disk may have.
pub const LARGEST: u64 = 1 << 20;

/// The memory of one disk.
#[derive(Debug)]
pub struct DiskState {
    memory: OwnedFd,
    size: u64,
    /// The last process that it was given to.
    holder: Cell<Option<KnownProcess>>,
}

/// Seals: no process can change its size, or remove the seals, so a process that maps it cannot be made to fault, and
/// none can fill dom0's memory with it.
fn seals() -> SealFlags {
    SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL
}

/// Owner of a state: another image of the same disk does not get it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateOwner {
    /// The disk.
    pub minor: u32,
    /// Its image, if its driver has one.
    pub image: Option<Identity>,
    /// When that was made.
    pub born: Option<u64>,
}

impl StateOwner {
    /// Of what a disk is served from.
    #[must_use]
    pub fn served(record: &Record) -> StateOwner {
        StateOwner {
            minor: record.minor,
            image: record.identity,
            born: record.born,
        }
    }

    /// Of what an unpause leads to.
    #[must_use]
    pub fn next(minor: u32, next: &NextImage) -> StateOwner {
        StateOwner {
            minor,
            image: next.identity,
            born: next.born,
        }
    }

    /// The name of the memory, by which the next supervisor finds it. Those of other programs have other
    /// beginnings.
    fn name(self) -> String {
        let image = match self.image {
            None => "none".into(),
            Some(Identity::File { dev, ino }) => format!("file-{dev:x}-{ino:x}"),
            Some(Identity::Device { rdev }) => format!("device-{rdev:x}"),
            Some(Identity::Export { digest }) => format!("export-{digest:x}"),
        };
        let born = self.born.unwrap_or_default();
        format!("xentap-state-{}-{image}-{born:x}", self.minor)
    }
}

impl DiskState {
    /// Makes one of zeroes.
    ///
    /// # Errors
    /// It would be too large, or the system refuses to.
    pub fn make(whose: StateOwner, size: u64) -> Result<DiskState, Failure> {
        let minor = whose.minor;
        if size == 0 || size > LARGEST {
            return Err(Failure::invalid(format!(
                "disk {minor} cannot have a state of {size} bytes: ask for 1 to {LARGEST}"
            )));
        }
        let made = || -> rustix::io::Result<OwnedFd> {
            let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
            let memory = memfd_create(whose.name(), flags)?;
            ftruncate(&memory, size)?;
            fcntl_add_seals(&memory, seals())?;
            Ok(memory)
        };
        let memory = made().map_err(|error| {
            Failure::system(
                format!("cannot make the state of disk {minor}"),
                &error.into(),
            )
        })?;
        Ok(DiskState {
            memory,
            size,
            holder: Cell::default(),
        })
    }

    /// Finds the one that an earlier supervisor gave to a process, which has it open. The process may
    /// hang: it is not asked.
    ///
    /// # Errors
    /// It is not known whether there is one, or this program has not made it.
    pub fn held_by(process: KnownProcess, whose: StateOwner) -> Result<Option<DiskState>, Failure> {
        let (pid, minor) = (process.pid, whose.minor);
        let unseen = |error| {
            Failure::system(
                format!("cannot look for the state of disk {minor} at tapdisk {pid}"),
                &error,
            )
        };
        let wanted = format!("/memfd:{} (deleted)", whose.name());
        for entry in fs::read_dir(format!("/proc/{pid}/fd")).map_err(unseen)? {
            let path = entry.map_err(unseen)?.path();
            // A descriptor may have been closed meanwhile.
            if !fs::read_link(&path).is_ok_and(|target| target.as_os_str() == wanted.as_str()) {
                continue;
            }
            let flags = OFlags::RDWR | OFlags::CLOEXEC;
            let memory = rustix::fs::open(&path, flags, Mode::empty());
            let memory = memory.map_err(|error| unseen(error.into()))?;
            let state = DiskState::of(memory, minor)?;
            state.holder.set(Some(process));
            return Ok(Some(state));
        }
        Ok(None)
    }

    /// Returns the state of a process, if it was made here.
    fn of(memory: OwnedFd, minor: u32) -> Result<DiskState, Failure> {
        let size = fstat(&memory)
            .ok()
            .and_then(|stat| u64::try_from(stat.st_size).ok());
        let sealed = fcntl_get_seals(&memory).is_ok_and(|found| found.contains(seals()));
        match size {
            Some(size) if sealed && size <= LARGEST => Ok(DiskState {
                memory,
                size,
                holder: Cell::default(),
            }),
            _ => Err(Failure::new(
                Code::Invalid,
                format!("the process of disk {minor} holds an invalid state: its successor starts without"),
            )),
        }
    }

    /// Finds the state that a process is given: the one that is there, or a new one, because who asks for
    /// another size does not know the old one. A process has one: else it could keep any number.
    ///
    /// # Errors
    /// It has one of another size, or the system refuses to make one.
    pub fn give(
        place: &mut Option<DiskState>,
        whose: StateOwner,
        size: u64,
        to: KnownProcess,
    ) -> Result<OwnedFd, Failure> {
        let state = match place {
            Some(state) if state.size == size => state,
            Some(state) if state.holder.get() == Some(to) => {
                return Err(Failure::new(
                    Code::Exists,
                    format!(
                        "tapdisk {} has a state of {} bytes for disk {}, and gets none of {size}",
                        to.pid, state.size, whose.minor
                    ),
                ));
            }
            place => place.insert(DiskState::make(whose, size)?),
        };
        state.holder.set(Some(to));
        state.open()
    }

    /// Opens it for a process, which shares nothing else with those before it, such as a place to read
    /// from.
    ///
    /// # Errors
    /// The system refuses to.
    pub fn open(&self) -> Result<OwnedFd, Failure> {
        let path = format!("/proc/self/fd/{}", self.memory.as_raw_fd());
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        rustix::fs::open(path, flags, Mode::empty())
            .map_err(|error| Failure::system("cannot open the state of a disk", &error.into()))
    }

    /// Bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }
}

#[cfg(test)]
mod tests {
    use super::{DiskState, Identity, KnownProcess, StateOwner, LARGEST};
    use std::fs::File;
    use std::io::{Read, Write};

    fn whose(minor: u32) -> StateOwner {
        StateOwner {
            minor,
            image: Some(Identity::File { dev: 1, ino: 2 }),
            born: Some(3),
        }
    }

    fn us() -> KnownProcess {
        let (pid, started) = (std::process::id(), 1);
        KnownProcess { pid, started }
    }

    #[test]
    fn a_process_has_one_state_and_the_next_may_want_another() {
        let mut place = None;
        DiskState::give(&mut place, whose(3), 512, us()).expect("the first");
        DiskState::give(&mut place, whose(3), 512, us()).expect("the same");
        let failure = DiskState::give(&mut place, whose(3), 4096, us()).expect_err("another");
        assert!(failure.message.contains("512 bytes"), "{failure}");
        let next = KnownProcess { pid: 1, started: 2 };
        // A failure to make memory takes nothing away.
        assert!(DiskState::give(&mut place, whose(3), LARGEST + 1, next).is_err());
        assert_eq!(place.as_ref().map(DiskState::size), Some(512));
        DiskState::give(&mut place, whose(3), 4096, next).expect("of its own");
        assert!(DiskState::give(&mut place, whose(3), 512, next).is_err());
        assert_eq!(place.as_ref().map(DiskState::size), Some(4096));
    }

    fn file(state: &DiskState) -> File {
        File::from(state.open().expect("a descriptor"))
    }

    #[test]
    fn size_is_bounded_and_sealed() {
        assert!(DiskState::make(whose(3), 0).is_err());
        let failure = DiskState::make(whose(3), LARGEST + 1).expect_err("too large");
        assert!(failure.message.contains(&LARGEST.to_string()), "{failure}");
        let state = DiskState::make(whose(3), 4096).expect("a state");
        assert_eq!(state.size(), 4096);
        let mut file = file(&state);
        assert!(file.set_len(8192).is_err());
        assert!(file.set_len(1).is_err());
        file.write_all(&[7; 4096]).expect("what fits");
        assert!(file.write_all(b"x").is_err());
    }

    #[test]
    fn is_found_at_the_process_that_holds_it() {
        let none = DiskState::held_by(us(), whose(4_000_000_001)).expect("descriptors");
        assert!(none.is_none());
        let state = DiskState::make(whose(4_000_000_002), 512).expect("a state");
        file(&state).write_all(b"left").expect("write");
        let found = DiskState::held_by(us(), whose(4_000_000_002)).expect("descriptors");
        let mut text = [0; 4];
        let found = found.expect("the state");
        file(&found).read_exact(&mut text).expect("read");
        assert_eq!((&text, found.size()), (b"left", 512));
        // Another image of the same disk has another one, or none.
        let other = StateOwner {
            image: Some(Identity::Device { rdev: 2 }),
            ..whose(4_000_000_002)
        };
        assert!(DiskState::held_by(us(), other)
            .expect("descriptors")
            .is_none());
        let other = StateOwner {
            born: Some(4),
            ..whose(4_000_000_002)
        };
        assert!(DiskState::held_by(us(), other)
            .expect("descriptors")
            .is_none());
        // Memory of that name from another program is not sealed.
        let name = whose(4_000_000_003).name();
        let other = rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC);
        let _other = other.expect("memory");
        assert!(DiskState::held_by(us(), whose(4_000_000_003)).is_err());
    }
}
