// SPDX-License-Identifier: MIT OR Apache-2.0
//! `tap-ctl list`: the disks that blktapctrl knows, each with its guest.

use crate::cli::{self, Cli};
use crate::disks::{self, TypedLine, Wanted};
use crate::host::xenstore::GuestNames;
use crate::host::Host;
use crate::{ask, format, print, say, Error};
use control::supervisor::{Filter, Reply, Request, Row};
use control::Failure;
use serde::Serialize;
use std::io::{self, IsTerminal};

/// A disk with its guest.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct ListedDisk {
    #[serde(flatten)]
    pub(crate) row: Row,
    /// The guest's number.
    guest: Option<u32>,
    /// The guest's name, if xenstore tells it.
    guest_name: Option<String>,
    /// Its name in the guest.
    pub(crate) vdev: Option<String>,
    /// The word by which a command line names the guest.
    #[serde(skip)]
    pub(crate) guest_word: Option<String>,
}

/// Answer of blktapctrl with the guests, for programs.
#[derive(Serialize)]
struct ListedDisks {
    /// Always `disks`.
    is: &'static str,
    /// The disks that fit the command line.
    disks: Vec<ListedDisk>,
}

/// Prints the disks that fit.
pub(crate) fn run(cli: &Cli, asked: &cli::List) -> Result<(), Error> {
    let filter = Filter {
        pid: asked.pid,
        minor: asked.minor,
        driver: asked.driver,
        file: asked.file.clone(),
    };
    let Reply::Disks { disks } = ask(cli, &Request::List(filter))? else {
        return Err(Failure::invalid("blktapctrl answered something else").into());
    };
    let guests = disks.iter().filter_map(|row| Some(parts(row)?.0));
    let names = GuestNames::read(&Host::at(&cli.root), guests);
    let disks = chosen(disks, asked, &names, &TypedLine::own())?;
    let disks: Vec<ListedDisk> = disks.into_iter().map(|row| listed(row, &names)).collect();
    if cli.json {
        let is = "disks";
        return print(&ListedDisks { is, disks });
    }
    // Programs read the lines through a pipe, such as Xen's scripts.
    Ok(say(&match io::stdout().is_terminal() {
        true => format::table(&disks),
        false => disks.iter().map(format::row).collect(),
    })?)
}

fn parts(row: &Row) -> Option<(u32, u32)> {
    disks::parts(row.vbd.as_deref()?)
}

/// Leaves the disks of the guest that the command line names, if it names one.
fn chosen(
    mut rows: Vec<Row>,
    asked: &cli::List,
    names: &GuestNames,
    line: &TypedLine,
) -> Result<Vec<Row>, Failure> {
    let Some(name) = &asked.guest else {
        return Ok(rows);
    };
    let guests: Vec<u32> = rows.iter().filter_map(|row| Some(parts(row)?.0)).collect();
    let guest = disks::guest(name, &guests, names, line)?;
    rows.retain(|row| parts(row).is_some_and(|(its, _)| its == guest));
    let Some(vdev) = asked.vdev.as_deref() else {
        return Ok(rows);
    };
    let device = |row: &Row| parts(row).map(|(_, device)| device);
    let is_called = |row: &Row| device(row).is_some_and(|device| disks::is_called(device, vdev));
    if !rows.iter().any(is_called) {
        let wanted = Wanted {
            guest: name,
            vdev: Some(vdev),
        };
        return Err(disks::not_one(wanted, rows.iter().filter_map(device), line));
    }
    rows.retain(is_called);
    Ok(rows)
}

/// Adds the guest to a disk.
pub(crate) fn listed(row: Row, names: &GuestNames) -> ListedDisk {
    let parts = parts(&row);
    let guest = parts.map(|(guest, _)| guest);
    ListedDisk {
        row,
        guest,
        guest_name: guest.and_then(|guest| names.get(guest).map(str::to_owned)),
        vdev: parts.map(|(_, device)| control::vdev(device)),
        guest_word: guest.map(|guest| names.typed(guest)),
    }
}

#[cfg(test)]
mod tests {
    use super::{chosen, listed, ListedDisks};
    use crate::cli::{Cli, Verb};
    use crate::disks::TypedLine;
    use crate::format;
    use crate::host::xenstore::GuestNames;
    use crate::status::fake;
    use clap::Parser;
    use control::supervisor::Row;
    use control::{Code, Failure};

    fn rows() -> Vec<Row> {
        let row = |minor, vbd: Option<&str>| Row {
            vbd: vbd.map(str::to_owned),
            ..fake::row(minor).row
        };
        vec![
            row(0, Some("backend/vbd/3/51712")),
            row(1, Some("backend/vbd/3/51728")),
            row(2, Some("backend/vbd/4/51712")),
            row(3, None),
        ]
    }

    fn minors(line: &str) -> Result<Vec<Option<u32>>, Failure> {
        let cli = Cli::try_parse_from(line.split(' ')).expect(line);
        let Verb::List(asked) = &cli.verb else {
            panic!("{line}");
        };
        let names = GuestNames::from([(3, "web")]);
        let rows = chosen(rows(), asked, &names, &TypedLine::of([]))?;
        Ok(rows.into_iter().map(|row| row.minor).collect())
    }

    #[test]
    fn a_guest_chooses_its_disks() {
        for (line, expected) in [
            ("tap-ctl list", vec![Some(0), Some(1), Some(2), Some(3)]),
            ("tap-ctl list web", vec![Some(0), Some(1)]),
            ("tap-ctl list 3 xvdb", vec![Some(1)]),
            ("tap-ctl list 4", vec![Some(2)]),
        ] {
            assert_eq!(minors(line), Ok(expected), "{line}");
        }
        for line in ["tap-ctl list mail", "tap-ctl list web xvdz"] {
            let code = minors(line).map_err(|failure| failure.code);
            assert_eq!(code, Err(Code::NotFound), "{line}");
        }
    }

    #[test]
    fn a_guest_is_named_in_json_in_a_line_and_in_the_table() {
        let names = GuestNames::from([(3, "web")]);
        let disks: Vec<_> = rows().into_iter().map(|row| listed(row, &names)).collect();
        let line = format::row(&disks[1]);
        assert!(
            line.ends_with(" vbd=backend/vbd/3/51728 vdev=xvdb guest=web\n"),
            "{line}"
        );
        let unnamed = format::row(&disks[2]);
        assert!(unnamed.ends_with(" vdev=xvda guest=4\n"), "{unnamed}");
        assert!(!format::row(&disks[3]).contains("guest="));
        let text = format::table(&disks);
        assert!(text.contains("\nweb   xvdb         1 "), "{text}");
        let is = "disks";
        let json = serde_json::to_value(ListedDisks { is, disks }).expect("json");
        let first = &json["disks"][0];
        assert_eq!((&first["minor"], &first["guest"]), (&0.into(), &3.into()));
        assert_eq!(
            (&first["guest_name"], &first["vdev"]),
            (&"web".into(), &"xvda".into())
        );
        assert!(json["disks"][2]["guest_name"].is_null(), "{json}");
    }
}
