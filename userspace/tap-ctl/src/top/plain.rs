// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pictures as text and for programs, one after the other.

use super::columns::{Column, COLUMNS};
use super::order::SortOrder;
use super::picture::{DiskPicture, Row};
use crate::host::{Host, Unread};
use crate::sample::{look, HostSample, Kind};
use crate::sample_delta::Figures;
use crate::{cli, print, Cli, Error};
use control::supervisor::TopRow;
use serde::Serialize;
use std::io::{self, IsTerminal, Write};
use std::rc::Rc;
use std::time::Duration;

/// Prints as many pictures as the command line asks for.
pub(super) fn run(cli: &Cli, asked: &cli::Top) -> Result<(), Error> {
    let host = Host::at(&cli.root);
    let mut before: Option<Rc<HostSample>> = None;
    let mut left = asked.iterations;
    let period = Duration::from_secs(asked.delay.into());
    loop {
        let now = Rc::new(look(&host, &cli.socket));
        let picture = DiskPicture::new(before.as_deref(), now.clone());
        if cli.json {
            print(&Shown::of(&picture))?;
        } else {
            // Home, and clear what is below.
            let clear = match io::stdout().is_terminal() {
                true => "\x1b[H\x1b[J",
                false => "",
            };
            write!(
                io::stdout(),
                "{clear}{}",
                control::shown_lines(&text(&picture))
            )?;
            io::stdout().flush()?;
        }
        left = left.map(|left| left.saturating_sub(1));
        if left == Some(0) {
            return Ok(now.complete()?);
        }
        before = Some(now);
        std::thread::sleep(period);
    }
}

/// The disks, the busiest one first; those that do the same stay in the order of guests.
fn rows(picture: &DiskPicture) -> Vec<Row<'_>> {
    let mut rows = picture.rows();
    SortOrder::BUSIEST.sort(&mut rows);
    rows
}

fn text(picture: &DiskPicture) -> String {
    let mut text = line(|column| column.padded(column.title));
    for row in rows(picture) {
        text += &line(|column| column.padded((column.cell)(&row)));
    }
    for lack in picture.lacks() {
        text += &lack;
        text.push('\n');
    }
    text
}

fn line(word: impl Fn(&Column) -> String) -> String {
    let words: Vec<String> = COLUMNS.iter().map(word).collect();
    words.join(" ") + "\n"
}

/// A picture, for programs.
#[derive(Serialize)]
struct Shown<'a> {
    /// Always `top`.
    is: &'static str,
    /// Answers of blktapctrl about tap disks.
    rows: Vec<&'a TopRow>,
    /// All disks, the busiest one first.
    disks: Vec<ShownDisk<'a>>,
    /// Reason why blktapctrl does not answer; nothing if it answers.
    supervisor: Option<&'a str>,
    /// Files that could not be read.
    unread: &'a [Unread],
}

/// A disk in a picture.
#[derive(Serialize)]
struct ShownDisk<'a> {
    /// The guest's number.
    guest: Option<u32>,
    /// The guest's name, if xenstore has one.
    guest_name: Option<&'a str>,
    /// Name of the disk in the guest.
    vdev: Option<String>,
    /// Kind of the disk.
    kind: Kind,
    /// Number of a tap disk's node.
    minor: Option<u32>,
    /// Work since the last picture; nothing in the first one.
    figures: Option<&'a Figures>,
}

impl<'a> Shown<'a> {
    fn of(picture: &'a DiskPicture) -> Shown<'a> {
        let shown = |row: Row<'a>| ShownDisk {
            guest: row.disk.guest(),
            guest_name: row.disk.guest_name.as_deref(),
            vdev: row.disk.vdev(),
            kind: row.disk.kind,
            minor: row.disk.minor(),
            figures: row.figures,
        };
        let disks = picture.now.disks.iter();
        Shown {
            is: "top",
            rows: disks.filter_map(|disk| disk.tap.as_ref()).collect(),
            disks: rows(picture).into_iter().map(shown).collect(),
            supervisor: picture.silent(),
            unread: &picture.now.unread,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{rows, text, Shown};
    use crate::sample::Supervisor;
    use crate::status::fake;
    use crate::top::fake::{counted, look};
    use crate::top::picture::DiskPicture;
    use std::rc::Rc;

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
        let picture = DiskPicture::new(Some(&before), Rc::new(now));
        let text = text(&picture);
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
        let json = serde_json::to_value(Shown::of(&picture)).expect("json");
        assert_eq!(json["rows"][0]["row"]["minor"], 0);
        assert_eq!(json["disks"][1]["figures"]["writes"], 50.0);
    }

    #[test]
    fn a_line_is_as_it_was_always() {
        let now = look(0, None, vec![fake::phy()]);
        let text = text(&DiskPicture::new(None, Rc::new(now)));
        let expected = "\
GUEST        VDEV     KIND MINOR     PID STATE       READ/s  WRITE/s   rMiB/s   wMiB/s  WAIT  BUSY  DISKms    RDms    WRms    FLms    99%us  MEM KiB TARGET
3            xvda     phy      -       - connected        -        -        -        -     -     0       -       -       -       -        -        - \n";
        assert_eq!(text, expected);
    }

    #[test]
    fn another_process_and_the_first_picture_have_no_figures() {
        let before = Rc::new(look(0, None, vec![fake::tap(0)]));
        let first = DiskPicture::new(None, before.clone());
        assert!(rows(&first)[0].figures.is_none());
        let mut tap = fake::tap(0);
        if let Some(tap) = &mut tap.tap {
            tap.row.pid = Some(313);
        }
        fake::stats(&mut tap).read.requests = 20;
        let now = look(2, Some(&before), vec![tap]);
        let picture = DiskPicture::new(Some(&before), Rc::new(now));
        assert!(rows(&picture)[0].figures.is_none());
    }

    #[test]
    fn disks_of_the_kernel_are_shown_without_a_supervisor() {
        let mut now = look(0, None, vec![fake::phy()]);
        now.supervisor = Supervisor::Silent("no such file".into());
        let picture = DiskPicture::new(None, Rc::new(now));
        let text = text(&picture);
        assert!(
            text.contains("xvda     phy") && text.contains("no such file"),
            "{text}"
        );
        let json = serde_json::to_value(Shown::of(&picture)).expect("json");
        assert_eq!(json["supervisor"], "no such file");
        assert_eq!(json["disks"][0]["vdev"], "xvda");
    }
}
