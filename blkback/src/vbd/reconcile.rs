// SPDX-License-Identifier: GPL-2.0-only

//! Looking at the world and doing what there is to do, step by step, from the first offer to the last
//! state.

use super::{Life, Next, Vbd, AGES, ASK_AGAIN, LATER, UNHEARD};
use crate::advertise;
use crate::disk;
use crate::linux::task::workqueue;
use crate::linux::xen::store;
use crate::proto::state::{
    ending, step_asking, Action, Ending, OnlineWish, Rings, View, XenbusState,
};
use crate::storage::StorageJob;
use kernel::prelude::*;
use kernel::sync::atomic::{ordering::Acquire, ordering::Full, ordering::Release};
use kernel::sync::lock::mutex::MutexGuard;
use kernel::sync::Arc;

/// Steps that one run of the work takes at most before it queues itself again.
const STEPS: u32 = 16;

impl Vbd {
    /// Looks at the device and does what there is to do.
    pub(super) fn look_and_act(self: &Arc<Self>) {
        let mut life = self.life.lock();
        for _ in 0..STEPS {
            if life.over {
                return;
            }
            self.end_errand(&mut life);
            if self.unbound.load(Acquire) {
                self.part(life);
                return;
            }
            if life.left || self.take_step(&mut life) == Next::Rest {
                return;
            }
        }
        drop(life);
        self.kick();
    }

    /// Returns whether the device is ours; looks only when the toolstack wrote the keys that decide it.
    fn is_ours(self: &Arc<Self>, life: &mut Life) -> bool {
        if life.ours || !self.disk_moved.xchg(false, Full) {
            return life.ours;
        }
        match disk::is_ours(&self.device) {
            Ok(false) => {}
            Ok(true) => {
                life.ours = true;
                // The keys that name the disk are still unread.
                self.disk_moved.store(true, Release);
            }
            Err(_) => {
                self.disk_moved.store(true, Release);
                self.kick_after(ASK_AGAIN);
            }
        }
        life.ours
    }

    fn take_step(self: &Arc<Self>, life: &mut Life) -> Next {
        if !self.is_ours(life) {
            return Next::Rest;
        }
        if self.broken.xchg(false, Full) {
            self.device.report(
                EIO,
                c"the frontend's request producer index is impossible; the ring is not served any more",
            );
        }
        if self.moved.xchg(false, Full) {
            life.refused = false;
        }
        if life.leaving {
            self.leave(life);
            return Next::Rest;
        }
        if !self.say(life) {
            return Next::Rest;
        }
        self.open_disk(life);
        self.end_draining(life);
        let action = match self.next_action(life) {
            Ok(action) => action,
            Err(error) => {
                // Xenstore does not answer (a shutdown, no memory): nothing is decided now.
                self.device.report(
                    error,
                    c"the keys of the frontend or the toolstack cannot be read",
                );
                self.kick_after(ASK_AGAIN);
                return Next::Rest;
            }
        };
        if action != Action::Connect {
            life.prepared = false;
        }
        self.act(life, action)
    }

    fn next_action(&self, life: &Life) -> Result<Action> {
        let theirs = match self.theirs.load(Acquire) {
            // The bus tells it in a moment.
            UNHEARD => return Ok(Action::Wait),
            number => XenbusState::from_number(number),
        };
        let view = View {
            ours: life.state.now(),
            theirs: match theirs {
                // The bus does not say why it could not be read.
                XenbusState::Unknown => self.frontend_state()?,
                known => known,
            },
            online: OnlineWish::Yes,
            disk: life.disk.is_some(),
            ready: life
                .disk
                .as_ref()
                .is_some_and(|disk| disk.backing.is_ready()),
            rings: match (&life.connection, life.draining) {
                (None, _) => Rings::None,
                (Some(_), false) => Rings::Served,
                (Some(_), true) => Rings::Draining,
            },
            refused: life.refused,
        };
        step_asking(view, || self.online())
    }

    /// Reads whether the toolstack keeps the device online.
    fn online(&self) -> Result<OnlineWish> {
        store::read_number(self.device.nodename(), c"online").map(OnlineWish::of)
    }

    /// Reads the frontend's state; a node that is gone or hidden from us, or that holds no state, is Unknown. Any other
    /// error says nothing about the frontend.
    fn frontend_state(&self) -> Result<XenbusState> {
        match store::read_state(self.device.otherend()) {
            Err(error) if error == ENOENT || error == EACCES => Ok(XenbusState::Unknown),
            other => other,
        }
    }

    /// Does one step.
    fn act(self: &Arc<Self>, life: &mut Life, action: Action) -> Next {
        match action {
            Action::Wait => {
                if let Some(pause) = self.follow_disk(life) {
                    self.kick_after(pause);
                }
                return Next::Rest;
            }
            Action::Offer => {
                let theirs = XenbusState::from_number(self.theirs.load(Acquire));
                // The memory that was reserved for the last offer is for this one.
                life.offer = None;
                let offered = advertise::publish_offer(&self.device, life.state.now(), theirs)
                    .map(|offer| life.offer = Some(offer));
                if offered == Err(advertise::TAKEN_AWAY) {
                    self.taken_away(life);
                    return Next::Look;
                }
                if let Some(error) = offered.err().filter(|error| *error != ENOENT) {
                    self.device.report(error, c"the offer cannot be published");
                    self.kick_after(ASK_AGAIN);
                    return Next::Rest;
                }
                self.published(life, XenbusState::InitWait, offered);
                if offered.is_err() {
                    self.publish(life, XenbusState::Closing);
                    return Next::Rest;
                }
            }
            Action::Connect => return self.connect(life),
            Action::StartClosing => self.publish(life, XenbusState::Closing),
            // How, `end_draining` says.
            Action::Disconnect => life.draining = true,
            // An earlier driver of the device may still have rings and disk.
            Action::Close | Action::Leave if !self.claim(life) => return Next::Rest,
            Action::Close => self.publish(life, XenbusState::Closed),
            Action::Leave => life.leaving = true,
            Action::Refuse => {
                self.device.report(
                    EINVAL,
                    c"the frontend's state is one that no frontend may have",
                );
                self.publish(life, XenbusState::Closing);
            }
        }
        Next::Look
    }

    /// Gives the disk back, then lets the toolstack and the bus know.
    fn leave(self: &Arc<Self>, life: &mut Life) {
        if life.errand.is_busy() {
            return;
        }
        if let Some(disk) = life.disk.take() {
            self.send(life, StorageJob::Close(disk));
            return;
        }
        life.left = true;
        life.offer = None;
        life.state.set(XenbusState::Closed, true);
        self.gone.store(true, Release);
        // Not by way of the bus, which writes nothing where it finds Closed or a state that the
        // toolstack has reset: only a write makes the watch fire in whose callback the device is
        // taken off the bus.
        if let Err(error) = advertise::touch_state(&self.device) {
            self.device.report(error, c"cannot write the state Closed");
            // Unless another write has done it in between.
            if self.gone.xchg(false, Full) {
                life.left = false;
                self.kick_after(ASK_AGAIN);
                return;
            }
        }
        self.device.note_state(XenbusState::Closed);
    }

    /// Gives back everything of a device that is not ours any more, step by step: each look resumes where the last one
    /// had to wait. Our subscription stays to the end, to tell us if the guest goes.
    fn part(self: &Arc<Self>, mut life: MutexGuard<'_, Life>) {
        if let Some(connection) = &life.connection {
            connection.end(self.ending_unbound());
        }
        if !self.end_connection(&mut life) {
            // The bus does not report the frontend's changes any more.
            self.kick_after(ASK_AGAIN);
            return;
        }
        if life.errand.is_busy() {
            return;
        }
        if let Some(disk) = life.disk.take() {
            self.send(&mut life, StorageJob::Close(disk));
            return;
        }
        if let Err(error) = advertise::close_after_unbind(&self.device) {
            self.device.report(error, c"cannot write the state Closed");
            self.kick_after(ASK_AGAIN);
            return;
        }
        life.over = true;
        life.offer = None;
        let claim = life.claim.take();
        drop(life);
        let (subscription, debug, module) = {
            let mut hold = self.hold.lock();
            let subscription = hold.subscription.take();
            (subscription, hold.debug.take(), hold.module.take())
        };
        // This waits for readers of the folder. The next device of this name may have the claim after that. The next
        // device of this name may have the claim after that.
        drop(debug);
        drop(claim);
        // An event that is being delivered still finds a life that is over. The module's end waits for that event.
        drop(subscription);
        workqueue::hasten::<_, LATER>(self.clone());
        workqueue::hasten::<_, AGES>(self.clone());
        drop(module);
    }

    /// Returns how the rings of a device that was taken from us are given back. A read error says nothing about the
    /// frontend.
    fn ending_unbound(&self) -> Ending {
        let ours = store::read_state(self.device.nodename());
        if self.device.is_vanished() || ours.is_err_and(|error| error == ENOENT) {
            return Ending::Now;
        }
        let theirs = self.frontend_state();
        theirs.map_or(Ending::Answered, |state| ending(state, true))
    }

    /// Returns how the rings of a device that is ours are given back.
    pub(super) fn ending(&self) -> Ending {
        let theirs = match self.theirs.load(Acquire) {
            UNHEARD => return Ending::Answered,
            number => XenbusState::from_number(number),
        };
        let theirs = match theirs {
            XenbusState::Unknown => self.frontend_state(),
            known => Ok(known),
        };
        theirs.map_or(Ending::Answered, |state| ending(state, false))
    }
}
