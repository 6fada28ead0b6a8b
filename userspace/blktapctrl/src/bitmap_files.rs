// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where the guests of disks write: for each mark of a disk a map, a file in the file system in memory that is ours. So
//! it outlives processes and supervisors, and goes with the disk, or with the host.
//!
//! The disk's process fills a map, and the supervisor does not trust it: a map can show more or fewer changes than
//! there were, and nothing else. Missing parts of a map count as changed.

use crate::folder::{self, Folder};
use control::{Extent, Failure};
use rustix::fs::{fallocate, FallocateFlags};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Bytes of the disk for each bit, unless that makes the map too large.
const UNIT: u64 = 64 << 10;
/// Bytes of the map of a disk when its first mark is set.
const LARGEST: u64 = 1 << 20;
/// Bytes of any map: what is behind them counts as written. A process says how large a disk is, and could make its map
/// larger.
const MOST: u64 = 4 << 20;
/// Parts in an answer.
const PARTS: usize = 8192;

/// Returns the bytes for each bit of the map of a disk of this size.
#[must_use]
pub fn unit(size: u64) -> u64 {
    let mut unit = UNIT;
    while bytes(size, unit) > LARGEST {
        unit *= 2;
    }
    unit
}

/// Bytes of a map.
fn bytes(size: u64, unit: u64) -> u64 {
    size.div_ceil(unit).div_ceil(8)
}

/// Makes the map of a disk of this size. Its memory is there from now on: a guest cannot be held up by the lack of it.
///
/// # Errors
/// The system refuses to.
pub fn make(path: &Path, size: u64, unit: u64) -> Result<(), Failure> {
    if bytes(size, unit) > MOST {
        return Err(Failure::invalid(format!(
            "a disk of {size} bytes has too many blocks of {unit} bytes for a dirty bitmap: remove all of its bitmaps, and the next one has larger blocks"
        )));
    }
    let made = || -> io::Result<()> {
        let mut options = File::options();
        let file = options
            .create_new(true)
            .write(true)
            .mode(0o600)
            .open(path)?;
        let none = FallocateFlags::empty();
        let filled = fallocate(&file, none, 0, bytes(size, unit).max(1));
        filled.map_err(io::Error::from).inspect_err(|_| {
            // A partial file that remains does no harm.
            let _ = folder::remove(path);
        })
    };
    made().map_err(|error| {
        Failure::system(
            format!(
                "cannot make memory for where the guest writes ({})",
                path.display()
            ),
            &error,
        )
    })
}

/// Opens the map for the process that writes it.
///
/// # Errors
/// It is gone, or the system refuses to.
pub fn open(path: &Path) -> Result<OwnedFd, Failure> {
    let file = File::options().read(true).write(true).open(path);
    file.map(OwnedFd::from)
        .map_err(|error| unread(path, &error))
}

/// Removes all maps of a disk.
///
/// # Errors
/// The system refuses to.
pub fn remove_all(folder: &Folder, minor: u32) -> io::Result<()> {
    for path in folder::files(&folder.notes(), "map")? {
        let name = path.file_name().and_then(|name| name.to_str());
        if name.is_some_and(|name| name.starts_with(&format!("{minor}."))) {
            folder::remove(&path)?;
        }
    }
    Ok(())
}

fn unread(path: &Path, error: &io::Error) -> Failure {
    let what = format!(
        "cannot read where the guest has written ({})",
        path.display()
    );
    Failure::system(what, error)
}

/// Reads a map, up to the largest size that one may have.
fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    let mut bits = Vec::new();
    let file = File::open(path).map_err(|error| unread(path, &error))?;
    let read = file.take(MOST).read_to_end(&mut bits);
    read.map_err(|error| unread(path, &error))?;
    Ok(bits)
}

/// Merges a map into an older one, which no process writes.
///
/// # Errors
/// One of them cannot be read or written.
pub fn merge(from: &Path, into: &Path) -> Result<(), Failure> {
    let (newer, mut older) = (read(from)?, read(into)?);
    for (at, byte) in older.iter_mut().enumerate() {
        *byte |= newer.get(at).copied().unwrap_or(u8::MAX);
    }
    let file = File::options().write(true).open(into);
    let written = file.and_then(|file| file.write_all_at(&older, 0));
    written.map_err(|error| {
        let what = format!(
            "cannot write where the guest has written ({})",
            into.display()
        );
        Failure::system(what, &error)
    })
}

/// Returns the parts of a disk of `size` bytes that one of the maps marks, from a place on, and the place where further
/// ones begin; each map has the size of the disk when it was made.
///
/// # Errors
/// One of them cannot be read.
pub fn look(
    maps: &[(PathBuf, u64)],
    size: u64,
    unit: u64,
    from: u64,
) -> Result<(Vec<Extent>, Option<u64>), Failure> {
    let found = maps.iter().map(|(path, _)| read(path));
    let found = found.collect::<Result<Vec<_>, _>>()?;
    let known = known(maps, &found, size, unit);
    let is_set = |number: u64| {
        let place = usize::try_from(number / 8).unwrap_or(usize::MAX);
        let mut bytes = found.iter().map(|map| map.get(place));
        bytes.any(|byte| byte.is_none_or(|byte| byte & 1 << (number % 8) != 0))
    };
    let mut extents: Vec<Extent> = Vec::new();
    for number in from / unit..known {
        if is_set(number) {
            let offset = number * unit;
            add(&mut extents, offset, unit.min(size - offset));
        }
        if extents.len() > PARTS {
            extents.pop();
            let next = extents.last().map(|last| last.offset + last.length);
            return Ok((extents, next));
        }
    }
    let rest = known.saturating_mul(unit).max(from);
    if rest < size {
        add(&mut extents, rest, size - rest);
    }
    Ok((extents, None))
}

/// Units of the disk of which all maps say something.
fn known(maps: &[(PathBuf, u64)], found: &[Vec<u8>], size: u64, unit: u64) -> u64 {
    let all = maps.iter().zip(found).map(|((_, was), map)| {
        // The bit of a unit does not cover bytes behind an end that was in the middle of that unit.
        let units = if *was >= size {
            size.div_ceil(unit)
        } else {
            was / unit
        };
        units.min(map.len() as u64 * 8)
    });
    all.min().unwrap_or(0)
}

/// Adds a part, to the last one if it follows on that.
fn add(extents: &mut Vec<Extent>, offset: u64, length: u64) {
    match extents.last_mut() {
        Some(last) if last.offset + last.length == offset => last.length += length,
        _ => extents.push(Extent { offset, length }),
    }
}

#[cfg(test)]
mod tests {
    use super::{bytes, look, make, merge, unit, LARGEST, MOST, PARTS, UNIT};
    use control::Extent;
    use std::fs;
    use std::path::PathBuf;

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("notes-{}-{name}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        folder
    }

    /// Units of a disk as parts.
    fn units(wanted: &[(u64, u64)]) -> Vec<Extent> {
        let part = |&(from, count): &(u64, u64)| Extent {
            offset: from * UNIT,
            length: count * UNIT,
        };
        wanted.iter().map(part).collect()
    }

    #[test]
    fn a_map_is_small_however_large_the_disk_is() {
        assert_eq!(unit(1), UNIT);
        assert_eq!(unit(512 << 30), UNIT);
        assert_eq!(unit((512 << 30) + 1), 2 * UNIT);
        for size in [1, 1 << 40, 64 << 40, u64::MAX >> 1] {
            assert!(bytes(size, unit(size)) <= LARGEST, "{size}");
        }
    }

    /// Returns the parts that maps mark, all of which are of a disk of `was` bytes.
    fn of(maps: &[&PathBuf], was: u64, size: u64, from: u64) -> Vec<Extent> {
        let maps: Vec<_> = maps.iter().map(|path| ((*path).clone(), was)).collect();
        let (extents, next) = look(&maps, size, UNIT, from).expect("maps");
        assert_eq!(next, None);
        extents
    }

    #[test]
    fn all_maps_together_say_what_was_written() {
        let folder = folder("all");
        let [older, newer] = ["0.1.map", "0.2.map"].map(|name| folder.join(name));
        let size = 40 * UNIT + 512;
        for map in [&older, &newer] {
            make(map, size, UNIT).expect("a map");
            assert!(make(map, size, UNIT).is_err(), "there is one");
        }
        let both = [&older, &newer];
        assert!(of(&both, size, size, 0).is_empty());
        // The last unit is not whole.
        fs::write(&older, [0b1000_0001, 0, 0, 0, 0, 1]).expect("write");
        fs::write(&newer, [0b0000_0011, 0b0000_0001, 0, 0, 0, 0]).expect("write");
        let mut wanted = units(&[(0, 2), (7, 2)]);
        wanted.push(Extent {
            offset: 40 * UNIT,
            length: 512,
        });
        assert_eq!(of(&both, size, size, 0), wanted);
        assert_eq!(of(&both[1..], size, size, 0), units(&[(0, 2), (8, 1)]));
        assert_eq!(of(&both, size, size, 7 * UNIT), wanted[1..]);
        merge(&newer, &older).expect("merge");
        assert_eq!(of(&both[..1], size, size, 0), wanted);
        fs::remove_dir_all(folder).expect("remove");
    }

    /// A process may have made it shorter, or the disk has grown, which may have an odd end.
    #[test]
    fn what_is_not_known_counts_as_written() {
        let folder = folder("short");
        let [short, whole] = ["0.1.map", "0.2.map"].map(|name| folder.join(name));
        fs::write(&short, [0b10]).expect("write");
        fs::write(&whole, [0, 0b1000_0000, 0]).expect("write");
        let size = 24 * UNIT;
        assert_eq!(
            of(&[&short, &whole], size, size, 0),
            units(&[(1, 1), (8, 16)])
        );
        let grown = of(&[&whole], 17 * UNIT, size, 0);
        assert_eq!(grown, units(&[(15, 1), (17, 7)]));
        let odd = of(&[&whole], 17 * UNIT + 512, size, 0);
        assert_eq!(odd, units(&[(15, 1), (17, 7)]));
        assert_eq!(of(&[&whole], size, 9 * UNIT, 0), []);
        merge(&short, &whole).expect("merge");
        assert_eq!(of(&[&whole], size, size, 0), units(&[(1, 1), (8, 16)]));
        let none = (folder.join("none"), size);
        assert!(look(&[none], size, UNIT, 0).is_err());
        let large = make(&folder.join("0.3.map"), u64::MAX, UNIT).expect_err("too large");
        assert!(
            large.message.contains("remove all of its bitmaps"),
            "{large}"
        );
        fs::remove_dir_all(folder).expect("remove");
    }

    /// Tests sizes and maps that are as large as a process can make them.
    #[test]
    fn no_size_and_no_map_is_too_large() {
        let folder = folder("large");
        let map = folder.join("0.1.map");
        let file = fs::File::create(&map).expect("create");
        file.set_len(1 << 40).expect("a hole");
        let known = MOST * 8 * UNIT;
        let found = of(&[&map], u64::MAX, u64::MAX, 0);
        let rest = Extent {
            offset: known,
            length: u64::MAX - known,
        };
        assert_eq!(found, [rest]);
        fs::remove_dir_all(folder).expect("remove");
    }

    #[test]
    fn a_long_answer_is_in_pieces() {
        let folder = folder("long");
        let map = folder.join("0.1.map");
        let count = PARTS as u64 + 100;
        fs::write(&map, vec![0b0101_0101; PARTS / 4 + 25]).expect("write");
        let size = 2 * count * UNIT;
        let maps = [(map, size)];
        let (mut from, mut all, mut answers) = (0, Vec::new(), 0);
        loop {
            let (extents, next) = look(&maps, size, UNIT, from).expect("the map");
            assert!(extents.len() <= PARTS);
            all.extend(extents);
            answers += 1;
            match next {
                Some(next) => from = next,
                None => break,
            }
        }
        let wanted: Vec<_> = (0..count).map(|number| (2 * number, 1)).collect();
        assert_eq!((all, answers), (units(&wanted), 2));
        fs::remove_dir_all(folder).expect("remove");
    }
}
