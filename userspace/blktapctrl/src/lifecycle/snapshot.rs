// SPDX-License-Identifier: MIT OR Apache-2.0
//! Snapshot: a disk switches to a new image over its present one, which keeps the disk's content of that moment.
//!
//! *Made*: the supervisor makes an empty file, of which no other file is lost, and the disk's process writes there that
//! its backing image is the present one, while it serves that. *Closed*: the process finishes what it has and makes it
//! durable, and requests wait in the kernel. *Switched*: the new image is on the record, and a process is given it; its
//! parent may be had because the disk was served from that. *Marked*: the supervisor removes the parent's write
//! permission, or makes a record of a device.
//!
//! A supervisor that ends when it has made the file, before the record has it, leaves the file empty. After that, until
//! the record has the next image, the disk is that of the old image: a supervisor that finds it in between serves the
//! old image, and removes the new file. From then on it is served from the new one, unless that cannot be and no
//! request was answered from it: then it is taken back, on the record first.

use super::handoff::check_served;
use super::key;
use super::respawn::owes_nothing;
use super::snapshot_group::SnapshotBarrier;
use super::{of_a_process, Lifecycle};
use crate::admission::with_mode;
use crate::blocking_io::{blocking_io, LIMIT};
use crate::disk::Disk;
use crate::image;
use crate::log::tell;
use crate::overlay;
use crate::process::OPEN;
use crate::record::{parents, DesiredState, NextImage, PendingOverlay};
use crate::rpc_client::EVER;
use control::supervisor::{Mode, PendingOperation, Snapshot, What};
use control::tapdisk::{Open, Request};
use control::{Code, Driver, Failure, LeaseKind, Target};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

impl Lifecycle {
    /// Switches a disk to a new image over the one that is served.
    ///
    /// # Errors
    /// It cannot: it is served as it was.
    pub async fn snapshot(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        target: Target,
    ) -> Result<Snapshot, Failure> {
        let _turn = disk.turn().await?;
        self.finish_before(disk).await?;
        match self.taken_before(disk, &target).await {
            Some(taken) => Ok(taken),
            None => self.take_snapshot(disk, target, None).await,
        }
    }

    /// Takes a snapshot, perhaps together with those of others. The caller has the turn, and has finished what was
    /// begun before.
    pub(super) async fn take_snapshot(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        target: Target,
        others: Option<&SnapshotBarrier>,
    ) -> Result<Snapshot, Failure> {
        check_served(disk)?;
        self.check_image(disk, &target)?;
        let made = self.begin_snapshot(disk, target).await?;
        let taken = disk.unless_doomed(self.go_on_in(disk, &made, others)).await;
        match taken {
            Ok(taken) => Ok(taken),
            Err(failure) if disk.record.borrow().next.is_some() => {
                // Only the next process finds out whether the disk is served from that.
                self.revive_later(disk);
                Err(failure)
            }
            Err(failure) => {
                // The others do not wait for what comes now.
                if let Some(others) = others {
                    others.fail(&Failure::new(
                        failure.code,
                        format!("disk {}: {failure}", disk.minor),
                    ));
                }
                let undone = self.undo_snapshot(disk, &failure);
                disk.unless_doomed(undone).await?;
                let why = format!("disk {} is served as before: {failure}", disk.minor);
                Err(of_a_process(Failure::new(failure.code, why)))
            }
        }
    }

    /// Finishes a snapshot that was begun, or undoes it.
    pub(super) async fn finish_snapshot(self: &Rc<Self>, disk: &Rc<Disk>) -> Result<(), Failure> {
        let why = if disk.record.borrow().next.is_some() {
            match self.switch(disk).await {
                Ok(()) => return self.complete(disk, None).await.map(drop),
                Err(failure) if disk.record.borrow().next.is_some() => return Err(failure),
                Err(failure) => failure,
            }
        } else {
            // A question of an earlier supervisor may be on its way, so what it led to must be over.
            self.close_image(disk, EVER).await?;
            Failure::new(
                Code::Gone,
                "the supervisor ended before the new image was served",
            )
        };
        self.undo_snapshot(disk, &why).await
    }

    /// Checks the images: the present one must be able to be a parent and be used by no other disk, and the new one
    /// must be able to have a backing image.
    fn check_image(&self, disk: &Disk, target: &Target) -> Result<(), Failure> {
        if !matches!(target.driver(), Driver::Qcow2 | Driver::Vhd) {
            return Err(Failure::invalid(format!(
                "{target} cannot have a backing image: use qcow2 or vhd"
            )));
        }
        if target.key().is_some() {
            return Err(Failure::unsupported(format!(
                "{target} would be a new image, and none is made that is encrypted: remove key="
            )));
        }
        key::must_stay_secret(&disk.open()?.target, "the new image")?;
        // Options of the disk, unlike those of its image, stay as they were.
        with_mode(Open::new(target.clone()), Mode::Write)?;
        self.check_followed(disk, target)
    }

    /// Checks that the disk alone uses its image, and may switch to another one.
    pub(super) fn check_followed(&self, disk: &Disk, target: &Target) -> Result<(), Failure> {
        let record = disk.record.borrow();
        let Some(open) = &record.open else {
            return Ok(());
        };
        let refuse = |code, why: &str| {
            let why = format!("disk {} is served from {}: {why}", disk.minor, open.target);
            Err(Failure::new(code, why))
        };
        if open.target.path().is_none() {
            return refuse(
                Code::Unsupported,
                "that is no image, so no other one can follow it",
            );
        }
        if record.mode != Mode::Write {
            let why = "only an image that one guest writes (mode w) can be followed by another";
            return refuse(Code::Unsupported, why);
        }
        if *open.target.lease() != LeaseKind::Lock || *target.lease() != LeaseKind::Lock {
            let why = "its lease is of that image, which other hosts could write once it is given up: detach the disk, use tapimg, and attach the new image with a lease of its own";
            return refuse(Code::Unsupported, why);
        }
        let same = |other: &&Rc<Disk>| {
            other.minor != disk.minor && other.record.borrow().identity == record.identity
        };
        let left = self.registry.left_alone();
        let left = left
            .iter()
            .find(|left| left.peek.identity == record.identity);
        let other = self
            .registry
            .all()
            .iter()
            .find(same)
            .map(|other| other.name());
        match other.or_else(|| left.map(|left| format!("tap disk {}", left.minor))) {
            Some(other) => {
                let why = format!(
                    "{other} has that image, too, and would not see the writes from then on: detach it"
                );
                refuse(Code::Busy, &why)
            }
            None => Ok(()),
        }
    }

    /// Makes the new file, and writes down that it is to be served.
    async fn begin_snapshot(&self, disk: &Disk, target: Target) -> Result<PendingOverlay, Failure> {
        let open = Open {
            target,
            // No other disk has it.
            shared: false,
            ..disk.open()?
        };
        let parent = self.image(disk).await?;
        let (Some(parent), Some(path)) = (parent, place(&open)) else {
            return Err(Failure::invalid("there is no image"));
        };
        let theirs = path.clone();
        let image = blocking_io(&path, LIMIT, move || overlay::make(&theirs, &parent)).await?;
        let image = Arc::new(image);
        let made = PendingOverlay {
            open,
            identity: Some(image.identity()),
            born: image.born(),
        };
        let vbd = disk.record.borrow().vbd.clone();
        let work = |_| {
            // A verb that takes the disk away in between has recorded that.
            disk.stays()?;
            self.registry.change(disk, |record| {
                record.doing = Some(PendingOperation::Snapshot);
                record.overlay = Some(made.clone());
            })
        };
        let minor = Some(disk.minor);
        let admission = &self.admission;
        let begun = admission.admit(Some(&image), Mode::Write, vbd.as_deref(), minor, work);
        if let Err(failure) = begun.await {
            take_away(disk, &made).await;
            return Err(failure);
        }
        disk.next_image.replace(Some(image));
        Ok(made)
    }

    async fn go_on_in(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        made: &PendingOverlay,
        others: Option<&SnapshotBarrier>,
    ) -> Result<Snapshot, Failure> {
        owes_nothing(disk).await?;
        self.fill(disk, made).await?;
        if let Some(others) = others {
            others.ready(disk.minor).await?;
        }
        let begun = Instant::now();
        // However long that takes: what the guest waits for then, it waits for in any case.
        if let Some(lost) = self.close_image(disk, EVER).await? {
            return Err(lost);
        }
        // It may have learnt that only now.
        owes_nothing(disk).await?;
        let _waits = match others {
            Some(others) => Some(others.arrive(disk).await?),
            None => None,
        };
        // Parts of the image that is served no more leave the record with it. And one that has ended makes way for the
        // next.
        if !disk.record.borrow().parts.is_empty() || disk.serving().is_err() {
            self.end_paused(disk).await?;
        }
        let next = NextImage {
            open: made.open.clone(),
            identity: made.identity,
            born: made.born,
            parts: Vec::new(),
            files: disk.record.borrow().files.clone(),
            committed: self.registry.executed(disk)?,
        };
        self.registry
            .change(disk, |record| record.next = Some(next))?;
        self.switch(disk).await?;
        self.complete(disk, Some(begun.elapsed())).await
    }

    /// Makes the process that serves the image write into the new one that this is its backing image.
    async fn fill(&self, disk: &Disk, made: &PendingOverlay) -> Result<(), Failure> {
        let process = disk.serving()?;
        let image = disk.next_image.borrow().clone();
        let given = self.given(disk, &made.open, image).await?;
        let target = made.open.target.clone();
        let question = Request::Overlay { target };
        given.ask(&process, &question, OPEN).await?;
        match place(&made.open) {
            Some(path) => blocking_io(&path.clone(), LIMIT, move || overlay::keep(&path)).await,
            None => Ok(()),
        }
    }

    /// Switches the disk to the new image, which its record names already. If that fails, the record names the old
    /// image again, unless a request was answered from the new one.
    pub(super) async fn switch(self: &Rc<Self>, disk: &Rc<Disk>) -> Result<(), Failure> {
        let Some(next) = disk.record.borrow().next.clone() else {
            return Ok(());
        };
        let Err(failure) = self.serve_next(disk, &next).await else {
            return Ok(());
        };
        // The process that had the question may still do it, and the kernel without it.
        self.end_process(disk).await?;
        if self.was_served(disk, &next, EVER).await? {
            tell!(
                warn,
                disk.about().failed(&failure),
                "disk {}: {failure}",
                disk.minor
            );
            self.revive_later(disk);
            return Ok(());
        }
        // A supervisor that finds this must not serve the new image once the old one is served.
        self.registry.change(disk, |record| record.next = None)?;
        disk.drop_next();
        Err(failure)
    }

    /// Completes the switch to the new image, and removes the write permission of the one below it.
    async fn complete(&self, disk: &Disk, pause: Option<Duration>) -> Result<Snapshot, Failure> {
        let marked = self.freeze_old(disk).await;
        let parent = disk.open()?.target;
        self.take_next(disk);
        disk.record.borrow_mut().overlay = None;
        self.end_of_verb(disk, DesiredState::Served);
        let micros = |pause: Duration| pause.as_micros().try_into().unwrap_or(u64::MAX);
        let taken = Snapshot {
            minor: disk.minor,
            target: disk.open()?.target,
            parent: parent.path().unwrap_or(Path::new("/")).into(),
            marked,
            pause_us: pause.map(micros),
        };
        let what = What::Snapshot(taken.clone());
        self.registry.events.add(Some(disk.minor), what);
        Ok(taken)
    }

    /// Takes the new image away that was made for a disk, unless that may have been served from it.
    pub(super) async fn take_unserved_away(&self, disk: &Disk) {
        let made = {
            let mut record = disk.record.borrow_mut();
            match record.next {
                Some(_) => None,
                None => record.overlay.take(),
            }
        };
        if let Some(made) = made {
            take_away(disk, &made).await;
        }
    }

    /// The disk is served from the image that it has, and nothing is left of the new one.
    async fn undo_snapshot(self: &Rc<Self>, disk: &Rc<Disk>, why: &Failure) -> Result<(), Failure> {
        let served = self.serve_again(disk).await;
        disk.drop_next();
        self.take_unserved_away(disk).await;
        self.end_of_verb(disk, DesiredState::Served);
        let why = why.message.clone();
        let what = What::SnapshotUndone { why };
        self.registry.events.add(Some(disk.minor), what);
        self.or_revive(disk, served).await;
        Ok(())
    }
}

fn place(open: &Open) -> Option<PathBuf> {
    open.target.path().map(Path::to_owned)
}

/// Takes a file away that was made, and is not served. A file that stays does no harm.
async fn take_away(disk: &Disk, made: &PendingOverlay) {
    let Some(path) = place(&made.open) else {
        return;
    };
    let (theirs, identity, born) = (path.clone(), made.identity, made.born);
    let removed = blocking_io(&path, LIMIT, move || {
        overlay::remove(&theirs, identity, born)
    });
    if let Err(failure) = removed.await {
        tell!(warn, disk.about().failed(&failure), "{failure}");
    }
}

impl Lifecycle {
    /// Returns the snapshot if the disk is served from the new image already, over its backing image.
    pub(super) async fn taken_before(&self, disk: &Disk, target: &Target) -> Option<Snapshot> {
        let parent = {
            let record = disk.record.borrow();
            record.open.as_ref().filter(|open| open.target == *target)?;
            let parent = parents(&record.parts).next()?;
            parent.path.clone()
        };
        let marked = match image::find(&parent).await {
            Ok(image) => self.is_frozen(image).await,
            Err(failure) => Err(failure),
        };
        Some(Snapshot {
            minor: disk.minor,
            target: target.clone(),
            // Without an answer the administrator learns the worse of the two.
            marked: marked.unwrap_or(false),
            parent,
            pause_us: None,
        })
    }
}
