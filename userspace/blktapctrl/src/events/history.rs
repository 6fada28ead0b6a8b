// SPDX-License-Identifier: MIT OR Apache-2.0
//! Events that outlive the supervisor: a file of a fixed size in which the newest are kept.
//!
//! The file is allocated when it is created, so that events can be stored even when `/run` is full. It holds lines:
//! eight hexadecimal digits, the CRC-32 (IEEE) of what follows the space behind them, which is the event in JSON as the
//! protocol has it. A line follows the one before it; if it does not fit before the end of the file, it is put at the
//! beginning, over the oldest ones. The reader skips anything that is no whole line, such as the rest of an overwritten
//! line, a line whose writer was killed, or foreign data.
//!
//! The ring of the crate `trace` is not used: its records are requests of 64 bytes, of a disk each, in 16 MiB at least.

use crate::folder;
use control::supervisor::{Event, What};
use rustix::fs::{fallocate, FallocateFlags, OFlags};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Bytes of the file.
const SIZE: u64 = 512 << 10;
/// Bytes of a line at most: of an event that needs more its number is kept.
const LONGEST: usize = 16 << 10;
/// Most bytes that are read of a file that another program has enlarged.
const MOST: u64 = 16 << 20;
/// Numbers beyond this are none of ours: programs that take numbers for floats would confuse them.
const LAST: u64 = 1 << 53;
/// Bytes before the event in a line: the checksum, and a space.
const HEAD: usize = 9;

/// The file.
#[derive(Debug)]
pub(super) struct EventHistory {
    path: PathBuf,
    file: File,
    /// Where the next line begins.
    at: u64,
}

impl EventHistory {
    /// Opens the file, or makes it. With it comes what is kept there, the oldest first.
    ///
    /// # Errors
    /// It cannot be used. There is none then: who comes next must not take the numbers in it for ours.
    pub(super) fn open(path: &Path) -> io::Result<(EventHistory, Vec<Event>)> {
        EventHistory::try_open(path).inspect_err(|_| {
            // If that fails, too, whoever comes next finds the same.
            let _ = folder::remove(path);
        })
    }

    fn try_open(path: &Path) -> io::Result<(EventHistory, Vec<Event>)> {
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false);
        // CAST: the bits are those of the kernel.
        let options = options.mode(0o600).custom_flags(flags.bits() as i32);
        let file = options.open(path)?;
        let found = file.metadata()?;
        if !found.is_file() {
            return Err(io::Error::other("it is no file"));
        }
        let mut bytes = vec![0; usize::try_from(found.len().min(MOST)).unwrap_or(0)];
        file.read_exact_at(&mut bytes, 0)?;
        file.set_len(SIZE)?;
        fallocate(&file, FallocateFlags::empty(), 0, SIZE)?;
        let (events, at) = read(&bytes);
        let path = path.into();
        Ok((EventHistory { path, file, at }, events))
    }

    /// Writes an event down.
    ///
    /// # Errors
    /// The file cannot be changed.
    pub(super) fn add(&mut self, event: &Event) -> io::Result<()> {
        let mut line = line(event)?;
        if line.len() > LONGEST {
            let what = What::Other;
            let guest_name = None;
            let vdev = None;
            line = self::line(&Event {
                guest_name,
                vdev,
                what,
                ..*event
            })?;
        }
        let length = line.len() as u64;
        if self.at.saturating_add(length) > SIZE {
            // Lines from here to the end of the file are older than those that the next lines replace.
            let rest = usize::try_from(SIZE.saturating_sub(self.at)).unwrap_or(0);
            self.file.write_all_at(&vec![b'\n'; rest], self.at)?;
            self.at = 0;
        }
        self.file.write_all_at(&line, self.at)?;
        self.at += length;
        Ok(())
    }

    /// Takes the file away: it does not have what has happened since.
    pub(super) fn remove(self) {
        // Nothing more can be done; an earlier message has the reason.
        let _ = folder::remove(&self.path);
    }
}

fn line(event: &Event) -> io::Result<Vec<u8>> {
    let event = serde_json::to_vec(event)?;
    let mut line = format!("{:08x} ", crc32fast::hash(&event)).into_bytes();
    line.extend_from_slice(&event);
    line.push(b'\n');
    Ok(line)
}

/// The event of a line, if it is whole and makes sense.
fn parse(line: &[u8]) -> Option<Event> {
    let (head, event) = line.split_at_checked(HEAD)?;
    let digits = std::str::from_utf8(head).ok()?.strip_suffix(' ')?;
    let is_whole = u32::from_str_radix(digits, 16).ok()? == crc32fast::hash(event);
    let event: Event = serde_json::from_slice(event).ok().filter(|_| is_whole)?;
    (1..LAST).contains(&event.number).then_some(event)
}

/// The events of a file in their order, and where the next line begins: behind the newest one. All are of its series.
fn read(bytes: &[u8]) -> (Vec<Event>, u64) {
    let mut end = 0_u64;
    let mut found = BTreeMap::new();
    for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
        end = end.saturating_add(piece.len() as u64);
        let line = piece.strip_suffix(b"\n");
        if let Some(event) = line.filter(|line| line.len() < LONGEST).and_then(parse) {
            found.insert(event.number, (event, end));
        }
    }
    let Some((newest, at)) = found.values().next_back() else {
        return (Vec::new(), 0);
    };
    let (series, at) = (newest.series, *at);
    let events = found.into_values().map(|(event, _)| event);
    let ours = events.filter(|event| event.series == series).collect();
    (ours, at)
}

#[cfg(test)]
mod tests {
    use super::{line, read, EventHistory, SIZE};
    use control::supervisor::{Event, What};
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::{Path, PathBuf};

    /// A folder that goes with its test.
    struct HistoryFolder(PathBuf);

    impl HistoryFolder {
        fn new(name: &str) -> HistoryFolder {
            let name = format!("history-{}-{name}", std::process::id());
            let folder = std::env::temp_dir().join(name);
            fs::create_dir_all(&folder).expect("a folder");
            HistoryFolder(folder)
        }

        fn file(&self) -> PathBuf {
            self.0.join("events")
        }
    }

    impl Drop for HistoryFolder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn event(number: u64) -> Event {
        Event {
            number,
            series: 77,
            at_ms: number,
            minor: Some(3),
            guest: None,
            guest_name: None,
            vdev: None,
            what: What::Failed {
                message: "x".repeat(number as usize % 50),
                retry_ms: 1,
            },
        }
    }

    fn open(path: &Path) -> (EventHistory, Vec<u64>) {
        let (history, events) = EventHistory::open(path).expect("a history");
        for found in &events {
            assert_eq!(*found, event(found.number), "it is as it was written");
        }
        (history, events.iter().map(|event| event.number).collect())
    }

    fn write(history: &mut EventHistory, numbers: impl IntoIterator<Item = u64>) {
        for number in numbers {
            history.add(&event(number)).expect("room");
        }
    }

    #[test]
    fn who_comes_next_finds_the_newest_whenever_the_last_one_ended() {
        let folder = HistoryFolder::new("ring");
        let mut last = 0;
        // Each writes some; all together many times what has room.
        for some in [1, 2, 900, 40, 3000, 1, 7, 5000] {
            let (mut history, found) = open(&folder.file());
            assert_eq!(found.last().copied().unwrap_or(0), last);
            let first = found.first().copied().unwrap_or(1);
            assert_eq!(found, (first..=last).collect::<Vec<u64>>(), "no gap");
            assert!(last < 5000 || found.len() > 2000, "{}", found.len());
            write(&mut history, last + 1..=last + some);
            last += some;
        }
        assert_eq!(fs::metadata(folder.file()).expect("a file").len(), SIZE);
    }

    #[test]
    fn a_line_that_is_not_whole_is_passed_over() {
        let lines = |numbers: std::ops::RangeInclusive<u64>| -> Vec<u8> {
            let lines = numbers.flat_map(|number| line(&event(number)).expect("a line"));
            lines.collect()
        };
        let old = lines(1..=20);
        let new = lines(21..=21);
        let numbers = |bytes: &[u8]| {
            let (events, at) = read(bytes);
            let numbers: Vec<u64> = events.iter().map(|event| event.number).collect();
            (numbers, at)
        };
        // It was being written over the oldest ones: so much of it is there.
        for cut in 1..new.len() {
            let mut bytes = old.clone();
            bytes[..cut].copy_from_slice(&new[..cut]);
            let (found, at) = numbers(&bytes);
            assert_eq!(found.last(), Some(&20), "cut at {cut}: {found:?}");
            assert_eq!(at, old.len() as u64);
            assert!(found.len() >= 18, "cut at {cut}: {found:?}");
        }
        let mut bytes = old.clone();
        bytes[..new.len()].copy_from_slice(&new);
        let (found, at) = numbers(&bytes);
        assert_eq!((found.last(), at), (Some(&21), new.len() as u64));
        // Or behind the newest.
        for cut in 1..new.len() {
            let bytes = [&old, &new[..cut], &[0; 100]].concat();
            assert_eq!(numbers(&bytes).1, old.len() as u64, "cut at {cut}");
        }
    }

    #[test]
    fn any_byte_may_be_another_one() {
        let lines = (1..=5).flat_map(|number| line(&event(number)).expect("a line"));
        let whole: Vec<u8> = lines.collect();
        for at in 0..whole.len() {
            for other in [0, b'\n', b'9', b'"', 0xff, whole[at] ^ 1] {
                let mut bytes = whole.clone();
                bytes[at] = other;
                let (found, _) = read(&bytes);
                let are_whole = found.iter().all(|found| *found == event(found.number));
                assert!(are_whole, "{other} at {at}: {found:?}");
                // Without an end of a line two lines are lost.
                let lost = 5 - found.len();
                assert!(lost <= 2, "{other} at {at}: {found:?}");
                assert_eq!(lost == 0, bytes == whole, "{other} at {at}");
            }
        }
    }

    /// Tests that a line that does not fit before the end leaves no events there that are older than the overwritten
    /// ones.
    #[test]
    fn nothing_is_kept_that_is_older_than_what_was_written_over() {
        let folder = HistoryFolder::new("wrap");
        let (mut history, _) = open(&folder.file());
        let mut number = 0;
        while number < 8000 || history.at < SIZE - 5000 {
            number += 1;
            write(&mut history, [number]);
        }
        let mut long = event(number + 1);
        let message = "x".repeat(10_000);
        long.what = What::Failed {
            message,
            retry_ms: 1,
        };
        history.add(&long).expect("room");
        assert!(history.at < 11_000, "it is at the beginning");
        let (_, found) = EventHistory::open(&folder.file()).expect("a history");
        let numbers: Vec<u64> = found.iter().map(|event| event.number).collect();
        let first = numbers.first().copied().unwrap_or(0);
        assert_eq!(numbers, (first..=number + 1).collect::<Vec<u64>>());
    }

    #[test]
    fn what_is_no_history_is_none() {
        let folder = HistoryFolder::new("foreign");
        let size = SIZE as usize;
        for (fill, length) in [
            (0, 0),
            (0xff, 1),
            (b'\n', 4096),
            (0xff, size),
            (b' ', 3 * size),
        ] {
            fs::write(folder.file(), vec![fill; length]).expect("written");
            let (mut history, found) = open(&folder.file());
            assert_eq!(found, [0; 0]);
            write(&mut history, [1]);
            assert_eq!(open(&folder.file()).1, [1]);
        }
        fs::remove_file(folder.file()).expect("removed");
        let elsewhere = folder.0.join("elsewhere");
        fs::write(&elsewhere, "precious").expect("written");
        symlink(&elsewhere, folder.file()).expect("a link");
        EventHistory::open(&folder.file()).expect_err("a link");
        assert_eq!(fs::read(&elsewhere).expect("bytes"), b"precious");
        // The link is gone, so the next one can begin.
        assert_eq!(open(&folder.file()).1, [0; 0]);
        fs::remove_file(folder.file()).expect("removed");
        fs::create_dir(folder.file()).expect("a folder");
        EventHistory::open(&folder.file()).expect_err("a folder");
    }

    #[test]
    fn of_an_event_that_is_too_long_the_number_stays() {
        let folder = HistoryFolder::new("long");
        let (mut history, _) = open(&folder.file());
        write(&mut history, [1]);
        let mut long = event(2);
        let message = "x".repeat(100_000);
        long.what = What::Failed {
            message,
            retry_ms: 1,
        };
        history.add(&long).expect("nothing to do");
        let (mut history, found) = EventHistory::open(&folder.file()).expect("a history");
        assert_eq!((found[1].number, &found[1].what), (2, &What::Other));
        write(&mut history, [3]);
        let (_, found) = EventHistory::open(&folder.file()).expect("a history");
        assert_eq!((found.len(), &found[2]), (3, &event(3)));
    }
}
