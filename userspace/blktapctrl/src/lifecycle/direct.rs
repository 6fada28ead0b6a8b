// SPDX-License-Identifier: MIT OR Apache-2.0
//! The kernel serves a disk by itself whose image is a block device, as far as that needs no decision: the disk's
//! process says what it may do, and this which device that is.
//!
//! It gets the image before the process is told to open it, so that the process finds it, and loses it when
//! the image is closed, so that nobody writes it any more. In between it keeps it, whatever becomes of
//! processes: the guest of one that has died goes on.

use super::Lifecycle;
use crate::apart::{apart, LIMIT};
use crate::disk::Disk;
use crate::image::Image;
use crate::kernel::{self, Node};
use control::supervisor::What;
use control::tapdisk::Open;
use control::{Code, Driver, Failure, LeaseKind};
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// The driver whose images are the disk byte for byte, past the page cache.
const DRIVER: Driver = Driver::Aio;

impl Lifecycle {
    /// Lets the kernel have what a process is about to open, or nothing if it is not for the kernel. A disk is
    /// served without that, too; why it is, is told.
    ///
    /// # Errors
    /// The kernel still uses another image than that.
    pub(super) async fn give_to_kernel(
        &self,
        disk: &Disk,
        open: &Open,
        image: Option<&Arc<Image>>,
    ) -> Result<(), Failure> {
        if open.target.driver() != DRIVER {
            return Ok(());
        }
        let Some(node) = self.node_of(disk)? else {
            return Ok(());
        };
        let image = image.filter(|image| self.is_for_kernel(&node, open, image));
        let Some(image) = image else {
            return self.take_from_kernel(disk, self.patience.get()).await;
        };
        match self.add_backing(disk, open, image).await {
            Ok(()) => Ok(()),
            Err(failure) => {
                let why = failure.message;
                let what = What::NotDirect { why };
                self.registry.events.add(Some(disk.minor), what);
                // What it had before may be another one.
                self.take_from_kernel(disk, self.patience.get()).await
            }
        }
    }

    /// Others must not write it, nor a lease end with the process; and somebody may not want it.
    fn is_for_kernel(&self, node: &Node, open: &Open, image: &Image) -> bool {
        let target = &open.target;
        node.has_maps
            && *target.lease() == LeaseKind::Lock
            && !open.shared
            && target.direct().unwrap_or(self.direct.get())
            && self.registry.kernel.can_serve(image)
    }

    async fn add_backing(
        &self,
        disk: &Disk,
        open: &Open,
        image: &Arc<Image>,
    ) -> Result<(), Failure> {
        let (again, writable) = (image.clone(), !open.read_only);
        let opened = apart(image.path(), LIMIT, move || again.open(writable, true)).await?;
        let Some(fd) = opened.fd().filter(|_| opened.direct) else {
            return Err(Failure::unsupported(format!(
                "{} has no direct I/O",
                image.path().display()
            )));
        };
        let kernel = &self.registry.kernel;
        let added = match kernel.add_backing(disk.minor, fd, writable) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                self.take_from_kernel(disk, self.patience.get()).await?;
                kernel.add_backing(disk.minor, fd, writable)
            }
            added => added,
        };
        added.map_err(|error| {
            Failure::system(
                format!("the kernel does not take {}", image.path().display()),
                &error,
            )
        })
    }

    /// Takes the image of a disk from the kernel, if it has it, and waits until nothing of its I/O is running.
    /// The caller has the turn of the disk, and nothing that others wait for.
    ///
    /// # Errors
    /// It takes longer than `limit`, or the kernel refuses.
    pub(super) async fn take_from_kernel(
        &self,
        disk: &Disk,
        limit: Duration,
    ) -> Result<(), Failure> {
        let minor = disk.minor;
        if !may_have_given(disk) {
            return Ok(());
        }
        if self
            .node_of(disk)?
            .is_none_or(|node| node.status.backings == 0)
        {
            return Ok(());
        }
        let removed = || match self.registry.kernel.remove_backing(minor) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => Ok(false),
            Err(error) => Err(Failure::system(
                format!("cannot take the image of disk {minor} from the kernel"),
                &error,
            )),
        };
        let late = || {
            Failure::new(
                Code::Timeout,
                format!(
                    "I/O of the kernel on the image of disk {minor} is not over: see whether its storage answers"
                ),
            )
        };
        until(limit, removed, late).await
    }

    fn node_of(&self, disk: &Disk) -> Result<Option<Node>, Failure> {
        kernel::node(&*self.registry.kernel, disk.minor)
            .map_err(|error| Failure::system("cannot ask the kernel", &error))
    }
}

/// Something of a disk is what the kernel could have. Of others it need not be asked.
fn may_have_given(disk: &Disk) -> bool {
    let record = disk.record.borrow();
    let next = record.next.as_ref().map(|next| &next.open);
    let mut all = record.open.iter().chain(next);
    all.any(|open| open.target.driver() == DRIVER)
}

/// Asks the kernel again and again for something of which it tells nobody when it is so.
///
/// # Errors
/// It takes longer than `limit`, or what `is_over` says.
pub(super) async fn until(
    limit: Duration,
    is_over: impl Fn() -> Result<bool, Failure>,
    late: impl FnOnce() -> Failure,
) -> Result<(), Failure> {
    let asked = async {
        let mut pause = Duration::from_millis(1);
        while !is_over()? {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(50));
        }
        Ok(())
    };
    tokio::time::timeout(limit, asked)
        .await
        .unwrap_or_else(|_| Err(late()))
}
