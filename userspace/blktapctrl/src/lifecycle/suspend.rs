// SPDX-License-Identifier: MIT OR Apache-2.0
//! A suspended guest releases its images, and a disk takes its image when it gets a request.
//!
//! A guest that moves has a disk on either side. That of the source is made inactive when the guest is suspended; that
//! of the destination begins inactive. The first request after that decides: one of the guest that arrived, or of the
//! guest that was not moved after all, which resumes with the same ring. The image's lock keeps all others out until
//! then. A disk that cannot have the image holds its requests.

use super::io_errors::{until_end, EventRate};
use super::Lifecycle;
use crate::disk::{Disk, DiskFate};
use crate::domains::Domains;
use crate::log::{tell, LogContext};
use crate::process::Process;
use crate::record::{DesiredState, InactiveReason};
use crate::rpc_client::{unexpected, EVER};
use control::supervisor::What;
use control::tapdisk::{self, ImageStamp, Reply, Request, State};
use control::{Code, Failure};
use std::rc::Rc;
use std::time::{Duration, Instant};

/// How long the requests of a suspended guest may take.
const DRAIN: Duration = Duration::from_secs(600);
/// Time between two attempts to take an image that another host or process has; each attempt waits for it for a while.
const SOON: Duration = Duration::from_millis(100);
/// Time between two attempts where another one hardly helps.
const LATER: Duration = Duration::from_secs(5);

impl Lifecycle {
    /// Asks these which guests are suspended.
    pub fn use_domains(&self, domains: Rc<dyn Domains>) {
        self.domains.replace(domains);
    }

    /// A guest may be suspended now.
    pub fn look_for_suspended(&self) {
        self.released.notify_one();
    }

    /// Lets go of the images of guests that are suspended, for ever.
    pub async fn watch_suspended(self: Rc<Self>) {
        let mut rate = EventRate::new();
        loop {
            self.released.notified().await;
            let all = self.registry.all();
            let mut active = all.iter().filter(|disk| is_active(disk)).peekable();
            if active.peek().is_none() {
                continue;
            }
            let domains = self.domains.borrow().clone();
            let suspended = match domains.suspended().await {
                Ok(suspended) => suspended,
                Err(failure) => {
                    if rate.is_due() {
                        rate.told();
                        tell!(warn, LogContext::default().failed(&failure), "it is not known whether guests are suspended, so their images stay in use: {failure}");
                    }
                    continue;
                }
            };
            for disk in active.filter(|disk| disk.domain().is_some_and(|d| suspended.contains(&d)))
            {
                let (lifecycle, disk) = (self.clone(), disk.clone());
                tokio::task::spawn_local(async move {
                    if let Err(failure) = lifecycle.inactivate(&disk).await {
                        tell!(
                            warn,
                            disk.about().failed(&failure),
                            "disk {}: {failure}",
                            disk.minor
                        );
                    }
                });
            }
        }
    }

    /// Has the process of a disk whose guest is suspended finish what it has and let go of the image.
    ///
    /// # Errors
    /// The guest resumes, or not all of the image could be made durable.
    pub async fn inactivate(self: &Rc<Self>, disk: &Rc<Disk>) -> Result<(), Failure> {
        let _turn = disk.turn().await?;
        if !is_active(disk) {
            return Ok(());
        }
        let Ok(process) = disk.serving() else {
            // The next one looks again.
            return Ok(());
        };
        self.await_wish(disk, &process);
        // Written down first: who replaces a process that dies on the way must not take the image again.
        let inactive = Some(InactiveReason::Suspended { stamp: None });
        self.registry
            .change(disk, |record| record.inactive = inactive)?;
        disk.unless_doomed(self.finish_inactivate(disk, &process))
            .await
    }

    async fn finish_inactivate(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        process: &Process,
    ) -> Result<(), Failure> {
        let failure = match process.ask(&Request::Inactivate, &[], DRAIN).await {
            Ok(Reply::Inactive { stamp }) => return self.became_inactive(disk, stamp).await,
            Ok(reply) => unexpected(&reply),
            Err(failure) => failure,
        };
        if process.has_died(&failure).await {
            // The next one leaves the image alone, and so must the kernel.
            return self.became_inactive(disk, None).await;
        }
        let status = process.status().await.inspect_err(|_| {
            // It is not known whether it has the image.
            self.give_lease_up_later(disk, Duration::ZERO);
        });
        match status?.state {
            State::Inactive => self.became_inactive(disk, None).await?,
            _ => {
                disk.record.borrow_mut().inactive = None;
                self.registry.note(disk);
            }
        }
        Err(failure)
    }

    async fn became_inactive(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        stamp: Option<ImageStamp>,
    ) -> Result<(), Failure> {
        self.take_from_kernel(disk, DRAIN).await?;
        self.give_lease_up(disk).await;
        disk.record.borrow_mut().inactive = Some(InactiveReason::Suspended { stamp });
        self.registry.note(disk);
        self.registry.events.add(Some(disk.minor), What::Inactive);
        Ok(())
    }

    /// Records that a disk is inactive because its process reports that, whatever the record has.
    pub(crate) fn found_inactive(self: &Rc<Self>, disk: &Rc<Disk>) {
        let suspended = InactiveReason::Suspended { stamp: None };
        disk.record.borrow_mut().inactive.get_or_insert(suspended);
        self.registry.note(disk);
        let process = disk.process.borrow().clone();
        if let Some(process) = process {
            self.await_wish(disk, &process);
        }
    }

    /// Sends the event that the former supervisor owes about an image that was released: it ended before it had stored
    /// that.
    pub(crate) fn tell_released(&self, disk: &Disk) {
        let inactive = disk.record.borrow().inactive;
        let is_suspended = matches!(inactive, Some(InactiveReason::Suspended { .. }));
        let events = &self.registry.events;
        let is_about_that = |what: &What| {
            // Another disk may have had the number.
            matches!(what, What::Inactive | What::Active | What::Created { .. })
        };
        if is_suspended && events.newest(disk.minor, is_about_that) != Some(What::Inactive) {
            events.add(Some(disk.minor), What::Inactive);
        }
    }

    /// Waits for the process' report that its inactive disk has a request.
    pub(crate) fn await_wish(self: &Rc<Self>, disk: &Rc<Disk>, process: &Rc<Process>) {
        if disk.listened.replace(Some(process.known())) == Some(process.known()) {
            return;
        }
        let (lifecycle, disk, process) = (self.clone(), disk.clone(), process.clone());
        tokio::task::spawn_local(async move {
            let listen = async || {
                let mut link = process.another_link().await?;
                loop {
                    match link.ask(&Request::Wanted, &[], EVER).await? {
                        Reply::Done => lifecycle.give_back(&disk, &process).await,
                        reply => return Err(unexpected(&reply)),
                    }
                }
            };
            until_end(&lifecycle, &process, "report requests for its disk", listen).await;
        });
    }

    /// Gets a disk its image, as often as it takes.
    async fn give_back(self: &Rc<Self>, disk: &Rc<Disk>, process: &Process) {
        let (since, mut told) = (Instant::now(), false);
        while !process.has_ended() && disk.fate() == DiskFate::Stays {
            let Err(failure) = self.activate(disk).await else {
                return;
            };
            let is_busy = failure.code == Code::Busy;
            if !told && (!is_busy || since.elapsed() >= self.patience_for_images.get()) {
                told = true;
                let why = failure.message;
                let what = What::Held { why };
                self.registry.events.add(Some(disk.minor), what);
            }
            tokio::time::sleep(if is_busy { SOON } else { LATER }).await;
        }
    }

    /// Has the process of an inactive disk take the image.
    async fn activate(self: &Rc<Self>, disk: &Rc<Disk>) -> Result<(), Failure> {
        let _turn = disk.turn().await?;
        let (is_inactive, want, doing) = {
            let record = disk.record.borrow();
            (record.inactive.is_some(), record.want, record.doing)
        };
        // An administrator has paused it, or it runs already.
        if !is_inactive || want != DesiredState::Served || doing.is_some() {
            return Ok(());
        }
        disk.unless_doomed(self.take(disk)).await.map(drop)
    }

    /// Takes the image, whatever was done with it in the meantime, because an administrator orders that. The caller has
    /// the turn.
    pub(super) async fn take_anyway(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
    ) -> Result<tapdisk::Disk, Failure> {
        self.registry.change(disk, |record| {
            record.inactive = Some(InactiveReason::Suspended { stamp: None });
            record.passed_on = None;
        })?;
        disk.unless_doomed(self.take(disk)).await
    }

    async fn take(self: &Rc<Self>, disk: &Rc<Disk>) -> Result<tapdisk::Disk, Failure> {
        check_not_passed_on(disk)?;
        let process = disk.serving()?;
        let (open, image) = (disk.open()?, self.image(disk).await?);
        // A file has a lock, which orders those who come and go.
        if image.as_ref().is_some_and(|image| image.is_export()) {
            self.check_rivals_rest(disk)?;
        }
        let stamp = match disk.record.borrow().inactive {
            Some(InactiveReason::Suspended { stamp }) => stamp,
            _ => None,
        };
        if stamp.is_none() {
            let why = "its image may have changed while the guest was suspended";
            self.lose_marks(disk, why)?;
        }
        self.lease(disk, &open, &process).await?;
        let question = |open| Request::Activate { open, stamp };
        let taken = match self.give_to_kernel(disk, &open, image.as_ref()).await {
            Ok(()) => self.open_with(disk, &process, open, image, question).await,
            Err(failure) => Err(failure),
        };
        let what = match taken {
            Err(failure) => self.not_taken(disk, &process, failure).await?,
            Ok(what) => what,
        };
        self.became_active(disk);
        Ok(what)
    }

    /// Handles a process that was to take the image and has not confirmed that. Another host may want the lease: it is
    /// given up when this process does not have the image for certain, or has ended.
    async fn not_taken(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        process: &Process,
        failure: Failure,
    ) -> Result<tapdisk::Disk, Failure> {
        // Until a question is answered, the state that a process says it is in is the one before it.
        let status = match failure.code {
            Code::Timeout => None,
            _ => process.status().await.ok(),
        };
        match status {
            Some(status) if status.state == State::Running && failure.code == Code::State => {
                // An answer that came too late.
                return status.disk.ok_or(failure);
            }
            Some(status) if status.state == State::Inactive => {}
            // One that has died is replaced by whoever watches it.
            _ if process.has_died(&failure).await => {}
            _ => {
                self.end_process(disk).await?;
                self.revive_later(disk);
            }
        }
        self.take_from_kernel(disk, DRAIN).await?;
        self.give_lease_up(disk).await;
        Err(self.named(disk, failure))
    }

    /// Checks that no other disk of this host is active on the image from which a disk is about to be served.
    fn check_rivals_rest(&self, disk: &Disk) -> Result<(), Failure> {
        let reads = |disk: &Disk| disk.record.borrow().mode.is_read_only();
        let is_active = |other: &Rc<Disk>| {
            let record = other.record.borrow();
            record.inactive.is_none() && record.want == DesiredState::Served
        };
        let is_in_the_way = |other: &Rc<Disk>| is_active(other) && !(reads(other) && reads(disk));
        match self.rivals(disk).into_iter().find(is_in_the_way) {
            None => Ok(()),
            Some(other) => Err(Failure::new(
                Code::Busy,
                format!(
                    "disk {} waits for {}, which has not released its export yet",
                    disk.minor,
                    other.name()
                ),
            )),
        }
    }

    /// A disk has its image. One whose guest has arrived is the one from now on: those that had the image
    /// before do not get it back, because the data that their guest has cached is old.
    pub(crate) fn became_active(&self, disk: &Disk) {
        let was = {
            let mut record = disk.record.borrow_mut();
            record.inactive.take()
        };
        self.registry.note(disk);
        if matches!(was, Some(InactiveReason::Arriving)) {
            for other in self.rivals(disk) {
                other.record.borrow_mut().passed_on = Some(disk.name());
                self.registry.note(&other);
            }
        }
        if was.is_some() {
            self.registry.events.add(Some(disk.minor), What::Active);
            // The rest of a suspended guest's requests may have been all that it had.
            self.look_for_suspended();
        }
    }

    /// Other disks with the same image, of which one at a time may be active.
    pub(super) fn rivals(&self, disk: &Disk) -> Vec<Rc<Disk>> {
        let exclusive = |disk: &Disk| {
            let record = disk.record.borrow();
            let open = record.open.as_ref().filter(|open| !open.shared);
            open.and(record.identity)
        };
        let Some(image) = exclusive(disk) else {
            return Vec::new();
        };
        let mut all = self.registry.all();
        all.retain(|other| other.minor != disk.minor && exclusive(other) == Some(image));
        all
    }

    /// Says who has an image that cannot be had.
    fn named(&self, disk: &Disk, failure: Failure) -> Failure {
        if failure.code != Code::Busy {
            return failure;
        }
        let rivals = self.rivals(disk);
        let has_it = |other: &&Rc<Disk>| other.record.borrow().inactive.is_none();
        let who = match rivals.iter().find(has_it) {
            Some(other) => format!(
                "{} has not released it: end its guest, or find out why it is not suspended",
                other.name()
            ),
            None => failure.message,
        };
        let message = format!("its requests wait for the image: {who}");
        Failure::new(Code::Busy, message)
    }
}

/// Refuses an image that another disk has taken over, because the guest's cached data of it is outdated.
///
/// # Errors
/// Another disk has taken it over.
pub(super) fn check_not_passed_on(disk: &Disk) -> Result<(), Failure> {
    let (to, minor) = (disk.record.borrow().passed_on.clone(), disk.minor);
    match to {
        None => Ok(()),
        Some(to) => Err(Failure::new(
            Code::Busy,
            format!(
                "{to} has continued with its image, so its guest's cached data is old: end the guest, or, if that disk has written nothing, resume this one: `tap-ctl unpause -m {minor}`"
            ),
        )),
    }
}

fn is_active(disk: &Disk) -> bool {
    let record = disk.record.borrow();
    record.want == DesiredState::Served && record.doing.is_none() && record.inactive.is_none()
}
