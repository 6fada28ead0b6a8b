// SPDX-License-Identifier: MIT OR Apache-2.0
//! A disk is made, and served for the first time.

use super::Lifecycle;
use crate::admission::{beside_others, check_files, with_mode, OtherUsers};
use crate::disk::{Disk, DiskFate};
use crate::log::tell;
use crate::record::{InactiveReason, Record};
use crate::store::relative;
use control::supervisor::{Allocate, Create, PendingOperation, What};
use control::tapdisk;
use control::{Code, Failure};
use std::rc::Rc;

/// Answer to the creation of a disk.
pub struct CreatedDisk {
    /// Its number.
    pub minor: u32,
    /// The process and the disk that it serves; nothing if the caller did not wait for that.
    pub served: Option<(u32, tapdisk::Disk)>,
}

impl Lifecycle {
    /// Makes a disk and serves it. A caller that repeats the request, because the answer was lost, gets the same disk.
    ///
    /// # Errors
    /// Its image is in use, or it cannot be served: nothing is left of it.
    pub async fn create(self: &Rc<Self>, create: Create) -> Result<CreatedDisk, Failure> {
        self.until_unparked().await?;
        let vbd = create.vbd.as_deref().map(relative).map(str::to_owned);
        if let Some(vbd) = &vbd {
            self.admission.check_directory(vbd).await?;
        }
        check_files(&create.files)?;
        let mut open = create.open;
        let mut policy = open.target.take_rules().over(create.policy);
        let mode = open.target.take_shared(create.mode);
        if let Some(said) = open.target.take_limits() {
            let other = policy.limits;
            let is_twice = (said.bytes != 0 && other.bytes != 0)
                || (said.requests != 0 && other.requests != 0);
            if is_twice {
                return Err(Failure::invalid(
                    "the limits are given both in the target and as options: remove one of them",
                ));
            }
            policy.limits.bytes |= said.bytes;
            policy.limits.requests |= said.requests;
        }
        policy.limits.check()?;
        if let Some(said) = open.target.take_group() {
            if policy.group.as_ref().is_some_and(|other| *other != said) {
                return Err(Failure::invalid(
                    "two groups are named, in the target and beside it: remove one of them",
                ));
            }
            policy.group = Some(said);
        }
        let open = with_mode(open, mode)?;
        if let Some(disk) = self.registry.made_before(vbd.as_deref(), &open, mode) {
            return match create.no_wait {
                true => Ok(begun(&disk)),
                false => self.start(&disk).await,
            };
        }
        if let Some(name) = &policy.group {
            self.check_group(name)?;
        }
        let (image, pinned) = self.image_to_serve(&open, mode).await?;
        let mut record = Record::new(0, policy);
        record.identity = image.as_ref().map(|image| image.identity());
        record.born = image.as_ref().and_then(|image| image.born());
        record.mode = mode;
        record.vbd.clone_from(&vbd);
        record.nbd = create.nbd;
        record.files = create.files;
        record.doing = Some(PendingOperation::Create);
        let target = Some(open.target.clone());
        let work = |beside| {
            record.open = Some(beside_others(open, beside)?);
            record.inactive = (beside == OtherUsers::Moving).then_some(InactiveReason::Arriving);
            self.registry
                .make_node(record, create.minor, create.arena_kib)
        };
        let disk = self
            .admission
            .admit(image.as_ref(), mode, vbd.as_deref(), None, work)
            .await?;
        disk.image.replace(image);
        drop(pinned);
        self.registry
            .events
            .add(Some(disk.minor), What::Created { target });
        let started = {
            let (lifecycle, disk) = (self.clone(), disk.clone());
            // A task of its own: it continues even if no caller waits for it.
            tokio::task::spawn_local(async move { lifecycle.start(&disk).await })
        };
        if create.no_wait {
            return Ok(begun(&disk));
        }
        started.await.map_err(|error| {
            Failure::new(Code::System, format!("creating a disk failed: {error}"))
        })?
    }

    /// Serves a new disk; one that cannot be leaves nothing.
    async fn start(self: &Rc<Self>, disk: &Rc<Disk>) -> Result<CreatedDisk, Failure> {
        let started = self.try_to_start(disk).await;
        if started.is_err() && disk.fate() != DiskFate::Stays {
            if let Err(also) = self.destroy(disk).await {
                tell!(error, disk.about().failed(&also), "{also}");
            }
        }
        started
    }

    async fn try_to_start(self: &Rc<Self>, disk: &Rc<Disk>) -> Result<CreatedDisk, Failure> {
        let _turn = disk.turn().await?;
        if disk.doing() == Some(PendingOperation::Create) {
            disk.unless_doomed(self.finish_open(disk)).await?;
        }
        // The toolstack may have given up while the image was opened.
        let vbd = disk.record.borrow().vbd.clone();
        if let Some(vbd) = vbd {
            self.admission
                .check_directory(&vbd)
                .await
                .inspect_err(|failure| {
                    if failure.code == Code::NotFound {
                        self.destroy_later(disk);
                    }
                })?;
        }
        served(disk)
    }

    /// Makes a disk without an image.
    ///
    /// # Errors
    /// The system refuses to.
    pub fn allocate(&self, allocate: &Allocate) -> Result<u32, Failure> {
        allocate.policy.limits.check()?;
        if let Some(name) = &allocate.policy.group {
            self.check_group(name)?;
        }
        let record = Record::new(0, allocate.policy.clone());
        let disk = self
            .registry
            .make_node(record, allocate.minor, allocate.arena_kib)?;
        self.registry
            .events
            .add(Some(disk.minor), What::Created { target: None });
        Ok(disk.minor)
    }
}

/// Answer about a disk whose caller does not wait until it is served.
fn begun(disk: &Disk) -> CreatedDisk {
    CreatedDisk {
        minor: disk.minor,
        served: None,
    }
}

fn served(disk: &Disk) -> Result<CreatedDisk, Failure> {
    let what = disk.serves.borrow().clone();
    let what = what.ok_or_else(|| {
        let message = format!("disk {} is not served at the moment", disk.minor);
        Failure::new(Code::State, message)
    })?;
    Ok(CreatedDisk {
        minor: disk.minor,
        served: Some((disk.serving()?.pid(), what)),
    })
}
