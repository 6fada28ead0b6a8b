// SPDX-License-Identifier: MIT OR Apache-2.0
//! What happened, for who asks later and for who listens.

use control::stats::Streaming;
use control::supervisor::{Event, What};
use control::tapdisk::Call;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::watch;

/// Events that are kept.
const KEPT: usize = 1024;

/// The events of this run, numbered from 1.
#[derive(Debug)]
pub struct Events {
    kept: RefCell<VecDeque<Event>>,
    last: watch::Sender<u64>,
}

impl Default for Events {
    fn default() -> Self {
        Events {
            kept: RefCell::default(),
            last: watch::Sender::new(0),
        }
    }
}

impl Events {
    /// Records an event of a disk and writes it to the log.
    pub fn add(&self, minor: Option<u32>, what: What) {
        let number = self.last.borrow().wrapping_add(1);
        log(minor, &what);
        let at_ms = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_millis().try_into().unwrap_or(u64::MAX));
        let mut kept = self.kept.borrow_mut();
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back(Event {
            number,
            at_ms,
            minor,
            what,
        });
        self.last.send_replace(number);
    }

    /// Changes whenever there is a new event.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.last.subscribe()
    }

    /// The events after the one numbered `after`. If some of them are not kept any more, the first
    /// one says how many.
    pub fn after(&self, after: u64) -> Vec<Event> {
        let kept = self.kept.borrow();
        let mut events: Vec<Event> = kept
            .iter()
            .filter(|event| event.number > after)
            .cloned()
            .collect();
        if let Some(first) = events.first() {
            let count = first.number - after - 1;
            if count > 0 {
                let lost = Event {
                    number: first.number - 1,
                    at_ms: first.at_ms,
                    minor: None,
                    what: What::Lost { count },
                };
                events.insert(0, lost);
            }
        }
        events
    }
}

fn log(minor: Option<u32>, what: &What) {
    let disk = minor.map_or_else(|| "a process".to_owned(), |minor| format!("disk {minor}"));
    match what {
        What::Died { pid, how } => tracing::warn!("{disk}: tapdisk {pid} {how}"),
        What::Trouble {
            trouble,
            target,
            error,
            more,
            stopped,
        } => {
            let image = target
                .as_ref()
                .map_or("its image".into(), ToString::to_string);
            let then = match stopped {
                true => {
                    "; the guest waits: see to the image's storage, then let the disk go on with tap-ctl unpause"
                }
                false if trouble.what == Call::Flush => {
                    "; what was written before may be lost, and a Linux guest takes this for a disk that cannot flush, and \
                     flushes no more: see to the storage, then detach and attach the disk, or restart the guest"
                }
                false => "; the guest was told",
            };
            tracing::error!(
                "{disk}: {} of {} bytes at {} of {image} failed: {error}; {more} more failed since the last report{then}",
                trouble.what,
                trouble.len,
                trouble.offset
            );
        }
        What::Failed { message, retry_ms } => {
            tracing::warn!("{disk}: {message}; the next attempt is in {retry_ms} ms");
        }
        What::HandedOff(handed) => tracing::info!(
            "{disk}: served by tapdisk {} of {} now; nobody served for {} us",
            handed.to,
            handed.program.display(),
            handed.pause_us
        ),
        What::Kept {
            pid: Some(pid),
            why,
        } => {
            tracing::warn!("{disk}: tapdisk {pid} serves on, and no new one: {why}");
        }
        What::Kept { pid: None, why } => {
            tracing::warn!("{disk}: not handed to a new process: {why}");
        }
        What::Snapshot(taken) => tracing::info!(
            "{disk}: goes on in {} over {}, which its configuration must name from now on",
            taken.target,
            taken.parent.display()
        ),
        What::SnapshotUndone { why } => {
            tracing::warn!("{disk}: goes on in the image that it has: {why}");
        }
        What::Streamed { target, outcome } => match outcome {
            Streaming::Failed { .. } => tracing::warn!("{disk}: {}", outcome.told(target)),
            _ => tracing::info!("{disk}: {}", outcome.told(target)),
        },
        What::Moved(moved) => tracing::info!("{disk}: {}", moved.told()),
        What::Mirrored { target, outcome } => {
            tracing::warn!("{disk}: {}", outcome.told(target));
        }
        What::Unmarked { why } => tracing::warn!("{disk}: {why}: its marks are gone"),
        What::Untraced { path, why } => {
            tracing::warn!("{disk}: its trace in {} has ended: {why}", path.display());
        }
        What::Hung {
            pid,
            for_ms,
            killed,
        } => {
            let then = if *killed { "killed" } else { "left alone" };
            tracing::warn!("{disk}: tapdisk {pid} has not answered for {for_ms} ms: {then}");
        }
        What::Poisoned { request, count } => {
            let request = request
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default();
            tracing::error!(
                "{disk}: its processes die of a request ({request}): it failed, the guest was told; {count} so far"
            );
        }
        What::Created {
            target: Some(target),
        } => tracing::info!("{disk}: made for {target}"),
        What::Created { target: None } => tracing::info!("{disk}: made"),
        What::Started { pid } => tracing::info!("{disk}: served by tapdisk {pid}"),
        What::Paused => tracing::info!("{disk}: paused"),
        What::Unpaused => tracing::info!("{disk}: goes on"),
        What::Inactive => tracing::info!("{disk}: has let go of its image: the guest is suspended"),
        What::Active => tracing::info!("{disk}: has its image and goes on"),
        What::Held { why } => tracing::error!("{disk}: the guest waits: {why}"),
        What::Resized { size } => tracing::info!("{disk}: now has {size} bytes"),
        What::Unknown { why } => tracing::error!("{disk}: left alone: {why}"),
        What::Refused { why } => tracing::warn!("{why}"),
        What::NotDirect { why } => {
            tracing::warn!("{disk}: its process serves it, and not the kernel by itself: {why}");
        }
        What::Reconnected { path } => {
            tracing::warn!("{disk}: connected to {} again", path.display())
        }
        What::Destroyed => tracing::info!("{disk}: gone"),
        What::Lost { .. } | What::Other => {}
    }
}

#[cfg(test)]
mod tests {
    use super::{Events, KEPT};
    use control::supervisor::What;

    #[test]
    fn events_are_numbered_without_a_gap() {
        let events = Events::default();
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
        let events = Events::default();
        for _ in 0..KEPT + 5 {
            events.add(None, What::Paused);
        }
        let seen = events.after(0);
        assert_eq!(seen[0].what, What::Lost { count: 5 });
        assert_eq!(seen.len(), KEPT + 1);
        assert_eq!(events.after(5).len(), KEPT);
    }
}
