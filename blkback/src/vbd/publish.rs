// SPDX-License-Identifier: GPL-2.0-only

//! Notices to the toolstack and the frontend: states, errors, and changes of the disk.

use super::{Life, Vbd, ASK_AGAIN};
use crate::advertise;
use crate::connect_error::ConnectError;
use crate::disk;
use crate::linux::local_clock;
use crate::proto::state::XenbusState;
use kernel::prelude::*;
use kernel::sync::atomic::{ordering::Acquire, ordering::Release};
use kernel::sync::Arc;

/// This driver's state, and whether xenstore has it.
pub(super) struct OurState {
    now: XenbusState,
    said: bool,
}

impl OurState {
    pub(super) const NEW: Self = Self {
        now: XenbusState::Initialising,
        said: true,
    };

    /// Returns the state.
    pub(super) fn now(&self) -> XenbusState {
        self.now
    }

    /// Sets the state. `said` is whether xenstore has it or needs no write; otherwise the write is tried again.
    pub(super) fn set(&mut self, state: XenbusState, said: bool) {
        (self.now, self.said) = (state, said);
    }
}

impl Vbd {
    pub(super) fn publish(self: &Arc<Self>, life: &mut Life, state: XenbusState) {
        if state != life.state.now() {
            let result = advertise::publish_state(&self.device, life.state.now(), state);
            self.published(life, state, result);
        }
    }

    /// Sets this driver's state after an attempt to write it. If the write failed, it is tried again after a while.
    pub(super) fn published(self: &Arc<Self>, life: &mut Life, state: XenbusState, result: Result) {
        // The toolstack has removed our directory or made a new one: there is no reader left.
        let failed = result.err().filter(|error| *error != ENOENT);
        life.state.set(state, failed.is_none());
        if let Some(error) = failed {
            self.device
                .report(error, c"the backend's state cannot be published");
            self.kick_after(ASK_AGAIN);
        }
    }

    /// Handles a state that the toolstack wrote in our place to take the device away. The driver tries nothing more
    /// before the frontend acts.
    pub(super) fn taken_away(&self, life: &mut Life) {
        // A state that cannot be read counts as Closing, because that is what the toolstack writes.
        let there = advertise::state(&self.device).unwrap_or(XenbusState::Closing);
        life.state.set(there, true);
        self.device.note_state(there);
        life.refused = true;
    }

    /// Writes our state if an earlier write failed; returns false if it fails again. The frontend waits for the state,
    /// so no event may ever come.
    pub(super) fn say(self: &Arc<Self>, life: &mut Life) -> bool {
        if !life.state.said {
            let state = life.state.now();
            let result = advertise::publish_state(&self.device, state, state);
            self.published(life, state, result);
        }
        life.state.said
    }

    /// Reports why the frontend cannot be connected.
    pub(super) fn report_why(&self, error: &ConnectError) {
        let (code, text) = error.describe();
        let fallback = c"the frontend cannot be connected";
        self.device
            .report(code, text.as_deref().unwrap_or(fallback));
    }

    /// Reports why the frontend cannot be connected. After a shortage the connect is tried again while the frontend
    /// waits, because the frontend may not survive Closing and has done nothing wrong. After any other error the
    /// frontend has to act first.
    pub(super) fn connect_failed(self: &Arc<Self>, life: &mut Life, error: &ConnectError) {
        if error.passes() {
            // The error node of the first attempt still stands.
            if life.short_of.replace(error.reason()) != Some(error.reason()) {
                self.report_why(error);
            }
            life.retry.ran_short(local_clock());
            return;
        }
        life.short_of = None;
        self.report_why(error);
        life.retry.refused(local_clock());
        life.refused = true;
        self.publish(life, XenbusState::Closing);
    }

    pub(super) fn disk_is_bad(self: &Arc<Self>, life: &mut Life, bad: &disk::NameError) {
        let is_known = life.bad_disk == Some(bad.name) && !bad.passes;
        if is_known || life.leaving || self.unbound.load(Acquire) {
            return;
        }
        let fallback = c"the disk cannot be opened";
        self.device
            .report(bad.error, bad.text.as_deref().unwrap_or(fallback));
        if bad.passes {
            // The toolstack does not write the disk's name a second time.
            self.disk_moved.store(true, Release);
            self.kick_after(ASK_AGAIN);
            return;
        }
        life.bad_disk = Some(bad.name);
        self.publish(life, XenbusState::Closing);
    }

    /// Reports that the device below the disk is gone, or that it is back with all its openers. The guest gets no
    /// notice, because its file system does not survive a disk of no size, while it is prepared for requests that fail.
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

    /// Publishes how the disk is served, and a size that changed while connected. Returns the number of milliseconds to
    /// wait if that must be delayed, because a process may change both as often as it likes.
    pub(super) fn follow_disk(&self, life: &mut Life) -> Option<u32> {
        let connected = life.state.now() == XenbusState::Connected;
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
            Some(now) if new_status => advertise::publish_status(&self.device, now),
            _ => Ok(()),
        };
        if resized {
            let size = advertise::publish_size(&self.device, sectors);
            published = published.and(size);
        }
        match published {
            Err(error) if error != ENOENT => {
                self.device
                    .report(error, c"disk status and size cannot be published");
                Some(ASK_AGAIN)
            }
            // If the toolstack has removed our directory, there is no reader left.
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
