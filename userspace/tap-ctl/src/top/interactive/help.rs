// SPDX-License-Identifier: MIT OR Apache-2.0
//! Help on keys and columns.

use crate::top::columns::COLUMNS;
use crate::top::order::SortKey;
use ratatui::style::Modifier;
use ratatui::text::Line;

const KEYS: [(&str, &str); 12] = [
    ("q, Ctrl-C", "quit"),
    (
        "Esc",
        "a step back: close what is open, show all disks, quit",
    ),
    ("Up, k; Down, j", "select a disk; PgUp, PgDn, Home, End"),
    (
        "Enter, d",
        "all figures of the selected disk, and what `tap-ctl status` says of it",
    ),
    (
        "Left, <; Right, >",
        "sort by the column beside; the one sorted by is marked",
    ),
    ("r", "turn the order round"),
    (
        "/",
        "show only disks of a guest, by its number or a part of its name, or with a text in their target",
    ),
    ("", "Enter keeps that, Esc shows all disks again"),
    ("+, -", "look less often, or more often, by a second"),
    ("space", "keep this picture; again: resume"),
    ("?", "this"),
    ("a large letter", "sort by the column that has it below"),
];

/// The whole text.
pub(super) fn lines() -> Vec<Line<'static>> {
    let title = |text| Line::styled(text, Modifier::BOLD);
    let line = |key: &str, what: &str| Line::from(format!("  {key:18} {what}"));
    let mut lines = vec![title("keys")];
    lines.extend(KEYS.iter().map(|(key, what)| line(key, what)));
    lines.push(title("columns"));
    let load = format!("{} READ/s + WRITE/s", SortKey::LOAD_KEY);
    lines.push(line(&load, "the busiest disk first"));
    lines.extend(
        COLUMNS
            .iter()
            .map(|column| line(&format!("{} {}", column.key, column.title), column.what)),
    );
    lines
}
