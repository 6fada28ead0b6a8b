// SPDX-License-Identifier: GPL-2.0-only

//! What the toolstack and the frontend are told: states, errors, and what becomes of the disk.

use super::{Life, Vbd, ASK_AGAIN};
use crate::connect_error::ConnectError;
use crate::disk;
use crate::linux::local_clock;
use crate::offer;
use crate::proto::state::State;
use kernel::prelude::*;
use kernel::sync::atomic::{ordering::Acquire, ordering::Release};
use kernel::sync::Arc;

/// Our state, and whether it is written.
pub(super) struct OurState {
    now: State,
    said: bool,
}

impl OurState {
    pub(super) const NEW: Self = Self {
        now: State::Initialising,
        said: true,
    };

    /// What it is.
    pub(super) fn now(&self) -> State {
        self.now
    }

    /// It is this one now. Says whether it is also written, or will be tried again.
    pub(super) fn set(&mut self, state: State, said: bool) {
        (self.now, self.said) = (state, said);
    }
}

impl Vbd {
    pub(super) fn publish(self: &Arc<Self>, life: &mut Life, state: State) {
        if state != life.state.now() {
            let result = offer::publish_state(&self.device, life.state.now(), state);
            self.published(life, state, result);
        }
    }

    /// Our state is this one now. If it could not be written, that is tried again in a while.
    pub(super) fn published(self: &Arc<Self>, life: &mut Life, state: State, result: Result) {
        // The toolstack has removed our directory or made a new one: nobody is left to tell.
        let failed = result.err().filter(|error| *error != ENOENT);
        life.state.set(state, failed.is_none());
        if let Some(error) = failed {
            self.device
                .report(error, c"the backend's state cannot be published");
            self.kick_after(ASK_AGAIN);
        }
    }

    /// The toolstack has written our state: it takes the device away. Nothing is tried before the frontend moves.
    pub(super) fn taken_away(&self, life: &mut Life) {
        // What cannot be read is what it writes.
        let there = offer::state(&self.device).unwrap_or(State::Closing);
        life.state.set(there, true);
        self.device.note_state(there);
        life.refused = true;
    }

    /// Writes our state if that could not be done before; false if it still cannot. The other end waits
    /// for it, so no event may ever come.
    pub(super) fn say(self: &Arc<Self>, life: &mut Life) -> bool {
        if !life.state.said {
            let state = life.state.now();
            let result = offer::publish_state(&self.device, state, state);
            self.published(life, state, result);
        }
        life.state.said
    }

    /// Says why the frontend cannot be connected.
    pub(super) fn report_why(&self, error: &ConnectError) {
        let (code, text) = error.describe();
        let fallback = c"the frontend cannot be connected";
        self.device
            .report(code, text.as_deref().unwrap_or(fallback));
    }

    /// Says why the frontend cannot be connected. After a shortage that is tried again while the frontend waits: it
    /// may not survive Closing, and has done nothing wrong. After anything else the frontend has to move first.
    pub(super) fn connect_failed(self: &Arc<Self>, life: &mut Life, error: &ConnectError) {
        if error.passes() {
            // The error node of the first attempt still stands.
            if life.short_of.replace(error.reason()) != Some(error.reason()) {
                self.report_why(error);
            }
            life.patience.ran_short(local_clock());
            return;
        }
        life.short_of = None;
        self.report_why(error);
        life.patience.refused(local_clock());
        life.refused = true;
        self.publish(life, State::Closing);
    }

    pub(super) fn disk_is_bad(self: &Arc<Self>, life: &mut Life, bad: &disk::Bad) {
        let is_known = life.bad_disk == Some(bad.name) && !bad.passes;
        if is_known || life.leaving || self.unbound.load(Acquire) {
            return;
        }
        let fallback = c"the disk cannot be opened";
        self.device
            .report(bad.error, bad.text.as_deref().unwrap_or(fallback));
        if bad.passes {
            // Nobody writes what names it a second time.
            self.disk_moved.store(true, Release);
            self.kick_after(ASK_AGAIN);
            return;
        }
        life.bad_disk = Some(bad.name);
        self.publish(life, State::Closing);
    }

    /// The device below the disk is gone, or is back with all who had it open. The guest is not told: a disk of no size
    /// is one that its file system does not survive, while requests that fail are what it is prepared for.
    fn tell_gone(&self, is_gone: bool) {
        if !is_gone {
            self.device.clear_report();
            self.device.tell(c"the disk's device is back");
            return;
        }
        self.device.report(
            ENODEV,
            c"the disk's device is gone: all requests fail; if a new device takes its place, detach the disk and attach it again",
        );
    }

    /// Publishes how the disk is served, and a size that changed while connected. If that has to wait,
    /// because a process may change both as often as it likes, says how many milliseconds.
    pub(super) fn follow_disk(&self, life: &mut Life) -> Option<u32> {
        let connected = life.state.now() == State::Connected;
        let Some(disk) = &mut life.disk else {
            return None;
        };
        let status = disk.backing.status();
        let sectors = disk.backing.sectors();
        let new_status = status != disk.status;
        let is_gone = connected && sectors == 0 && disk.sectors != 0;
        if core::mem::replace(&mut disk.is_gone, is_gone) != is_gone {
            self.tell_gone(is_gone);
        }
        let resized = connected && !is_gone && sectors != disk.sectors;
        if !new_status && !resized {
            return None;
        }
        let pause = disk.must_pause();
        if pause > 0 {
            return Some(pause);
        }
        let mut published = match status {
            Some(now) if new_status => offer::publish_status(&self.device, now),
            _ => Ok(()),
        };
        if resized {
            let size = offer::publish_size(&self.device, sectors);
            published = published.and(size);
        }
        match published {
            Err(error) if error != ENOENT => {
                self.device
                    .report(error, c"what has become of the disk cannot be published");
                Some(ASK_AGAIN)
            }
            // Where the toolstack has removed our directory, nobody is left to tell.
            _ => {
                disk.status = status;
                if resized {
                    disk.sectors = sectors;
                }
                None
            }
        }
    }
}
