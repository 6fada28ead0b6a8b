// SPDX-License-Identifier: MIT OR Apache-2.0
//! The log of a VHDX: changes of tables that may not be in their places yet. The log is a ring of sectors of 4 KiB with
//! entries; the newest complete entry refers to the first one that counts.
//!
//! Each change is of a whole sector, or zeroes a range. The changes of the log are kept in memory ([`Overlay`]); the
//! file does not change.

use super::crc32c::Sum;
use super::entry::{Descriptor, LogEntry, Sectors};
use super::header::{VhdxHeader, HEADERS_END};
use super::log_overlay::{Over, Overlay, MOST, SECTOR};
use crate::field::{array, failed, le32, refused};
use crate::{storage, Storage};
use control::Failure;
use diskio::Errno;
use std::collections::BTreeMap;

/// Bytes of a log that is replayed at most. Others make 1 MiB.
const LARGEST: u64 = 64 << 20;
/// Bytes that are read at once.
const PIECE: u64 = 64 << 10;
/// Maximum number of log entries that may contain one sector: a hostile log with nested entries would take hours.
const LOOKS: u64 = 16;

/// The ring.
#[derive(Debug)]
struct LogRing<'s, S> {
    file: &'s S,
    header: &'s VhdxHeader,
    /// Bytes of entries that were looked at.
    looked: u64,
}

/// Returns the changes of the log, empty if it has none.
///
/// # Errors
/// The log is damaged, or larger than this driver replays.
pub(crate) async fn replay<S: Storage>(file: &S, header: &VhdxHeader) -> Result<Overlay, Failure> {
    if header.log.is_zero() {
        return Ok(Overlay::default());
    }
    let length = file.size().map_err(failed("cannot see the image's size"))?;
    check(header, length)?;
    let mut log = LogRing {
        file,
        header,
        looked: 0,
    };
    let entries = log.entries().await?;
    let active = active(&entries).ok_or_else(|| {
        refused(
            "the VHDX was not closed, and no changes in its log are whole: it is damaged. If its last writer died \
             before its first change, qemu-img convert makes a copy of what there is",
        )
    })?;
    let head = active.last().copied().unwrap_or_default();
    if head.flushed > length {
        return Err(refused(format!(
            "the VHDX has {length} bytes, and its log says that it had {}: it is cut off",
            head.flushed
        )));
    }
    let mut overlay = Overlay::new(head.last);
    for entry in &active {
        log.apply(entry, &mut overlay).await?;
    }
    Ok(overlay)
}

fn check(header: &VhdxHeader, length: u64) -> Result<(), Failure> {
    if header.log_version != 0 {
        return Err(refused(format!(
            "the VHDX was not closed, and its log has version {}, which this program does not support: let the program that \
             wrote it open it once",
            header.log_version
        )));
    }
    if header.log_len == 0 || header.log_range().end > length {
        return Err(refused(format!(
            "the VHDX was not closed, and its log of {} bytes at byte {} is not in the image of {length}: it is cut off",
            header.log_len, header.log_at
        )));
    }
    if header.log_len > LARGEST {
        return Err(too_much(&format!(
            "a log of {} MiB, of which {} can be replayed here",
            header.log_len >> 20,
            LARGEST >> 20
        )));
    }
    Ok(())
}

fn too_much(what: &str) -> Failure {
    refused(format!(
        "the VHDX was not closed and has {what}: let qemu-img check -r all replay it"
    ))
}

/// Returns the entries that count, the oldest first: up to the newest one from which the chain leads back without a gap
/// to the beginning that it names. An entry that a power cut interrupted does not count, nor does one before it whose
/// successor exists but is not complete.
fn active(entries: &BTreeMap<u64, LogEntry>) -> Option<Vec<LogEntry>> {
    let mut newest: Vec<&LogEntry> = entries.values().collect();
    newest.sort_by_key(|entry| std::cmp::Reverse(entry.sequence));
    // Place of the last entry that each entry leads to.
    let mut heads: BTreeMap<u64, u64> = BTreeMap::new();
    for entry in &newest {
        let next = entries.get(&entry.next).filter(|next| next.follows(entry));
        let head = next.and_then(|next| heads.get(&next.at));
        let head = head.copied().unwrap_or(entry.at);
        heads.insert(entry.at, head);
    }
    let is_whole = |entry: &&&LogEntry| {
        heads.get(&entry.at) == Some(&entry.at) && heads.get(&entry.tail) == Some(&entry.at)
    };
    let head = **newest.iter().find(is_whole)?;
    let mut entry = *entries.get(&head.tail)?;
    let mut all = vec![entry];
    while entry.at != head.at {
        entry = *entries.get(&entry.next)?;
        all.push(entry);
    }
    Some(all)
}

impl<S: Storage> LogRing<'_, S> {
    /// Reads from a place in the log on; at most a piece, which wraps around at the end of the log.
    async fn read(&self, at: u64, len: u64) -> Result<Vec<u8>, Errno> {
        let ring = self.header.log_len;
        let at = at % ring.max(1);
        let first = len.min(ring - at);
        let begin = self.header.log_at + at;
        // CAST: at most a piece.
        let mut bytes = storage::bytes(self.file, begin, first as usize).await?;
        if first < len {
            let rest = storage::bytes(self.file, self.header.log_at, (len - first) as usize);
            bytes.extend(rest.await?);
        }
        Ok(bytes)
    }

    /// All entries that are whole, by where they begin.
    async fn entries(&mut self) -> Result<BTreeMap<u64, LogEntry>, Failure> {
        let reading = |error| failed("cannot read the VHDX's log")(error);
        let mut found = BTreeMap::new();
        let mut at = 0;
        while at < self.header.log_len {
            let len = PIECE.min(self.header.log_len - at);
            let bytes = self.read(at, len).await.map_err(reading)?;
            for (sector, place) in bytes
                .chunks(SECTOR as usize)
                .zip((at..).step_by(SECTOR as usize))
            {
                let Some(entry) = LogEntry::parse(sector, place, self.header) else {
                    continue;
                };
                self.looked = self.looked.saturating_add(entry.len);
                if self.looked > self.header.log_len.saturating_mul(LOOKS) {
                    return Err(refused(
                        "the entries of the VHDX's log lie over each other: it is damaged",
                    ));
                }
                if self.is_whole(&entry).await.map_err(reading)? {
                    found.insert(place, entry);
                }
            }
            at += len;
        }
        Ok(found)
    }

    /// The checksum of an entry is right, and everything in it belongs to it.
    async fn is_whole(&self, entry: &LogEntry) -> Result<bool, Errno> {
        let mut sectors = Sectors::new(entry);
        let mut sum: Option<Sum> = None;
        let mut at = 0;
        while at < entry.len {
            let len = PIECE.min(entry.len - at);
            let bytes = self.read(entry.at + at, len).await?;
            match &mut sum {
                None => sum = Some(Sum::of(&bytes)),
                Some(sum) => sum.add(&bytes),
            }
            if !bytes
                .chunks(SECTOR as usize)
                .all(|sector| sectors.is_next(sector))
            {
                return Ok(false);
            }
            at += len;
        }
        let is_right = sum.is_some_and(|sum| sum.finish() == entry.sum);
        Ok(is_right && sectors.are_all())
    }

    /// Lays the changes of an entry over the file.
    async fn apply(&self, entry: &LogEntry, overlay: &mut Overlay) -> Result<(), Failure> {
        let mut data = entry.data();
        for number in 0..entry.descriptor_sectors() {
            let sector = self.read(entry.at + number * SECTOR, SECTOR).await;
            let sector = sector.map_err(failed("cannot read the VHDX's log"))?;
            for descriptor in entry.descriptors(&sector, number) {
                match Descriptor::parse(descriptor, entry) {
                    Some(Descriptor::Zero { at, len }) => {
                        let end = self.target(at, len)?;
                        overlay.put(at, end, Over::Zeroes);
                    }
                    Some(Descriptor::Data { at }) => {
                        let end = self.target(at, SECTOR)?;
                        let over = Over::Sector {
                            at: self.header.log_at + data % self.header.log_len.max(1),
                            leading: array(descriptor, 8),
                            trailing: le32(descriptor, 4).to_le_bytes(),
                        };
                        overlay.put(at, end, over);
                        data += SECTOR;
                    }
                    None => return Err(refused("the VHDX's log changes while it is read")),
                }
            }
            if overlay.count() > MOST {
                return Err(too_much(&format!(
                    "a log with more than {MOST} changes, which is all that can be replayed here"
                )));
            }
        }
        Ok(())
    }

    /// Returns the end of a change, which must be one that the log may make.
    fn target(&self, at: u64, len: u64) -> Result<u64, Failure> {
        let log = self.header.log_range();
        // Sizes of files have 63 bits.
        let end = at.checked_add(len).filter(|end| *end <= i64::MAX as u64);
        match end {
            Some(end) if at >= HEADERS_END && (end <= log.start || at >= log.end) => Ok(end),
            _ => Err(refused(format!(
                "the VHDX's log changes {len} bytes at byte {at}, where the headers or itself are: it is damaged"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{active, LogEntry};
    use std::collections::BTreeMap;

    /// Entries of one sector each: where, which number, and where the first is that counts.
    fn ring(all: &[(u64, u64, u64)]) -> BTreeMap<u64, LogEntry> {
        let entry = |(at, sequence, tail): (u64, u64, u64)| LogEntry {
            at,
            next: (at + 1) % 8,
            sequence,
            tail,
            ..LogEntry::default()
        };
        all.iter().map(|one| (one.0, entry(*one))).collect()
    }

    fn found(all: &[(u64, u64, u64)]) -> Option<Vec<u64>> {
        let all = active(&ring(all))?;
        Some(all.iter().map(|entry| entry.sequence).collect())
    }

    #[test]
    fn the_newest_whole_sequence_counts() {
        assert_eq!(found(&[]), None);
        assert_eq!(found(&[(3, 9, 3)]), Some(vec![9]));
        // The first of three is in its place already.
        assert_eq!(found(&[(0, 1, 0), (1, 2, 1), (2, 3, 1)]), Some(vec![2, 3]));
        // Over the end of the ring.
        assert_eq!(
            found(&[(6, 4, 6), (7, 5, 6), (0, 6, 6), (1, 7, 6)]),
            Some(vec![4, 5, 6, 7])
        );
        // An older one is still there, behind the newest or before it.
        assert_eq!(
            found(&[(0, 8, 0), (1, 9, 0), (4, 3, 4), (5, 4, 4)]),
            Some(vec![8, 9])
        );
        assert_eq!(found(&[(1, 5, 1), (2, 2, 2), (3, 3, 2)]), Some(vec![5]));
        // The newest leads back to an incomplete one, so the entries before that count.
        assert_eq!(found(&[(0, 1, 0), (1, 2, 0), (3, 4, 0)]), Some(vec![1, 2]));
        // Nothing leads back to where it says.
        assert_eq!(found(&[(1, 2, 0), (2, 3, 0)]), None);
        // All of the ring.
        let all: Vec<(u64, u64, u64)> = (0..8).map(|at| (at, 10 + at, 0)).collect();
        assert_eq!(found(&all).map(|all| all.len()), Some(8));
    }
}
