// SPDX-License-Identifier: MIT OR Apache-2.0
//! How a tapdisk lives and dies: it is started, given a node and an image, replaced when it ends, and
//! ended with its disk.
//!
//! Each verb that changes a disk is recorded before its first step, done in steps that can be repeated, and removed
//! from the record at the end. The next one that finds an unfinished verb, such as a new supervisor, finishes it. A
//! verb that certainly cannot be finished is undone: the disk is as it was.

mod backing_chain;

mod commit;
pub mod create;
mod credentials;
mod death;
mod destroy;
mod dirty_bitmap;
mod fd_broker;
mod frozen;
mod group;
mod handoff;
pub(crate) mod io_errors;
mod key;
mod lease;
mod mirror;
mod open;
mod output;
mod park;
mod passthrough;
mod pause;
mod process_log;
mod release;
mod respawn;
mod serve;
mod server;
mod set;
mod snapshot;
mod snapshot_group;
mod stream;
mod suspend;
mod trace;

use crate::admission::Admission;
use crate::disk::Disk;
use crate::domains::{Domains, Xl};
use crate::groups::Groups;
use crate::image::Image;
use crate::process::{Process, Program, OPEN, SOON};
use crate::quota::Quota;
use crate::record::DesiredState;
use crate::registry::{PinnedMemory, Registry};
use ::lease::{Lease, LeaseClaim};
use control::supervisor::{Mode, PendingOperation};
use control::tapdisk;
use control::{Code, Failure, LeaseKind};
use std::cell::{Cell, RefCell};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{watch, Notify};

/// The life of all disks.
pub struct Lifecycle {
    /// All disks.
    pub registry: Rc<Registry>,
    /// Decides which disk may use an image.
    pub admission: Admission,
    /// How tapdisks are started.
    program: Program,
    /// Source of the guests that are suspended.
    domains: RefCell<Rc<dyn Domains>>,
    /// A guest may be.
    released: Notify,
    /// How the lease of an image is opened.
    leases: RefCell<OpenLease>,
    /// How long an inactive disk waits for its image before the supervisor reports that.
    pub patience_for_images: Cell<Duration>,
    /// Whether the kernel may serve disks whose target does not have `direct=` (passthrough).
    pub direct: Cell<bool>,
    /// Limit for short waits: a node that another process has open, a verb that is being finished.
    pub patience: Cell<Duration>,
    /// How long a process may take to open an image.
    pub patience_to_open: Cell<Duration>,
    /// Disks are parked, or about to be: no new ones are made.
    parked: watch::Sender<bool>,
    /// The control groups of guests, if they have any.
    groups: RefCell<Option<Rc<Groups>>>,
    /// The groups of disks that share limits.
    quota: Quota,
}

/// Opens the lease of an image; it may hang as storage does.
pub type OpenLease =
    Arc<dyn Fn(&LeaseKind, &Path, LeaseClaim) -> Result<Box<dyn Lease>, Failure> + Send + Sync>;

/// Converts a failure of a disk's process for a caller, for whom `Gone` would mean that the supervisor has gone.
fn of_a_process(failure: Failure) -> Failure {
    match failure.code {
        Code::Gone => Failure::new(Code::System, failure.message),
        _ => failure,
    }
}

impl Lifecycle {
    /// Supervises the disks of a registry. Files that a disk needs beside its image may be in `folders`.
    #[must_use]
    pub fn new(registry: Rc<Registry>, program: Program, folders: Vec<PathBuf>) -> Rc<Lifecycle> {
        Rc::new(Lifecycle {
            quota: Quota::open(&registry.folder),
            admission: Admission::new(registry.clone(), folders),
            registry,
            program,
            domains: RefCell::new(Rc::new(Xl)),
            released: Notify::new(),
            leases: RefCell::new(Arc::new(::lease::open)),
            patience_for_images: Cell::new(Duration::from_secs(30)),
            direct: Cell::new(true),
            patience: Cell::new(OPEN),
            patience_to_open: Cell::new(OPEN),
            parked: watch::Sender::new(false),
            groups: RefCell::default(),
        })
    }

    /// Guests have these control groups.
    pub fn use_groups(&self, groups: Groups) {
        self.groups.replace(Some(Rc::new(groups)));
    }

    /// The control groups of guests, if they have any.
    pub fn groups(&self) -> Option<Rc<Groups>> {
        self.groups.borrow().clone()
    }

    /// Opens leases so.
    pub fn use_leases(&self, open: OpenLease) {
        self.leases.replace(open);
    }

    /// Finishes what was begun with a disk and was not finished: then it is known who serves it, and
    /// from what. The caller has the turn.
    async fn finish_before(self: &Rc<Self>, disk: &Rc<Disk>) -> Result<(), Failure> {
        if disk.doing().is_none() {
            return Ok(());
        }
        let patience = self.patience.get();
        disk.unless_doomed(self.finish(disk, patience)).await
    }

    /// The process that serves a disk, and what it says of itself. The caller has the turn.
    ///
    /// # Errors
    /// The disk is not served.
    async fn introduced(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
    ) -> Result<(Rc<Process>, tapdisk::Process), Failure> {
        self.finish_before(disk).await?;
        handoff::check_served(disk)?;
        let process = disk.serving()?;
        let says = process.introduce(SOON).await?;
        Ok((process, says))
    }

    /// Does what has begun with a disk and is not done. The caller has the turn.
    ///
    /// # Errors
    /// It is not done yet, or was undone.
    pub async fn finish(self: &Rc<Self>, disk: &Rc<Disk>, limit: Duration) -> Result<(), Failure> {
        let Some(doing) = disk.doing() else {
            return Ok(());
        };
        let done = match doing {
            PendingOperation::Create | PendingOperation::Open => {
                self.finish_open(disk).await.map(drop)
            }
            PendingOperation::Close => self.finish_close(disk, false, limit).await,
            PendingOperation::Pause => self.finish_pause(disk, limit).await,
            PendingOperation::Unpause => self.finish_unpause(disk).await.map(drop),
            PendingOperation::Handoff => self.finish_handoff(disk).await,
            PendingOperation::Snapshot => self.finish_snapshot(disk).await,
            PendingOperation::Mirror => self.finish_mirror(disk).await,
            PendingOperation::Park => Err(Self::is_parked()),
            PendingOperation::Destroy => {
                self.destroy_later(disk);
                Ok(())
            }
        };
        done.map_err(|failure| {
            let about = format!("disk {}: {doing} is not done: {failure}", disk.minor);
            Failure::new(failure.code, about)
        })
    }

    /// Finds the image that a disk is to be served from with this mode. Its memory stays as long as the second value.
    ///
    /// # Errors
    /// There is no such image, or no disk may write it.
    async fn image_to_serve(
        &self,
        open: &tapdisk::Open,
        mode: Mode,
    ) -> Result<(Option<Arc<Image>>, Option<PinnedMemory>), Failure> {
        let found = self.registry.image_for(open).await?;
        self.admission
            .check_not_frozen(found.0.as_ref(), mode)
            .await?;
        Ok(found)
    }

    /// Makes way for another verb than the one that has begun, if one has.
    async fn make_way(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        verb: PendingOperation,
        limit: Duration,
    ) -> Result<(), Failure> {
        match disk.doing() {
            Some(doing) if doing != verb => disk.unless_doomed(self.finish(disk, limit)).await,
            _ => Ok(()),
        }
    }

    fn begin(&self, disk: &Disk, doing: PendingOperation) -> Result<(), Failure> {
        self.registry
            .change(disk, |record| record.doing = Some(doing))
    }

    /// Removes the finished verb from the record. If the record cannot be changed, the next supervisor repeats the
    /// verb.
    fn end_of_verb(&self, disk: &Disk, want: DesiredState) {
        {
            let mut record = disk.record.borrow_mut();
            record.doing = None;
            record.want = want;
            if want == DesiredState::Served {
                record.stopped = None;
            }
        }
        self.registry.note(disk);
        // The verb may have left memory that has no user now.
        self.registry.give_memory_back();
    }
}
