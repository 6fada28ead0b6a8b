// SPDX-License-Identifier: MIT OR Apache-2.0
//! `tap-ctl events`: what happens to disks.

use crate::{connect, patience, print, say, show, Cli, Error};
use clap::Args;
use control::supervisor::{Event, Reply, Request, What};
use control::{shown, Code, Failure};

/// Events.
#[derive(Debug, Args)]
pub(crate) struct Events {
    /// Begin after the event with this number; 0 for all that are kept
    #[arg(long, value_name = "NUMBER")]
    pub(crate) after: Option<u64>,
    /// The series of that event, as --json prints it: if the numbers have begun anew since, as after a boot, the first
    /// event says so
    #[arg(long, value_name = "SERIES", requires = "after")]
    pub(crate) series: Option<u32>,
}

/// Prints events until blktapctrl ends.
pub(crate) fn follow(cli: &Cli, events: &Events) -> Result<(), Error> {
    let mut channel = connect(cli, patience(cli))?;
    // Without a number only new events are shown: the stored ones are skipped.
    let since = match events.after {
        Some(_) => 0,
        None => std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |since| since.as_millis()),
    };
    let after = events.after.unwrap_or(0);
    let series = events.series;
    let _: Reply = channel.ask(Request::Subscribe { after, series }, &[])?;
    while let Some((event, _)) = channel.receive::<Event>()? {
        if u128::from(event.body.at_ms) < since {
            continue;
        }
        if cli.json {
            print(&event.body)?;
        } else if event.body.what != What::Other {
            say(&format!("{}\n", shown(&show::event(&event.body))))?;
        }
    }
    Err(Failure::new(Code::Gone, "blktapctrl has ended").into())
}
