// SPDX-License-Identifier: MIT OR Apache-2.0
//! A disk whose image several hosts reach has the lease of it while a process has the image open.
//!
//! The supervisor keeps the lease, so it outlives a process; each heartbeat tells the process until when it may do I/O,
//! and a timer of the kernel ends a process that gets no more heartbeats. So what ends the heartbeats ends the I/O: a
//! storage that does not answer, a supervisor that is not there, another host that has the lease. The guest's requests
//! wait in the kernel until the lease is here again.
//!
//! A reservation needs no such end: the storage refuses what its holder must not do any more. But the host that broke
//! the reservation leaves the image free, and another host may have changed it before this one reserves it again. So
//! the record keeps that a disk has the reservation, and the supervisor pauses a disk that finds it lost: an
//! administrator has to look before the disk resumes.
//!
//! A resource of sanlock is the host's as a reservation is, and has a term. Where it is lost, sanlock waits for the end
//! of the disk's I/O, and has the host reset if that takes too long: so it is let go of when nothing is under way.

use super::io_errors::{pause_for_good, EventRate};
use super::respawn::AGAIN;
use super::Lifecycle;
use crate::blocking_io::{blocking_io, LIMIT};
use crate::disk::Disk;
use crate::held_lease::HeldLease;
use crate::log::tell;
use crate::process::{Process, SOON};
use crate::record::{image_of, is_one_lease, leased, Hold, KnownProcess, Record};
use crate::rpc_client::RpcClient;
use control::supervisor::What;
use control::tapdisk::{Open, Request};
use control::{Code, Failure, LeaseKind, Target};
use lease::{Grant, Lease, LeaseClaim, LeaseRenewer, RenewerNews};
use std::rc::Rc;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::mpsc::{unbounded_channel, UnboundedReceiver};

/// Time to wait for another host to give a lease up. A caller that wants the disk asks again. The rules wait longer for
/// a record that this host had before it was booted, because each attempt begins to watch it anew.
const WAIT: Duration = Duration::from_secs(5);

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
        if let Err(failure) = self.give_others_up(disk, Some(open)).await {
            let about = disk.about().failed(&failure);
            tell!(warn, about, "disk {}: {failure}", disk.minor);
            self.give_lease_up_later(disk, AGAIN);
        }
        let Some(target) = leased(open) else {
            return Ok(());
        };
        let tenure = match self.kept(disk, target).await? {
            Some(tenure) => tenure,
            None => match self.take_lease(disk, target).await {
                Ok(tenure) => tenure,
                Err(failure) => {
                    self.end_if_lost(disk, target, process, &failure).await;
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
                    image_of(target).display(),
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

    /// The lease of a target, if it is kept. A lease that is being given up is given up first, and then taken anew.
    async fn kept(&self, disk: &Disk, target: &Target) -> Result<Option<HeldLease>, Failure> {
        let tenure = disk.lease.borrow().clone();
        let is_its =
            |tenure: &HeldLease| is_one_lease(&tenure.target, target) && !tenure.keeper.has_ended();
        let Some(tenure) = tenure.filter(is_its) else {
            return Ok(None);
        };
        if disk.record.borrow().hold(target) == Some(Hold::Held) {
            return Ok(Some(tenure));
        }
        self.give_one_up(disk, target).await?;
        Ok(None)
    }

    /// A process that serves a disk, as an earlier supervisor left it, ends when the lease of that is lost.
    async fn end_if_lost(&self, disk: &Disk, target: &Target, process: &Process, why: &Failure) {
        let is_lost = why.code == Code::Gone && disk.record.borrow().is_reserved();
        if !is_lost || !matches!(target.lease(), LeaseKind::Sanlock(_)) {
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
        target: &Target,
    ) -> Result<HeldLease, Failure> {
        let (name, token, before) = {
            let record = disk.record.borrow();
            let name = match record.vbd.as_deref() {
                Some(vbd) => format!("{vbd} (disk {})", disk.minor),
                None => format!("disk {}", disk.minor),
            };
            (name, record.token().map(str::to_owned), record.hold(target))
        };
        if target.lease().is_of_host() {
            self.check_not_reserved_here(disk, target)?;
        }
        let mut claim = LeaseClaim::new(name)?;
        // The next supervisor of the disk continues the lease with this token, so the record has it first.
        if let Some(token) = token {
            claim = claim.again(&token)?;
        }
        let token = claim.token();
        self.registry
            .change(disk, |record| record.take_lease(token, target))?;
        let asked = Arc::new(LeaseRequested::default());
        let taken = self.reserve(target, before, claim, &asked).await;
        let (lease, grant) = match taken {
            Ok(taken) => taken,
            Err(failure) => {
                if asked.never() {
                    self.undo_taking(disk, target, before);
                }
                let is_strict = before == Some(Hold::Held) && target.lease().is_of_host();
                if is_strict && failure.code == Code::Gone {
                    pause_for_good(self, disk);
                }
                return Err(failure);
            }
        };
        // Before the process gets the lease, because a supervisor that finds it lost must know that there was something
        // to lose.
        self.registry
            .change(disk, |record| record.set_hold(target, Hold::Held))?;
        let (sender, news) = unbounded_channel();
        // The receiver may be gone after the lease was given up.
        let keeper = LeaseRenewer::start(lease, &grant, move |told| drop(sender.send(told)))
            .map_err(|error| Failure::system("cannot start a thread", &error))?;
        let tenure = HeldLease {
            keeper: Arc::new(keeper),
            target: target.clone(),
        };
        disk.lease.replace(Some(tenure.clone()));
        tokio::task::spawn_local(follow(self.clone(), disk.clone(), news));
        Ok(tenure)
    }

    /// The storage was never asked, so it is as it was before.
    fn undo_taking(&self, disk: &Disk, target: &Target, before: Option<Hold>) {
        {
            let mut record = disk.record.borrow_mut();
            match before {
                Some(hold) => record.set_hold(target, hold),
                None => record.drop_lease(target),
            }
        }
        self.registry.note(disk);
    }

    /// Takes a lease, or continues with the one that the host has for the disk.
    async fn reserve(
        &self,
        target: &Target,
        before: Option<Hold>,
        claim: LeaseClaim,
        asked: &Arc<LeaseRequested>,
    ) -> Result<(Box<dyn Lease>, Grant), Failure> {
        let image = image_of(target).to_owned();
        let (kind, place) = (target.lease().clone(), image.clone());
        let is_of_host = kind.is_of_host();
        let (how, asked) = (self.leases.borrow().clone(), asked.clone());
        blocking_io(&image, LIMIT, move || {
            let mut lease = how(&kind, &place, claim)?;
            asked.begin()?;
            let resumed = before.map(|_| lease.resume(0));
            let grant = match resumed {
                // No process has done I/O under it, or it may be taken again after it was lost.
                Some(Err(lost))
                    if lost.code == Code::Gone && !(is_of_host && before == Some(Hold::Held)) =>
                {
                    lease.settle()?;
                    lease.take(WAIT)?
                }
                Some(resumed) => resumed?,
                None => lease.take(WAIT)?,
            };
            Ok((lease, grant))
        })
        .await
    }

    /// All disks of a host are one to the storage: it would take what another one of them writes that has lost the
    /// reservation and does not know yet.
    fn check_not_reserved_here(&self, disk: &Disk, target: &Target) -> Result<(), Failure> {
        let rivals: Vec<u32> = self.rivals(disk).iter().map(|disk| disk.minor).collect();
        let has_it = |other: &Rc<Disk>| {
            let record = other.record.borrow();
            let mut its = record.leases().iter().map(|leased| &leased.target);
            let is_rival = rivals.contains(&other.minor);
            its.any(|its| {
                let is_one = is_rival || is_one_resource(its.lease(), target.lease());
                its.lease().is_of_host() && is_one
            })
        };
        let mut others = self.registry.all();
        others.retain(|other| other.minor != disk.minor);
        match others.into_iter().find(has_it) {
            None => Ok(()),
            Some(other) => Err(Failure::new(
                Code::Busy,
                format!(
                    "the lease of {} is that of {}, which has not released it yet",
                    image_of(target).display(),
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
                if let Some(target) = leased(&open).filter(|_| disk.lease.borrow().is_none()) {
                    // It does I/O: an older supervisor does not write down how far a lease has come.
                    if disk.record.borrow().hold(target) == Some(Hold::Leaving) {
                        let again = |record: &mut Record| record.set_hold(target, Hold::Taking);
                        lifecycle.registry.change(&disk, again)?;
                    }
                }
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
}

/// Whether the storage has got a request for a lease. A thread whose file system hangs may come to that when it is not
/// waited for any more: then it does not ask.
#[derive(Debug, Default)]
struct LeaseRequested(OnceLock<bool>);

impl LeaseRequested {
    /// Marks that the request to the storage is about to begin.
    fn begin(&self) -> Result<(), Failure> {
        match self.0.get_or_init(|| true) {
            true => Ok(()),
            false => Err(Failure::new(
                Code::Timeout,
                "the lease is not waited for any more",
            )),
        }
    }

    /// The storage was not asked, and will not be.
    fn never(&self) -> bool {
        !*self.0.get_or_init(|| false)
    }
}

/// Whether both are one resource of sanlock, whatever images they are for, and wherever the resource is stored.
fn is_one_resource(one: &LeaseKind, other: &LeaseKind) -> bool {
    let (LeaseKind::Sanlock(one), LeaseKind::Sanlock(other)) = (one, other) else {
        return false;
    };
    (&one.lockspace, &one.name) == (&other.lockspace, &other.name)
}

/// Passes on what becomes of a lease, until it is given up or lost.
async fn follow(
    lifecycle: Rc<Lifecycle>,
    disk: Rc<Disk>,
    mut news: UnboundedReceiver<RenewerNews>,
) {
    let mut rate = EventRate::new();
    // Their own: the others may be busy with a long question.
    let mut links: Vec<(KnownProcess, RpcClient)> = Vec::new();
    while let Some(told) = news.recv().await {
        let until = match &told {
            RenewerNews::Kept(until) => *until,
            RenewerNews::Missed(failure) => {
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
            // The lease has been over since another host got it.
            RenewerNews::Lost(failure) => {
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
        // Not before its process has the command to end: an unpause must not find that process.
        if until.is_zero() && disk.record.borrow().is_reserved() {
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
    links: &mut Vec<(KnownProcess, RpcClient)>,
    until: Duration,
) -> Result<RpcClient, Failure> {
    let place = links.iter().position(|(of, _)| *of == process.known());
    let mut link = match place {
        Some(place) => links.swap_remove(place).1,
        None => process.another_link().await?,
    };
    let until = Some(until);
    link.ask(&Request::Term { until }, &[], SOON).await?;
    Ok(link)
}
