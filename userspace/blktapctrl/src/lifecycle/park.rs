// SPDX-License-Identifier: MIT OR Apache-2.0
//! Parks disks: they release the kernel's module, so that it can be exchanged, and resume with the next one.
//!
//! A disk that is parked has neither a process nor a node. All else is kept: its record, its image and the lease of
//! that, its memory, and its number, by which the guest's device finds the next node. The caller has ensured that no
//! guest sends requests in the meantime and that all are answered: the kernel's part of a disk is only its unanswered
//! requests, so nothing is lost with the node.

use super::passthrough::until;
use super::Lifecycle;
use crate::disk::{Disk, DiskFate};
use crate::kernel::Make;
use crate::log::tell;
use crate::record::DesiredState;
use control::supervisor::PendingOperation;
use control::{Code, Failure};
use std::io;
use std::rc::Rc;
use std::time::Duration;

/// How long the creation of a disk waits for the next module.
const EXCHANGE: Duration = Duration::from_secs(20);
/// How long the supervisor waits for a disk that resumes.
const SERVE: Duration = Duration::from_secs(5);

impl Lifecycle {
    /// Parks all disks, or none.
    ///
    /// # Errors
    /// One cannot be: says which, and why. All are served as before, or will be.
    pub async fn park(self: &Rc<Self>, limit: Duration) -> Result<Vec<u32>, Failure> {
        if let Some(left) = self.registry.left_alone().first() {
            let why = format!(
                "disk {} is ignored, because its record is not understood: run `tap-ctl adopt -m {}` first",
                left.minor, left.minor
            );
            return Err(Failure::new(Code::State, why));
        }
        self.parked.send_replace(true);
        let mut parked = self.park_all(limit).await;
        if let Err(failure) = &mut parked {
            if let Err(also) = self.unpark().await {
                failure.message = format!("{failure}; and not all disks resumed: {also}");
            }
        }
        parked
    }

    async fn park_all(self: &Rc<Self>, limit: Duration) -> Result<Vec<u32>, Failure> {
        // Those that are on their way out hold the module, too.
        let disks = self.registry.all();
        let parks = disks.iter().map(|disk| async {
            match disk.fate() {
                DiskFate::Stays => self.park_one(disk, limit).await,
                DiskFate::Doomed | DiskFate::Gone => self.destroy_within(disk, limit).await,
            }
        });
        // At once: guests wait for the slowest alone.
        for parked in futures::future::join_all(parks).await {
            parked?;
        }
        self.no_nodes_left()?;
        Ok(disks.iter().map(|disk| disk.minor).collect())
    }

    async fn park_one(self: &Rc<Self>, disk: &Rc<Disk>, limit: Duration) -> Result<(), Failure> {
        let named = |failure: Failure| {
            let about = format!("disk {} cannot be parked: {failure}", disk.minor);
            Failure::new(failure.code, about)
        };
        let _turn = disk.turn().await?;
        if disk.doing() != Some(PendingOperation::Park) {
            self.finish_before(disk).await.map_err(named)?;
            self.has_no_guest(disk).map_err(named)?;
            self.begin(disk, PendingOperation::Park)?;
        }
        let gone = disk.unless_doomed(self.let_node_go(disk, limit)).await;
        gone.map_err(named)
    }

    /// Refuses to park a disk that the kernel serves to a guest, whose requests are in the node.
    fn has_no_guest(&self, disk: &Disk) -> Result<(), Failure> {
        let Some((domain, _)) = self.node_of(disk)?.and_then(|node| node.bound) else {
            return Ok(());
        };
        let why = format!(
            "the kernel serves domain {domain} from it: `xen-blkback-rs exchange` takes it from its driver first"
        );
        Err(Failure::new(Code::Busy, why))
    }

    /// The process of a disk ends, and what it had is durable; then its node goes.
    async fn let_node_go(&self, disk: &Disk, limit: Duration) -> Result<(), Failure> {
        self.let_process_go(disk, limit).await?;
        let minor = disk.minor;
        let is_gone = || match self.registry.kernel.destroy(minor) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => Ok(false),
            Err(error) => Err(Failure::system("its node cannot be taken away", &error)),
        };
        let late = || {
            let why =
                "its node is in use: fuser -v /dev/xentap/*, and see whether its storage answers";
            Failure::new(Code::Timeout, why)
        };
        until(limit, is_gone, late).await
    }

    /// A module that goes takes nodes of others with it.
    fn no_nodes_left(&self) -> Result<(), Failure> {
        let left = self.registry.kernel.query(0);
        let left =
            left.map_err(|error| Failure::system("cannot ask the kernel for its nodes", &error))?;
        match left {
            None => Ok(()),
            Some(node) if self.registry.get(node.minor).is_some() => Err(Failure::new(
                Code::Busy,
                format!("disk {} was made meanwhile: ask again", node.minor),
            )),
            Some(node) => Err(Failure::new(
                Code::Busy,
                format!(
                    "the node {} belongs to no disk: `tap-ctl free -m {}` takes it away",
                    node.minor, node.minor
                ),
            )),
        }
    }

    /// Resumes all parked disks with the module that is loaded. Those that cannot at once are tried again.
    ///
    /// # Errors
    /// The module does not make the node of one: it stays parked.
    pub async fn unpark(self: &Rc<Self>) -> Result<Vec<u32>, Failure> {
        let all = self.registry.all();
        let is_parked = |disk: &Rc<Disk>| disk.doing() == Some(PendingOperation::Park);
        let disks: Vec<_> = all.into_iter().filter(is_parked).collect();
        let unparks = disks.iter().map(|disk| async {
            self.unpark_one(disk).await?;
            self.served_soon(disk).await;
            Ok(())
        });
        let unparked = futures::future::join_all(unparks).await;
        unparked.into_iter().collect::<Result<Vec<()>, _>>()?;
        self.parked.send_replace(false);
        Ok(disks.iter().map(|disk| disk.minor).collect())
    }

    async fn unpark_one(self: &Rc<Self>, disk: &Rc<Disk>) -> Result<(), Failure> {
        // One that is on its way out needs no node.
        let Ok(_turn) = disk.turn().await else {
            return Ok(());
        };
        if disk.doing() != Some(PendingOperation::Park) {
            return Ok(());
        }
        let is_new = self.make_node_again(disk)?;
        self.registry.change(disk, |record| {
            record.doing = None;
            if is_new {
                // Its counters begin at zero.
                (record.poisoned, record.failed_flushes) = (0, 0);
            }
        })
    }

    /// Serves a disk that has a node again, and waits for that, but for no storage that hangs.
    async fn served_soon(self: &Rc<Self>, disk: &Rc<Disk>) {
        if disk.record.borrow().want != DesiredState::Served {
            return;
        }
        let (lifecycle, again) = (self.clone(), disk.clone());
        // A task of its own: it continues even if no caller waits for it.
        let served = tokio::task::spawn_local(async move {
            if again.serving().is_ok() {
                lifecycle.serve_with_its_own(&again).await;
            }
            lifecycle.revive(&again, Duration::ZERO).await;
            // An earlier supervisor may have begun them.
            lifecycle.follow_stream(&again);
            lifecycle.follow_mirror(&again);
        });
        if tokio::time::timeout(SERVE, served).await.is_err() {
            tell!(
                warn,
                disk.about(),
                "disk {}: it is not served yet",
                disk.minor
            );
        }
    }

    /// A disk that was not parked after all has its process yet, which may have let go of the image.
    async fn serve_with_its_own(self: &Rc<Self>, disk: &Rc<Disk>) {
        if let Ok(_turn) = disk.turn().await {
            let served = disk.unless_doomed(self.serve_again(disk)).await;
            self.or_revive(disk, served).await;
        }
    }

    /// False if the node has not gone yet.
    fn make_node_again(&self, disk: &Disk) -> Result<bool, Failure> {
        let make = {
            let record = disk.record.borrow();
            Make {
                minor: Some(disk.minor),
                arena_kib: record.arena_kib,
                fail_after_s: record.policy.fail_after_s,
                max_deaths: record.policy.max_deaths,
            }
        };
        match self.registry.kernel.create(make) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(crate::registry::unmade(disk.minor, &error)),
        }
    }

    /// Waits while there is no module to make a disk with.
    ///
    /// # Errors
    /// That takes long.
    pub(super) async fn until_unparked(&self) -> Result<(), Failure> {
        let mut parked = self.parked.subscribe();
        let over = async {
            // The sender is `self`, so this ends with the value only.
            let _ = parked.wait_for(|parked| !parked).await;
        };
        tokio::time::timeout(EXCHANGE, over).await.map_err(|_| {
            let why =
                "the kernel's module is being exchanged: try again when `xen-blkback-rs exchange` has ended";
            Failure::new(Code::Busy, why)
        })
    }

    /// Registers a disk that an earlier supervisor has parked; the program that parked it asks for its return. True if
    /// it is.
    pub(crate) fn found_parked(&self, disk: &Disk) -> bool {
        let is_parked = disk.doing() == Some(PendingOperation::Park);
        if is_parked {
            self.parked.send_replace(true);
        }
        is_parked
    }

    /// Failure of a verb on a parked disk, which does nothing until it resumes.
    pub(super) fn is_parked() -> Failure {
        let why = "the kernel's module is being exchanged, and it has no node until then: run `tap-ctl unpark` if \
                   that exchange has ended";
        Failure::new(Code::State, why)
    }
}
