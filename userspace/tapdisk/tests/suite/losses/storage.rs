// SPDX-License-Identifier: MIT OR Apache-2.0
//! Storage with a cache that forgets, as Linux's page cache does: a sector whose write-back failed is clean afterwards, so
//! one flush reports the error, and the next one succeeds although the sector is not durable.

use super::chance::Chance;
use diskio::{Errno, Op, Opened, OperationFate};
use rustix::fs::{fstat, memfd_create, MemfdFlags};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::rc::Rc;

const SECTOR: usize = 512;

/// One in so many fails, where the storage fails at all.
const FLUSHES: u64 = 5;
const WRITES: u64 = 40;
/// After one in so many writes, the write-back of others fails.
const WRITE_BACKS: u64 = 40;
/// One in so many operations is delayed.
const DELAYS: u64 = 3;

type Sector = [u8; SECTOR];

/// A file in memory: what it holds is what readers see, and less than that is durable.
#[derive(Clone)]
pub(super) struct Volatile(Rc<Inner>);

struct Inner {
    file: File,
    state: RefCell<State>,
}

struct State {
    chance: Chance,
    /// Sectors that survive a loss of power, but for those that are zeroes.
    durable: BTreeMap<u64, Sector>,
    durable_size: u64,
    size: u64,
    /// Sectors with content that the next flush makes durable.
    dirty: BTreeSet<u64>,
    /// Sectors that the cache holds, and no flush makes durable.
    forgotten: BTreeSet<u64>,
    /// A write-back has failed that no flush has reported.
    owes: bool,
    fails: bool,
    /// A process is opening the image: flushes fail at times.
    opens: bool,
    /// The process is dead: no flush ends any more.
    is_dead: bool,
    /// Operations that failed.
    errors: u64,
}

/// A new open file description of a file in memory.
pub(super) fn reopen(file: impl AsFd, write: bool) -> OwnedFd {
    let path = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
    let mut options = File::options();
    let opened = options.read(true).write(write).open(path);
    opened.expect("a file in memory").into()
}

/// A file in memory with this content.
pub(super) fn memory(bytes: &[u8]) -> File {
    let file: File = memfd_create("image", MemfdFlags::CLOEXEC)
        .expect("memory")
        .into();
    file.write_all_at(bytes, 0).expect("memory");
    file
}

impl Volatile {
    /// All that `file` holds is durable.
    pub(super) fn new(file: File, chance: Chance) -> Self {
        let storage = Self(Rc::new(Inner {
            file,
            state: RefCell::new(State {
                chance,
                durable: BTreeMap::new(),
                durable_size: 0,
                size: 0,
                dirty: BTreeSet::new(),
                forgotten: BTreeSet::new(),
                owes: false,
                fails: false,
                opens: false,
                is_dead: false,
                errors: 0,
            }),
        }));
        storage.0.state.borrow_mut().settle(&storage.0.file);
        storage
    }

    pub(super) fn descriptor(&self) -> OwnedFd {
        reopen(&self.0.file, true)
    }

    /// A process begins to use it.
    pub(super) fn revive(&self) {
        self.0.state.borrow_mut().is_dead = false;
    }

    /// True for one in so many calls, while operations fail.
    pub(super) fn happens(&self, one_in: u64) -> bool {
        let mut state = self.0.state.borrow_mut();
        state.fails && state.chance.one_in(one_in)
    }

    /// The machine of the storage loses its power, and starts again.
    pub(super) fn lose_power(&self) {
        let left = self.cut();
        let mut state = self.0.state.borrow_mut();
        let size = left.metadata().expect("memory").len();
        let mut bytes = vec![0; size as usize];
        left.read_exact_at(&mut bytes, 0).expect("memory");
        self.0.file.set_len(size).expect("memory");
        self.0.file.write_all_at(&bytes, 0).expect("memory");
        state.settle(&self.0.file);
    }

    /// From now on operations fail at times, or none does any more. A write-back that has failed is still reported.
    pub(super) fn fail(&self, fails: bool) {
        self.0.state.borrow_mut().fails = fails;
    }

    /// A process begins to open the image, or has ended that.
    pub(super) fn open(&self, opens: bool) {
        self.0.state.borrow_mut().opens = opens;
    }

    /// The process is dead. Its writes may still be executed; no flush is.
    pub(super) fn die(&self) {
        let mut state = self.0.state.borrow_mut();
        state.is_dead = true;
        state.fails = false;
    }

    /// Operations that failed.
    pub(super) fn errors(&self) -> u64 {
        self.0.state.borrow().errors
    }

    /// The cache lets go of clean sectors: a reader of one whose write-back failed gets the durable content.
    pub(super) fn evict(&self) {
        let mut state = self.0.state.borrow_mut();
        let size = self.size();
        for sector in std::mem::take(&mut state.forgotten) {
            let at = sector * SECTOR as u64;
            if at + SECTOR as u64 <= size {
                let old = state.durable.get(&sector).unwrap_or(&[0; SECTOR]);
                self.0.file.write_all_at(old, at).expect("memory");
            }
        }
    }

    /// The image after a loss of power: of the sectors that a flush would have made durable, some are.
    pub(super) fn cut(&self) -> File {
        let mut state = self.0.state.borrow_mut();
        self.look_at_size(&mut state);
        let file = memory(&[]);
        let size = match state.chance.one_in(2) {
            true => state.durable_size,
            false => state.size,
        };
        file.set_len(size).expect("memory");
        let put = |sector: u64, bytes: &Sector| {
            let at = sector * SECTOR as u64;
            // CAST: at most a sector.
            let count = size.saturating_sub(at).min(SECTOR as u64) as usize;
            file.write_all_at(&bytes[..count], at).expect("memory");
        };
        for (sector, bytes) in &state.durable {
            put(*sector, bytes);
        }
        let dirty: Vec<u64> = state.dirty.iter().copied().collect();
        for sector in dirty {
            if state.chance.one_in(2) {
                put(sector, &visible(&self.0.file, sector));
            }
        }
        file
    }

    fn size(&self) -> u64 {
        self.0.file.metadata().expect("memory").len()
    }

    pub(super) fn is(&self, file: &Opened) -> bool {
        let (own, other) = (fstat(&self.0.file), fstat(file));
        let (own, other) = (own.expect("memory"), other.expect("a file"));
        (own.st_dev, own.st_ino) == (other.st_dev, other.st_ino)
    }

    /// Sectors behind a new end are not durable any more after the next flush.
    fn look_at_size(&self, state: &mut State) {
        let size = self.size();
        if size < state.size {
            let cut: Vec<u64> = state
                .durable
                .range(size / SECTOR as u64..)
                .map(|(sector, _)| *sector)
                .collect();
            state.dirty.extend(cut);
        }
        state.size = size;
    }

    /// Decides on an operation on this file.
    pub(super) fn decide(&self, op: &Op) -> OperationFate {
        let mut state = self.0.state.borrow_mut();
        self.look_at_size(&mut state);
        if state.chance.one_in(DELAYS) {
            return OperationFate::Later;
        }
        match op {
            Op::Write { offset, data, .. } => {
                let bytes = data.to_vec();
                let failed = state.fails && state.chance.one_in(WRITES);
                if failed {
                    state.errors += 1;
                    if state.chance.one_in(2) {
                        return OperationFate::Fail(Errno::IO);
                    }
                    // It is in the image nevertheless.
                    self.0.file.write_all_at(&bytes, *offset).expect("memory");
                }
                state.write(*offset, bytes.len() as u64);
                if state.fails && state.chance.one_in(WRITE_BACKS) {
                    state.owes = true;
                    state.write_back_some(&self.0.file);
                }
                match failed {
                    true => OperationFate::Fail(Errno::IO),
                    false => OperationFate::Execute,
                }
            }
            Op::Zero { hole: false, .. } => OperationFate::Fail(Errno::OPNOTSUPP),
            Op::Zero { offset, len, .. } => {
                state.write(*offset, *len);
                OperationFate::Execute
            }
            Op::Sync { .. } if state.is_dead => OperationFate::Later,
            Op::Sync { .. } => self.flush(&mut state),
            _ => OperationFate::Execute,
        }
    }

    fn flush(&self, state: &mut State) -> OperationFate {
        let fails = (state.fails || state.opens) && state.chance.one_in(FLUSHES);
        if fails || state.owes {
            state.owes = false;
            state.errors += 1;
            state.write_back_some(&self.0.file);
            return OperationFate::Fail(match state.chance.one_in(4) {
                true => Errno::NOSPC,
                false => Errno::IO,
            });
        }
        for sector in std::mem::take(&mut state.dirty) {
            state.write_back(&self.0.file, sector);
        }
        state.durable_size = state.size;
        OperationFate::Execute
    }
}

impl State {
    /// All that `file` holds is durable now.
    fn settle(&mut self, file: &File) {
        self.size = file.metadata().expect("memory").len();
        self.durable_size = self.size;
        self.durable.clear();
        self.dirty.clear();
        self.forgotten.clear();
        self.owes = false;
        for sector in 0..self.size.div_ceil(SECTOR as u64) {
            self.write_back(file, sector);
        }
    }

    fn write(&mut self, offset: u64, len: u64) {
        let unit = SECTOR as u64;
        for sector in offset / unit..(offset + len).div_ceil(unit) {
            self.forgotten.remove(&sector);
            self.dirty.insert(sector);
        }
    }

    /// Writes each sector that is dirty back, or forgets it.
    fn write_back_some(&mut self, file: &File) {
        for sector in std::mem::take(&mut self.dirty) {
            match self.chance.one_in(2) {
                true => self.write_back(file, sector),
                false => drop(self.forgotten.insert(sector)),
            }
        }
    }

    fn write_back(&mut self, file: &File, sector: u64) {
        let bytes = visible(file, sector);
        match bytes == [0; SECTOR] {
            true => self.durable.remove(&sector),
            false => self.durable.insert(sector, bytes),
        };
    }
}

/// A sector as who reads it sees it.
fn visible(file: &File, sector: u64) -> Sector {
    let (mut bytes, mut done) = ([0; SECTOR], 0);
    while done < SECTOR {
        let at = sector * SECTOR as u64 + done as u64;
        match file.read_at(&mut bytes[done..], at).expect("memory") {
            0 => break,
            count => done += count,
        }
    }
    bytes
}
