// SPDX-License-Identifier: MIT OR Apache-2.0
//! `tap-ctl top`: what all disks are doing, phy and tap, the busiest one first.

use crate::figures::Figures;
use crate::host::vbd::{Operation, Vbd};
use crate::host::Host;
use crate::look::{look, Disk, Kind, Look, Supervisor};
use crate::{cli, print, Cli, Error};
use control::supervisor::TopRow;
use serde::Serialize;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

const HEAD: &str = "GUEST VDEV     KIND MINOR     PID STATE       READ/s  WRITE/s   rMiB/s   wMiB/s  WAIT  BUSY  DISKms    RDms    WRms    FLms    99%us  MEM KiB TARGET\n";

/// Shows all disks, again and again.
pub(crate) fn run(cli: &Cli, asked: &cli::Top) -> Result<(), Error> {
    let host = Host::at(&cli.root);
    let mut before: Option<Look> = None;
    let mut left = asked.iterations;
    let period = Duration::from_secs(asked.delay.into());
    loop {
        let now = look(&host, &cli.socket);
        let rows = rows(before.as_ref(), &now);
        if cli.json {
            print(&Picture::of(&now, &rows))?;
        } else {
            // Home, and clear what is below.
            let clear = match io::stdout().is_terminal() {
                true => "\x1b[H\x1b[J",
                false => "",
            };
            write!(io::stdout(), "{clear}{}", text(&now, &rows))?;
            io::stdout().flush()?;
        }
        before = Some(now);
        left = left.map(|left| left.saturating_sub(1));
        if left == Some(0) {
            return Ok(());
        }
        std::thread::sleep(period);
    }
}

/// A disk, and what it did since the last picture.
struct Row<'a> {
    disk: &'a Disk,
    /// Nothing in the first picture that has the disk, or another process of it.
    figures: Option<Figures>,
}

impl Row<'_> {
    /// Requests in a second, by which rows are sorted.
    fn load(&self) -> f64 {
        let figures = self.figures.as_ref();
        figures.map_or(0.0, |figures| figures.reads + figures.writes)
    }
}

/// The disks, the busiest one first; those that do the same stay in the order of guests.
fn rows<'a>(before: Option<&Look>, now: &'a Look) -> Vec<Row<'a>> {
    let figures = |disk: &Disk| {
        let before = before?;
        let old = disk.among(&before.disks)?;
        let pid = |disk: &Disk| disk.tap.as_ref().map(|tap| tap.row.pid);
        (pid(old) == pid(disk)).then_some(())?;
        Figures::between(old, disk, now.at.saturating_duration_since(before.at))
    };
    let mut rows: Vec<Row<'_>> = now
        .disks
        .iter()
        .map(|disk| Row {
            figures: figures(disk),
            disk,
        })
        .collect();
    rows.sort_by(|one, other| other.load().total_cmp(&one.load()));
    rows
}

fn text(now: &Look, rows: &[Row<'_>]) -> String {
    let mut text = HEAD.to_owned();
    text.extend(rows.iter().map(line));
    if let Supervisor::Silent(why) = &now.supervisor {
        text += &format!("blktapctrl does not answer, so processes are not shown: {why}\n");
    }
    let unread = now.unread.iter();
    text.extend(unread.map(|file| format!("cannot read {}: {}\n", file.path.display(), file.why)));
    text
}

fn line(row: &Row<'_>) -> String {
    const MIB: f64 = 1048576.0;
    let (disk, figures) = (row.disk, row.figures.as_ref());
    let tap = disk.tap.as_ref().map(|tap| &tap.row);
    let kernel = tap.and_then(|row| row.kernel.as_ref());
    let rate = |rate: fn(&Figures) -> f64, unit: f64| {
        word(figures.map(|figures| format!("{:.1}", rate(figures) / unit)))
    };
    let awaited = |operation| {
        let one = figures.and_then(|figures| figures.awaited(operation));
        word(one.map(|one| format!("{:.1}", one.mean_ms)))
    };
    let busy = match disk.kind {
        Kind::Phy => in_flight(disk),
        Kind::Tap => kernel.map(|kernel| kernel.delivered.into()),
    };
    format!(
        "{:>5} {:8} {:4} {:>5} {:>7} {:9} {:>8} {:>8} {:>8} {:>8} {:>5} {:>5} {:>7} {:>7} {:>7} {:>7} {:>8} {:>8} {}\n",
        word(disk.guest()),
        word(disk.vdev()),
        disk.kind.name(),
        word(disk.minor()),
        word(tap.and_then(|row| row.pid)),
        state(disk),
        rate(|figures| figures.reads, 1.0),
        rate(|figures| figures.writes, 1.0),
        rate(|figures| figures.read_bytes, MIB),
        rate(|figures| figures.written_bytes, MIB),
        word(kernel.map(|kernel| kernel.waiting)),
        word(busy),
        word(figures.and_then(|figures| Some(format!("{:.1}", figures.storage_ms?)))),
        awaited(Operation::Read),
        awaited(Operation::Write),
        awaited(Operation::Flush),
        word(figures.and_then(|figures| figures.p99_us)),
        word(memory_kib(disk)),
        target(disk),
    )
}

/// What a disk of the kernel's has: what the driver counts, or else what its block device has of whoever.
fn in_flight(disk: &Disk) -> Option<u64> {
    let counted = disk.vbd.as_ref().and_then(Vbd::in_flight);
    counted.or_else(|| Some(disk.block.as_ref()?.in_flight))
}

fn word(value: Option<impl ToString>) -> String {
    value.map_or("-".into(), |value| value.to_string())
}

/// What its process says, or else the kernel of it.
fn state(disk: &Disk) -> String {
    let tap = disk.tap.as_ref().map(|tap| &tap.row);
    match tap.map(|row| (&row.unknown, row.state, &row.kernel)) {
        Some((Some(_), _, _)) => "unknown".into(),
        Some((None, Some(state), _)) => format!("{state:?}").to_lowercase(),
        Some((None, None, Some(kernel))) => kernel.state.clone(),
        Some((None, None, None)) => "-".into(),
        None => word(disk.vbd.as_ref().and_then(|vbd| vbd.state.clone())).to_lowercase(),
    }
}

/// Memory of its process, or of the driver where there is none.
fn memory_kib(disk: &Disk) -> Option<u64> {
    let resident = disk.tap.as_ref().and_then(|tap| tap.resident);
    let kernel = || disk.vbd.as_ref()?.counters.get("memory_kib").copied();
    resident.map(|bytes| bytes >> 10).or_else(kernel)
}

fn target(disk: &Disk) -> String {
    let image = disk
        .tap
        .as_ref()
        .and_then(|tap| Some(tap.row.target.as_ref()?.to_string()));
    let device = || Some(disk.block.as_ref()?.label());
    word(image.or_else(device))
}

/// A picture, for programs.
#[derive(Serialize)]
struct Picture<'a> {
    is: &'static str,
    /// What blktapctrl says of tap disks.
    rows: Vec<&'a TopRow>,
    /// All disks, the busiest one first.
    disks: Vec<Shown<'a>>,
}

#[derive(Serialize)]
struct Shown<'a> {
    guest: Option<u32>,
    vdev: Option<String>,
    kind: Kind,
    minor: Option<u32>,
    figures: Option<&'a Figures>,
}

impl<'a> Picture<'a> {
    fn of(now: &'a Look, rows: &'a [Row<'a>]) -> Picture<'a> {
        let shown = |row: &'a Row<'a>| Shown {
            guest: row.disk.guest(),
            vdev: row.disk.vdev(),
            kind: row.disk.kind,
            minor: row.disk.minor(),
            figures: row.figures.as_ref(),
        };
        Picture {
            is: "top",
            rows: now
                .disks
                .iter()
                .filter_map(|disk| disk.tap.as_ref())
                .collect(),
            disks: rows.iter().map(shown).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{rows, text, Picture};
    use crate::host::made::Made;
    use crate::look::{gather, Disk, Look, Supervisor};
    use crate::status::fake;
    use std::time::Duration;

    /// What there is after so many seconds.
    fn look(seconds: u64, before: Option<&Look>, disks: Vec<Disk>) -> Look {
        let mut look = gather(&Made::new().host(), Vec::new(), Supervisor::Answers);
        look.unread.clear();
        if let Some(before) = before {
            look.at = before.at + Duration::from_secs(seconds);
        }
        Look { disks, ..look }
    }

    fn counted(mut disk: Disk, name: &str, value: u64) -> Disk {
        let vbd = disk.vbd.as_mut().expect("a guest's disk");
        vbd.counters.insert(name.into(), value);
        disk
    }

    #[test]
    fn the_busiest_disk_comes_first_with_the_figures_of_the_interval() {
        let mut tap = fake::tap(0);
        fake::stats(&mut tap).read.requests = 1000;
        let phy = ["wr_done", "wr_ns"]
            .iter()
            .fold(fake::phy(), |disk, name| counted(disk, name, 0));
        let before = look(0, None, vec![phy, tap.clone()]);
        let mut phy = counted(fake::phy(), "wr_req", 100);
        for (name, value) in [("wr_done", 100), ("wr_ns", 250_000_000), ("in_flight", 7)] {
            phy = counted(phy, name, value);
        }
        fake::stats(&mut tap).read.requests = 1300;
        for _ in 0..300 {
            fake::stats(&mut tap).read.latency.add(1_000_000);
        }
        let now = look(2, Some(&before), vec![phy, tap]);
        let rows = rows(Some(&before), &now);
        let text = text(&now, &rows);
        let lines: Vec<Vec<&str>> = text
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert_eq!(
            lines[1][..7],
            ["3", "xvdb", "tap", "0", "312", "running", "150.0"],
            "{text}"
        );
        assert_eq!(lines[1][16], "1048", "{text}");
        // Seven that it has, and writes took 2.5 ms.
        assert_eq!(lines[2][11..15], ["7", "-", "-", "2.5"], "{text}");
        assert_eq!(
            lines[2][..8],
            ["3", "xvda", "phy", "-", "-", "connected", "0.0", "50.0"],
            "{text}"
        );
        let json = serde_json::to_value(Picture::of(&now, &rows)).expect("json");
        assert_eq!(json["rows"][0]["row"]["minor"], 0);
        assert_eq!(json["disks"][1]["figures"]["writes"], 50.0);
    }

    #[test]
    fn another_process_and_the_first_picture_have_no_figures() {
        let before = look(0, None, vec![fake::tap(0)]);
        assert!(rows(None, &before)[0].figures.is_none());
        let mut tap = fake::tap(0);
        if let Some(tap) = &mut tap.tap {
            tap.row.pid = Some(313);
        }
        fake::stats(&mut tap).read.requests = 20;
        let now = look(2, Some(&before), vec![tap]);
        assert!(rows(Some(&before), &now)[0].figures.is_none());
    }

    #[test]
    fn disks_of_the_kernel_are_shown_without_a_supervisor() {
        let mut now = look(0, None, vec![fake::phy()]);
        now.supervisor = Supervisor::Silent("no such file".into());
        let text = text(&now, &rows(None, &now));
        assert!(
            text.contains("xvda     phy") && text.contains("no such file"),
            "{text}"
        );
    }
}
