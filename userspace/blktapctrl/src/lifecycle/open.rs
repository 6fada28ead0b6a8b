// SPDX-License-Identifier: MIT OR Apache-2.0
//! Opening an image on a disk, closing and growing it; starting and ending a process without an image.

use super::Lifecycle;
use crate::admission::{beside_others, check_files, with_mode};
use crate::disk::Disk;
use crate::process::SOON;
use crate::record::DesiredState;
use crate::rpc_client::unexpected;
use control::supervisor::{Mode, PendingOperation, What, Which};
use control::tapdisk::{self, Open, Reply, Request, State};
use control::{Code, Failure};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

impl Lifecycle {
    /// Opens an image on a disk that has none.
    ///
    /// # Errors
    /// It is in use, or cannot be opened: then it is not the disk's.
    pub async fn open(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        open: Open,
        mode: Mode,
        files: Vec<PathBuf>,
    ) -> Result<tapdisk::Disk, Failure> {
        check_files(&files)?;
        let _turn = disk.turn().await?;
        let patience = self.patience.get();
        self.make_way(disk, PendingOperation::Open, patience)
            .await?;
        if disk.record.borrow().want != DesiredState::Idle {
            return Err(Failure::new(
                Code::State,
                format!(
                    "disk {} is open already: pause and unpause it with another image",
                    disk.minor
                ),
            ));
        }
        let why = "the disk has another image";
        self.lose_marks(disk, why)?;
        self.lose_trace(disk, why)?;
        let open = with_mode(open, mode)?;
        let (image, _pinned) = self.image_to_serve(&open, mode).await?;
        let vbd = disk.record.borrow().vbd.clone();
        let work = |beside| {
            let open = beside_others(open, beside)?;
            self.registry.change(disk, |record| {
                record.doing = Some(PendingOperation::Open);
                record.identity = image.as_ref().map(|image| image.identity());
                record.born = image.as_ref().and_then(|image| image.born());
                record.open = Some(open);
                record.mode = mode;
                record.files = files;
            })
        };
        self.admission
            .admit(image.as_ref(), mode, vbd.as_deref(), Some(disk.minor), work)
            .await?;
        disk.image.replace(image);
        disk.unless_doomed(self.finish_open(disk)).await
    }

    /// Serves an image that is the disk's.
    pub(super) async fn finish_open(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
    ) -> Result<tapdisk::Disk, Failure> {
        let created = disk.doing() == Some(PendingOperation::Create);
        let served = match self.prepare_memory(disk) {
            Ok(()) => self.serve(disk).await,
            Err(failure) => Err(failure),
        };
        match served {
            Ok(what) => {
                self.end_of_verb(disk, DesiredState::Served);
                Ok(what)
            }
            Err(failure) => {
                // A process that serves nothing is of no use.
                self.give_up_process(disk).await;
                if created {
                    disk.ends_for(&failure);
                    self.destroy_later(disk);
                } else {
                    self.take_from_kernel(disk, self.patience.get()).await?;
                    self.give_lease_up(disk).await;
                    self.drop_image(disk);
                }
                Err(failure)
            }
        }
    }

    fn drop_image(&self, disk: &Disk) {
        {
            let mut record = disk.record.borrow_mut();
            (record.identity, record.born, record.open) = (None, None, None);
            record.next = None;
            record.parts.clear();
            record.files.clear();
        }
        disk.state.replace(None);
        disk.image.replace(None);
        disk.drop_next();
        disk.serves.replace(None);
        self.end_of_verb(disk, DesiredState::Idle);
    }

    /// Closes the image of a disk.
    ///
    /// # Errors
    /// Its process does not answer: it may close it later.
    pub async fn close(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        force: bool,
        limit: Duration,
    ) -> Result<(), Failure> {
        let _turn = disk.turn().await?;
        if !force {
            self.make_way(disk, PendingOperation::Close, limit).await?;
        }
        self.begin(disk, PendingOperation::Close)?;
        disk.unless_doomed(self.finish_close(disk, force, limit))
            .await
    }

    pub(super) async fn finish_close(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        force: bool,
        limit: Duration,
    ) -> Result<(), Failure> {
        let has_parts = !disk.record.borrow().parts.is_empty();
        if let Ok(process) = disk.serving() {
            match process.ask(&Request::Close, &[], limit).await {
                Ok(_) => disk.attached.set(false),
                Err(failure) if force || process.has_died(&failure).await => {
                    self.give_up_process(disk).await;
                }
                Err(failure) => match process.status().await {
                    // It has closed it, and could not write all of it back.
                    Ok(status) if status.state == State::Idle => {
                        disk.attached.set(false);
                        self.let_image_go(disk, has_parts).await?;
                        return Err(failure);
                    }
                    _ => return Err(failure),
                },
            }
        }
        self.let_image_go(disk, has_parts).await
    }

    /// The image of a disk is closed. A process that has parts of it makes way for another one.
    async fn let_image_go(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        has_parts: bool,
    ) -> Result<(), Failure> {
        let replaced = has_parts && disk.process.borrow().is_some();
        if replaced {
            self.end_process(disk).await?;
        }
        self.take_from_kernel(disk, self.patience.get()).await?;
        self.give_lease_up(disk).await;
        self.drop_image(disk);
        if replaced {
            self.assign(disk, &self.spawn_for(disk).await?)?;
        }
        Ok(())
    }

    /// Tells the process of a disk that its image has grown or is to grow, and thereby the guest.
    ///
    /// # Errors
    /// Its process refuses, or does not answer.
    pub async fn grow(
        &self,
        which: &Which,
        how: &Request,
        limit: Duration,
    ) -> Result<tapdisk::Disk, Failure> {
        let disk = self.registry.find(which)?;
        let _turn = disk.turn().await?;
        let process = disk.serving()?;
        // An image grows as long as its storage takes.
        match disk.unless_doomed(process.ask(how, &[], limit)).await? {
            Reply::Disk(what) => {
                self.note_size(&disk, &process, &what).await;
                disk.serves.replace(Some(what.clone()));
                self.registry
                    .events
                    .add(Some(disk.minor), What::Resized { size: what.size });
                Ok(what)
            }
            reply => Err(unexpected(&reply)),
        }
    }

    /// Gives a disk a process that waits for one.
    ///
    /// # Errors
    /// The disk has one, or the process has a disk.
    pub async fn attach_idle(self: &Rc<Self>, which: &Which) -> Result<(), Failure> {
        let Some(pid) = which.pid else {
            return Err(Failure::invalid("say which process with -p"));
        };
        let disk = self.registry.find(&Which {
            pid: None,
            ..which.clone()
        })?;
        let _turn = disk.turn().await?;
        if let Some(process) = &*disk.process.borrow() {
            return Err(Failure::new(
                Code::Busy,
                format!(
                    "disk {} has the process {} already",
                    disk.minor,
                    process.pid()
                ),
            ));
        }
        let process = self.registry.idle(pid);
        let process = process.ok_or_else(|| {
            Failure::new(
                Code::NotFound,
                format!("{pid} is no process that waits for a disk: spawn one"),
            )
        })?;
        self.assign(&disk, &process)?;
        let attached = disk.unless_doomed(self.attach(&disk)).await;
        self.or_give_up(&disk, attached).await.map(drop)
    }

    /// A process of which something failed is of no use.
    async fn or_give_up<T>(&self, disk: &Disk, result: Result<T, Failure>) -> Result<T, Failure> {
        if result.is_err() {
            self.give_up_process(disk).await;
        }
        result
    }

    /// Ends the process of a disk that is closed.
    ///
    /// # Errors
    /// The disk is open, or has no process.
    pub async fn detach(&self, which: &Which) -> Result<(), Failure> {
        let disk = self.registry.find(which)?;
        let _turn = disk.turn().await?;
        if disk.record.borrow().want != DesiredState::Idle {
            return Err(Failure::new(
                Code::State,
                format!("disk {} is open: close it first", disk.minor),
            ));
        }
        let process = disk.serving()?;
        self.tell_totals(&disk, process.pid());
        process.end(SOON).await?;
        disk.forget_process();
        self.registry.note(&disk);
        Ok(())
    }
}
