// SPDX-License-Identifier: MIT OR Apache-2.0
//! A disk whose image several hosts reach has the lease of it while a process has the image open.
//!
//! The supervisor keeps it, so it outlives a process; each heartbeat tells the process until when it may do I/O,
//! and a timer of the kernel ends a process that is told nothing more. So what ends the heartbeats ends the
//! I/O: a storage that does not answer, a supervisor that is not there, another host that has the lease. The
//! guest's requests wait in the kernel until the lease is here again.
//!
//! A reservation needs no such end: the storage refuses what its holder must not do any more. But whoever broke it leaves
//! it free, and the image may have been written before it is reserved again. So it is on record that a disk has it, and
//! one that finds that it has not is paused: somebody has to look before it goes on.
//!
//! A resource of sanlock is the host's as a reservation is, and has a term. Where it is lost, sanlock waits for the end of
//! the disk's I/O, and has the host reset if that takes too long: so it is let go of when nothing is under way.

use super::trouble::{pause_for_good, Rate};
use super::Lifecycle;
use crate::apart::{apart, LIMIT};
use crate::disk::Disk;
use crate::link::Link;
use crate::log::tell;
use crate::process::{Process, SOON};
use crate::record::Known;
use crate::tenure::Tenure;
use control::supervisor::What;
use control::tapdisk::{Open, Request};
use control::{Code, Failure, LeaseKind};
use lease::{Claim, Grant, Keeper, Lease, News};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc::{unbounded_channel, UnboundedReceiver};

/// How long is waited for another host to give a lease up. Who asks for the disk asks again.
const WAIT: Duration = Duration::from_secs(5);

/// The image, if its disk needs the lease of it.
fn image_of(open: &Open) -> Option<PathBuf> {
    let is_alone = *open.target.lease() != LeaseKind::Lock && !open.read_only && !open.shared;
    open.target.path().filter(|_| is_alone).map(Path::to_owned)
}

impl Lifecycle {
    /// Has the lease of what a process is to serve, and tells it how long it may.
    ///
    /// # Errors
    /// Another host has it, or its storage fails.
    pub(crate) async fn lease(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        open: &Open,
        process: &Process,
    ) -> Result<(), Failure> {
        let Some(image) = image_of(open) else {
            return Ok(());
        };
        let held = disk.lease.borrow().clone();
        let held = held.filter(|tenure| tenure.image == image && !tenure.keeper.has_ended());
        let tenure = match held {
            Some(tenure) => tenure,
            None => match self.take_lease(disk, open, image).await {
                Ok(tenure) => tenure,
                Err(failure) => {
                    self.end_if_lost(disk, open, process, &failure).await;
                    return Err(failure);
                }
            },
        };
        let term = tenure.keeper.term();
        if term.is_over() {
            return Err(Failure::new(
                Code::Timeout,
                format!(
                    "the storage of the lease of {} does not answer, so its disk {} waits: see to that",
                    tenure.image.display(),
                    disk.minor
                ),
            ));
        }
        let until = Some(term.until());
        process
            .ask(&Request::Term { until }, &[], SOON)
            .await
            .map(drop)
    }

    /// A process that serves a disk, as an earlier supervisor left it, ends when the lease of that is lost.
    async fn end_if_lost(&self, disk: &Disk, open: &Open, process: &Process, why: &Failure) {
        let is_lost = why.code == Code::Gone && disk.record.borrow().reserved;
        if !is_lost || !is_sanlocked(open.target.lease()) {
            return;
        }
        let over = Request::Term {
            until: Some(Duration::ZERO),
        };
        if let Err(failure) = process.ask(&over, &[], SOON).await {
            if !process.has_died(&failure).await {
                tell!(
                    warn,
                    disk.about().failed(&failure),
                    "disk {}: its process is not told that its lease is lost: {failure}",
                    disk.minor
                );
            }
        }
    }

    async fn take_lease(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        open: &Open,
        image: PathBuf,
    ) -> Result<Tenure, Failure> {
        let name = match disk.record.borrow().vbd.as_deref() {
            Some(vbd) => format!("{vbd} (disk {})", disk.minor),
            None => format!("disk {}", disk.minor),
        };
        let mut claim = Claim::new(name)?;
        // Whoever supervises the disk next goes on with the lease by this, so it is written down first.
        if let Some(token) = disk.record.borrow().lease.as_deref() {
            claim = claim.again(token)?;
        }
        let token = claim.token();
        if disk.record.borrow().lease.as_ref() != Some(&token) {
            self.registry
                .change(disk, |record| record.lease = Some(token))?;
        }
        let (lease, grant) = self.reserve(disk, open, &image, claim).await?;
        let (sender, news) = unbounded_channel();
        // Nobody listens any more to what has been given up.
        let keeper = Keeper::start(lease, &grant, move |told| drop(sender.send(told)))
            .map_err(|error| Failure::system("cannot start a thread", &error))?;
        let tenure = Tenure {
            keeper: Arc::new(keeper),
            image,
            kind: open.target.lease().clone(),
        };
        disk.lease.replace(Some(tenure.clone()));
        tokio::task::spawn_local(follow(self.clone(), disk.clone(), news));
        Ok(tenure)
    }

    /// Takes a lease, or goes on with what the host has for the disk.
    async fn reserve(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        open: &Open,
        image: &Path,
        claim: Claim,
    ) -> Result<(Box<dyn Lease>, Grant), Failure> {
        let (kind, place) = (open.target.lease().clone(), image.to_owned());
        let is_of_host = kind.is_of_host();
        if is_of_host {
            self.check_not_reserved_here(disk, &kind, image)?;
        }
        let has_it = disk.record.borrow().reserved;
        let how = self.leases.borrow().clone();
        let taken = apart(image, LIMIT, move || {
            let mut lease = how(&kind, &place, claim)?;
            let grant = match has_it {
                true => lease.resume(0)?,
                false => lease.take(WAIT)?,
            };
            Ok((lease, grant))
        });
        match taken.await {
            Ok(taken) if is_of_host && !has_it => {
                self.registry
                    .change(disk, |record| record.reserved = true)?;
                Ok(taken)
            }
            Err(failure) if has_it && failure.code == Code::Gone => {
                pause_for_good(self, disk);
                Err(failure)
            }
            taken => taken,
        }
    }

    /// All disks of a host are one to the storage: it would take what another one of them writes that has lost the
    /// reservation and does not know yet.
    fn check_not_reserved_here(
        &self,
        disk: &Disk,
        kind: &LeaseKind,
        image: &Path,
    ) -> Result<(), Failure> {
        let rivals: Vec<u32> = self.rivals(disk).iter().map(|disk| disk.minor).collect();
        let is_its = |open: &Open| is_one_resource(open.target.lease(), kind);
        let has_it = |other: &Rc<Disk>| {
            let record = other.record.borrow();
            let is_one = rivals.contains(&other.minor) || record.open.as_ref().is_some_and(is_its);
            record.reserved && is_one && other.minor != disk.minor
        };
        match self.registry.all().into_iter().find(has_it) {
            None => Ok(()),
            Some(other) => Err(Failure::new(
                Code::Busy,
                format!(
                    "the lease of {} is that of {}, which has not let go of it yet",
                    image.display(),
                    other.name()
                ),
            )),
        }
    }

    /// Takes the lease of a disk again whose process serves it, as the next supervisor does.
    pub(crate) fn lease_again(self: &Rc<Self>, disk: &Rc<Disk>, process: &Rc<Process>) {
        let (lifecycle, disk, process) = (self.clone(), disk.clone(), process.clone());
        tokio::task::spawn_local(async move {
            let leased = async {
                let _turn = disk.turn().await?;
                let open = disk.open()?;
                lifecycle.lease(&disk, &open, &process).await
            };
            if let Err(failure) = leased.await {
                // The process ends with its term, and the next one asks for the lease again.
                let (message, retry_ms) = (failure.message, 0);
                let what = What::Failed { message, retry_ms };
                lifecycle.registry.events.add(Some(disk.minor), what);
            }
        });
    }

    /// Gives the lease of a disk up, whose image is closed: nothing of its I/O is under way.
    pub(super) async fn give_lease_up(&self, disk: &Disk) {
        let Some(tenure) = disk.lease.take() else {
            return self.give_reservation_up(disk).await;
        };
        // Of a process that was killed.
        if let Err(failure) = self.fenced(disk, LIMIT).await {
            let (message, retry_ms) = (failure.message, 0);
            let what = What::Failed { message, retry_ms };
            self.registry.events.add(Some(disk.minor), what);
            disk.lease.replace(Some(tenure));
            return;
        }
        let process = disk.process.borrow().clone();
        if let Some(process) = process.filter(|process| !process.has_ended()) {
            let never = Request::Term { until: None };
            if let Err(failure) = process.ask(&never, &[], SOON).await {
                tell!(
                    warn,
                    disk.about().failed(&failure),
                    "disk {}: {failure}",
                    disk.minor
                );
            }
        }
        // The next one who finds a reservation knows it by its key, should this not be finished; of sanlock's nobody is
        // known but the host.
        let is_sanlocked = is_sanlocked(&tenure.kind);
        if !is_sanlocked {
            self.note_reserved_no_more(disk);
        }
        let image = tenure.image.clone();
        let given_up = match (tenure.keeper.has_ended(), is_sanlocked) {
            (true, false) => return,
            (true, true) => {
                self.give_left_over_up(disk, tenure.kind, image.clone())
                    .await
            }
            (false, _) => apart(&image, LIMIT, move || tenure.keeper.give_up()).await,
        };
        let is_over = matches!(&given_up, Err(failure) if failure.code == Code::Gone);
        if is_sanlocked && (given_up.is_ok() || is_over) {
            self.note_reserved_no_more(disk);
        }
        if let Err(failure) = given_up {
            let message = format!(
                "the lease of {} is not given up: {failure}",
                image.display()
            );
            let what = What::Failed {
                message,
                retry_ms: 0,
            };
            self.registry.events.add(Some(disk.minor), what);
        }
    }

    fn note_reserved_no_more(&self, disk: &Disk) {
        disk.record.borrow_mut().reserved = false;
        self.registry.note(disk);
    }

    /// Gives up what an earlier supervisor had for a disk, which this one has not needed.
    async fn give_reservation_up(&self, disk: &Disk) {
        if !disk.record.borrow().reserved {
            return;
        }
        let given_up = async {
            self.fenced(disk, LIMIT).await?;
            let open = disk.open()?;
            match image_of(&open) {
                Some(image) => {
                    let kind = open.target.lease().clone();
                    self.give_left_over_up(disk, kind, image).await
                }
                None => Ok(()),
            }
        };
        match given_up.await {
            // It was lost before.
            Err(failure) if failure.code != Code::Gone => {
                let message = format!(
                    "what disk {} has reserved is not given up: {failure}",
                    disk.minor
                );
                let what = What::Failed {
                    message,
                    retry_ms: 0,
                };
                self.registry.events.add(Some(disk.minor), what);
                // Nobody else on this host gives that up.
                if disk
                    .open()
                    .is_ok_and(|open| is_sanlocked(open.target.lease()))
                {
                    return;
                }
            }
            _ => {}
        }
        self.note_reserved_no_more(disk);
    }

    /// Gives up what the host has for a disk and nobody keeps, or lets go of what is left of it when it is lost. Nothing
    /// of its I/O is under way.
    async fn give_left_over_up(
        &self,
        disk: &Disk,
        kind: LeaseKind,
        image: PathBuf,
    ) -> Result<(), Failure> {
        let Some(token) = disk.record.borrow().lease.clone() else {
            return Ok(());
        };
        let claim = Claim::new("")?.again(&token)?;
        let (how, place) = (self.leases.borrow().clone(), image.clone());
        apart(&image, LIMIT, move || {
            let mut lease = how(&kind, &place, claim)?;
            match lease.resume(0) {
                Ok(_) => lease.give_up(),
                Err(lost) if lost.code == Code::Gone => lease.settle(),
                Err(failure) => Err(failure),
            }
        })
        .await
    }
}

/// Both are the same resource of sanlock, whatever they are of, and wherever it is said to be.
fn is_one_resource(one: &LeaseKind, other: &LeaseKind) -> bool {
    let (LeaseKind::Sanlock(one), LeaseKind::Sanlock(other)) = (one, other) else {
        return false;
    };
    (&one.lockspace, &one.name) == (&other.lockspace, &other.name)
}

fn is_sanlocked(kind: &LeaseKind) -> bool {
    matches!(kind, LeaseKind::Sanlock(_))
}

/// Passes on what becomes of a lease, until it is given up or lost.
async fn follow(lifecycle: Rc<Lifecycle>, disk: Rc<Disk>, mut news: UnboundedReceiver<News>) {
    let mut rate = Rate::new();
    // Their own: the others may be busy with a long question.
    let mut links: Vec<(Known, Link)> = Vec::new();
    while let Some(told) = news.recv().await {
        let until = match &told {
            News::Kept(until) => *until,
            News::Missed(failure) => {
                if rate.is_due() {
                    rate.told();
                    tell!(
                        warn,
                        disk.about().failed(failure),
                        "disk {}: no heartbeat of its lease: {failure}",
                        disk.minor
                    );
                }
                continue;
            }
            // It has been over since somebody else got it.
            News::Lost(failure) => {
                tell!(
                    error,
                    disk.about().failed(failure),
                    "disk {}: {failure}",
                    disk.minor
                );
                let (message, retry_ms) = (failure.message.clone(), 0);
                let what = What::Failed { message, retry_ms };
                lifecycle.registry.events.add(Some(disk.minor), what);
                Duration::ZERO
            }
        };
        let mut told = Vec::new();
        for process in served_by(&disk) {
            match tell(&process, &mut links, until).await {
                Ok(link) => told.push((process.known(), link)),
                Err(failure) => {
                    if !process.has_died(&failure).await && rate.is_due() {
                        rate.told();
                        tell!(
                            warn,
                            disk.about().failed(&failure),
                            "disk {}: its process is not told of its lease: {failure}",
                            disk.minor
                        );
                    }
                }
            }
        }
        links = told;
        // Not before its process has been told to end: who lets the disk go on must not find that one.
        if until.is_zero() && disk.record.borrow().reserved {
            pause_for_good(&lifecycle, &disk);
        }
    }
}

/// The process of a disk, and the one that is to take the disk over.
fn served_by(disk: &Disk) -> Vec<Rc<Process>> {
    let all = [
        disk.process.borrow().clone(),
        disk.successor.borrow().clone(),
    ];
    let all = all.into_iter().flatten();
    all.filter(|process| !process.has_ended()).collect()
}

/// Tells a process until when it may do I/O, over its own link, which is kept.
async fn tell(
    process: &Process,
    links: &mut Vec<(Known, Link)>,
    until: Duration,
) -> Result<Link, Failure> {
    let place = links.iter().position(|(of, _)| *of == process.known());
    let mut link = match place {
        Some(place) => links.swap_remove(place).1,
        None => process.another_link().await?,
    };
    let until = Some(until);
    link.ask(&Request::Term { until }, &[], SOON).await?;
    Ok(link)
}
