// SPDX-License-Identifier: MIT OR Apache-2.0
//! Events, for later queries and for listeners.

mod history;
mod log;

use crate::disk::DiskTable;
use crate::log::{tell, LogContext};
use control::supervisor::{Event, What};
use history::EventHistory;
use rustix::rand::{getrandom, GetRandomFlags};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::path::Path;
use std::rc::Rc;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::watch;

/// Events that are kept.
const KEPT: usize = 1024;

/// The events of this host since it was started, numbered from 1.
#[derive(Debug)]
pub struct Events {
    /// The disks that events are about.
    disks: Rc<DiskTable>,
    series: u32,
    kept: RefCell<VecDeque<Event>>,
    last: watch::Sender<u64>,
    /// The file in which the next supervisor finds the events. Nothing if it cannot be used.
    history: RefCell<Option<EventHistory>>,
    /// Number of events that a reader missed, because they were no longer kept.
    lost: Cell<u64>,
    /// Traces that have ended by themselves.
    untraced: Cell<u64>,
}

impl Events {
    /// The events of these disks that an earlier supervisor has left at a path, and those to come. Without a path, or
    /// if the file cannot be used, events end with this supervisor, and the next one begins a new series.
    #[must_use]
    pub fn new(disks: Rc<DiskTable>, path: Option<&Path>) -> Events {
        let (history, kept) = match path.map(|path| (path, EventHistory::open(path))) {
            Some((_, Ok((history, kept)))) => (Some(history), kept),
            Some((path, Err(error))) => {
                tell!(
                    warn,
                    LogContext::default().because(&error),
                    "events end with this supervisor: cannot use {}: {error}",
                    path.display()
                );
                (None, Vec::new())
            }
            None => (None, Vec::new()),
        };
        let newest = kept.last();
        let last = newest.map_or(0, |event| event.number);
        Events {
            disks,
            series: newest.map_or_else(random, |event| event.series),
            last: watch::Sender::new(last),
            kept: RefCell::new(newest_of(kept)),
            history: RefCell::new(history),
            lost: Cell::default(),
            untraced: Cell::default(),
        }
    }

    /// Records an event of a disk and writes it to the log.
    pub fn add(&self, minor: Option<u32>, what: What) {
        let number = self.last().saturating_add(1);
        let about = self.about(minor, &what, number);
        if matches!(what, What::Untraced { .. }) {
            self.untraced.set(self.untraced.get().saturating_add(1));
        }
        let event = Event {
            number,
            series: self.series,
            at_ms: now(),
            minor,
            guest: about.domid,
            guest_name: about.guest.clone(),
            vdev: about.vdev.clone(),
            what,
        };
        // The file has the event before any reader does: its number is not given out again.
        self.write_down(&event);
        log::write(&about, &event.what);
        let mut kept = self.kept.borrow_mut();
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back(event);
        self.last.send_replace(number);
    }

    fn write_down(&self, event: &Event) {
        let mut place = self.history.borrow_mut();
        let Some(Err(error)) = place.as_mut().map(|history| history.add(event)) else {
            return;
        };
        tell!(
            error,
            LogContext::default().because(&error),
            "events end with this supervisor, because it cannot store them: {error}"
        );
        if let Some(history) = place.take() {
            history.remove();
        }
    }

    /// Returns the log context of an event.
    fn about(&self, minor: Option<u32>, what: &What, number: u64) -> LogContext {
        let disks = self.disks.try_borrow().ok();
        let disk = disks.and_then(|disks| disks.get(&minor?).cloned());
        let about = match (disk, minor) {
            (Some(disk), _) => disk.about(),
            (None, Some(minor)) => LogContext::disk(minor),
            (None, None) => LogContext::default(),
        };
        LogContext {
            number: Some(number),
            ..log::with(about, what)
        }
    }

    /// Returns the newest event of a disk, of those that are kept and meant.
    pub(crate) fn newest(&self, minor: u32, is_meant: impl Fn(&What) -> bool) -> Option<What> {
        let kept = self.kept.borrow();
        let mut newest = kept.iter().rev();
        let found = newest.find(|event| event.minor == Some(minor) && is_meant(&event.what));
        found.map(|event| event.what.clone())
    }

    /// Changes whenever there is a new event.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.last.subscribe()
    }

    /// The number of the last event; 0 if there is none yet.
    pub fn last(&self) -> u64 {
        *self.last.borrow()
    }

    /// Returns the number of events that a reader missed, because they were no longer kept.
    pub fn lost(&self) -> u64 {
        self.lost.get()
    }

    /// Traces that have ended by themselves.
    pub fn untraced(&self) -> u64 {
        self.untraced.get()
    }

    /// The events after the one numbered `after`. Before those that follow a gap is one that says how many are missing.
    pub fn after(&self, after: u64) -> Vec<Event> {
        let kept = self.kept.borrow();
        let mut events: Vec<Event> = Vec::new();
        let mut before = after;
        for event in kept.iter().filter(|event| event.number > after) {
            let count = event.number - before - 1;
            if count > 0 {
                events.push(told(event, What::Lost { count }));
            }
            before = event.number;
            events.push(event.clone());
        }
        events
    }

    /// Returns the events after number `after` of a series. If that is another one, the first event says so, and those
    /// that are kept follow.
    pub fn since(&self, after: u64, series: Option<u32>) -> Vec<Event> {
        let is_ours = series.is_none_or(|series| series == self.series);
        if is_ours && after <= self.last() {
            let events = self.after(after);
            if after > 0 {
                self.count_lost(&events);
            }
            return events;
        }
        let mut events = self.after(0);
        // Events before the first one were not for this subscriber.
        events.retain(|event| !matches!(event.what, What::Lost { .. }));
        let first = events.first().cloned().unwrap_or(Event {
            number: self.last().saturating_add(1),
            series: self.series,
            at_ms: now(),
            minor: None,
            guest: None,
            guest_name: None,
            vdev: None,
            what: What::Renumbered,
        });
        events.insert(0, told(&first, What::Renumbered));
        events
    }

    fn count_lost(&self, events: &[Event]) {
        let lost = events.iter().map(|event| match event.what {
            What::Lost { count } => count,
            _ => 0,
        });
        self.lost.set(self.lost.get().saturating_add(lost.sum()));
    }
}

/// Makes the event that precedes another one and reports missing ones.
fn told(event: &Event, what: What) -> Event {
    Event {
        number: event.number.saturating_sub(1),
        minor: None,
        guest: None,
        guest_name: None,
        vdev: None,
        what,
        ..event.clone()
    }
}

fn newest_of(mut events: Vec<Event>) -> VecDeque<Event> {
    let more = events.len().saturating_sub(KEPT);
    events.drain(..more);
    events.into()
}

/// Milliseconds since 1970.
fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis().try_into().unwrap_or(u64::MAX))
}

/// A number for a series, which is not 0.
fn random() -> u32 {
    let mut bytes = [0; 4];
    match getrandom(&mut bytes, GetRandomFlags::empty()) {
        Ok(4) => u32::from_le_bytes(bytes) | 1,
        // CAST: any part of it differs from one start to the next.
        _ => now() as u32 | 1,
    }
}

#[cfg(test)]
mod tests {
    use super::{Events, KEPT};
    use control::supervisor::What;
    use std::rc::Rc;

    #[test]
    fn events_are_numbered_without_a_gap() {
        let events = Events::new(Rc::default(), None);
        for _ in 0..3 {
            events.add(Some(4), What::Paused);
        }
        let numbers: Vec<u64> = events.after(1).iter().map(|event| event.number).collect();
        assert_eq!(numbers, [2, 3]);
        assert!(events.after(3).is_empty());
        assert_eq!(*events.subscribe().borrow(), 3);
    }

    #[test]
    fn who_was_away_too_long_is_told() {
        let events = Events::new(Rc::default(), None);
        for _ in 0..KEPT + 5 {
            events.add(None, What::Paused);
        }
        let seen = events.since(0, None);
        assert_eq!(seen[0].what, What::Lost { count: 5 });
        assert_eq!(seen.len(), KEPT + 1);
        assert_eq!(events.since(5, None).len(), KEPT);
        // A reader that asks for all kept events has lost nothing.
        assert_eq!(events.lost(), 0);
        assert_eq!(events.since(2, None)[0].what, What::Lost { count: 3 });
        assert_eq!(events.lost(), 3);
    }

    #[test]
    fn who_knows_other_numbers_is_told_and_gets_all() {
        let events = Events::new(Rc::default(), None);
        let series = |events: &Events| events.after(0).first().map(|event| event.series);
        // Nothing has happened, and that is what it gets.
        assert_eq!(events.since(9, None).len(), 1);
        events.add(Some(4), What::Paused);
        events.add(Some(4), What::Unpaused);
        let ours = series(&events);
        assert!(ours.is_some_and(|series| series != 0));
        let others = ours.map(|series| series ^ 2);
        for (after, of) in [(1, others), (0, others), (3, ours), (3, None)] {
            let seen = events.since(after, of);
            let what: Vec<&What> = seen.iter().map(|event| &event.what).collect();
            assert_eq!(what, [&What::Renumbered, &What::Paused, &What::Unpaused]);
            assert_eq!(seen[0].number, 0);
        }
        assert_eq!(events.since(1, ours), events.after(1));
        assert!(events.since(2, ours).is_empty());
    }
}
