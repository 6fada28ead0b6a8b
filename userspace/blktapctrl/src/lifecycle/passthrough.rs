// SPDX-License-Identifier: MIT OR Apache-2.0
//! The kernel serves a disk without its process whose image is the disk byte for byte, as far as that needs no
//! decision: the disk's process says what it may do, and this which image that is.
//!
//! The kernel gets the image before the process opens it, so that the process finds it, and loses it when the image is
//! closed, so that the kernel writes it no more. In between the kernel keeps it, whatever becomes of processes: the
//! guest of a disk whose process has died continues to work. The file is locked, and stays locked for the kernel,
//! because a lock of the process would be over while the kernel still writes.

use super::Lifecycle;
use crate::blocking_io::{blocking_io, LIMIT};
use crate::disk::Disk;
use crate::image::{Image, Opened};
use crate::kernel::{self, NodeInfo, IMAGE};
use control::supervisor::What;
use control::tapdisk::Open;
use control::{Code, Failure, LeaseKind};
use diskio::{lock_part, LockKind, LockPart};
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;
use tapdev::abi::MAX_BACKINGS;

impl Lifecycle {
    /// Lets the kernel have what a process is about to open, or nothing if it is not for the kernel. The disk is served
    /// without that, too; an event tells the reason.
    ///
    /// # Errors
    /// The kernel still uses another image than that.
    pub(super) async fn give_to_kernel(
        &self,
        disk: &Disk,
        open: &Open,
        image: Option<&Arc<Image>>,
    ) -> Result<(), Failure> {
        if !open.target.may_map() {
            return Ok(());
        }
        let Some(node) = self.node_of(disk)? else {
            return Ok(());
        };
        let image = image.filter(|_| self.is_for_kernel(&node, open));
        let Some(image) = image else {
            return self.take_from_kernel(disk, self.patience.get()).await;
        };
        match self.add_backing(disk, open, image).await {
            Ok(()) => {
                self.lend_again(disk, open).await;
                Ok(())
            }
            Err(failure) => {
                // If the target did not ask for passthrough, an image without support for it is no event.
                if open.target.direct().is_some() || failure.code != Code::Unsupported {
                    let why = failure.message;
                    let what = What::NotDirect { why };
                    self.registry.events.add(Some(disk.minor), what);
                }
                // The image that the kernel had before may be another one.
                self.take_from_kernel(disk, self.patience.get()).await
            }
        }
    }

    /// Whether the kernel may have the image: no other disk may write it, no lease may end with the process, and
    /// neither the target nor the supervisor's option may forbid it.
    pub(super) fn is_for_kernel(&self, node: &NodeInfo, open: &Open) -> bool {
        let target = &open.target;
        node.has_maps
            && *target.lease() == LeaseKind::Lock
            && !open.shared
            && target
                .direct()
                .unwrap_or(self.direct.get() && !target.driver().has_format())
    }

    async fn add_backing(
        &self,
        disk: &Disk,
        open: &Open,
        image: &Arc<Image>,
    ) -> Result<(), Failure> {
        let (again, writable) = (image.clone(), !open.read_only);
        let opened = blocking_io(image.path(), LIMIT, move || again.open(writable, true)).await?;
        let fd = direct_fd(image, &opened)?;
        let refused = |error: io::Error| not_taken(image, &error);
        let kernel = &self.registry.kernel;
        if self.kernel_holds(disk)? {
            // If it is the same one it is locked, though not by this description of it.
            match kernel.add_backing(disk.minor, IMAGE, fd, writable) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    self.take_from_kernel(disk, self.patience.get()).await?;
                }
                added => return added.map_err(refused),
            }
        }
        self.lock_for_kernel(image, fd, writable).await?;
        kernel
            .add_backing(disk.minor, IMAGE, fd, writable)
            .map_err(refused)
    }

    /// Locks what the kernel is to get. A process that ended may have I/O under way, which its lock outlives.
    async fn lock_for_kernel(
        &self,
        image: &Image,
        fd: BorrowedFd<'_>,
        writable: bool,
    ) -> Result<(), Failure> {
        let kind = match writable {
            true => LockKind::Write,
            false => LockKind::Read,
        };
        let locked = || lock_data(image, fd, kind);
        until(self.patience.get(), locked, || is_locked(image)).await
    }

    /// The kernel has the image of a disk: its process must not lock what is locked for the kernel.
    pub(super) fn kernel_holds(&self, disk: &Disk) -> Result<bool, Failure> {
        Ok(self.held(disk)?.contains(&IMAGE))
    }

    /// The numbers of what the kernel has of a disk.
    fn held(&self, disk: &Disk) -> Result<Vec<u16>, Failure> {
        if !may_have_given(disk) {
            return Ok(Vec::new());
        }
        let bits = self.node_of(disk)?.map_or(0, |node| node.backings);
        let numbers = 0..MAX_BACKINGS;
        Ok(numbers.filter(|number| bits >> number & 1 != 0).collect())
    }

    /// Takes the image of a disk from the kernel, if it has it, with what it has below, and waits until nothing of its
    /// I/O is running. The caller has the turn of the disk, and nothing that others wait for.
    ///
    /// # Errors
    /// It takes longer than `limit`, or the kernel refuses.
    pub(super) async fn take_from_kernel(
        &self,
        disk: &Disk,
        limit: Duration,
    ) -> Result<(), Failure> {
        self.take_numbers(disk, &self.held(disk)?, limit).await
    }

    /// Takes the files below the image from the kernel, but not the image.
    pub(super) async fn take_below(&self, disk: &Disk, limit: Duration) -> Result<(), Failure> {
        let mut below = self.held(disk)?;
        below.retain(|number| *number != IMAGE);
        self.take_numbers(disk, &below, limit).await
    }

    pub(super) async fn take_numbers(
        &self,
        disk: &Disk,
        numbers: &[u16],
        limit: Duration,
    ) -> Result<(), Failure> {
        let minor = disk.minor;
        if numbers.is_empty() {
            return Ok(());
        }
        let remove = |number| match self.registry.kernel.remove_backing(minor, number) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => Ok(false),
            Err(error) => Err(Failure::system(
                format!("cannot take the image of disk {minor} from the kernel"),
                &error,
            )),
        };
        // Nothing is begun in any of them while one is waited for.
        let removed = || {
            let mut all = numbers.iter().map(|number| remove(*number));
            all.try_fold(true, |all, is_removed| Ok(all & is_removed?))
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

    pub(super) fn node_of(&self, disk: &Disk) -> Result<Option<NodeInfo>, Failure> {
        kernel::node(&*self.registry.kernel, disk.minor)
            .map_err(|error| Failure::system("cannot ask the kernel", &error))
    }
}

/// Returns the file, open past the page cache, that the kernel gets.
pub(super) fn direct_fd<'o>(image: &Image, opened: &'o Opened) -> Result<BorrowedFd<'o>, Failure> {
    let fd = opened.fd().filter(|_| opened.direct);
    let path = image.path().display();
    fd.ok_or_else(|| Failure::unsupported(format!("the file system of {path} has no direct I/O")))
}

/// Locks the data of a file that the kernel is to get; false if another process has it locked.
pub(super) fn lock_data(
    image: &Image,
    fd: BorrowedFd<'_>,
    kind: LockKind,
) -> Result<bool, Failure> {
    match lock_part(fd, kind, LockPart::Data) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(error) => Err(Failure::system(
            format!("cannot lock {}", image.path().display()),
            &error,
        )),
    }
}

pub(super) fn is_locked(image: &Image) -> Failure {
    Failure::new(
        Code::Busy,
        format!("{} is locked by another process", image.path().display()),
    )
}

pub(super) fn not_taken(image: &Image, error: &io::Error) -> Failure {
    Failure::system(
        format!("the kernel does not take {}", image.path().display()),
        error,
    )
}

/// Whether the kernel could have a file of the disk. For other disks, the supervisor does not ask the kernel.
fn may_have_given(disk: &Disk) -> bool {
    let record = disk.record.borrow();
    let next = record.next.as_ref().map(|next| &next.open);
    let mut all = record.open.iter().chain(next);
    all.any(|open| open.target.may_map())
}

/// Asks the kernel at growing intervals for a state of which it sends no notification.
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
