// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pauses and resumes a disk, perhaps with another image.

use super::passthrough::until;
use super::respawn::owes_nothing;
use super::Lifecycle;
use crate::admission::{beside_others, check_files, with_mode};
use crate::disk::Disk;
use crate::image::not_the_same;
use crate::log::tell;
use crate::ram_files;
use crate::record::{DesiredState, NextImage};
use control::supervisor::{PendingOperation, What};
use control::tapdisk::{self, Open, Request, State};
use control::{Code, Failure, Target};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

/// Whether a request may still be carried out: its process lives, and has not answered.
fn is_open_question(failure: &Failure, disk: &Disk) -> bool {
    failure.code == Code::Timeout && disk.serving().is_ok()
}

impl Lifecycle {
    /// Stops serving a disk.
    ///
    /// # Errors
    /// Its process does not answer: it may pause later, and the same verb again waits for that.
    pub async fn pause(self: &Rc<Self>, disk: &Rc<Disk>, limit: Duration) -> Result<(), Failure> {
        let _turn = disk.turn().await?;
        self.make_way(disk, PendingOperation::Pause, limit).await?;
        let (want, doing) = {
            let record = disk.record.borrow();
            (record.want, record.doing)
        };
        match (want, doing) {
            (DesiredState::Paused, None) => return Ok(()),
            (DesiredState::Idle, None) => disk.open().map(drop)?,
            _ => {}
        }
        // From now on a process that dies is not replaced: nothing is to be served.
        self.begin(disk, PendingOperation::Pause)?;
        disk.unless_doomed(self.finish_pause(disk, limit)).await
    }

    pub(super) async fn finish_pause(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        limit: Duration,
    ) -> Result<(), Failure> {
        let lost = self.close_image(disk, limit).await?;
        self.give_lease_up(disk).await;
        {
            // The verb that resumes the disk names its image.
            let mut record = disk.record.borrow_mut();
            (record.inactive, record.passed_on) = (None, None);
        }
        self.end_of_verb(disk, DesiredState::Paused);
        self.registry.events.add(Some(disk.minor), What::Paused);
        lost.map_or(Ok(()), Err)
    }

    /// Has the image of a disk closed, whose process keeps the node. Returns the reason, if not all data could be
    /// flushed.
    ///
    /// # Errors
    /// It is not closed, or that is not known.
    pub(super) async fn close_image(
        &self,
        disk: &Disk,
        limit: Duration,
    ) -> Result<Option<Failure>, Failure> {
        let mut lost = None;
        if let Ok(process) = disk.serving() {
            match process.ask(&Request::Pause, &[], limit).await {
                Ok(_) => {}
                Err(failure) if process.has_died(&failure).await => {
                    self.fenced(disk, limit).await?;
                }
                Err(failure) if failure.code == Code::Timeout => return Err(failure),
                // An earlier question may have paused it, and the process may have found when it closed the image that
                // some data did not reach the storage.
                Err(failure) => match process.status().await?.state {
                    State::Running => return Err(failure),
                    _ if failure.code == Code::State => {}
                    _ => lost = Some(failure),
                },
            }
        } else {
            self.fenced(disk, limit).await?;
        }
        self.take_from_kernel(disk, limit).await?;
        disk.serves.replace(None);
        Ok(lost)
    }

    /// Waits until the I/O of a process that is dead is over: what it had waits in the kernel, and the
    /// image does not change any more.
    pub(super) async fn fenced(&self, disk: &Disk, limit: Duration) -> Result<(), Failure> {
        let is_over = || self.is_fencing(disk.minor).map(|is_fencing| !is_fencing);
        let late = || {
            Failure::new(
                Code::Timeout,
                format!(
                    "I/O of the process of disk {} that ended may not be over: what went over a network gets a minute to settle, so wait; if it takes longer, see whether its storage answers",
                    disk.minor
                ),
            )
        };
        until(limit, is_over, late).await
    }

    /// Serves a paused disk again, perhaps from another image.
    ///
    /// # Errors
    /// It cannot be: then it is paused, and has the image that it had. Or its process does not answer:
    /// the same verb again waits for that.
    pub async fn unpause(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        target: Option<Target>,
        files: Vec<PathBuf>,
        may_shrink: bool,
    ) -> Result<tapdisk::Disk, Failure> {
        check_files(&files)?;
        let _turn = disk.turn().await?;
        let patience = self.patience.get();
        self.make_way(disk, PendingOperation::Unpause, patience)
            .await?;
        if disk.doing() == Some(PendingOperation::Unpause) {
            let leads_to = self.leads_to(disk)?;
            if target
                .as_ref()
                .is_some_and(|target| *target != leads_to.target)
            {
                // First it must be known which image is served.
                let before = disk.unless_doomed(self.finish_unpause(disk)).await;
                before?;
            } else {
                return disk.unless_doomed(self.finish_unpause(disk)).await;
            }
        }
        let others =
            "it did not have its image for a while, and another program may have changed that";
        if target.is_none() && disk.record.borrow().inactive.is_some() {
            self.lose_marks(disk, others)?;
            return self.take_anyway(disk).await;
        }
        if disk.record.borrow().want != DesiredState::Paused {
            return Err(Failure::new(
                Code::State,
                format!("disk {} is not paused", disk.minor),
            ));
        }
        self.lose_marks(disk, others)?;
        match target {
            Some(target) => self.begin_with(disk, target, files, may_shrink).await?,
            None => self.registry.change(disk, |record| {
                record.doing = Some(PendingOperation::Unpause);
                if !files.is_empty() {
                    record.files = files;
                }
                if let Some(open) = &mut record.open {
                    open.may_shrink = may_shrink;
                }
            })?,
        }
        disk.unless_doomed(self.finish_unpause(disk)).await
    }

    /// Returns the image from which the disk is to be served.
    pub(super) fn leads_to(&self, disk: &Disk) -> Result<Open, Failure> {
        let next = disk.record.borrow().next.clone();
        next.map_or_else(|| disk.open(), |next| Ok(next.open))
    }

    /// Begins to serve another image. Until it is served, both are the disk's.
    async fn begin_with(
        &self,
        disk: &Disk,
        target: Target,
        files: Vec<PathBuf>,
        may_shrink: bool,
    ) -> Result<(), Failure> {
        let (mode, vbd, files) = {
            let record = disk.record.borrow();
            let named_before = files.is_empty().then(|| record.files.clone());
            let files = named_before.unwrap_or(files);
            (record.mode, record.vbd.clone(), files)
        };
        let mut open = disk.open()?;
        open.target = target;
        open.may_shrink = may_shrink;
        let open = with_mode(open, mode)?;
        let (image, _pinned) = self.image_to_serve(&open, mode).await?;
        // Parts of the image that is served no more leave the record with it.
        if !disk.record.borrow().parts.is_empty() {
            disk.unless_doomed(self.end_paused(disk)).await?;
        }
        let committed = self.registry.executed(disk)?;
        let work = |beside| {
            let next = NextImage {
                open: beside_others(open, beside)?,
                identity: image.as_ref().map(|image| image.identity()),
                born: image.as_ref().and_then(|image| image.born()),
                parts: Vec::new(),
                files,
                committed,
            };
            self.registry.change(disk, |record| {
                record.doing = Some(PendingOperation::Unpause);
                record.next = Some(next);
            })
        };
        self.admission
            .admit(image.as_ref(), mode, vbd.as_deref(), Some(disk.minor), work)
            .await?;
        disk.next_image.replace(image);
        Ok(())
    }

    pub(super) async fn finish_unpause(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
    ) -> Result<tapdisk::Disk, Failure> {
        let next = disk.record.borrow().next.clone();
        let served = match &next {
            Some(next) => self.serve_next(disk, next).await,
            None => self.serve(disk).await,
        };
        match served {
            Ok(what) => {
                self.take_next(disk);
                disk.allow_shrinking(false);
                self.end_of_verb(disk, DesiredState::Served);
                self.registry.events.add(Some(disk.minor), What::Unpaused);
                Ok(what)
            }
            Err(failure) if is_open_question(&failure, disk) => Err(failure),
            Err(failure) => self.end_unpause(disk, next, failure).await,
        }
    }

    /// The disk is not served: it is paused again, with the image that it had.
    async fn end_unpause(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        next: Option<NextImage>,
        failure: Failure,
    ) -> Result<tapdisk::Disk, Failure> {
        if let Ok(process) = disk.serving() {
            // One that has just died counts as living for a moment.
            if !process.has_died(&failure).await && failure.code == Code::Gone {
                // It had the question, and its answer is lost.
                self.end_process(disk).await?;
            }
        }
        let rests = async {
            let limit = self.patience.get();
            let Some(next) = next else {
                self.take_from_kernel(disk, limit).await?;
                return Ok(false);
            };
            // An earlier question may be on its way, and it would serve the other image yet. But the guest learns of an
            // error that it is owed from this process alone.
            let owes = matches!(owes_nothing(disk).await, Err(owes) if owes.code == Code::State);
            if !owes {
                self.end_process(disk).await?;
            }
            let was_served = self.was_served(disk, &next, limit).await?;
            if was_served {
                self.end_process(disk).await?;
            }
            Ok(was_served)
        };
        let was_served = rests.await.inspect_err(|_: &Failure| {
            tell!(
                warn,
                disk.about().failed(&failure),
                "disk {}: {failure}",
                disk.minor
            );
        })?;
        if was_served {
            // Writes of the guest since then are in the new image.
            self.take_next(disk);
            disk.allow_shrinking(false);
            self.end_of_verb(disk, DesiredState::Served);
            self.registry.events.add(Some(disk.minor), What::Unpaused);
            self.revive_later(disk);
        } else {
            disk.record.borrow_mut().next = None;
            disk.drop_next();
            disk.allow_shrinking(false);
            self.give_lease_up(disk).await;
            self.end_of_verb(disk, DesiredState::Paused);
        }
        Err(failure)
    }

    /// Whether something may have been answered from the next image of a disk, which no process serves any more. The
    /// kernel gives up the image first, so that it does nothing there either.
    pub(super) async fn was_served(
        &self,
        disk: &Disk,
        next: &NextImage,
        limit: Duration,
    ) -> Result<bool, Failure> {
        self.take_from_kernel(disk, limit).await?;
        // If the kernel does not say, it may have been: continuing there loses nothing.
        Ok(self.registry.executed(disk).ok() != Some(next.committed))
    }

    pub(super) async fn serve_next(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        next: &NextImage,
    ) -> Result<tapdisk::Disk, Failure> {
        let known = disk.next_image.borrow().clone();
        let image = match known {
            Some(image) => Some(image),
            None => {
                let image = self.registry.image_of(&next.open).await?;
                if let Some(image) = image.as_ref().filter(|i| !i.is(next.identity, next.born)) {
                    return Err(not_the_same(image));
                }
                image
            }
        };
        disk.next_image.replace(image.clone());
        ram_files::prepare(&self.registry.folder, disk.minor, &next.open.target)?;
        let served = self.bring_up(disk, &next.open, image).await?;
        self.started(disk).await;
        Ok(served)
    }

    /// The image that an unpause led to is the disk's.
    pub(super) fn take_next(&self, disk: &Disk) {
        let mut record = disk.record.borrow_mut();
        if let Some(next) = record.next.take() {
            record.open = Some(next.open);
            (record.identity, record.born) = (next.identity, next.born);
            record.parts = next.parts;
            record.files = next.files;
            disk.state.replace(disk.next_state.take());
            disk.image.replace(disk.next_image.take());
        }
    }
}
