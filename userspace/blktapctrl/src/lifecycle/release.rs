// SPDX-License-Identifier: MIT OR Apache-2.0
//! A lease is given up: every kind of it, by the supervisor that took it or by a later one.
//!
//! There is one way. The record keeps each lease of this host ([`Hold`]) until the storage has confirmed its release,
//! so a supervisor that ends on the way leaves that to the next one, and the supervisor asks again a storage that does
//! not answer. A disk that is destroyed stays in the list until then.

use super::passthrough::until;
use super::Lifecycle;
use crate::blocking_io::{blocking_io, LIMIT};
use crate::disk::Disk;
use crate::kernel;
use crate::log::tell;
use crate::process::SOON;
use crate::record::{image_of, is_one_lease, leased, DesiredState, Hold, Leased};
use control::supervisor::What;
use control::tapdisk::{Open, Request};
use control::{Code, Failure, Target};
use lease::LeaseClaim;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

/// Time until a lease that could not be given up is tried again; it doubles.
const FIRST: Duration = Duration::from_secs(1);
/// The most that it becomes.
const MOST: Duration = Duration::from_secs(30);

impl Lifecycle {
    /// Gives up the leases of a disk whose image is closed: no process has it, or could still open it because of an
    /// unanswered request. A lease that cannot be given up now is given up later.
    pub(super) async fn give_lease_up(self: &Rc<Self>, disk: &Rc<Disk>) {
        if let Err(failure) = self.give_leases_up(disk).await {
            self.tell_left(disk, &failure, FIRST);
            self.give_lease_up_later(disk, FIRST);
        }
    }

    async fn give_leases_up(&self, disk: &Disk) -> Result<(), Failure> {
        let all = disk.record.borrow().leases().to_vec();
        if all.is_empty() {
            return Ok(());
        }
        self.has_no_io(disk, LIMIT).await?;
        self.end_term(disk).await;
        self.give_all_up(disk, all).await
    }

    /// Gives up what a disk has beside the lease of what it is about to open, or serves.
    ///
    /// # Errors
    /// One is not given up: it is tried again.
    pub(super) async fn give_others_up(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        open: Option<&Open>,
    ) -> Result<(), Failure> {
        let its = open.and_then(leased);
        let is_other =
            |leased: &Leased| its.is_none_or(|target| !is_one_lease(&leased.target, target));
        let mut others = disk.record.borrow().leases().to_vec();
        others.retain(is_other);
        self.give_all_up(disk, others).await
    }

    async fn give_all_up(&self, disk: &Disk, all: Vec<Leased>) -> Result<(), Failure> {
        let mut result = Ok(());
        for leased in all {
            result = result.and(self.give_one_up(disk, &leased.target).await);
        }
        result
    }

    /// Gives a lease up. The process of the disk does not have that image.
    ///
    /// # Errors
    /// It is not given up, as far as is known: it stays on record.
    pub(super) async fn give_one_up(&self, disk: &Disk, target: &Target) -> Result<(), Failure> {
        let image = image_of(target);
        disk.record.borrow_mut().set_hold(target, Hold::Leaving);
        self.registry.note(disk);
        let tenure = disk.lease.borrow().clone();
        let tenure = tenure.filter(|tenure| is_one_lease(&tenure.target, target));
        let keeper = tenure.as_ref().map(|tenure| tenure.keeper.clone());
        let given_up = match keeper.filter(|keeper| !keeper.has_ended()) {
            // Also if an earlier call has no answer yet: one after the other.
            Some(keeper) => blocking_io(image, LIMIT, move || keeper.give_up()).await,
            None => self.give_left_over_up(disk, target, image).await,
        };
        let given_up = match given_up {
            Err(failure) if failure.code == Code::Gone && tenure.is_some() => {
                self.give_left_over_up(disk, target, image).await
            }
            given_up => given_up,
        };
        match given_up {
            Err(failure) if failure.code != Code::Gone => {
                let place = image.display();
                let why = format!("the lease of {place} is not given up yet: {failure}");
                return Err(Failure::new(failure.code, why));
            }
            _ => {}
        }
        if tenure.is_some() {
            disk.lease.replace(None);
        }
        disk.record.borrow_mut().drop_lease(target);
        self.registry.note(disk);
        Ok(())
    }

    /// Gives up what no thread of this supervisor keeps, or lets go of the rest of a lease that is lost.
    async fn give_left_over_up(
        &self,
        disk: &Disk,
        target: &Target,
        image: &Path,
    ) -> Result<(), Failure> {
        let Some(token) = disk.record.borrow().token().map(str::to_owned) else {
            return Ok(());
        };
        let claim = LeaseClaim::new("")?.again(&token)?;
        let (how, kind) = (self.leases.borrow().clone(), target.lease().clone());
        let its = image.to_owned();
        blocking_io(image, LIMIT, move || {
            let mut lease = how(&kind, &its, claim)?;
            match lease.resume(0) {
                Ok(_) => lease.give_up(),
                Err(lost) if lost.code == Code::Gone => lease.settle(),
                Err(failure) => Err(failure),
            }
        })
        .await
    }

    /// Waits until the kernel says that no I/O of the disk's processes is under way: nothing of one that has ended, and
    /// none that has ended for this supervisor alone.
    async fn has_no_io(&self, disk: &Disk, limit: Duration) -> Result<(), Failure> {
        if disk.serving().is_ok() {
            return self.fenced(disk, limit).await;
        }
        let is_over = || {
            let node = kernel::node(&*self.registry.kernel, disk.minor)
                .map_err(|error| Failure::system("cannot ask the kernel", &error))?;
            let busy = ["fencing", "open", "live"];
            Ok(node.is_none_or(|node| !busy.contains(&node.status.state.as_str())))
        };
        let late = || {
            let why = format!(
                "I/O of the process of disk {} that ended may not be over, so its lease stays: see whether its storage answers",
                disk.minor
            );
            Failure::new(Code::Timeout, why)
        };
        until(limit, is_over, late).await
    }

    /// A process without its image may live on for as long as it likes.
    async fn end_term(&self, disk: &Disk) {
        let process = disk.process.borrow().clone();
        let Some(process) = process.filter(|process| !process.has_ended()) else {
            return;
        };
        let never = Request::Term { until: None };
        if let Err(failure) = process.ask(&never, &[], SOON).await {
            let about = disk.about().failed(&failure);
            tell!(warn, about, "disk {}: {failure}", disk.minor);
        }
    }

    /// Gives up, again and again, what a disk has on record and is not served from. A process of which it is not known
    /// whether it has the image is ended first.
    pub(crate) fn give_lease_up_later(self: &Rc<Self>, disk: &Rc<Disk>, pause: Duration) {
        if disk.record.borrow().leases().is_empty() || disk.releases.replace(true) {
            return;
        }
        let (lifecycle, disk) = (self.clone(), disk.clone());
        tokio::task::spawn_local(async move {
            let mut pause = pause;
            // The end of a disk does it itself.
            loop {
                let slept = async {
                    tokio::time::sleep(pause).await;
                    Ok(())
                };
                if disk.unless_doomed(slept).await.is_err() {
                    break;
                }
                pause = (pause * 2).clamp(FIRST, MOST);
                match lifecycle.give_unused_up(&disk).await {
                    Ok(true) => break,
                    Ok(false) => {}
                    Err(failure) => lifecycle.tell_left(&disk, &failure, pause),
                }
            }
            disk.releases.set(false);
        });
    }

    /// False if something has begun with the disk that has a word in it.
    async fn give_unused_up(self: &Rc<Self>, disk: &Rc<Disk>) -> Result<bool, Failure> {
        let _turn = disk.turn().await?;
        let (want, is_inactive, doing) = {
            let record = disk.record.borrow();
            (record.want, record.inactive.is_some(), record.doing)
        };
        if doing.is_some() {
            return Ok(false);
        }
        if want == DesiredState::Served && !is_inactive {
            let open = disk.open()?;
            self.give_others_up(disk, Some(&open)).await?;
            return Ok(true);
        }
        // Images whose leases are being given up were closed before.
        let is_closed = |leased: &Leased| leased.hold == Hold::Leaving;
        if !disk.record.borrow().leases().iter().all(is_closed) {
            self.end_process(disk).await?;
        }
        let given_up = self.give_leases_up(disk).await;
        if disk.serving().is_err() {
            self.revive_later(disk);
        }
        given_up.map(|()| true)
    }

    /// Gives up all that a disk has which is being destroyed, however long that takes, unless an administrator forgets it.
    pub(super) async fn give_up_at_the_end(&self, disk: &Disk) {
        let mut pause = FIRST;
        while let Err(failure) = self.give_leases_up(disk).await {
            self.tell_left(disk, &failure, pause);
            disk.leaves.replace(Some(failure));
            let forgotten = disk.forgotten.notified();
            if tokio::time::timeout(pause, forgotten).await.is_ok() {
                break;
            }
            pause = (pause * 2).min(MOST);
        }
        disk.leaves.replace(None);
    }

    /// Ends the wait for the lease of a disk that is being destroyed, which stays held. False if it does not wait.
    pub fn forget_lease(&self, minor: u32) -> bool {
        let disk = self.registry.get(minor);
        let disk = disk.filter(|disk| disk.leaves.borrow().is_some());
        disk.inspect(|disk| disk.forgotten.notify_one()).is_some()
    }

    fn tell_left(&self, disk: &Disk, failure: &Failure, pause: Duration) {
        let message = failure.message.clone();
        let retry_ms = pause.as_millis().try_into().unwrap_or(u64::MAX);
        let what = What::Failed { message, retry_ms };
        self.registry.events.add(Some(disk.minor), what);
    }
}
