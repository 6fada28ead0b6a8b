// SPDX-License-Identifier: MIT OR Apache-2.0
//! Output of `tap-ctl status`.

use super::{Line, Report};
use crate::format::by_itself;
use crate::sample_delta::Figures;
use std::collections::BTreeMap;

/// One line for each disk, what to do below it, and the sum of all.
pub(crate) fn text(report: &Report, extended: bool) -> String {
    let mut text = String::new();
    let words = report
        .disks
        .iter()
        .filter_map(|disk| disk.guest_word.as_deref());
    let width = words
        .map(|word| word.chars().count())
        .max()
        .unwrap_or(0)
        .max(5);
    if !report.disks.is_empty() {
        text += &format!(
            "{:width$} VDEV     KIND MINOR VERDICT             CAUSE         WHAT\n",
            "GUEST"
        );
    }
    for disk in &report.disks {
        text += &line(disk, width);
        if let Some(remedy) = &disk.verdict.remedy {
            text += &format!("      do: {remedy}\n");
        }
        if let Some(direct) = disk.direct {
            text += &format!("      {}\n", by_itself(direct));
        }
        if extended {
            text += &more(disk);
        }
    }
    text += &ending(report);
    if extended {
        for what in report.not_known {
            text += &format!("not known: {what}\n");
        }
    }
    text
}

fn line(disk: &Line, width: usize) -> String {
    let number = |number: Option<u32>| number.map_or("-".into(), |number| number.to_string());
    let image = disk.image.as_deref().unwrap_or("-");
    let what = match disk.verdict.why.as_str() {
        "" => image.to_owned(),
        why => format!("{why} [{image}]"),
    };
    format!(
        "{:width$} {:8} {:4} {:>5} {:19} {:13} {what}\n",
        disk.guest_word.as_deref().unwrap_or("-"),
        disk.vdev.as_deref().unwrap_or("-"),
        disk.kind.name(),
        number(disk.minor),
        disk.verdict.word(),
        disk.verdict.cause.map_or("-", |cause| cause.name()),
    )
}

/// The figures behind the verdict.
fn more(disk: &Line) -> String {
    let Some(figures) = &disk.figures else {
        return "      it was there at one of the looks only\n".into();
    };
    const MIB: f64 = 1048576.0;
    let Figures {
        seconds,
        reads,
        writes,
        read_bytes,
        written_bytes,
        ..
    } = figures;
    let named: String = named(figures)
        .into_iter()
        .map(|(name, value)| format!(", {name} {value}"))
        .collect();
    format!(
        "      in {seconds:.1} s: {reads:.1} reads/s of {:.1} MiB/s, {writes:.1} writes/s of {:.1} MiB/s{named}\n",
        read_bytes / MIB,
        written_bytes / MIB
    )
}

/// The figures beside those of reads and writes that say something, by their names.
pub(crate) fn named(figures: &Figures) -> Vec<(String, String)> {
    let mut named = Vec::new();
    let mut add = |name: &str, value: Option<String>| {
        named.extend(value.map(|value| (name.to_owned(), value)));
    };
    let some = |number: u64| (number > 0).then(|| number.to_string());
    let percent = |part: f64| Some(format!("{:.0} %", part * 100.0));
    add(
        "storage ms",
        figures.storage_ms.map(|ms| format!("{ms:.1}")),
    );
    for one in &figures.awaits {
        let ms = format!("{:.1}", one.mean_ms);
        add(&format!("{} ms", one.operation.name()), Some(ms));
    }
    add("in flight", figures.in_flight.and_then(some));
    let oldest = figures.oldest_ms.filter(|ms| *ms > 0.0);
    add("the oldest for ms", oldest.map(|ms| format!("{ms:.0}")));
    add("99 % < us", figures.p99_us.map(|us| us.to_string()));
    add("waits for pages", some(figures.page_waits));
    add("waiting for pages", figures.page_wait.and_then(percent));
    add("pieces for want of pages", some(figures.pieces));
    add(
        "passes with a full ring",
        figures.ring_full.and_then(percent),
    );
    add("room in rings used", figures.ring_used.and_then(percent));
    add("errors", some(figures.errors));
    add("refused", some(figures.refused));
    add("thread ran", percent(figures.ran));
    let process = Some(figures.process_ran).filter(|part| *part > 0.0);
    add("process ran", process.and_then(percent));
    add("without a processor", percent(figures.starved));
    named
}

fn ending(report: &Report) -> String {
    let mut text = String::new();
    for file in &report.unread {
        text += &format!("cannot read {}: {}\n", file.path.display(), file.why);
    }
    if let Some(why) = &report.supervisor {
        text += &format!("blktapctrl does not answer, so nothing is known of tap disks: {why}\n");
    }
    let mut states: BTreeMap<_, usize> = BTreeMap::new();
    for disk in &report.disks {
        *states.entry(disk.verdict.state).or_default() += 1;
    }
    let states: Vec<String> = states
        .into_iter()
        .map(|(state, count)| format!("{count} {}", state.name()))
        .collect();
    let disks = match report.disks.len() {
        0 => "no disks".to_owned(),
        1 => "1 disk".to_owned(),
        count => format!("{count} disks"),
    };
    let hidden = match report.hidden {
        0 => String::new(),
        1 => "; 1 that is well is not shown".to_owned(),
        hidden => format!("; {hidden} that are well are not shown"),
    };
    match states.is_empty() {
        true => format!("{text}{disks}{hidden}\n"),
        false => format!("{text}{disks}: {}{hidden}\n", states.join(", ")),
    }
}
