// SPDX-License-Identifier: MIT OR Apache-2.0
//! Layout of the file of a lease.
//!
//! The file is a row of cells of 4096 bytes, of which each has at most one record in its first 512, so that any storage
//! writes it as a whole. A generation has two cells: in the first all candidates write, in the second only the one that
//! got it. The cells of a generation are used again 32 generations later.

use crate::host::{hex, LeaseClaim, Token};
use crate::Holder;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, IntoBytes};
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a cell: what the coarsest storage writes as a whole.
pub(super) const CELL: usize = 4096;
/// Bytes of a record: what the finest storage writes as a whole.
pub(super) const RECORD: usize = 512;
/// Generations that have cells of their own.
pub(super) const GENERATIONS: usize = 32;
/// Bytes of the file.
pub(super) const SIZE: usize = 2 * GENERATIONS * CELL;

const MAGIC: [u8; 8] = *b"xtlease\n";
const VERSION: u32 = 1;

/// Which of the two cells of a generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Cell {
    /// A candidate for the lease.
    Claim,
    /// The holder, or a former one.
    Hold,
}

/// State of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum RecordState {
    Claimed,
    Held,
    /// The last owner gave the lease up.
    Free,
    /// The administrator broke the lease, on the host that the record names; it is free.
    Broken,
}

impl RecordState {
    const ALL: [(Self, u32); 4] = [
        (Self::Claimed, 1),
        (Self::Held, 2),
        (Self::Free, 3),
        (Self::Broken, 4),
    ];

    /// A claim is in a claim's cell and nowhere else.
    fn is_in(self, cell: Cell) -> bool {
        (self == Self::Claimed) == (cell == Cell::Claim)
    }
}

/// Content of a cell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LeaseRecord {
    pub(super) state: RecordState,
    pub(super) generation: u64,
    /// Heartbeats since it was taken.
    pub(super) beat: u64,
    pub(super) since_ms: u64,
    /// Number of the image's file; 0 for a block device.
    pub(super) image: u64,
    pub(super) who: LeaseClaim,
}

impl LeaseRecord {
    /// Returns true if the record is of this disk and of this boot.
    pub(super) fn is_of(&self, claim: &LeaseClaim) -> bool {
        let (host, other) = (&self.who.host, &claim.host);
        self.who.token == claim.token && host.machine == other.machine && host.boot == other.boot
    }

    /// Returns the holder, for people.
    pub(super) fn holder(&self, seen_by: &LeaseClaim) -> Holder {
        let (host, other) = (&self.who.host, &seen_by.host);
        Holder {
            host: host.name.clone(),
            machine: hex(&host.machine),
            disk: self.who.disk.clone(),
            generation: self.generation,
            since_ms: self.since_ms,
            is_here: host.machine == other.machine && host.boot == other.boot,
            key: None,
            sanlock: None,
        }
    }
}

/// Why a cell is not understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CellDamage {
    /// The record has this unknown version.
    Version(u32),
    /// Foreign data.
    Foreign,
}

/// The cells of a file, as they were at the moments at which they were read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Area {
    cells: Vec<Option<LeaseRecord>>,
}

impl Default for Area {
    fn default() -> Self {
        Area {
            cells: vec![None; 2 * GENERATIONS],
        }
    }
}

/// Number of the cell in the file.
pub(super) fn place(generation: u64, cell: Cell) -> usize {
    // CAST: a remainder of 32.
    2 * (generation % GENERATIONS as u64) as usize + usize::from(cell == Cell::Hold)
}

impl Area {
    pub(super) fn read(bytes: &[u8]) -> Result<Area, CellDamage> {
        let cells = bytes.chunks_exact(CELL).enumerate();
        let cells: Vec<_> = cells
            .map(|(at, bytes)| decode(&bytes[..RECORD], at))
            .collect::<Result<_, _>>()?;
        match cells.len() == 2 * GENERATIONS {
            true => Ok(Area { cells }),
            false => Err(CellDamage::Foreign),
        }
    }

    #[cfg(test)]
    pub(super) fn set(&mut self, cell: Cell, record: LeaseRecord) {
        let at = place(record.generation, cell);
        self.cells[at] = Some(record);
    }

    /// The record of a generation.
    pub(super) fn at(&self, generation: u64, cell: Cell) -> Option<&LeaseRecord> {
        let record = self.cells.get(place(generation, cell))?.as_ref()?;
        (record.generation == generation).then_some(record)
    }

    /// The latest generation; 0 if there was none.
    pub(super) fn generation(&self) -> u64 {
        let all = self.cells.iter().flatten();
        all.map(|record| record.generation).max().unwrap_or(0)
    }

    /// Returns the last holder or the present one: the record of the latest generation that a host got.
    pub(super) fn settled(&self) -> Option<&LeaseRecord> {
        let all = self.cells.iter().flatten();
        all.filter(|record| record.state != RecordState::Claimed)
            .max_by_key(|record| record.generation)
    }

    /// Returns the next candidate: the latest claim of a generation that no host got, nor any later one.
    pub(super) fn claim(&self) -> Option<&LeaseRecord> {
        let generation = self.generation();
        let settled = self.settled().map_or(0, |record| record.generation);
        self.at(generation, Cell::Claim)
            .filter(|_| generation > settled)
    }
}

/// A record as it is stored.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Stored {
    magic: [u8; 8],
    version: U32,
    state: U32,
    generation: U64,
    beat: U64,
    since_ms: U64,
    image: U64,
    token: Token,
    machine: Token,
    boot: Token,
    host: [u8; 64],
    disk: [u8; 128],
    reserved: [u8; 220],
    /// CRC-32 of all before it.
    checksum: U32,
}

const _: () = assert!(size_of::<Stored>() == RECORD);

pub(super) fn encode(record: &LeaseRecord) -> [u8; RECORD] {
    let state = RecordState::ALL
        .iter()
        .find(|(state, _)| *state == record.state)
        .map_or(0, |(_, number)| *number);
    let mut stored = Stored {
        magic: MAGIC,
        version: VERSION.into(),
        state: state.into(),
        generation: record.generation.into(),
        beat: record.beat.into(),
        since_ms: record.since_ms.into(),
        image: record.image.into(),
        token: record.who.token,
        machine: record.who.host.machine,
        boot: record.who.host.boot,
        host: text(&record.who.host.name),
        disk: text(&record.who.disk),
        reserved: [0; 220],
        checksum: 0.into(),
    };
    stored.checksum = sum(stored.as_bytes()).into();
    let mut bytes = [0; RECORD];
    bytes.copy_from_slice(stored.as_bytes());
    bytes
}

fn decode(bytes: &[u8], at: usize) -> Result<Option<LeaseRecord>, CellDamage> {
    if bytes.iter().all(|byte| *byte == 0) {
        return Ok(None);
    }
    let stored = Stored::read_from_bytes(bytes).map_err(|_| CellDamage::Foreign)?;
    if stored.magic != MAGIC {
        return Err(CellDamage::Foreign);
    }
    if stored.version.get() != VERSION {
        return Err(CellDamage::Version(stored.version.get()));
    }
    let cell = match at % 2 {
        0 => Cell::Claim,
        _ => Cell::Hold,
    };
    let state = RecordState::ALL
        .iter()
        .find(|(_, number)| *number == stored.state.get())
        .map(|(state, _)| *state)
        .filter(|state| state.is_in(cell));
    let generation = stored.generation.get();
    let state = match state {
        Some(state) if stored.checksum.get() == sum(bytes) && place(generation, cell) == at => {
            state
        }
        _ => return Err(CellDamage::Foreign),
    };
    Ok(Some(LeaseRecord {
        state,
        generation,
        beat: stored.beat.get(),
        since_ms: stored.since_ms.get(),
        image: stored.image.get(),
        who: LeaseClaim {
            host: crate::Host {
                name: name(&stored.host),
                machine: stored.machine,
                boot: stored.boot,
            },
            disk: name(&stored.disk),
            token: stored.token,
        },
    }))
}

/// The checksum of a record of [`RECORD`] bytes.
fn sum(bytes: &[u8]) -> u32 {
    crc32fast::hash(&bytes[..RECORD - size_of::<U32>()])
}

/// As much of a text as has room, in whole characters.
fn text<const ROOM: usize>(text: &str) -> [u8; ROOM] {
    let mut end = text.len().min(ROOM);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let mut bytes = [0; ROOM];
    bytes[..end].copy_from_slice(&text.as_bytes()[..end]);
    bytes
}

/// A text that another host wrote, as it can be shown.
fn name(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0);
    String::from_utf8_lossy(&bytes[..end.unwrap_or(bytes.len())])
        .chars()
        .filter(|char| !char.is_control())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{
        encode, place, Area, Cell, CellDamage, LeaseRecord, RecordState, CELL, RECORD, SIZE,
    };
    use crate::host::{Host, LeaseClaim};

    fn record(generation: u64, state: RecordState) -> LeaseRecord {
        LeaseRecord {
            state,
            generation,
            beat: 7,
            since_ms: 1234,
            image: 99,
            who: LeaseClaim {
                host: Host {
                    name: "one".into(),
                    machine: [1; 16],
                    boot: [2; 16],
                },
                disk: "guest 3, xvda".into(),
                token: [3; 16],
            },
        }
    }

    fn file(records: &[(Cell, LeaseRecord)]) -> Vec<u8> {
        let mut bytes = vec![0; SIZE];
        for (cell, record) in records {
            let at = place(record.generation, *cell) * CELL;
            bytes[at..at + RECORD].copy_from_slice(&encode(record));
        }
        bytes
    }

    #[test]
    fn what_is_written_is_read() {
        assert_eq!(Area::read(&vec![0; SIZE]).unwrap(), Area::default());
        let (old, claim, hold) = (
            record(31, RecordState::Free),
            record(32, RecordState::Claimed),
            record(32, RecordState::Held),
        );
        let bytes = file(&[
            (Cell::Hold, old),
            (Cell::Claim, claim.clone()),
            (Cell::Hold, hold.clone()),
        ]);
        let area = Area::read(&bytes).unwrap();
        assert_eq!(area.generation(), 32);
        assert_eq!(area.settled(), Some(&hold));
        assert_eq!(area.claim(), None);
        assert_eq!(area.at(32, Cell::Claim), Some(&claim));
        // The cell is that of generation 32.
        assert_eq!(area.at(64, Cell::Hold), None);
        assert!(area.settled().unwrap().is_of(&hold.who));
        let mut other = hold.who.clone();
        other.host.boot = [9; 16];
        assert!(!area.settled().unwrap().is_of(&other));
    }

    #[test]
    fn names_that_are_too_long_or_strange_are_shown_all_the_same() {
        let mut long = record(1, RecordState::Held);
        long.who.host.name = "\u{e9}".repeat(60);
        long.who.disk = "a\u{1b}[2J".into();
        let area = Area::read(&file(&[(Cell::Hold, long)])).unwrap();
        let found = area.settled().unwrap();
        assert_eq!(found.who.host.name, "\u{e9}".repeat(32));
        assert_eq!(found.who.disk, "a[2J");
    }

    #[test]
    fn what_is_not_understood_is_not_taken_for_free() {
        let good = file(&[(Cell::Hold, record(5, RecordState::Held))]);
        let at = place(5, Cell::Hold) * CELL;
        // Every byte counts.
        for byte in 0..RECORD {
            let mut bad = good.clone();
            bad[at + byte] ^= 1;
            assert!(Area::read(&bad).is_err(), "byte {byte}");
        }
        let mut newer = good.clone();
        newer[at + 8] = 2;
        assert_eq!(Area::read(&newer), Err(CellDamage::Version(2)));
        // In a cell that is not its own: of another generation, and of the other kind.
        let mut moved = vec![0; SIZE];
        moved[..RECORD].copy_from_slice(&good[at..at + RECORD]);
        assert_eq!(Area::read(&moved), Err(CellDamage::Foreign));
        let wrong = file(&[(Cell::Claim, record(5, RecordState::Held))]);
        assert_eq!(Area::read(&wrong), Err(CellDamage::Foreign));
        assert_eq!(Area::read(&good[..SIZE - 1]), Err(CellDamage::Foreign));
    }
}
