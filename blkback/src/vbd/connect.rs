// SPDX-License-Identifier: GPL-2.0-only

//! Getting the disk, connecting the frontend to it, and what follows when its queues are through.

use super::{Life, Next, Vbd, ASK_AGAIN, ERRAND};
use crate::advertise::{Features, TAKEN_AWAY};
use crate::connect_error::ConnectError;
use crate::connection::Peer;
use crate::disk::{self, DiskOpener, Name};
use crate::linux::local_clock;
use crate::linux::task::workqueue;
use crate::linux::xen::claims::FrontendClaim;
use crate::proto::state::XenbusState;
use crate::storage::{Errand, JobOutcome, StorageJob};
use kernel::prelude::*;
use kernel::sync::atomic::{
    ordering::Acquire, ordering::Full, ordering::Relaxed, ordering::Release,
};
use kernel::sync::Arc;

impl Vbd {
    /// Hands a job that may wait for storage to the work queue for such jobs.
    pub(super) fn send(self: &Arc<Self>, life: &mut Life, job: StorageJob) {
        life.errand = Errand::Given(job);
        // There is one at a time, so it is not queued.
        let _queued = workqueue::enqueue_storage::<_, ERRAND>(self.clone());
    }

    pub(super) fn run_errand(self: &Arc<Self>) {
        let job = self.life.lock().errand.take_job();
        if let Some(job) = job {
            let outcome = job.run();
            self.life.lock().errand = Errand::Done(outcome);
            self.kick();
        }
    }

    /// Handles the outcome of the last errand.
    pub(super) fn end_errand(self: &Arc<Self>, life: &mut Life) {
        match life.errand.take_outcome() {
            None | Some(JobOutcome::Closed) => {}
            Some(JobOutcome::Prepared(Ok(()))) => life.prepared = true,
            Some(JobOutcome::Prepared(Err(error))) => self.connect_failed(life, &error),
            Some(JobOutcome::Opened(Ok(disk))) => {
                self.number.store(disk.backing.number(), Relaxed);
                self.writable.store(disk.backing.is_writable(), Relaxed);
                life.bad_disk = None;
                life.disk = Some(disk);
            }
            Some(JobOutcome::Opened(Err(bad))) => self.disk_is_bad(life, &bad),
        }
    }

    /// Starts the errand that opens the disk, once the hotplug script has named it.
    pub(super) fn open_disk(self: &Arc<Self>, life: &mut Life) {
        // Only after a write of the key: opening a device that is gone loads its driver.
        if life.errand.is_busy() || !self.disk_moved.load(Acquire) {
            return;
        }
        if let Some(disk) = &life.disk {
            self.compare_name(disk.name);
            return;
        }
        if !self.claim(life) || !self.disk_moved.xchg(false, Full) {
            return;
        }
        match disk::named(&self.device) {
            Ok(None) => {}
            Ok(Some(name)) => {
                let opener = DiskOpener {
                    device: self.device.clone(),
                    events: self.clone(),
                    attach_tap: self.attach_tap,
                };
                self.send(life, StorageJob::Open(opener, name));
            }
            Err(bad) => self.disk_is_bad(life, &bad),
        }
    }

    /// Compares the disk's name with that of the open disk, which stays: if they differ, the device reports that.
    fn compare_name(self: &Arc<Self>, open: Name) {
        self.disk_moved.store(false, Release);
        let is_other = match disk::named(&self.device) {
            Ok(name) => name.is_some_and(|name| name != open),
            Err(bad) if bad.passes => {
                self.disk_moved.store(true, Release);
                self.kick_after(ASK_AGAIN);
                false
            }
            Err(_) => true,
        };
        if is_other {
            self.device.report(
                EBUSY,
                c"another disk is named, and the one that is open is served on: detach the disk and attach it again",
            );
        }
    }

    /// True if disk and frontend are ours alone. Otherwise the device was ours before, and its life then
    /// is not over: it tells when it is.
    pub(super) fn claim(self: &Arc<Self>, life: &mut Life) -> bool {
        if life.claim.is_none() {
            let frontend = (self.device.otherend_id(), self.device.number());
            match FrontendClaim::new(frontend, self.clone()) {
                Ok(claim) => {
                    life.claim = claim;
                    if life.claim.is_some() {
                        self.show_in_debugfs();
                    }
                }
                Err(error) => {
                    self.device.report(error, c"the frontend cannot be claimed");
                    self.kick_after(ASK_AGAIN);
                }
            }
        }
        life.claim.is_some()
    }

    /// Connects, or does the step before: the pause after a failure, getting the disk ready.
    pub(super) fn connect(self: &Arc<Self>, life: &mut Life) -> Next {
        let pause = life.retry.left_ms(local_clock());
        if pause > 0 {
            self.kick_after(pause);
            return Next::Rest;
        }
        if life.errand.is_busy() {
            return Next::Rest;
        }
        if !core::mem::replace(&mut life.prepared, false) {
            if let Some(disk) = &life.disk {
                let job = StorageJob::Prepare(disk.backing.clone());
                self.send(life, job);
            }
            return Next::Rest;
        }
        match self.try_connect(life) {
            Ok(()) => {
                life.retry.connected();
                life.short_of = None;
                life.state.set(XenbusState::Connected, true);
                self.watch_for_late();
            }
            Err(ConnectError::TakenAway) => self.taken_away(life),
            Err(error) => self.connect_failed(life, &error),
        }
        Next::Look
    }

    fn try_connect(self: &Arc<Self>, life: &mut Life) -> Result<(), ConnectError> {
        let (Some(disk), Some(offer)) = (&mut life.disk, &life.offer) else {
            return Err(ConnectError::Step("the disk is not open", ENODEV));
        };
        let features = Features::read(&self.device, &*disk.backing)
            .map_err(|error| ConnectError::Store("the disk's settings cannot be read", error))?;
        let limits = features.limits();
        let connection = disk.backing.clone().connect(&Peer {
            events: self.clone(),
            totals: &self.totals,
            device: &self.device,
            limits: &limits,
            offer: &offer.offer,
            keeps_grants: features.keeps_grants(),
            reservation: Some(&offer.reservation),
        });
        let connection = connection.inspect_err(|_| offer.hold())?;
        offer.reservation.settle();
        disk.sectors = limits.sectors;
        self.totals.set_memory(connection.memory_kib());
        // A frontend that sees Connected must not find the report of an earlier attempt.
        self.device.clear_report();
        let published = features.publish(&self.device, connection.limits(), life.state.now());
        life.draining = published.is_err();
        if let (Ok(()), Ok(text)) = (published, connection.summary()) {
            self.device.tell(&text);
        }
        life.connection = Some(connection);
        published.map_err(|error| {
            if error == TAKEN_AWAY {
                return ConnectError::TakenAway;
            }
            ConnectError::Store("the disk cannot be published", error)
        })
    }

    /// Takes no more from rings that are to be given back, and lets go of them as soon as their frontend allows.
    pub(super) fn end_draining(&self, life: &mut Life) {
        if !life.draining {
            return;
        }
        if let Some(connection) = &life.connection {
            connection.end(self.ending());
        }
        self.end_connection(life);
    }

    /// Lets go of a connection that has let go of the guest; `false` if a connection has not.
    pub(super) fn end_connection(&self, life: &mut Life) -> bool {
        let Some(connection) = life.connection.take() else {
            return true;
        };
        if !connection.is_detached() {
            life.connection = Some(connection);
            return false;
        }
        life.draining = false;
        self.totals.set_memory(0);
        if let Ok(text) = self.totals.summary() {
            self.device.tell(&text);
        }
        connection.release_deferred();
        true
    }
}
