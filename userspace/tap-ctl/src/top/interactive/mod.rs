// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pictures on a terminal, with keys.
//!
//! `view` is what keys do, `looks` what was seen, `draw` how both look; `threads` are what may wait. One thread has
//! all that and shows it: it waits for nothing but events, so a look that hangs keeps no key from being heard.

mod details;
mod draw;
mod help;
mod looks;
#[cfg(test)]
mod tests;
mod threads;
mod view;

use crate::{cli, Cli, Error};
use control::{Code, Failure};
use looks::SampleHistory;
use ratatui::crossterm::event;
use ratatui::DefaultTerminal;
use signal_hook::low_level::emulate_default_handler;
use std::io;
use std::ops::ControlFlow;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};
use threads::Event;
use view::{Step, View};

/// How often an age that is shown grows.
const SECOND: Duration = Duration::from_secs(1);

/// Why it ends.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// By a key.
    Key,
    /// By this signal.
    Signal(i32),
}

/// Shows pictures until the user quits. The terminal is then as it was, whatever the reason.
pub(super) fn run(cli: &Cli, asked: &cli::Top) -> Result<(), Error> {
    let (to, events) = mpsc::channel();
    let started = |what, result: io::Result<()>| {
        result.map_err(|error| Error::from(Failure::system(format!("cannot {what}"), &error)))
    };
    // From here on a signal ends nothing that would not be put in order.
    let signals = threads::signals();
    let signals = signals.and_then(|signals| threads::tell_signals(signals, &to));
    started("wait for signals", signals)?;
    let mut app = App::new(Duration::from_secs(asked.delay.into()));
    let (root, socket) = (cli.root.clone(), cli.socket.clone());
    // It is made and dropped in there: its end shows the cursor. After a panic its own hook restores.
    let shown = ratatui::try_init()
        .map_err(Error::Output)
        .and_then(|mut terminal| {
            started("read keys", threads::tell_terminal(&to))?;
            let look = threads::tell_looks(root, socket, &to)
                .map_err(|error| Failure::system("cannot look", &error))?;
            drop(to);
            show(&mut terminal, &mut app, &look, &events)
        });
    let restored = ratatui::try_restore();
    match shown? {
        End::Key => Ok(restored?),
        // The parent process sees the signal that ended it.
        End::Signal(signal) => Ok(restored.and_then(|()| emulate_default_handler(signal))?),
    }
}

/// Shows what there is, again whenever something happens.
fn show(
    terminal: &mut DefaultTerminal,
    app: &mut App,
    look: &Sender<()>,
    events: &Receiver<Event>,
) -> Result<End, Error> {
    loop {
        let now = Instant::now();
        // If the thread has ended, its end is among the events.
        if app.begins_look(now) {
            let _ = look.send(());
        }
        terminal.draw(|frame| draw::draw(frame, app, now))?;
        let first = match events.recv_timeout(app.patience(now)) {
            Ok(event) => event,
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => return Err(ended("all", "of an error")),
        };
        // A key that is held down does not cause a drawing for each of its events.
        for event in std::iter::once(first).chain(events.try_iter()) {
            if let ControlFlow::Break(end) = app.event(event) {
                return end;
            }
        }
    }
}

fn ended(thread: &str, why: &str) -> Error {
    let what = format!("the thread of {thread} has ended: {why}");
    Error::Failed(Failure::new(Code::Other, what))
}

/// All that is shown.
struct App {
    view: View,
    looks: SampleHistory,
}

impl App {
    fn new(interval: Duration) -> App {
        App {
            view: View::new(interval),
            looks: SampleHistory::default(),
        }
    }

    /// Whether to look now; then a look has begun.
    fn begins_look(&mut self, now: Instant) -> bool {
        let is_due = self.looks.next_in(now, self.view.interval) == Some(Duration::ZERO);
        let begins = is_due && !self.view.is_paused;
        if begins {
            self.looks.begin(now);
        }
        begins
    }

    /// How long nothing is to be done if nothing happens.
    fn patience(&self, now: Instant) -> Duration {
        let next = self.looks.next_in(now, self.view.interval);
        let next = next.filter(|_| !self.view.is_paused);
        next.unwrap_or(SECOND).min(SECOND)
    }

    fn event(&mut self, event: Event) -> ControlFlow<Result<End, Error>> {
        match event {
            Event::Look(look) => self.looks.end(*look, !self.view.is_paused),
            Event::Terminal(event::Event::Key(key)) => {
                if self.view.key(key, self.looks.picture()) == Step::Quit {
                    return ControlFlow::Break(Ok(End::Key));
                }
            }
            // Another size is seen by whoever draws.
            Event::Terminal(_) => {}
            Event::Signal(signal) => return ControlFlow::Break(Ok(End::Signal(signal))),
            Event::Ended { thread, why } => return ControlFlow::Break(Err(ended(thread, &why))),
        }
        ControlFlow::Continue(())
    }
}
