// SPDX-License-Identifier: MIT OR Apache-2.0
//! The orders of the rows of a picture.

use super::columns::{Cell, Column, COLUMNS};
use super::picture::Row;
use std::cmp::Ordering;

/// How rows are sorted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SortOrder {
    pub(super) by: SortKey,
    /// Whether what is first otherwise is last.
    pub(super) is_reversed: bool,
}

/// Criterion by which rows are sorted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SortKey {
    /// Reads and writes in a second.
    Load,
    /// The column of this key.
    Column(char),
}

impl SortOrder {
    /// The busiest one first.
    pub(super) const BUSIEST: SortOrder = SortOrder {
        by: SortKey::Load,
        is_reversed: false,
    };

    /// Sorts rows. Those that have the same stay as they are, and those that have nothing are the last.
    pub(super) fn sort(self, rows: &mut Vec<Row<'_>>) {
        let mut keyed: Vec<(Cell, Row<'_>)> = rows
            .drain(..)
            .map(|row| (self.by.cell(&row), row))
            .collect();
        keyed.sort_by(|(one, _), (two, _)| self.order(one, two));
        rows.extend(keyed.into_iter().map(|(_, row)| row));
    }

    /// Whether the largest is first.
    pub(super) fn is_largest_first(self) -> bool {
        self.by.is_largest_first() != self.is_reversed
    }

    fn order(self, one: &Cell, two: &Cell) -> Ordering {
        let is_nothing = |cell: &Cell| *cell == Cell::Nothing;
        let by_value = match self.is_largest_first() {
            true => two.order(one),
            false => one.order(two),
        };
        is_nothing(one).cmp(&is_nothing(two)).then(by_value)
    }
}

impl SortKey {
    /// The key for reads and writes in a second.
    pub(super) const LOAD_KEY: char = 'A';

    /// Returns the criterion of a key.
    pub(super) fn of(key: char) -> Option<SortKey> {
        let is_column = COLUMNS.iter().any(|column| column.key == key);
        match key {
            Self::LOAD_KEY => Some(SortKey::Load),
            key => is_column.then_some(SortKey::Column(key)),
        }
    }

    /// Returns the criterion beside it, to the right or to the left, as the columns stand: the load is before the first
    /// one.
    pub(super) fn beside(self, is_right: bool) -> SortKey {
        let columns = COLUMNS.iter().map(|column| SortKey::Column(column.key));
        let all: Vec<SortKey> = std::iter::once(SortKey::Load).chain(columns).collect();
        let place = all.iter().position(|by| *by == self).unwrap_or(0);
        let next = match is_right {
            true => place + 1,
            false => place + all.len() - 1,
        };
        all[next % all.len()]
    }

    /// Whether rows are sorted by what stands in a column.
    pub(super) fn is(self, column: &Column) -> bool {
        match self {
            SortKey::Load => matches!(column.title, "READ/s" | "WRITE/s"),
            SortKey::Column(_) => self.is_alone(column),
        }
    }

    /// Whether rows are sorted by what stands in a column, and by nothing else.
    fn is_alone(self, column: &Column) -> bool {
        self == SortKey::Column(column.key)
    }

    /// Returns its name, for the picture.
    pub(super) fn name(self) -> &'static str {
        self.column()
            .map_or("READ/s + WRITE/s", |column| column.title)
    }

    fn column(self) -> Option<&'static Column> {
        COLUMNS.iter().find(|column| self.is_alone(column))
    }

    fn cell(self, row: &Row<'_>) -> Cell {
        match self.column() {
            Some(column) => (column.cell)(row),
            None => Cell::Figure(row.load()),
        }
    }

    /// Whether the largest comes first, as for figures; names, numbers of things and words are in the order of the
    /// alphabet.
    fn is_largest_first(self) -> bool {
        let is_name = |column: &Column| NAMES.contains(&column.title);
        !self.column().is_some_and(is_name)
    }
}

/// The headings of columns that say what a disk is, not how much it does.
const NAMES: [&str; 7] = ["GUEST", "VDEV", "KIND", "MINOR", "PID", "STATE", "TARGET"];

#[cfg(test)]
mod tests {
    use super::{SortKey, NAMES};
    use crate::top::columns::COLUMNS;
    use std::collections::BTreeSet;

    #[test]
    fn every_column_has_a_key_of_its_own() {
        let keys: BTreeSet<char> = COLUMNS.iter().map(|column| column.key).collect();
        assert_eq!(keys.len(), COLUMNS.len());
        assert!(!keys.contains(&SortKey::LOAD_KEY));
        assert!(keys.iter().all(char::is_ascii_uppercase), "{keys:?}");
        assert_eq!(
            (SortKey::of('x'), SortKey::of('T')),
            (None, Some(SortKey::Column('T')))
        );
    }

    #[test]
    fn names_are_those_of_columns() {
        let is_title = |name: &&str| COLUMNS.iter().any(|column| column.title == *name);
        assert!(NAMES.iter().all(is_title));
    }

    #[test]
    fn what_is_beside_leads_round() {
        let mut by = SortKey::Load;
        for _ in 0..=COLUMNS.len() {
            assert_eq!(by.beside(true).beside(false), by);
            by = by.beside(true);
        }
        assert_eq!(by, SortKey::Load);
    }
}
