// SPDX-License-Identifier: MIT OR Apache-2.0
//! Internal snapshots.

use super::header::Qcow2Header;
use super::image::{EntryTable, Qcow2Image};
use crate::field::refused;
use crate::{storage, Storage};
use control::Failure;
use diskio::Errno;

/// Bytes of the fixed part of a snapshot's record.
const RECORD: u64 = 40;
/// Bytes of extra data at most that are believed.
const MOST: u64 = 64 << 10;
/// Bytes of all records at most, as QEMU has it.
const MOST_IN_ALL: u64 = 64 << 20;

/// The state of a disk at an earlier time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSnapshot {
    /// Its id, unique in the image.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Bytes of the disk.
    pub size: u64,
    /// Seconds since 1970.
    pub seconds: u32,
    /// Bytes of the guest's memory that it also has.
    pub memory: u64,
    pub(crate) l1: EntryTable,
}

/// Looks at the snapshots of an image one after the other, and says how many bytes their table has.
pub(crate) async fn walk<S: Storage>(
    file: &S,
    header: &Qcow2Header,
    mut look: impl FnMut(DiskSnapshot),
) -> Result<u64, Failure> {
    let mut at = header.snapshots_at;
    for number in 0..header.snapshots {
        let failed =
            |error: Errno| Failure::system(format!("cannot read snapshot {number}"), &error.into());
        let record = storage::bytes(file, at, RECORD as usize)
            .await
            .map_err(failed)?;
        let word = |at: usize| {
            u32::from_be_bytes([record[at], record[at + 1], record[at + 2], record[at + 3]])
        };
        let long = |at: usize| u64::from(word(at)) << 32 | u64::from(word(at + 4));
        let short = |at: usize| u64::from(u16::from_be_bytes([record[at], record[at + 1]]));
        let (extra, id, name) = (u64::from(word(36)), short(12), short(14));
        if extra > MOST {
            return Err(refused(format!(
                "the record of snapshot {number} has no end"
            )));
        }
        // CAST: three numbers that were checked.
        let rest = storage::bytes(file, at + RECORD, (extra + id + name).max(1) as usize)
            .await
            .map_err(failed)?;
        // CAST: all three are bounded.
        let (extra, id, name) = (extra as usize, id as usize, name as usize);
        let extra_long = |at: usize| {
            let bytes = rest.get(at..at + 8).filter(|_| at + 8 <= extra)?;
            Some(u64::from_be_bytes(bytes.try_into().ok()?))
        };
        let text =
            |from: usize, len: usize| String::from_utf8_lossy(&rest[from..from + len]).into_owned();
        let l1 = EntryTable {
            at: long(0),
            entries: u64::from(word(8)),
        };
        let size = extra_long(8).unwrap_or(header.size);
        check(header, number, l1, size)?;
        look(DiskSnapshot {
            id: text(extra, id),
            name: text(extra + id, name),
            size,
            seconds: word(16),
            memory: extra_long(0).unwrap_or(u64::from(word(32))),
            l1,
        });
        at += RECORD + (extra + id + name) as u64;
        at = at.next_multiple_of(8);
        if at - header.snapshots_at > MOST_IN_ALL {
            return Err(refused(format!(
                "the records of snapshots have more than {MOST_IN_ALL} bytes"
            )));
        }
    }
    Ok(at - header.snapshots_at)
}

/// The snapshot with an id, or else the first one with that name.
pub(crate) async fn find<S: Storage>(
    file: &S,
    header: &Qcow2Header,
    wanted: &str,
) -> Result<DiskSnapshot, Failure> {
    let (mut by_id, mut by_name) = (None, None);
    walk(file, header, |one| {
        if one.id == wanted {
            by_id.get_or_insert(one);
        } else if one.name == wanted {
            by_name.get_or_insert(one);
        }
    })
    .await?;
    by_id
        .or(by_name)
        .ok_or_else(|| refused(format!("there is no snapshot {wanted:?}")))
}

fn check(header: &Qcow2Header, number: u32, l1: EntryTable, size: u64) -> Result<(), Failure> {
    let cluster = header.geometry.cluster();
    let is_right = l1.at % cluster == 0
        && l1.at < super::geometry::MAX_OFFSET
        && l1.entries <= 4 << 20
        && size < super::geometry::MAX_OFFSET
        && size % 512 == 0
        && l1.entries >= header.geometry.l1_entries(size);
    match is_right {
        true => Ok(()),
        false => Err(refused(format!(
            "the L1 table of snapshot {number} cannot be what it says"
        ))),
    }
}

impl<S: Storage> Qcow2Image<S> {
    /// Shows a snapshot instead of the disk as it is now. The image must be read-only.
    pub(crate) fn show(&self, snapshot: &DiskSnapshot) {
        self.l1.set(snapshot.l1);
        self.size.set(snapshot.size);
    }
}
