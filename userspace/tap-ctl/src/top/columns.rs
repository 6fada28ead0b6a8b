// SPDX-License-Identifier: MIT OR Apache-2.0
//! The columns of a picture.

use super::picture::Row;
use crate::host::vbd::{Operation, Vbd};
use crate::sample::{Kind, SampledDisk};
use crate::sample_delta::Figures;
use std::cmp::Ordering;
use std::fmt;

const MIB: f64 = 1048576.0;

/// Value of a disk in a column.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Cell {
    /// Nothing that is known.
    Nothing,
    Count(u64),
    /// A figure with a digit behind the point.
    Figure(f64),
    Word(String),
}

impl Cell {
    fn count(value: Option<impl Into<u64>>) -> Cell {
        value.map_or(Cell::Nothing, |value| Cell::Count(value.into()))
    }

    fn figure(value: Option<f64>) -> Cell {
        value.map_or(Cell::Nothing, Cell::Figure)
    }

    fn word(value: Option<impl Into<String>>) -> Cell {
        value.map_or(Cell::Nothing, |value| Cell::Word(value.into()))
    }

    /// The order of two cells of a column.
    pub(super) fn order(&self, other: &Cell) -> Ordering {
        match (self, other) {
            (Cell::Count(one), Cell::Count(two)) => one.cmp(two),
            (Cell::Figure(one), Cell::Figure(two)) => one.total_cmp(two),
            // A guest without a name has its number there.
            (Cell::Word(one), Cell::Word(two)) => match (one.parse::<u64>(), two.parse()) {
                (Ok(one), Ok(two)) => one.cmp(&two),
                _ => one.cmp(two),
            },
            _ => Ordering::Equal,
        }
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cell::Nothing => f.pad("-"),
            Cell::Count(count) => f.pad(&count.to_string()),
            Cell::Figure(figure) => f.pad(&format!("{figure:.1}")),
            Cell::Word(word) => f.pad(word),
        }
    }
}

/// The side on which the cells of a column begin or end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Left,
    Right,
}

/// A column.
pub(super) struct Column {
    /// The key that has rows sorted by it.
    pub(super) key: char,
    /// Its heading.
    pub(super) title: &'static str,
    /// Meaning of the column.
    pub(super) what: &'static str,
    pub(super) side: Side,
    /// Its width; 0 of the last one, which has the rest of a line.
    pub(super) width: u16,
    /// Returns the value of a disk in it.
    pub(super) cell: fn(&Row<'_>) -> Cell,
}

const fn left(
    key: char,
    title: &'static str,
    what: &'static str,
    width: u16,
    cell: fn(&Row<'_>) -> Cell,
) -> Column {
    Column {
        key,
        title,
        what,
        side: Side::Left,
        width,
        cell,
    }
}

const fn right(
    key: char,
    title: &'static str,
    what: &'static str,
    width: u16,
    cell: fn(&Row<'_>) -> Cell,
) -> Column {
    Column {
        side: Side::Right,
        ..left(key, title, what, width, cell)
    }
}

impl Column {
    /// The width that it needs beside others.
    fn least_width(&self) -> u16 {
        match self.width {
            0 => LAST_WIDTH,
            width => width,
        }
    }

    /// A text as it stands in the column.
    pub(super) fn padded(&self, text: impl fmt::Display) -> String {
        let width = usize::from(self.width);
        match self.side {
            Side::Left => format!("{text:<width$}"),
            Side::Right => format!("{text:>width$}"),
        }
    }
}

/// How many there are.
const COUNT: usize = 19;

/// All of them, in their order.
pub(super) static COLUMNS: [Column; COUNT] = [
    left('G', "GUEST", "the guest's name or number", 12, |row| {
        Cell::word(row.disk.guest_word.clone())
    }),
    left('V', "VDEV", "the disk's name in the guest", 8, |row| {
        Cell::word(row.disk.vdev())
    }),
    left(
        'K',
        "KIND",
        "phy: the kernel serves it, tap: a process",
        4,
        |row| Cell::Word(row.disk.kind.name().into()),
    ),
    right('N', "MINOR", "the number of its node", 5, |row| {
        Cell::count(row.disk.minor())
    }),
    right('P', "PID", "its process", 7, |row| {
        Cell::count(
            row.disk
                .tap
                .as_ref()
                .and_then(|tap| tap.row.pid)
                .map(u64::from),
        )
    }),
    left('S', "STATE", "its state", 9, |row| state(row.disk)),
    right('R', "READ/s", "reads in a second", 8, |row| {
        rate(row, |figures| figures.reads)
    }),
    right('W', "WRITE/s", "writes in a second", 8, |row| {
        rate(row, |figures| figures.writes)
    }),
    right('I', "rMiB/s", "MiB read in a second", 8, |row| {
        rate(row, |figures| figures.read_bytes / MIB)
    }),
    right('O', "wMiB/s", "MiB written in a second", 8, |row| {
        rate(row, |figures| figures.written_bytes / MIB)
    }),
    right(
        'Q',
        "WAIT",
        "requests that wait for its process",
        5,
        |row| Cell::count(kernel(row.disk).map(|kernel| kernel.waiting)),
    ),
    right(
        'B',
        "BUSY",
        "requests that its process or the driver has",
        5,
        |row| Cell::count(busy(row.disk)),
    ),
    right(
        'D',
        "DISKms",
        "mean time of requests on its block device, whoever they are from",
        7,
        |row| Cell::figure(row.figures.and_then(|figures| figures.storage_ms)),
    ),
    right('X', "RDms", "mean time of the guest's reads", 7, |row| {
        awaited(row, Operation::Read)
    }),
    right('Y', "WRms", "mean time of the guest's writes", 7, |row| {
        awaited(row, Operation::Write)
    }),
    right('Z', "FLms", "mean time of the guest's flushes", 7, |row| {
        awaited(row, Operation::Flush)
    }),
    right('L', "99%us", "99 of 100 requests took less", 8, |row| {
        Cell::count(row.figures.and_then(|figures| figures.p99_us))
    }),
    right(
        'M',
        "MEM KiB",
        "memory of its process or the driver",
        8,
        |row| Cell::count(memory_kib(row.disk)),
    ),
    left('T', "TARGET", "image or device that serves it", 0, |row| {
        Cell::word(target(row.disk))
    }),
];

/// Least width of the last column where the end of a line is that of the terminal.
const LAST_WIDTH: u16 = 12;

/// The headings of columns, the most wanted first: those at the end are left out where a line is too short.
const WANTED: [&str; COUNT] = [
    "VDEV", "GUEST", "READ/s", "WRITE/s", "TARGET", "STATE", "rMiB/s", "wMiB/s", "RDms", "WRms",
    "BUSY", "WAIT", "KIND", "99%us", "MINOR", "FLms", "DISKms", "MEM KiB", "PID",
];

/// The columns that a line of this width has room for, in their order. One that must be is among them, and one is there
/// in any case.
pub(super) fn fitting(width: u16, must_be: impl Fn(&Column) -> bool) -> Vec<&'static Column> {
    let wanted = |column: &&Column| {
        let place = WANTED.iter().position(|title| *title == column.title);
        (!must_be(column), place)
    };
    let mut left: Vec<&Column> = COLUMNS.iter().collect();
    left.sort_by_key(wanted);
    let needs = |columns: &[&Column]| -> u16 {
        let widths: u16 = columns.iter().map(|column| column.least_width() + 1).sum();
        widths.saturating_sub(1)
    };
    while left.len() > 1 && needs(&left) > width {
        left.pop();
    }
    let is_left = |column: &&Column| left.iter().any(|its| its.title == column.title);
    COLUMNS.iter().filter(is_left).collect()
}

fn rate(row: &Row<'_>, rate: fn(&Figures) -> f64) -> Cell {
    Cell::figure(row.figures.map(rate))
}

fn awaited(row: &Row<'_>, operation: Operation) -> Cell {
    let one = row.figures.and_then(|figures| figures.awaited(operation));
    Cell::figure(one.map(|one| one.mean_ms))
}

fn kernel(disk: &SampledDisk) -> Option<&control::supervisor::Kernel> {
    disk.tap.as_ref()?.row.kernel.as_ref()
}

/// Returns the requests that its process has; of a disk of the kernel the driver's count, or else that of its block
/// device, for all of its users.
fn busy(disk: &SampledDisk) -> Option<u64> {
    match disk.kind {
        Kind::Tap => kernel(disk).map(|kernel| kernel.delivered.into()),
        Kind::Phy => {
            let counted = disk.vbd.as_ref().and_then(Vbd::in_flight);
            counted.or_else(|| Some(disk.block.as_ref()?.in_flight))
        }
    }
}

/// Returns the state that its process reports, or else the kernel's.
fn state(disk: &SampledDisk) -> Cell {
    let tap = disk.tap.as_ref().map(|tap| &tap.row);
    match tap.map(|row| (&row.unknown, row.state, &row.kernel)) {
        Some((Some(_), _, _)) => Cell::Word("unknown".into()),
        Some((None, Some(state), _)) => Cell::Word(format!("{state:?}").to_lowercase()),
        Some((None, None, Some(kernel))) => Cell::Word(kernel.state.clone()),
        Some((None, None, None)) => Cell::Nothing,
        None => {
            let state = disk.vbd.as_ref().and_then(|vbd| vbd.state.as_ref());
            Cell::word(state.map(|state| state.to_lowercase()))
        }
    }
}

/// Memory of its process, or of the driver where there is none.
fn memory_kib(disk: &SampledDisk) -> Option<u64> {
    let resident = disk.tap.as_ref().and_then(|tap| tap.resident);
    let kernel = || disk.vbd.as_ref()?.counted("memory_kib");
    resident.map(|bytes| bytes >> 10).or_else(kernel)
}

/// Returns the image or device from which it is served.
pub(super) fn target(disk: &SampledDisk) -> Option<String> {
    let image = disk
        .tap
        .as_ref()
        .and_then(|tap| Some(tap.row.target.as_ref()?.to_string()));
    let device = || Some(disk.block.as_ref()?.label());
    image.or_else(device)
}

#[cfg(test)]
mod tests {
    use super::{fitting, COLUMNS, WANTED};
    use std::collections::BTreeSet;

    #[test]
    fn every_column_has_its_place_among_the_wanted() {
        let wanted: BTreeSet<&str> = WANTED.into_iter().collect();
        let titles: BTreeSet<&str> = COLUMNS.iter().map(|column| column.title).collect();
        assert_eq!(wanted, titles);
    }

    #[test]
    fn what_is_left_fits_and_what_must_be_is_left() {
        for width in 0..300 {
            let left = fitting(width, |column| column.title == "PID");
            assert!(left.iter().any(|column| column.title == "PID"), "{width}");
            let needs: u16 = left.iter().map(|column| column.least_width() + 1).sum();
            assert!(left.len() == 1 || needs - 1 <= width, "{width}");
            assert!(width < 168 || left.len() == COLUMNS.len(), "{width}");
        }
    }
}
