// SPDX-License-Identifier: MIT OR Apache-2.0
//! The columns of a picture.

use super::picture::Row;
use crate::figures::Figures;
use crate::host::vbd::{Operation, Vbd};
use crate::look::{Disk, Kind};
use std::fmt;

const MIB: f64 = 1048576.0;

/// What a disk has in a column.
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
    /// Its heading.
    pub(super) title: &'static str,
    pub(super) side: Side,
    /// Its width; 0 of the last one, which has the rest of a line.
    pub(super) width: u16,
    /// What a disk has in it.
    pub(super) cell: fn(&Row<'_>) -> Cell,
}

const fn left(title: &'static str, width: u16, cell: fn(&Row<'_>) -> Cell) -> Column {
    Column {
        title,
        side: Side::Left,
        width,
        cell,
    }
}

const fn right(title: &'static str, width: u16, cell: fn(&Row<'_>) -> Cell) -> Column {
    Column {
        side: Side::Right,
        ..left(title, width, cell)
    }
}

impl Column {
    /// A text as it stands in the column.
    pub(super) fn padded(&self, text: impl fmt::Display) -> String {
        let width = usize::from(self.width);
        match self.side {
            Side::Left => format!("{text:<width$}"),
            Side::Right => format!("{text:>width$}"),
        }
    }
}

/// All of them, in their order.
pub(super) const COLUMNS: [Column; 19] = [
    right("GUEST", 5, |row| Cell::count(row.disk.guest())),
    left("VDEV", 8, |row| Cell::word(row.disk.vdev())),
    left("KIND", 4, |row| Cell::Word(row.disk.kind.name().into())),
    right("MINOR", 5, |row| Cell::count(row.disk.minor())),
    right("PID", 7, |row| {
        Cell::count(
            row.disk
                .tap
                .as_ref()
                .and_then(|tap| tap.row.pid)
                .map(u64::from),
        )
    }),
    left("STATE", 9, |row| state(row.disk)),
    right("READ/s", 8, |row| rate(row, |figures| figures.reads)),
    right("WRITE/s", 8, |row| rate(row, |figures| figures.writes)),
    right("rMiB/s", 8, |row| {
        rate(row, |figures| figures.read_bytes / MIB)
    }),
    right("wMiB/s", 8, |row| {
        rate(row, |figures| figures.written_bytes / MIB)
    }),
    right("WAIT", 5, |row| {
        Cell::count(kernel(row.disk).map(|kernel| kernel.waiting))
    }),
    right("BUSY", 5, |row| Cell::count(busy(row.disk))),
    right("DISKms", 7, |row| {
        Cell::figure(row.figures.and_then(|figures| figures.storage_ms))
    }),
    right("RDms", 7, |row| awaited(row, Operation::Read)),
    right("WRms", 7, |row| awaited(row, Operation::Write)),
    right("FLms", 7, |row| awaited(row, Operation::Flush)),
    right("99%us", 8, |row| {
        Cell::count(row.figures.and_then(|figures| figures.p99_us))
    }),
    right("MEM KiB", 8, |row| Cell::count(memory_kib(row.disk))),
    left("TARGET", 0, |row| target(row.disk)),
];

fn rate(row: &Row<'_>, rate: fn(&Figures) -> f64) -> Cell {
    Cell::figure(row.figures.map(rate))
}

fn awaited(row: &Row<'_>, operation: Operation) -> Cell {
    let one = row.figures.and_then(|figures| figures.awaited(operation));
    Cell::figure(one.map(|one| one.mean_ms))
}

fn kernel(disk: &Disk) -> Option<&control::supervisor::Kernel> {
    disk.tap.as_ref()?.row.kernel.as_ref()
}

/// What its process has; of a disk of the kernel's what the driver counts, or else what its block device has of
/// whoever.
fn busy(disk: &Disk) -> Option<u64> {
    match disk.kind {
        Kind::Tap => kernel(disk).map(|kernel| kernel.delivered.into()),
        Kind::Phy => {
            let counted = disk.vbd.as_ref().and_then(Vbd::in_flight);
            counted.or_else(|| Some(disk.block.as_ref()?.in_flight))
        }
    }
}

/// What its process says, or else the kernel of it.
fn state(disk: &Disk) -> Cell {
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
fn memory_kib(disk: &Disk) -> Option<u64> {
    let resident = disk.tap.as_ref().and_then(|tap| tap.resident);
    let kernel = || disk.vbd.as_ref()?.counted("memory_kib");
    resident.map(|bytes| bytes >> 10).or_else(kernel)
}

fn target(disk: &Disk) -> Cell {
    let image = disk
        .tap
        .as_ref()
        .and_then(|tap| Some(tap.row.target.as_ref()?.to_string()));
    let device = || Some(disk.block.as_ref()?.label());
    Cell::word(image.or_else(device))
}
