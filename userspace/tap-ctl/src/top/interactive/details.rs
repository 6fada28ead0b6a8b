// SPDX-License-Identifier: MIT OR Apache-2.0
//! All that is known of one disk.

use super::looks::SampleHistory;
use super::view::Known;
use crate::format::{by_itself, stats};
use crate::host::task::Task;
use crate::sample::SampledDisk;
use crate::status::{self, named};
use crate::top::columns::COLUMNS;
use crate::top::picture::Row;
use ratatui::style::Modifier;
use ratatui::text::Line;

/// Returns the details of a disk of the picture.
pub(super) fn lines(known: &Known, looks: &SampleHistory) -> Vec<Line<'static>> {
    let rows = looks.picture().map(|picture| picture.rows());
    let row = rows.iter().flatten().find(|row| known.is(row.disk));
    let Some(row) = row else {
        return vec![
            "the disk has gone, or another process serves it: Esc shows those that there are"
                .into(),
        ];
    };
    let mut lines = verdict(looks.verdict(row.disk));
    lines.extend(figures(row));
    lines.extend(counters(row.disk));
    lines.extend(process(row.disk));
    lines.extend(below(row.disk));
    lines
}

fn title(text: impl Into<String>) -> Line<'static> {
    Line::styled(text.into(), Modifier::BOLD)
}

fn pair(name: &str, value: &str, what: &str) -> Line<'static> {
    Line::from(
        format!("  {name:26} {value:>12}  {what}")
            .trim_end()
            .to_owned(),
    )
}

/// How it is, why, and what to do.
fn verdict(said: Option<status::Line>) -> Vec<Line<'static>> {
    let Some(said) = said else {
        return vec![title("how it is comes with the next picture")];
    };
    let verdict = &said.verdict;
    let cause = verdict.cause.map_or(String::new(), |cause| {
        format!(", because of {}", cause.name())
    });
    let mut lines = vec![title(format!("{}{cause}", verdict.word()))];
    let why = Some(&verdict.why).filter(|why| !why.is_empty());
    lines.extend(why.map(|why| Line::from(format!("  {why}"))));
    let remedy = verdict.remedy.as_ref();
    lines.extend(remedy.map(|remedy| Line::from(format!("  do: {remedy}"))));
    lines.extend(
        said.direct
            .map(|direct| Line::from(format!("  {}", by_itself(direct)))),
    );
    lines
}

/// Returns its values in all columns, and those that have no column.
fn figures(row: &Row<'_>) -> Vec<Line<'static>> {
    let seconds = row.figures.map_or(String::new(), |figures| {
        format!(", in the last {:.1} s", figures.seconds)
    });
    let mut lines = vec![title(format!("now{seconds}"))];
    for column in &COLUMNS {
        let value = (column.cell)(row).to_string();
        lines.push(pair(column.title, &value, column.what));
    }
    let more = row.figures.map(named).unwrap_or_default();
    lines.extend(more.iter().map(|(name, value)| pair(name, value, "")));
    lines
}

/// Returns the driver's counters.
fn counters(disk: &SampledDisk) -> Vec<Line<'static>> {
    let Some(vbd) = &disk.vbd else {
        return vec![title("no guest has it")];
    };
    let driver = vbd.driver.as_deref().unwrap_or("no driver");
    let mut lines = vec![title(format!("counted by {driver} of {}", vbd.path))];
    let counters = vbd.counters.iter();
    lines.extend(counters.map(|(name, count)| pair(name, &count.to_string(), "")));
    lines
}

/// Returns its process' counters.
fn process(disk: &SampledDisk) -> Vec<Line<'static>> {
    let Some(counted) = disk.tap.as_ref().and_then(|tap| tap.stats.as_deref()) else {
        return Vec::new();
    };
    let mut lines = vec![title("counted by its process")];
    let text = stats(counted);
    lines.extend(text.lines().map(|line| Line::from(format!("  {line}"))));
    lines
}

/// The threads that serve it, and the block devices that it stands on.
fn below(disk: &SampledDisk) -> Vec<Line<'static>> {
    let threads: Vec<&Task> = disk.queues.iter().chain(&disk.process).collect();
    let mut lines = Vec::new();
    if !threads.is_empty() {
        lines.push(title("threads"));
    }
    lines.extend(threads.into_iter().map(|task| {
        let place = task.sleeps_in.as_ref();
        let place = place.map_or(String::new(), |place| format!("sleeps in {place}"));
        pair(&task.name, &format!("{} {}", task.pid, task.state), &place)
    }));
    let stack = disk.block.as_ref().map(|block| block.stack());
    let stack = stack.unwrap_or_default();
    if !stack.is_empty() {
        lines.push(title("block devices, each on those below it"));
    }
    lines.extend(stack.into_iter().map(|block| {
        let held = match block.is_suspended {
            true => ", and it is suspended",
            false => "",
        };
        let what = format!("requests now{held}");
        pair(&block.label(), &block.in_flight.to_string(), &what)
    }));
    lines
}
