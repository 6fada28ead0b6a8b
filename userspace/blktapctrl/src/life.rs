// SPDX-License-Identifier: MIT OR Apache-2.0
//! The verbs that change a disk: each is written down before its first step, done in steps that can be
//! done twice, and written off at the end. Who finds one that is not done, the next supervisor
//! included, finishes it. What certainly cannot be finished is undone: the disk is as it was.

use crate::disk::Disk;
use crate::host::{image_of, not_the_same, unexpected, Host, OPEN, SOON};
use crate::image::Image;
use crate::kernel;
use crate::memory;
use crate::process::Process;
use crate::record::{Next, Want};
use control::supervisor::{Doing, Mode, What};
use control::tapdisk::{self, Open, Reply, Request, State, Status};
use control::{Code, Failure, Target};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// A mode decides what a tapdisk may do.
pub(crate) fn with_mode(mut open: Open, mode: Mode) -> Open {
    open.read_only = mode.is_read_only();
    open.shared = mode.is_shared();
    open.whole_blocks = mode.is_shared() && !mode.is_read_only();
    open
}

/// As a guest and its stub domain do.
pub(crate) fn beside_others(mut open: Open, beside: bool) -> Open {
    open.shared |= beside;
    open
}

/// It may still happen: whoever was asked lives, and has not answered.
fn is_open_question(failure: &Failure, disk: &Disk) -> bool {
    failure.code == Code::Timeout && disk.serving().is_ok()
}

impl Host {
    /// Does what has begun with a disk and is not done. The caller has the turn.
    ///
    /// # Errors
    /// It is not done yet, or was undone.
    pub async fn finish(self: &Rc<Self>, disk: &Rc<Disk>, limit: Duration) -> Result<(), Failure> {
        let Some(doing) = disk.doing() else {
            return Ok(());
        };
        let done = match doing {
            Doing::Create | Doing::Open => self.finish_open(disk).await.map(drop),
            Doing::Close => self.finish_close(disk, false, limit).await,
            Doing::Pause => self.finish_pause(disk, limit).await,
            Doing::Unpause => self.finish_unpause(disk).await.map(drop),
            Doing::Destroy => {
                self.destroy_later(disk);
                Ok(())
            }
        };
        done.map_err(|failure| {
            let about = format!("disk {}: {doing} is not done: {failure}", disk.minor);
            Failure::new(failure.code, about)
        })
    }

    /// Makes way for another verb than the one that has begun, if one has.
    async fn make_way(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        verb: Doing,
        limit: Duration,
    ) -> Result<(), Failure> {
        match disk.doing() {
            Some(doing) if doing != verb => disk.unless_doomed(self.finish(disk, limit)).await,
            _ => Ok(()),
        }
    }

    fn begin(&self, disk: &Disk, doing: Doing) -> Result<(), Failure> {
        self.change(disk, |record| record.doing = Some(doing))
    }

    /// What has begun is over. Should that not be written, the next supervisor does it once more.
    fn end_of_verb(&self, disk: &Disk, want: Want) {
        {
            let mut record = disk.record.borrow_mut();
            record.doing = None;
            record.want = want;
        }
        self.note(disk);
    }

    /// Opens an image on a disk that has none.
    ///
    /// # Errors
    /// It is in use, or cannot be opened: then it is not the disk's.
    pub(crate) async fn open(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        open: Open,
        mode: Mode,
    ) -> Result<tapdisk::Disk, Failure> {
        self.make_way(disk, Doing::Open, OPEN).await?;
        if disk.record.borrow().want != Want::Idle {
            return Err(Failure::new(
                Code::State,
                format!(
                    "disk {} is open already: pause and unpause it with another image",
                    disk.minor
                ),
            ));
        }
        let open = with_mode(open, mode);
        let image = image_of(&open).await?;
        let vbd = disk.record.borrow().vbd.clone();
        let work = |beside| {
            self.change(disk, |record| {
                record.doing = Some(Doing::Open);
                record.identity = image.as_ref().map(|image| image.identity());
                record.born = image.as_ref().and_then(|image| image.born());
                record.open = Some(beside_others(open, beside));
                record.mode = mode;
            })
        };
        self.admit(image.as_ref(), mode, vbd.as_deref(), Some(disk.minor), work)
            .await?;
        disk.image.replace(image);
        disk.unless_doomed(self.finish_open(disk)).await
    }

    /// Serves an image that is the disk's.
    pub(crate) async fn finish_open(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
    ) -> Result<tapdisk::Disk, Failure> {
        let created = disk.doing() == Some(Doing::Create);
        let served = match self.prepare_memory(disk) {
            Ok(()) => self.serve(disk).await,
            Err(failure) => Err(failure),
        };
        match served {
            Ok(what) => {
                self.end_of_verb(disk, Want::Served);
                Ok(what)
            }
            Err(failure) => {
                // A process that serves nothing is of no use.
                self.give_up_process(disk).await;
                if created {
                    self.destroy_later(disk);
                } else {
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
        }
        disk.image.replace(None);
        disk.next_image.replace(None);
        disk.serves.replace(None);
        self.end_of_verb(disk, Want::Idle);
    }

    /// Closes the image of a disk.
    ///
    /// # Errors
    /// Its process does not answer: it may close it later.
    pub(crate) async fn close(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        force: bool,
        limit: Duration,
    ) -> Result<(), Failure> {
        if !force {
            self.make_way(disk, Doing::Close, limit).await?;
        }
        self.begin(disk, Doing::Close)?;
        disk.unless_doomed(self.finish_close(disk, force, limit))
            .await
    }

    async fn finish_close(&self, disk: &Disk, force: bool, limit: Duration) -> Result<(), Failure> {
        if let Ok(process) = disk.serving() {
            match process.ask(&Request::Close, &[], limit).await {
                Ok(_) => disk.attached.set(false),
                Err(failure) if force || process.has_died(&failure).await => {
                    self.give_up_process(disk).await;
                }
                Err(failure) => match status(&process).await {
                    // It has closed it, and could not write all of it back.
                    Ok(status) if status.state == State::Idle => {
                        disk.attached.set(false);
                        self.drop_image(disk);
                        return Err(failure);
                    }
                    _ => return Err(failure),
                },
            }
        }
        self.drop_image(disk);
        Ok(())
    }

    /// Stops serving a disk.
    ///
    /// # Errors
    /// Its process does not answer: it may pause later, and the same verb again waits for that.
    pub(crate) async fn pause(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        limit: Duration,
    ) -> Result<(), Failure> {
        self.make_way(disk, Doing::Pause, limit).await?;
        let (want, doing) = {
            let record = disk.record.borrow();
            (record.want, record.doing)
        };
        match (want, doing) {
            (Want::Paused, None) => return Ok(()),
            (Want::Idle, None) => disk.open().map(drop)?,
            _ => {}
        }
        // From now on a process that dies is not replaced: nothing is to be served.
        self.begin(disk, Doing::Pause)?;
        disk.unless_doomed(self.finish_pause(disk, limit)).await
    }

    async fn finish_pause(&self, disk: &Disk, limit: Duration) -> Result<(), Failure> {
        let mut result = Ok(());
        if let Ok(process) = disk.serving() {
            match process.ask(&Request::Pause, &[], limit).await {
                Ok(_) => {}
                Err(failure) if process.has_died(&failure).await => {
                    self.fenced(disk, limit).await?;
                }
                Err(failure) if failure.code == Code::Timeout => return Err(failure),
                // An earlier question may have paused it, and it may have found when it closed the
                // image that not all could be written back.
                Err(failure) => match status(&process).await?.state {
                    State::Running => return Err(failure),
                    _ if failure.code == Code::State => {}
                    _ => result = Err(failure),
                },
            }
        } else {
            self.fenced(disk, limit).await?;
        }
        disk.serves.replace(None);
        self.end_of_verb(disk, Want::Paused);
        self.events.add(Some(disk.minor), What::Paused);
        result
    }

    /// Waits until the I/O of a process that is dead is over: what it had waits in the kernel, and the
    /// image does not change any more.
    async fn fenced(&self, disk: &Disk, limit: Duration) -> Result<(), Failure> {
        let mut pause = Duration::from_millis(1);
        let over = async {
            loop {
                let node = kernel::node(&*self.kernel, disk.minor)
                    .map_err(|error| Failure::system("cannot ask the kernel", &error))?;
                if node.is_none_or(|node| node.status.state != "fencing") {
                    return Ok(());
                }
                // The kernel tells nobody when it is over.
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_millis(50));
            }
        };
        tokio::time::timeout(limit, over).await.unwrap_or_else(|_| {
            Err(Failure::new(
                Code::Timeout,
                format!(
                    "I/O of the process of disk {} that ended is not over: see whether its storage answers",
                    disk.minor
                ),
            ))
        })
    }

    /// Serves a paused disk again, perhaps from another image.
    ///
    /// # Errors
    /// It cannot be: then it is paused, and has the image that it had. Or its process does not answer:
    /// the same verb again waits for that.
    pub(crate) async fn unpause(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        target: Option<Target>,
        may_shrink: bool,
    ) -> Result<tapdisk::Disk, Failure> {
        self.make_way(disk, Doing::Unpause, OPEN).await?;
        if disk.doing() == Some(Doing::Unpause) {
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
        if disk.record.borrow().want != Want::Paused {
            return Err(Failure::new(
                Code::State,
                format!("disk {} is not paused", disk.minor),
            ));
        }
        match target {
            Some(target) => self.begin_with(disk, target, may_shrink).await?,
            None => self.change(disk, |record| {
                record.doing = Some(Doing::Unpause);
                if let Some(open) = &mut record.open {
                    open.may_shrink = may_shrink;
                }
            })?,
        }
        disk.unless_doomed(self.finish_unpause(disk)).await
    }

    /// What a disk is to be served from.
    fn leads_to(&self, disk: &Disk) -> Result<Open, Failure> {
        let next = disk.record.borrow().next.clone();
        next.map_or_else(|| disk.open(), |next| Ok(next.open))
    }

    /// Begins to serve another image. Until it is served, both are the disk's.
    async fn begin_with(
        &self,
        disk: &Disk,
        target: Target,
        may_shrink: bool,
    ) -> Result<(), Failure> {
        let (mode, vbd) = {
            let record = disk.record.borrow();
            (record.mode, record.vbd.clone())
        };
        let mut open = disk.open()?;
        open.target = target;
        open.may_shrink = may_shrink;
        let open = with_mode(open, mode);
        let image = image_of(&open).await?;
        let committed = self.answered(disk);
        let work = |beside| {
            let next = Next {
                open: beside_others(open, beside),
                identity: image.as_ref().map(|image| image.identity()),
                born: image.as_ref().and_then(|image| image.born()),
                committed,
            };
            self.change(disk, |record| {
                record.doing = Some(Doing::Unpause);
                record.next = Some(next);
            })
        };
        self.admit(image.as_ref(), mode, vbd.as_deref(), Some(disk.minor), work)
            .await?;
        disk.next_image.replace(image);
        Ok(())
    }

    async fn finish_unpause(self: &Rc<Self>, disk: &Rc<Disk>) -> Result<tapdisk::Disk, Failure> {
        let next = disk.record.borrow().next.clone();
        let served = match &next {
            Some(next) => self.serve_next(disk, next).await,
            None => self.serve(disk).await,
        };
        match served {
            Ok(what) => {
                self.take_next(disk);
                disk.allow_shrinking(false);
                self.end_of_verb(disk, Want::Served);
                self.events.add(Some(disk.minor), What::Unpaused);
                Ok(what)
            }
            Err(failure) if is_open_question(&failure, disk) => Err(failure),
            // It was served, and what the guest wrote then is in the new image.
            Err(failure) if next.is_some_and(|next| self.answered(disk) > next.committed) => {
                self.take_next(disk);
                disk.allow_shrinking(false);
                self.end_of_verb(disk, Want::Served);
                self.events.add(Some(disk.minor), What::Unpaused);
                let (host, disk) = (self.clone(), disk.clone());
                tokio::task::spawn_local(async move {
                    if disk.serving().is_err() {
                        host.revive(&disk, Duration::ZERO).await;
                    }
                });
                Err(failure)
            }
            Err(failure) => {
                disk.record.borrow_mut().next = None;
                disk.next_image.replace(None);
                disk.allow_shrinking(false);
                self.end_of_verb(disk, Want::Paused);
                Err(failure)
            }
        }
    }

    async fn serve_next(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        next: &Next,
    ) -> Result<tapdisk::Disk, Failure> {
        let known = disk.next_image.borrow().clone();
        let image = match known {
            Some(image) => Some(image),
            None => {
                let image = image_of(&next.open).await?;
                if let Some(image) = image.as_ref().filter(|i| !i.is(next.identity, next.born)) {
                    return Err(not_the_same(image));
                }
                image
            }
        };
        disk.next_image.replace(image.clone());
        let target = &next.open.target;
        if let (control::Driver::Ram, Some(size)) = (target.driver(), target.size()) {
            memory::prepare(&self.folder, disk.minor, size)?;
        }
        let served = self.bring_up(disk, &next.open, image).await?;
        self.started(disk).await;
        Ok(served)
    }

    /// The image that an unpause led to is the disk's.
    fn take_next(&self, disk: &Disk) {
        let mut record = disk.record.borrow_mut();
        if let Some(next) = record.next.take() {
            record.open = Some(next.open);
            (record.identity, record.born) = (next.identity, next.born);
            disk.image.replace(disk.next_image.take());
        }
    }

    /// Makes the process of a disk serve an image, whatever it does now; without one, a new one.
    ///
    /// # Errors
    /// It does not. It may be left without an image.
    pub async fn bring_up(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        open: &Open,
        image: Option<Arc<Image>>,
    ) -> Result<tapdisk::Disk, Failure> {
        disk.answered_before.set(self.answered(disk));
        let there = disk.process.borrow().clone();
        let mut state = match there {
            Some(process) => match status(&process).await? {
                status if status.state == State::Running => return running(disk, status, open),
                status => status.state,
            },
            None => State::Idle,
        };
        disk.attached.set(state != State::Idle);
        let process = self.attach(disk).await?;
        if state == State::Idle {
            state = State::Attached;
        }
        let question = match state {
            State::Paused => Request::Unpause,
            _ => Request::Open,
        };
        let opened = self.open_with(disk, &process, open.clone(), image, question);
        match opened.await {
            // A question of an earlier supervisor was still on its way.
            Err(failure) if failure.code == Code::State => match status(&process).await? {
                status if status.state == State::Running => running(disk, status, open),
                _ => Err(failure),
            },
            result => result,
        }
    }
}

/// What a process says that it does.
///
/// # Errors
/// It says nothing, or something else.
pub async fn status(process: &Process) -> Result<Status, Failure> {
    match process.ask(&Request::Status, &[], SOON).await? {
        Reply::Status(status) => Ok(status),
        reply => Err(unexpected(&reply)),
    }
}

/// A process serves already: it must be what is wanted.
fn running(disk: &Disk, status: Status, open: &Open) -> Result<tapdisk::Disk, Failure> {
    disk.attached.set(true);
    let serves = status.open.map(|open| open.target);
    match status.disk {
        Some(what) if serves.as_ref() == Some(&open.target) => {
            disk.serves.replace(Some(what.clone()));
            Ok(what)
        }
        _ => Err(Failure::new(
            Code::State,
            format!(
                "the process of disk {} serves {}, not {}: pause it first",
                disk.minor,
                serves.map_or("something else".into(), |target| target.to_string()),
                open.target
            ),
        )),
    }
}
