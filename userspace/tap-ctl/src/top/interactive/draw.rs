// SPDX-License-Identifier: MIT OR Apache-2.0
//! How it looks: some lines about the host, the table or what is open over it, and a line about keys. Where there is
//! little room the table is what stays.

use super::looks::SampleHistory;
use super::view::{Place, View};
use super::{details, help, App};
use crate::host::Memory;
use crate::sample_delta::Figures;
use crate::top::columns::fitting;
use crate::top::order::SortKey;
use crate::top::picture::{DiskPicture, Row};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Cell, Paragraph, Row as Shown, Table, Wrap};
use ratatui::Frame;
use std::time::{Duration, Instant};

const MIB: f64 = 1048576.0;

/// Keys, in a line.
const KEYS: &str = "q quit  ? keys  arrows select  enter details  <> sort by  r turn round  / filter  +- interval  space pause";

/// Draws everything.
pub(super) fn draw(frame: &mut Frame<'_>, app: &mut App, now: Instant) {
    let area = frame.area();
    let header = header(app, now);
    let footer = u16::from(area.height > 2);
    let room = area.height.saturating_sub(2 + footer);
    let lines = short(header.len()).min(room);
    let parts = [
        Constraint::Length(lines),
        Constraint::Fill(1),
        Constraint::Length(footer),
    ];
    let [above, body, below] = Layout::vertical(parts).areas(area);
    frame.render_widget(Paragraph::new(header), above);
    let App { view, looks } = app;
    match &view.place {
        Place::Table => table(frame, body, view, looks),
        Place::Details(known) => {
            let lines = details::lines(known, looks);
            text(frame, body, view, lines);
        }
        Place::Help => text(frame, body, view, help::lines()),
    }
    let line = match view.is_typing {
        true => format!("guest or part of a target: {}_", view.filter),
        false => KEYS.to_owned(),
    };
    frame.render_widget(Paragraph::new(line), below);
}

/// Limits a number of lines to that of a terminal.
fn short(length: usize) -> u16 {
    u16::try_from(length).unwrap_or(u16::MAX)
}

fn header(app: &App, now: Instant) -> Vec<Line<'static>> {
    let loud = Style::new().add_modifier(Modifier::BOLD | Modifier::REVERSED);
    let age = age(&app.view, &app.looks, now);
    let mut lines: Vec<Line<'static>> =
        age.map(|age| Line::styled(age, loud)).into_iter().collect();
    let Some(picture) = app.looks.picture() else {
        lines.push("top: looking at this host".into());
        return lines;
    };
    lines.push(chosen(&app.view, picture).into());
    lines.push(host(picture).into());
    let lacks = picture.lacks();
    lines.push(match lacks.as_slice() {
        [] => "blktapctrl answers".into(),
        [one] => Line::styled(one.clone(), loud),
        [one, more @ ..] => Line::styled(format!("{one} (and {} more)", more.len()), loud),
    });
    lines
}

/// How old the picture is, if it is older than it should be.
fn age(view: &View, looks: &SampleHistory, now: Instant) -> Option<String> {
    let seconds = |time: Duration| time.as_secs();
    let age = looks.age(now).map(seconds);
    let old = age.map_or("there is no picture yet".into(), |age| {
        format!("this picture is {age} s old")
    });
    if view.is_paused {
        return Some(format!("paused, {old}: space resumes"));
    }
    let late = seconds(looks.late(now)?);
    Some(format!(
        "{old}: for {late} s what is looked at has not answered (blktapctrl, or the kernel because of storage)"
    ))
}

/// The disks that are shown, and their order.
fn chosen(view: &View, picture: &DiskPicture) -> String {
    let first = match view.order.is_largest_first() {
        true => "largest",
        false => "smallest",
    };
    let all = picture.now.disks.len();
    let disks = match view.filter.is_empty() {
        true => format!("{all} disks"),
        false => format!(
            "{} of {all} disks (guest or target `{}`)",
            view.rows(picture).len(),
            view.filter
        ),
    };
    format!(
        "top: {disks}, every {} s, sorted by {}, the {first} first",
        view.interval.as_secs(),
        view.order.by.name(),
    )
}

/// The figures of the host.
fn host(picture: &DiskPicture) -> String {
    let Some((interval, stolen)) = picture.since else {
        return "figures come with the next picture".into();
    };
    let rows = picture.rows();
    let sum = |part: fn(&Figures) -> f64| {
        let figures = rows.iter().filter_map(|row| row.figures);
        // The sum of no numbers is -0.0, which a user would see.
        figures.fold(0.0, |sum, one| sum + part(one))
    };
    let mut text = format!(
        "in {:.1} s: {:.1} reads/s ({:.1} MiB/s), {:.1} writes/s ({:.1} MiB/s), stolen {:.0} %",
        interval.as_secs_f64(),
        sum(|one| one.reads),
        sum(|one| one.read_bytes) / MIB,
        sum(|one| one.writes),
        sum(|one| one.written_bytes) / MIB,
        stolen * 100.0,
    );
    if let Some(Memory {
        used_kib, host_kib, ..
    }) = picture.now.memory
    {
        let limit = host_kib.map_or(String::new(), |kib| format!(" of {}", kib >> 10));
        text += &format!(", memory {}{limit} MiB", used_kib >> 10);
    }
    text
}

fn table(frame: &mut Frame<'_>, area: Rect, view: &mut View, looks: &SampleHistory) {
    let Some(picture) = looks.picture() else {
        return;
    };
    let rows = view.rows(picture);
    let page = area.height.saturating_sub(1).into();
    let (shown, selected) = view.settle(&rows, page);
    if rows.is_empty() {
        let why = match picture.now.disks.is_empty() {
            true => "no guest has a disk here",
            false => "no disk is like that: Esc shows all",
        };
        frame.render_widget(Paragraph::new(why), area);
        return;
    }
    let by = view.order.by;
    let columns = fitting(area.width, |column| by == SortKey::Column(column.key));
    let titles = columns.iter().map(|column| {
        let style = match by.is(column) {
            true => Modifier::BOLD | Modifier::REVERSED,
            false => Modifier::BOLD,
        };
        Cell::new(column.padded(column.title)).style(style)
    });
    let place = shown.start;
    let lines = rows.get(shown).unwrap_or_default().iter().enumerate();
    let lines = lines.map(|(line, row): (usize, &Row<'_>)| {
        let cells = columns
            .iter()
            .map(|column| column.padded((column.cell)(row)));
        let style = match place + line == selected {
            true => Modifier::REVERSED,
            false => Modifier::empty(),
        };
        Shown::new(cells).style(style)
    });
    let widths = columns.iter().map(|column| match column.width {
        0 => Constraint::Fill(1),
        width => Constraint::Length(width),
    });
    frame.render_widget(Table::new(lines, widths).header(Shown::new(titles)), area);
}

/// A text instead of the table, from the line to which a person has gone.
fn text(frame: &mut Frame<'_>, area: Rect, view: &mut View, lines: Vec<Line<'static>>) {
    let width = usize::from(area.width.max(1));
    // Words are not broken, so there may be some more.
    let count = lines.iter().map(|line| line.width().div_ceil(width).max(1));
    let first = view.settle_text(count.sum(), area.height.into());
    let text = Paragraph::new(lines).wrap(Wrap { trim: false });
    frame.render_widget(text.scroll((short(first), 0)), area);
}
