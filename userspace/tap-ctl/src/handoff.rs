// SPDX-License-Identifier: MIT OR Apache-2.0
//! All disks are handed to new processes, a few at once: progress, and what became of each.

use crate::{ask, cli, complain, format, print, say, Cli, Error};
use control::supervisor::{Filter, HandedOff, Reply, Request, Row, Which};
use control::tapdisk::State;
use control::{Code, Failure};
use serde::Serialize;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;

/// Result of a hand-off of a disk.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Fate {
    /// A new process serves the disk.
    HandedOff(HandedOff),
    /// The former process still serves the disk.
    Kept {
        /// Number of the disk's node.
        minor: u32,
        /// Reason of the failure.
        error: Failure,
    },
    /// The disk was removed before its turn was over.
    Gone {
        /// Number of the disk's node.
        minor: u32,
    },
}

/// Results of all hand-offs.
#[derive(Debug, Default, Serialize)]
struct Summary {
    /// Number of disks that have a new process.
    handed_off: usize,
    /// Number of disks that keep their process, because the hand-off failed.
    kept: usize,
    /// Number of disks that were removed before their turn was over.
    gone: usize,
    /// The longest time that a guest waited.
    longest_pause_us: u64,
    /// Result for each disk.
    disks: Vec<Fate>,
}

impl Summary {
    fn add(&mut self, fate: Fate) {
        match &fate {
            Fate::HandedOff(handed) => {
                self.handed_off += 1;
                self.longest_pause_us = self.longest_pause_us.max(handed.pause_us);
            }
            Fate::Kept { .. } => self.kept += 1,
            Fate::Gone { .. } => self.gone += 1,
        }
        self.disks.push(fate);
    }
}

/// Hands all disks over.
pub(crate) fn all(cli: &Cli, asked: &cli::Handoff) -> Result<(), Error> {
    let minors = minors(cli)?;
    let next = AtomicUsize::new(0);
    let work = |fates: mpsc::Sender<Fate>| {
        while let Some(minor) = minors.get(next.fetch_add(1, Ordering::Relaxed)) {
            if fates.send(one(cli, asked, *minor)).is_err() {
                return;
            }
        }
    };
    let mut summary = Summary::default();
    thread::scope(|scope| -> io::Result<()> {
        let (sender, fates) = mpsc::channel();
        // CAST: a small number.
        for _ in 0..minors.len().min(asked.jobs as usize) {
            let (work, sender) = (&work, sender.clone());
            scope.spawn(move || work(sender));
        }
        drop(sender);
        for fate in fates {
            if !cli.json {
                tell(&fate, summary.disks.len() + 1, minors.len())?;
            }
            summary.add(fate);
        }
        Ok(())
    })?;
    if cli.json {
        print(&summary)?;
    } else {
        say(&format!("{}\n", sum(&summary)))?;
    }
    match summary.kept {
        0 => Ok(()),
        _ => Err(Error::Some),
    }
}

/// The disks that are to be served, by their numbers.
fn minors(cli: &Cli) -> Result<Vec<u32>, Error> {
    let Reply::Disks { disks } = ask(cli, &Request::List(Filter::default()))? else {
        return Err(Failure::invalid("blktapctrl answered something else").into());
    };
    // A disk without a process may be about to get one, so the request includes it.
    let is_one = |row: &Row| row.unknown.is_none() && row.state != Some(State::Idle);
    let served = disks
        .iter()
        .filter(|row| is_one(row) && row.target.is_some());
    Ok(served.filter_map(|row| row.minor).collect())
}

/// Hands one disk over.
fn one(cli: &Cli, asked: &cli::Handoff, minor: u32) -> Fate {
    let question = Request::Handoff {
        which: Which {
            minor: Some(minor),
            ..Which::default()
        },
        program: asked.all.clone().flatten(),
        timeout_s: asked.timeout,
    };
    let error = match ask(cli, &question) {
        Ok(Reply::HandedOff(handed)) => return Fate::HandedOff(handed),
        Err(Error::Failed(error)) if error.code == Code::NotFound => return Fate::Gone { minor },
        Err(Error::Failed(error) | Error::Silent(error)) => error,
        Err(Error::Output(error)) => Failure::system("cannot write", &error),
        Ok(_) | Err(Error::Some) => Failure::invalid("blktapctrl answered something else"),
    };
    Fate::Kept { minor, error }
}

/// Says what became of a disk, and how far it is.
fn tell(fate: &Fate, number: usize, all: usize) -> io::Result<()> {
    match fate {
        Fate::HandedOff(handed) => say(&format!("{number}/{all} {}\n", format::handed_off(handed))),
        Fate::Gone { minor } => say(&format!("{number}/{all} minor={minor} gone\n")),
        Fate::Kept { minor, error } => {
            complain(&format!("{number}/{all} minor={minor}: {error}"));
            Ok(())
        }
    }
}

/// The last line.
fn sum(summary: &Summary) -> String {
    let kept = summary.disks.iter().filter_map(|fate| match fate {
        Fate::Kept { minor, .. } => Some(minor.to_string()),
        _ => None,
    });
    let kept: Vec<String> = kept.collect();
    let stay = match kept.is_empty() {
        true => String::new(),
        false => format!("; the process that it had serves on: {}", kept.join(" ")),
    };
    format!(
        "{} of {} disks are served by new processes, the longest pause was {} us{stay}",
        summary.handed_off,
        summary.disks.len(),
        summary.longest_pause_us
    )
}

#[cfg(test)]
mod tests {
    use super::{sum, Fate, Summary};
    use control::supervisor::HandedOff;
    use control::{Code, Failure};

    #[test]
    fn those_that_stay_are_named() {
        let mut summary = Summary::default();
        assert_eq!(
            sum(&summary),
            "0 of 0 disks are served by new processes, the longest pause was 0 us"
        );
        for (minor, pause_us) in [(0, 900), (3, 4000), (4, 30)] {
            summary.add(Fate::HandedOff(HandedOff {
                minor,
                from: Some(7),
                to: 8,
                program: control::installed::TAPDISK.into(),
                version: "1".into(),
                pause_us,
            }));
        }
        for minor in [2, 9] {
            let error = Failure::new(Code::Timeout, "it did not start");
            summary.add(Fate::Kept { minor, error });
        }
        assert_eq!(
            sum(&summary),
            "3 of 5 disks are served by new processes, the longest pause was 4000 us; the process that it had serves on: 2 9"
        );
        let text = serde_json::to_value(&summary).expect("json");
        assert_eq!((&text["handed_off"], &text["kept"]), (&3.into(), &2.into()));
        assert_eq!(text["disks"][3]["kept"]["minor"], 2);
        assert_eq!(text["disks"][3]["kept"]["error"]["code"], "timeout");
    }
}
