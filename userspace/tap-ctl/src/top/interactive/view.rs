// SPDX-License-Identifier: MIT OR Apache-2.0
//! State that keys change: the order and the choice of rows, the selected one, the page over the table.

use crate::sample::{DiskId, Kind, SampledDisk};
use crate::top::columns::target;
use crate::top::order::{SortKey, SortOrder};
use crate::top::picture::{DiskPicture, Row};
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use std::ops::Range;
use std::time::Duration;

/// Longest filter that a user can type.
const LONGEST_FILTER: usize = 200;

/// Whether the program continues after a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    On,
    Quit,
}

/// Page that is shown.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Place {
    Table,
    /// All figures of a disk.
    Details(Known),
    /// The help on keys.
    Help,
}

/// A disk that is known again in the next picture.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Known {
    path: Option<String>,
    minor: Option<u32>,
    kind: Kind,
}

impl Known {
    fn of(disk: &SampledDisk) -> Known {
        let (path, minor, kind) = disk.id();
        Known {
            path: path.map(str::to_owned),
            minor,
            kind,
        }
    }

    /// Whether it is this one.
    pub(super) fn is(&self, disk: &SampledDisk) -> bool {
        let its: DiskId<'_> = (self.path.as_deref(), self.minor, self.kind);
        its == disk.id()
    }
}

/// A way through rows or lines.
#[derive(Clone, Copy)]
enum CursorMotion {
    Up,
    Down,
    PageUp,
    PageDown,
    First,
    Last,
}

impl CursorMotion {
    fn of(code: KeyCode) -> Option<CursorMotion> {
        Some(match code {
            KeyCode::Up | KeyCode::Char('k') => CursorMotion::Up,
            KeyCode::Down | KeyCode::Char('j') => CursorMotion::Down,
            KeyCode::PageUp => CursorMotion::PageUp,
            KeyCode::PageDown => CursorMotion::PageDown,
            KeyCode::Home | KeyCode::Char('g') => CursorMotion::First,
            KeyCode::End => CursorMotion::Last,
            _ => return None,
        })
    }

    /// Where it leads from a place, of so many, of which a page shows so many.
    fn from(self, at: usize, page: usize, length: usize) -> usize {
        let to = match self {
            CursorMotion::Up => at.saturating_sub(1),
            CursorMotion::Down => at + 1,
            CursorMotion::PageUp => at.saturating_sub(page.max(1)),
            CursorMotion::PageDown => at + page.max(1),
            CursorMotion::First => 0,
            CursorMotion::Last => length,
        };
        to.min(length.saturating_sub(1))
    }
}

/// The user's choices.
pub(super) struct View {
    pub(super) place: Place,
    pub(super) order: SortOrder,
    /// Only disks of the guest with this number, or with this in the guest's name or in their target.
    pub(super) filter: String,
    /// Whether keys are the filter's.
    pub(super) is_typing: bool,
    pub(super) is_paused: bool,
    /// Between two looks.
    pub(super) interval: Duration,
    /// The selected disk; nothing for whichever is the first.
    selected: Option<Known>,
    /// Its row.
    at: usize,
    /// The first row that is shown.
    first: usize,
    /// Number of rows that are shown.
    page: usize,
    /// The first line of a text, where one is shown instead of the table, and so many there are.
    line: usize,
    lines: usize,
}

impl View {
    pub(super) fn new(interval: Duration) -> View {
        View {
            place: Place::Table,
            order: SortOrder::BUSIEST,
            filter: String::new(),
            is_typing: false,
            is_paused: false,
            interval,
            selected: None,
            at: 0,
            first: 0,
            page: 1,
            line: 0,
            lines: 0,
        }
    }

    /// The rows that were chosen, in the order that was chosen.
    pub(super) fn rows<'a>(&self, picture: &'a DiskPicture) -> Vec<Row<'a>> {
        let mut rows = picture.rows();
        rows.retain(|row| self.is_chosen(row.disk));
        self.order.sort(&mut rows);
        rows
    }

    fn is_chosen(&self, disk: &SampledDisk) -> bool {
        let wanted = self.filter.to_lowercase();
        let has_number = || {
            disk.guest()
                .is_some_and(|guest| self.filter == guest.to_string())
        };
        let has_name = || {
            let name = disk.guest_name.as_ref();
            name.is_some_and(|name| name.to_lowercase().contains(&wanted))
        };
        let is_its_target =
            || target(disk).is_some_and(|target| target.to_lowercase().contains(&wanted));
        self.filter.is_empty() || has_number() || has_name() || is_its_target()
    }

    /// Rows that a page shows, and the selected one of all. If that has gone, the one in its place is selected.
    pub(super) fn settle(&mut self, rows: &[Row<'_>], page: usize) -> (Range<usize>, usize) {
        let last = rows.len().saturating_sub(1);
        self.at = match &self.selected {
            Some(known) => {
                let its = rows.iter().position(|row| known.is(row.disk));
                its.unwrap_or(self.at).min(last)
            }
            None => 0,
        };
        if self.selected.is_some() {
            self.selected = rows.get(self.at).map(|row| Known::of(row.disk));
        }
        self.page = page;
        let lowest = (self.at + 1).saturating_sub(page);
        let highest = rows.len().saturating_sub(page).min(self.at);
        self.first = self.first.clamp(lowest.min(highest), highest);
        let end = (self.first + page).min(rows.len());
        (self.first..end, self.at)
    }

    /// The first line to show of a text, of which a page shows so many.
    pub(super) fn settle_text(&mut self, lines: usize, page: usize) -> usize {
        (self.lines, self.page) = (lines, page);
        self.line = self.line.min(lines.saturating_sub(1));
        self.line
    }

    /// A key was pressed.
    pub(super) fn key(&mut self, key: KeyEvent, picture: Option<&DiskPicture>) -> Step {
        if key.is_release() {
            return Step::On;
        }
        if key.modifiers.contains(KeyModifiers::CONTROL) {
            return match key.code {
                KeyCode::Char('c') => Step::Quit,
                _ => Step::On,
            };
        }
        if self.is_typing {
            self.typed(key.code);
            return Step::On;
        }
        match key.code {
            KeyCode::Char('q') => return Step::Quit,
            KeyCode::Esc => return self.back(),
            KeyCode::Char('?') => self.open(Place::Help),
            KeyCode::Char(' ') => self.is_paused = !self.is_paused,
            KeyCode::Char('+' | '=') => self.interval += Duration::from_secs(1),
            KeyCode::Char('-') => {
                let shorter = self.interval.saturating_sub(Duration::from_secs(1));
                self.interval = shorter.max(Duration::from_secs(1));
            }
            code => match CursorMotion::of(code) {
                Some(motion) => self.go(motion, picture),
                None if self.place == Place::Table => self.in_table(code, picture),
                None => {}
            },
        }
        Step::On
    }

    /// A step back: from what is open over the table, from a filter, and at last out.
    fn back(&mut self) -> Step {
        match (&self.place, self.filter.is_empty()) {
            (Place::Table, true) => return Step::Quit,
            (Place::Table, false) => self.filter.clear(),
            _ => self.place = Place::Table,
        }
        Step::On
    }

    fn open(&mut self, place: Place) {
        (self.place, self.line) = (place, 0);
    }

    fn typed(&mut self, code: KeyCode) {
        match code {
            KeyCode::Enter => self.is_typing = false,
            KeyCode::Esc => {
                self.is_typing = false;
                self.filter.clear();
            }
            KeyCode::Backspace => {
                self.filter.pop();
            }
            KeyCode::Char(letter) if self.filter.len() < LONGEST_FILTER => {
                self.filter.push(letter);
            }
            _ => {}
        }
    }

    fn in_table(&mut self, code: KeyCode, picture: Option<&DiskPicture>) {
        match code {
            KeyCode::Enter | KeyCode::Char('d') => {
                let rows = picture.map(|picture| self.rows(picture));
                let row = rows.as_ref().and_then(|rows| rows.get(self.at));
                if let Some(known) = row.map(|row| Known::of(row.disk)) {
                    // The one that was looked at is found again in the table.
                    self.selected = Some(known.clone());
                    self.open(Place::Details(known));
                }
            }
            KeyCode::Char('/') => self.is_typing = true,
            KeyCode::Char('r') => self.order.is_reversed = !self.order.is_reversed,
            KeyCode::Left | KeyCode::Char('<') => self.sort(self.order.by.beside(false)),
            KeyCode::Right | KeyCode::Char('>') => self.sort(self.order.by.beside(true)),
            KeyCode::Char(letter) => {
                if let Some(by) = SortKey::of(letter) {
                    self.sort(by);
                }
            }
            _ => {}
        }
    }

    fn sort(&mut self, by: SortKey) {
        self.order = SortOrder {
            by,
            is_reversed: false,
        };
    }

    fn go(&mut self, motion: CursorMotion, picture: Option<&DiskPicture>) {
        if self.place != Place::Table {
            self.line = motion.from(self.line, self.page, self.lines);
            return;
        }
        let Some(picture) = picture else {
            return;
        };
        let rows = self.rows(picture);
        self.at = motion.from(self.at, self.page, rows.len());
        // A user at the top of the list sees whichever disk comes there.
        let row = rows.get(self.at).filter(|_| self.at > 0);
        self.selected = row.map(|row| Known::of(row.disk));
    }
}
