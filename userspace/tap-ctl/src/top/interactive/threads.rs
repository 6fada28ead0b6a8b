// SPDX-License-Identifier: MIT OR Apache-2.0
//! Threads for calls that may wait, which send events: the terminal, the looks at the host, the signals. The thread
//! that shows waits for none of them.

use crate::host::Host;
use crate::sample::{look, HostSample};
use ratatui::crossterm::{event, terminal};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;
use std::io;
use std::path::PathBuf;
use std::sync::mpsc::{self, Sender};
use std::thread::Builder;

/// Event of a thread.
pub(super) enum Event {
    /// A key, or another size.
    Terminal(event::Event),
    /// A look has come to its end.
    Look(Box<HostSample>),
    /// A signal that ends the program.
    Signal(i32),
    /// A thread has ended, which happens only after a fault.
    Ended { thread: &'static str, why: String },
}

/// Signals that end the program.
pub(super) fn signals() -> io::Result<Signals> {
    Signals::new([SIGHUP, SIGINT, SIGQUIT, SIGTERM])
}

/// Tells of signals.
pub(super) fn tell_signals(mut signals: Signals, to: &Sender<Event>) -> io::Result<()> {
    start("signals", to, move |to| {
        let mut forever = signals.forever();
        if let Some(signal) = forever.next() {
            tell(to, Event::Signal(signal));
        }
        // A second signal does not wait for a terminal that accepts no output.
        match forever.next() {
            Some(signal) => {
                terminal::disable_raw_mode()?;
                emulate_default_handler(signal)
            }
            None => Ok(()),
        }
    })
}

/// Tells of keys and sizes.
pub(super) fn tell_terminal(to: &Sender<Event>) -> io::Result<()> {
    start("keys", to, |to| loop {
        tell(to, Event::Terminal(event::read()?));
    })
}

/// Looks at the host on request.
pub(super) fn tell_looks(
    root: PathBuf,
    socket: PathBuf,
    to: &Sender<Event>,
) -> io::Result<Sender<()>> {
    let (ask, asked) = mpsc::channel();
    start("looks", to, move |to| {
        let host = Host::at(root);
        for () in asked {
            tell(to, Event::Look(Box::new(look(&host, &socket))));
        }
        Ok(())
    })?;
    Ok(ask)
}

/// Starts a thread. It reports its end, even by a panic.
fn start(
    thread: &'static str,
    to: &Sender<Event>,
    work: impl FnOnce(&Sender<Event>) -> io::Result<()> + Send + 'static,
) -> io::Result<()> {
    let mut last = LastAct {
        to: to.clone(),
        thread,
        why: "it has panicked".into(),
    };
    let work = move || {
        let result = work(&last.to);
        last.because(result);
    };
    Builder::new().name(thread.into()).spawn(work)?;
    Ok(())
}

/// The last thing that a thread does.
struct LastAct {
    to: Sender<Event>,
    thread: &'static str,
    why: String,
}

impl LastAct {
    fn because(&mut self, result: io::Result<()>) {
        self.why = match result {
            Ok(()) => "there is nothing to do any more".into(),
            Err(error) => error.to_string(),
        };
    }
}

impl Drop for LastAct {
    fn drop(&mut self) {
        let why = std::mem::take(&mut self.why);
        let thread = self.thread;
        tell(&self.to, Event::Ended { thread, why });
    }
}

fn tell(to: &Sender<Event>, event: Event) {
    // If the receiver is gone, the program is ending.
    let _ = to.send(event);
}

#[cfg(test)]
mod tests {
    use super::{start, Event};
    use std::io;
    use std::sync::mpsc;

    fn ended(work: impl FnOnce() -> io::Result<()> + Send + 'static) -> String {
        let (to, events) = mpsc::channel();
        start("work", &to, |_| work()).expect("started");
        drop(to);
        match events.recv() {
            Ok(Event::Ended { thread, why }) => format!("{thread}: {why}"),
            _ => panic!("its end is not told"),
        }
    }

    #[test]
    fn the_end_of_a_thread_is_told_with_its_reason() {
        assert_eq!(ended(|| panic!("on purpose")), "work: it has panicked");
        assert_eq!(ended(|| Err(io::Error::other("gone"))), "work: gone");
        assert_eq!(ended(|| Ok(())), "work: there is nothing to do any more");
    }
}
