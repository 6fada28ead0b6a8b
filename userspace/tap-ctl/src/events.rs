// SPDX-License-Identifier: MIT OR Apache-2.0
//! `tap-ctl events`: prints events of disks as they happen.

use crate::host::xenstore::GuestNames;
use crate::host::Host;
use crate::{connect, format, patience, print, say, Cli, Error};
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
    let host = Host::at(&cli.root);
    while let Some((mut event, _)) = channel.receive::<Event>()? {
        if u128::from(event.body.at_ms) < since {
            continue;
        }
        name_guest(&host, &mut event.body);
        if cli.json {
            print(&event.body)?;
        } else if event.body.what != What::Other {
            say(&format!("{}\n", shown(&format::event(&event.body))))?;
        }
    }
    Err(Failure::new(Code::Gone, "blktapctrl has ended").into())
}

/// Adds the guest's name, which blktapctrl learns after a disk was made.
fn name_guest(host: &Host, event: &mut Event) {
    let (Some(guest), None) = (event.guest, &event.guest_name) else {
        return;
    };
    let names = GuestNames::read(host, [guest]);
    event.guest_name = names.get(guest).map(str::to_owned);
}

#[cfg(test)]
mod tests {
    use super::name_guest;
    use crate::host::made::Made;
    use crate::host::xenstore;
    use control::supervisor::Event;

    #[test]
    fn a_name_that_the_supervisor_did_not_know_yet_is_added() {
        let made = Made::new();
        xenstore::fake::serve(&made, &[(3, "web")]);
        let text = r#"{"number":1,"at_ms":0,"minor":0,"guest":3,"what":{"event":"paused"}}"#;
        let mut event: Event = serde_json::from_str(text).expect("an event");
        name_guest(&made.host(), &mut event);
        assert_eq!(event.guest_name.as_deref(), Some("web"));
        // One of an older supervisor has no guest.
        let text = r#"{"number":1,"at_ms":0,"minor":0,"what":{"event":"paused"}}"#;
        let mut event: Event = serde_json::from_str(text).expect("an event");
        name_guest(&made.host(), &mut event);
        assert_eq!((event.guest, event.guest_name), (None, None));
    }
}
