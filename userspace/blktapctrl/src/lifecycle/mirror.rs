// SPDX-License-Identifier: MIT OR Apache-2.0
//! Mirror: the supervisor has a disk copied to another image while its guest works, and then switches the disk to that.
//!
//! *Requested*: the record has the other image as a part of the disk, which no other disk gets. The supervisor asks the
//! disk's process for its progress at intervals; a new process begins the copy anew. *Equal*: each write goes to both
//! images. *Switched*: the process closes both, and says that they are the same; then the other one is on the record as
//! what comes next, as after an unpause with another image. A supervisor that finds the disk before that serves it from
//! the image that it had.

use super::commit::{check_below, check_top};
use super::handoff::check_served;
use super::respawn::{is_just_served, owes_nothing, says_nothing, AGAIN, STEP};
use super::Lifecycle;
use crate::admission::{with_mode, OtherUsers};
use crate::disk::{Disk, DiskFate};
use crate::image::{self, not_the_same, Image};
use crate::log::tell;
use crate::process::{Process, OPEN, SOON};
use crate::record::{DesiredState, DiskPart, NextImage, PartRole, PendingMirror};
use crate::rpc_client::EVER;
use control::stats::{Mirror, Mirroring};
use control::supervisor::{MirrorTo, Mode, MovedDisk, PendingOperation, What};
use control::tapdisk::{Open, Request};
use control::{Code, Driver, Failure, Target};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

impl Lifecycle {
    /// Has a disk copied to an image that is there, and then served from that; if it is `below` the one of the disk,
    /// only of what that has itself.
    ///
    /// # Errors
    /// It cannot be.
    pub async fn mirror(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        to: MirrorTo,
        below: bool,
    ) -> Result<Mirror, Failure> {
        let MirrorTo { target, rate } = to;
        let _turn = disk.turn().await?;
        self.end_pending(disk).await?;
        check_served(disk)?;
        if let Some(mirror) = disk.record.borrow().mirror.as_ref() {
            if mirror.open.target == target && mirror.below == below {
                return self.mirrored(disk);
            }
            let what = &mirror.open.target;
            let why = format!(
                "disk {0} is being copied to {what}: end that first: `tap-ctl mirror -m {0} --cancel`",
                disk.minor
            );
            return Err(Failure::new(Code::State, why));
        }
        check_not_reserved(&disk.open()?.target)?;
        check_not_reserved(&target)?;
        self.check_sole(disk, &target)?;
        if below {
            check_top(disk)?;
        }
        let mut mirror = PendingMirror {
            open: with_mode(
                Open {
                    target,
                    ..disk.open()?
                },
                Mode::Write,
            )?,
            rate,
            below,
            marked: false,
        };
        let image = self.take_beside(disk, &mut mirror).await?;
        tell(disk, &mirror, Mirror::default());
        // From now on a task follows the mirror, whatever becomes of this call.
        self.follow_mirror(disk);
        let process = disk.serving()?;
        let begun = self.begin_mirror(disk, &process, &mirror, image);
        if let Err(failure) = disk.unless_doomed(begun).await {
            // It may have begun all the same, and has the other image open.
            disk.unless_doomed(self.let_mirror_go(disk)).await?;
            let why = failure.message.clone();
            over(disk, Mirroring::Failed { why });
            return Err(failure);
        }
        self.mirrored(disk)
    }

    /// Makes the other image a part of the disk, which no other disk uses.
    async fn take_beside(
        &self,
        disk: &Disk,
        mirror: &mut PendingMirror,
    ) -> Result<Arc<Image>, Failure> {
        let image = image::of(&mirror.open).await?.ok_or_else(|| {
            Failure::invalid(format!(
                "{} is no image that a disk could be copied to: make one: `tapimg create IMAGE SIZE`",
                mirror.open.target
            ))
        })?;
        if disk.record.borrow().identity == Some(image.identity()) {
            let why = format!("{} is what the disk is served from", mirror.open.target);
            return Err(Failure::new(Code::Busy, why));
        }
        if mirror.below {
            check_below(disk, &image)?;
            mirror.marked = self.is_frozen(image.clone()).await?;
        } else {
            let admission = &self.admission;
            admission
                .check_not_frozen(Some(&image), Mode::Write)
                .await?;
        }
        let part = DiskPart {
            role: PartRole::Mirror,
            path: image.path().into(),
            identity: Some(image.identity()),
            born: image.born(),
            mode: Mode::Write,
            locked: true,
        };
        let work = |beside| {
            if beside == OtherUsers::Shared {
                let why = format!("{} is used by another disk, too", mirror.open.target);
                return Err(Failure::new(Code::Busy, why));
            }
            self.registry.change(disk, |record| {
                record.mirror = Some(mirror.clone());
                record.parts.push(part);
            })
        };
        // The image must be free as for a new disk, and must not be this disk's own either, under whatever name, unless
        // it is the backing image.
        let except = mirror.below.then_some(disk.minor);
        let admission = &self.admission;
        let admitted = admission.admit(Some(&image), Mode::Write, None, except, work);
        admitted.await.map(|()| image)
    }

    async fn begin_mirror(
        &self,
        disk: &Disk,
        process: &Process,
        mirror: &PendingMirror,
        image: Arc<Image>,
    ) -> Result<(), Failure> {
        if mirror.below {
            // The kernel has it locked, so that no process writes it.
            self.take_below(disk, self.patience.get()).await?;
        }
        let image = match mirror.below {
            true => Arc::new(image.in_spite_of_its_mark()?),
            false => image,
        };
        let given = self.given(disk, &mirror.open, Some(image)).await?;
        let question = Request::Mirror {
            open: mirror.open.clone(),
            rate: mirror.rate,
            below: mirror.below,
        };
        given.ask(process, &question, OPEN).await.map(drop)
    }

    /// The other image is not the disk's any more, nor has its process got it.
    async fn let_mirror_go(self: &Rc<Self>, disk: &Rc<Disk>) -> Result<(), Failure> {
        self.renew(disk, |record| {
            record.mirror = None;
            record.parts.retain(|part| part.role != PartRole::Mirror);
        })
        .await
    }

    /// Ends the mirror of a disk. Nothing is done to the other image after this: the process that had it has ended.
    ///
    /// # Errors
    /// The disk has it still.
    pub async fn end_mirror(self: &Rc<Self>, disk: &Rc<Disk>) -> Result<Mirror, Failure> {
        let _turn = disk.turn().await?;
        self.end_pending(disk).await?;
        if disk.record.borrow().mirror.is_some() {
            let let_go = self.let_mirror_go(disk);
            disk.unless_doomed(let_go).await?;
            over(disk, Mirroring::Ended);
        }
        self.mirrored(disk)
    }

    /// How far it is, or how the last one has ended, as far as this supervisor knows.
    ///
    /// # Errors
    /// There was none.
    pub fn mirrored(&self, disk: &Disk) -> Result<Mirror, Failure> {
        let known = disk.mirrored.borrow().clone();
        // The task that follows it has not reported yet how it has ended.
        let runs = disk.record.borrow().mirror.is_some() || disk.mirrors.get();
        let is_over =
            |mirror: &Mirror| !matches!(mirror.state, Mirroring::Copying | Mirroring::Same);
        match known {
            Some(mirror) if runs || is_over(&mirror) => Ok(mirror),
            Some(mirror) => Ok(Mirror {
                state: Mirroring::Ended,
                ..mirror
            }),
            None if runs => Ok(Mirror::default()),
            None => Err(Failure::new(
                Code::State,
                format!("disk {} is not copied to another image", disk.minor),
            )),
        }
    }

    /// Sees to the mirror that is on record, until it is over.
    pub fn follow_mirror(self: &Rc<Self>, disk: &Rc<Disk>) {
        if disk.record.borrow().mirror.is_none() || disk.mirrors.replace(true) {
            return;
        }
        let (lifecycle, disk) = (self.clone(), disk.clone());
        tokio::task::spawn_local(async move {
            while disk.fate() == DiskFate::Stays && disk.record.borrow().mirror.is_some() {
                let looked = disk.unless_doomed(lifecycle.look_at_mirror(&disk)).await;
                let pause = match looked {
                    Ok(()) => STEP,
                    Err(failure) => {
                        tell!(
                            warn,
                            disk.about().failed(&failure),
                            "disk {}: {failure}",
                            disk.minor
                        );
                        AGAIN
                    }
                };
                tokio::time::sleep(pause).await;
            }
            disk.mirrors.set(false);
        });
    }

    /// Does what is to be done about a mirror now.
    async fn look_at_mirror(self: &Rc<Self>, disk: &Rc<Disk>) -> Result<(), Failure> {
        let _turn = disk.turn().await?;
        let (mirror, part) = {
            let record = disk.record.borrow();
            let mut parts = record.parts.iter();
            let part = parts.find(|part| part.role == PartRole::Mirror).cloned();
            (record.mirror.clone(), part)
        };
        let Some(mirror) = mirror.filter(|_| is_just_served(disk)) else {
            return Ok(());
        };
        let Some(part) = part else {
            // Another image is served by now.
            return self.mirror_is_over(disk, Mirroring::Ended).await;
        };
        let Ok(process) = disk.serving() else {
            return Ok(());
        };
        let now = match process.stats(SOON).await {
            Ok(stats) => stats.mirror,
            // One that does not answer in time may do so later.
            Err(_) => return Ok(()),
        };
        let state = now.as_ref().map(|now| now.state.clone());
        match state {
            Some(Mirroring::Copying) => {
                tell(disk, &mirror, now.unwrap_or_default());
                Ok(())
            }
            Some(Mirroring::Same) => {
                tell(disk, &mirror, now.unwrap_or_default());
                self.move_to(disk, &mirror, &part).await
            }
            Some(over @ Mirroring::Failed { .. }) => self.mirror_is_over(disk, over).await,
            // It has another process, or was paused.
            None | Some(Mirroring::Ended | Mirroring::Complete) => {
                self.mirror_again(disk, &process, &mirror, &part).await
            }
        }
    }

    async fn mirror_again(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        process: &Process,
        mirror: &PendingMirror,
        part: &DiskPart,
    ) -> Result<(), Failure> {
        let begun = async {
            let image = image_of(mirror, part).await?;
            self.begin_mirror(disk, process, mirror, image).await
        };
        match begun.await {
            Ok(()) => Ok(()),
            Err(failure) if says_nothing(&failure) => Ok(()),
            Err(failure) => {
                let why = failure.message;
                self.mirror_is_over(disk, Mirroring::Failed { why }).await
            }
        }
    }

    /// Removes the mirror from the record when the process does nothing more to the other image. On an error the caller
    /// repeats this.
    async fn mirror_is_over(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        outcome: Mirroring,
    ) -> Result<(), Failure> {
        let mirror = disk.record.borrow().mirror.clone();
        self.let_mirror_go(disk).await?;
        over(disk, outcome.clone());
        if let Some(mirror) = mirror {
            let target = mirror.open.target;
            let what = What::Mirrored { target, outcome };
            self.registry.events.add(Some(disk.minor), what);
        }
        Ok(())
    }

    /// Switches the disk to the other image, because both are equal.
    async fn move_to(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        mirror: &PendingMirror,
        part: &DiskPart,
    ) -> Result<(), Failure> {
        let image = image_of(mirror, part).await?;
        owes_nothing(disk).await?;
        // Another user may have come to the disk's old image: a guest that migrates, and resumes there.
        self.check_followed(disk, &mirror.open.target)?;
        self.begin(disk, PendingOperation::Mirror)?;
        let begun = Instant::now();
        match self.close_both(disk, mirror, image).await {
            Ok(()) => self.moved(disk, Some(begun.elapsed())).await,
            Err(failure) if disk.record.borrow().next.is_some() => {
                // Only the next process finds out whether the disk is served from that.
                self.revive_later(disk);
                Err(failure)
            }
            Err(failure) => self.stay(disk, &failure).await,
        }
    }

    /// Has both images closed, and the other one served.
    async fn close_both(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        mirror: &PendingMirror,
        image: Arc<Image>,
    ) -> Result<(), Failure> {
        let lost = self.close_image(disk, EVER).await?;
        let told = disk.serving()?.stats(SOON).await?.mirror;
        if told.is_none_or(|told| told.state != Mirroring::Complete) {
            let why = "the other image was not the same when the disk was closed";
            return Err(lost.unwrap_or_else(|| Failure::new(Code::State, why)));
        }
        let image = self.thaw(mirror, image).await?;
        // The copy may have read old data where the old image has lost new data. The process that the guest learns of that
        // from stays: another process gets other memory with another image.
        let is_told = lost.is_none() && owes_nothing(disk).await.is_ok();
        if is_told {
            self.end_paused(disk).await?;
        }
        let next = NextImage {
            open: mirror.open.clone(),
            identity: Some(image.identity()),
            born: image.born(),
            parts: Vec::new(),
            files: disk.record.borrow().files.clone(),
            committed: self.registry.executed(disk)?,
        };
        self.registry
            .change(disk, |record| record.next = Some(next))?;
        disk.next_image.replace(Some(image));
        self.switch(disk).await
    }

    /// Completes the switch to the other image, and removes the write permission of the old one.
    async fn moved(&self, disk: &Disk, pause: Option<Duration>) -> Result<(), Failure> {
        let marked = self.freeze_old(disk).await;
        let from = disk.open()?.target;
        self.take_next(disk);
        let mirror = disk.record.borrow_mut().mirror.take();
        self.end_of_verb(disk, DesiredState::Served);
        if let Some(mirror) = mirror {
            let told = disk.mirrored.borrow().clone().unwrap_or_default();
            tell(disk, &mirror, told);
        }
        over(disk, Mirroring::Complete);
        let micros = |pause: Duration| pause.as_micros().try_into().unwrap_or(u64::MAX);
        let what = What::Moved(MovedDisk {
            from,
            to: disk.open()?.target,
            marked,
            pause_us: pause.map(micros),
        });
        self.registry.events.add(Some(disk.minor), what);
        Ok(())
    }

    /// The disk is served from the image that it has, and the other one is not its own any more.
    async fn stay(self: &Rc<Self>, disk: &Rc<Disk>, why: &Failure) -> Result<(), Failure> {
        self.freeze_again(disk).await;
        disk.drop_next();
        let outcome = Mirroring::Failed {
            why: why.message.clone(),
        };
        // Whichever image is served now, the disk gets a new process afterwards.
        let told = self.mirror_is_over(disk, outcome).await;
        self.end_of_verb(disk, DesiredState::Served);
        told
    }

    /// Finishes what had begun when both were the same, or undoes it.
    pub(super) async fn finish_mirror(self: &Rc<Self>, disk: &Rc<Disk>) -> Result<(), Failure> {
        let why = if disk.record.borrow().next.is_some() {
            match self.switch(disk).await {
                Ok(()) => return self.moved(disk, None).await,
                Err(failure) if disk.record.borrow().next.is_some() => return Err(failure),
                Err(failure) => failure,
            }
        } else {
            // A question of an earlier supervisor may be on its way, so what it led to must be over.
            self.close_image(disk, EVER).await?;
            let why = "the supervisor ended before the other image was served";
            Failure::new(Code::Gone, why)
        };
        self.stay(disk, &why).await
    }

    /// Completes a verb that has begun; then it is known from which image the disk is served.
    async fn end_pending(self: &Rc<Self>, disk: &Rc<Disk>) -> Result<(), Failure> {
        let patience = self.patience.get();
        disk.unless_doomed(self.finish(disk, patience)).await
    }

    /// The disk alone has its image, and what it is copied to could be a disk's.
    fn check_sole(&self, disk: &Disk, target: &Target) -> Result<(), Failure> {
        if target.driver().has_memory() || target.driver() == Driver::Null {
            return Err(Failure::invalid(format!(
                "{target} does not outlive the disk: give an image"
            )));
        }
        self.check_followed(disk, target)
    }
}

/// The other image, which is the one that it was.
pub(super) async fn image_of(
    mirror: &PendingMirror,
    part: &DiskPart,
) -> Result<Arc<Image>, Failure> {
    let image = image::of(&mirror.open).await?;
    let image = image.ok_or_else(|| Failure::invalid("there is no image"))?;
    match image.is(part.identity, part.born) {
        true => Ok(image),
        false => Err(not_the_same(&image)),
    }
}

/// How far it is.
fn tell(disk: &Disk, mirror: &PendingMirror, now: Mirror) {
    disk.mirrored.replace(Some(Mirror {
        to: Some(mirror.open.target.clone()),
        ..now
    }));
}

/// Sets the state of the mirror that later answers show.
fn over(disk: &Disk, state: Mirroring) {
    let mut told = disk.mirrored.borrow().clone().unwrap_or_default();
    told.state = state;
    disk.mirrored.replace(Some(told));
}

/// Refuses a target with a reservation or a lease of sanlock, because it is of one image, and a disk that switches to
/// another one would have both, or none, in between.
fn check_not_reserved(target: &Target) -> Result<(), Failure> {
    match target.lease().is_of_host() {
        false => Ok(()),
        true => Err(Failure::unsupported(format!(
            "{target} has a reservation or a lease of sanlock's, which a copy does not take along: detach the disk, use tapimg, and attach the \
             other image with a lease of its own"
        ))),
    }
}
