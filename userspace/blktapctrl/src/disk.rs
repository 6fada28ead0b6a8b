// SPDX-License-Identifier: MIT OR Apache-2.0
//! One disk: its record, its image, its process.

use crate::backoff::Backoff;
use crate::held_lease::HeldLease;
use crate::image::Image;
use crate::log::LogContext;
use crate::process::Process;
use crate::process_stats::ProcessStats;
use crate::record::{DesiredState, KnownProcess, Record};
use crate::slow_request::SlowRequest;
use crate::state::DiskState;
use crate::store;
use control::stats::{Mirror, Stream};
use control::supervisor::{PendingOperation, Row};
use control::tapdisk::{self, Open};
use control::{Code, Failure};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::{watch, Mutex, MutexGuard, Notify};

/// How far the end of a disk has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum DiskFate {
    /// The disk is to stay.
    Stays,
    /// The disk is being removed: all work on it stops.
    Doomed,
    /// Nothing is left.
    Gone,
}

/// Disks by their numbers.
pub type DiskTable = RefCell<BTreeMap<u32, Rc<Disk>>>;

/// A disk.
#[derive(Debug)]
pub struct Disk {
    /// The node.
    pub minor: u32,
    /// The name of its guest, once xenstore has said it.
    pub guest: RefCell<Option<String>>,
    /// Record of the disk, as it is on storage.
    pub record: RefCell<Record>,
    /// The image that it serves, if its driver has one.
    pub image: RefCell<Option<Arc<Image>>>,
    /// The image that an unpause leads to, until it is served.
    pub next_image: RefCell<Option<Arc<Image>>>,
    /// Memory that each of its processes leaves to the next one.
    pub state: RefCell<Option<DiskState>>,
    /// Memory that processes leave to each other for the image that an unpause leads to.
    pub next_state: RefCell<Option<DiskState>>,
    /// Its process.
    pub process: RefCell<Option<Rc<Process>>>,
    /// The process that is to take the disk over from that.
    pub successor: RefCell<Option<Rc<Process>>>,
    /// The lease of its image.
    pub lease: RefCell<Option<HeldLease>>,
    /// Xenstore does not have its directory: someone waits until the kernel has no guest on it either.
    pub unlisted: Cell<bool>,
    /// Someone tries to give leases up that the disk does not need.
    pub releases: Cell<bool>,
    /// Why a lease of the disk, which is being destroyed, is not given up yet.
    pub leaves: RefCell<Option<Failure>>,
    /// That lease is not to be waited for any more.
    pub forgotten: Notify,
    /// The process that is listened to for a wish while the disk is inactive.
    pub listened: Cell<Option<KnownProcess>>,
    /// The process has the node.
    pub attached: Cell<bool>,
    /// The disk that its process serves, while it does.
    pub serves: RefCell<Option<tapdisk::Disk>>,
    /// The deaths of its processes.
    pub backoff: RefCell<Backoff>,
    /// Requests that were answered when its process began to serve.
    pub answered_before: Cell<u64>,
    /// Its last process died of something that it did itself, and the next one does not serve yet.
    pub crashed: Cell<bool>,
    /// Last known progress of a stream into its image.
    pub streamed: RefCell<Option<Stream>>,
    /// Someone sees to that.
    pub streams: Cell<bool>,
    /// Last known progress of a copy to another image.
    pub mirrored: RefCell<Option<Mirror>>,
    /// Someone sees to that.
    pub mirrors: Cell<bool>,
    /// Someone is replacing its process.
    pub reviving: Cell<bool>,
    /// The request for which it was reported as hung is not answered yet.
    pub hung: Cell<bool>,
    /// Requests answered when the watchdog saw that number first, and when that was.
    pub progress: Cell<(u64, Instant)>,
    /// The request that takes long.
    pub slow: SlowRequest,
    /// The kernel's counts at the start of its process.
    pub tally: ProcessStats,
    /// Its guest's requests wait for other disks, not for anything that its process does.
    pub waits_for_others: Cell<bool>,
    turn: Mutex<()>,
    /// Reason for its end, if no user asked for it.
    ends_for: RefCell<Option<Failure>>,
    fate: watch::Sender<DiskFate>,
}

impl Disk {
    /// A disk with a record and nothing else.
    #[must_use]
    pub fn new(record: Record) -> Rc<Disk> {
        Rc::new(Disk {
            minor: record.minor,
            guest: RefCell::default(),
            record: RefCell::new(record),
            image: RefCell::default(),
            next_image: RefCell::default(),
            state: RefCell::default(),
            next_state: RefCell::default(),
            process: RefCell::default(),
            successor: RefCell::default(),
            lease: RefCell::default(),
            unlisted: Cell::default(),
            releases: Cell::default(),
            leaves: RefCell::default(),
            forgotten: Notify::default(),
            listened: Cell::default(),
            attached: Cell::default(),
            serves: RefCell::default(),
            backoff: RefCell::default(),
            answered_before: Cell::default(),
            crashed: Cell::default(),
            streamed: RefCell::default(),
            streams: Cell::default(),
            mirrored: RefCell::default(),
            mirrors: Cell::default(),
            reviving: Cell::default(),
            hung: Cell::default(),
            progress: Cell::new((0, Instant::now())),
            slow: SlowRequest::default(),
            tally: ProcessStats::default(),
            waits_for_others: Cell::default(),
            turn: Mutex::new(()),
            ends_for: RefCell::default(),
            fate: watch::Sender::new(DiskFate::Stays),
        })
    }

    /// Returns the log context of the disk. Fields of a record that is being changed are left out, because a log line
    /// is no reason to fail.
    #[must_use]
    pub fn about(&self) -> LogContext {
        let mut about = LogContext::disk(self.minor);
        if let Ok(record) = self.record.try_borrow() {
            if let Some(vbd) = &record.vbd {
                about = about.at(vbd);
            }
            about.target = record.open.as_ref().map(|open| open.target.to_string());
            about.pid = record.process.map(|process| process.pid);
        }
        if let Ok(process) = self.process.try_borrow() {
            about.pid = process.as_ref().map(|process| process.pid()).or(about.pid);
        }
        if let Ok(guest) = self.guest.try_borrow() {
            about.guest.clone_from(&guest);
        }
        about
    }

    /// Waits for its turn to change the disk. One at a time may.
    ///
    /// # Errors
    /// The disk is being taken away.
    pub async fn turn(&self) -> Result<MutexGuard<'_, ()>, Failure> {
        self.unless_doomed(async { Ok(self.turn.lock().await) })
            .await
    }

    /// The last turn: waits until whoever works on the disk has stopped.
    pub async fn last_turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().await
    }

    /// Does some work, unless the disk is being taken away or comes to be meanwhile.
    ///
    /// # Errors
    /// That, or what the work says.
    pub async fn unless_doomed<T>(
        &self,
        work: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        let mut fate = self.fate.subscribe();
        tokio::select! {
            biased;
            _ = fate.wait_for(|fate| *fate != DiskFate::Stays) => Err(self.doomed()),
            result = work => result,
        }
    }

    /// Returns an error if the disk is being removed.
    ///
    /// # Errors
    /// It is.
    pub fn stays(&self) -> Result<(), Failure> {
        match self.fate() {
            DiskFate::Stays => Ok(()),
            _ => Err(self.doomed()),
        }
    }

    fn doomed(&self) -> Failure {
        let why = self.ends_for.borrow().clone();
        why.unwrap_or_else(|| {
            Failure::new(
                Code::State,
                format!("disk {} is being taken away", self.minor),
            )
        })
    }

    /// Records the reason for the coming removal, which callers that wait for the disk get.
    pub fn ends_for(&self, why: &Failure) {
        self.ends_for.replace(Some(why.clone()));
    }

    /// How far its end has come.
    #[must_use]
    pub fn fate(&self) -> DiskFate {
        *self.fate.borrow()
    }

    /// Its end has come further. True if it had not been so far.
    pub fn advance(&self, to: DiskFate) -> bool {
        self.fate.send_if_modified(|fate| {
            let further = *fate < to;
            *fate = to.max(*fate);
            further
        })
    }

    /// Waits until nothing of it is left.
    pub async fn gone(&self) {
        // The sender is `self`, so this ends with the value only.
        let _ = self
            .fate
            .subscribe()
            .wait_for(|fate| *fate == DiskFate::Gone)
            .await;
    }

    /// The domain of its guest.
    #[must_use]
    pub fn domain(&self) -> Option<u32> {
        store::domain(self.record.borrow().vbd.as_deref()?)
    }

    /// The process that serves, if there is one.
    ///
    /// # Errors
    /// There is none.
    pub fn serving(&self) -> Result<Rc<Process>, Failure> {
        let process = self.process.borrow().clone();
        process
            .filter(|process| !process.has_ended())
            .ok_or_else(|| {
                Failure::new(
                    Code::State,
                    format!("disk {} has no process at the moment", self.minor),
                )
            })
    }

    /// Returns the image that a tapdisk has to open, with its options.
    ///
    /// # Errors
    /// No image has been set yet.
    pub fn open(&self) -> Result<Open, Failure> {
        let record = self.record.borrow();
        let mut open = record.open.clone().ok_or_else(|| {
            Failure::new(
                Code::State,
                format!("disk {} has no image: open one", self.minor),
            )
        })?;
        record.rule(&mut open);
        Ok(open)
    }

    /// From now on a process may find an image that is smaller than what the guest knows, or not.
    pub fn allow_shrinking(&self, may: bool) {
        if let Some(open) = &mut self.record.borrow_mut().open {
            open.may_shrink = may;
        }
    }

    /// The image that was to be served instead is not.
    pub fn drop_next(&self) {
        self.next_image.replace(None);
        self.next_state.replace(None);
    }

    /// Returns the name of the disk, for a message.
    #[must_use]
    pub fn name(&self) -> String {
        match &self.record.borrow().vbd {
            Some(vbd) => format!("tap disk {} of {vbd}", self.minor),
            None => format!("tap disk {}", self.minor),
        }
    }

    /// Returns the verb that has begun and is not done.
    #[must_use]
    pub fn doing(&self) -> Option<PendingOperation> {
        self.record.borrow().doing
    }

    /// The process is no more. Its socket is removed now: the next one's has the same name.
    pub fn forget_process(&self) {
        self.attached.set(false);
        self.serves.replace(None);
        self.record.borrow_mut().process = None;
        if let Some(process) = self.process.take() {
            process.tidy();
        }
    }

    /// A process is to take the disk over.
    #[must_use]
    pub fn is_successor(&self, process: &Process) -> bool {
        matches!(&*self.successor.borrow(), Some(its) if std::ptr::eq(&**its, process))
    }

    /// Returns the known state of the process, without a question to it.
    fn process_state(&self) -> Option<tapdisk::State> {
        self.process.borrow().as_ref()?;
        let record = self.record.borrow();
        Some(match (self.attached.get(), record.want) {
            (false, _) => tapdisk::State::Idle,
            (true, DesiredState::Served) if record.inactive.is_some() => tapdisk::State::Inactive,
            (true, DesiredState::Paused) => tapdisk::State::Paused,
            (true, _) if self.serves.borrow().is_some() => tapdisk::State::Running,
            (true, _) => tapdisk::State::Attached,
        })
    }

    /// Returns the row of a list, without the kernel's part.
    #[must_use]
    pub fn row(&self) -> Row {
        let record = self.record.borrow();
        Row {
            minor: Some(self.minor),
            pid: self.process.borrow().as_ref().map(|process| process.pid()),
            state: self.process_state(),
            kernel: None,
            target: record.open.as_ref().map(|open| open.target.clone()),
            mode: record.open.as_ref().map(|_| record.mode),
            vbd: record.vbd.clone(),
            disk: self.serves.borrow().clone(),
            restarts: record.restarts,
            doing: record.doing,
            unknown: None,
            stopped: record.stopped.clone(),
            state_bytes: self.state.borrow().as_ref().map_or(0, DiskState::size),
            binary: self
                .process
                .borrow()
                .as_ref()
                .and_then(|process| process.binary()),
        }
    }
}
