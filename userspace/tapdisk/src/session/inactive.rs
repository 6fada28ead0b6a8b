// SPDX-License-Identifier: MIT OR Apache-2.0
//! An inactive disk, whose image belongs to another process for some time: its guest is suspended, or has not arrived.
//!
//! The process has the node, and no access to the image. Its requests wait in the kernel, and the supervisor learns
//! when one arrives: that means that the guest runs here and the image is needed again.

use super::{no_node, not_running, Session};
use crate::describe::describe;
use crate::io_errors::wait;
use control::tapdisk::{ImageStamp, Open, Reply};
use control::{Code, Failure};
use diskio::File;
use rustix::fs::{fstat, FileType};
use std::future::poll_fn;
use std::os::fd::OwnedFd;
use std::task::Poll;

/// State of an inactive disk's image.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Inactive {
    /// State in which the image was left.
    stamp: Option<ImageStamp>,
}

impl Session {
    /// Closes the image of a guest that is suspended. The requests of the guest are served first and not handed back,
    /// because it may resume with the same ring.
    pub(super) async fn inactivate(&self) -> Result<Reply, Failure> {
        if let Some(inactive) = self.state.borrow().inactive {
            let stamp = inactive.stamp;
            return Ok(Reply::Inactive { stamp });
        }
        let Some(server) = self.state.borrow().server.clone() else {
            return Err(not_running());
        };
        server.drain().await?;
        let disk = self.state.borrow().disk.clone();
        let let_go = self.let_go(server, Ok(())).await;
        let stamp = {
            let mut state = self.state.borrow_mut();
            let stamp = state.left;
            state.disk = disk;
            state.inactive = Some(Inactive { stamp });
            stamp
        };
        self.watch();
        let_go.map(|()| Reply::Inactive { stamp })
    }

    /// Begins inactive: the guest learns how large the disk is, and nothing else of the image.
    pub(super) async fn open_inactive(
        &self,
        open: Open,
        image: Option<OwnedFd>,
    ) -> Result<Reply, Failure> {
        let tap = self.state.borrow().tap.clone().ok_or_else(no_node)?;
        let engine = self.select(&open)?;
        let (shape, fence) = self.look(&open, image).await?;
        self.tell_kernel(&tap, &open, &shape, fence).await?;
        let disk = describe(&shape, &open, engine);
        self.link(&tap);
        {
            let mut state = self.state.borrow_mut();
            state.open = Some(open);
            state.disk = Some(disk.clone());
            state.inactive = Some(Inactive::default());
        }
        self.watch();
        Ok(Reply::Disk(disk))
    }

    fn watch(&self) {
        let link = self.state.borrow().link.clone();
        if let Some(link) = link {
            link.watch();
        }
        // NBD clients that already wait must note again that they want to use the disk.
        for waker in self.waiting.take() {
            waker.wake();
        }
    }

    /// Waits until the disk is inactive and a request or a client waits for it.
    pub(super) async fn wanted(&self) {
        poll_fn(|cx| match &self.state.borrow().link {
            Some(link) => link.poll_wanted(cx.waker()),
            None => {
                wait(&mut self.waiting.borrow_mut(), cx.waker());
                Poll::Pending
            }
        })
        .await;
    }

    /// Stops noticing requests and clients.
    pub(super) async fn stop_watching(&self) {
        if self.state.borrow_mut().inactive.take().is_none() {
            return;
        }
        self.state.borrow_mut().disk = None;
        let link = self.state.borrow().link.clone();
        if let Some(link) = link {
            link.unwatch().await;
        }
    }
}

/// Returns the present state of an image's file.
pub(super) fn stamp(image: &File) -> Option<ImageStamp> {
    let file = fstat(image).ok()?;
    // A server of files has times of its own, which come when they come.
    if image.is_remote().unwrap_or(true) {
        return None;
    }
    let is_file = FileType::from_raw_mode(file.st_mode) == FileType::RegularFile;
    is_file.then_some(ImageStamp {
        // CAST: a size is not negative.
        size: file.st_size as u64,
        modified_s: file.st_mtime,
        modified_ns: file.st_mtime_nsec,
    })
}

/// Checks that an image has not changed since this disk left it. A shared image may change at any time: its guests
/// agree on that among themselves, and read again what they have in memory. An image with one writer has that writer's
/// data there, too.
pub(super) fn check(
    open: &Open,
    image: Option<&File>,
    stamp: Option<ImageStamp>,
) -> Result<(), Failure> {
    let has_others = open.shared && !open.target.driver().has_one_writer();
    match stamp.filter(|_| !has_others) {
        Some(stamp) if image.and_then(self::stamp) != Some(stamp) => Err(Failure::new(
            Code::Image,
            format!(
                "{} has changed while the guest was suspended, and the guest's memory has old content of it: \
                 end the guest, or, if the changes are its own, resume it: `tap-ctl unpause -m MINOR`",
                open.target
            ),
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::check;
    use control::tapdisk::{ImageStamp, Open};

    #[test]
    fn others_may_have_written_what_has_no_tables_and_is_shared() {
        let stamp = ImageStamp {
            size: 512,
            modified_s: 1,
            modified_ns: 2,
        };
        let passes = |target: &str, shared| {
            let target = target.parse().expect("a target");
            let open = Open {
                shared,
                ..Open::new(target)
            };
            // As it was left it is not: it is gone.
            check(&open, None, Some(stamp)).is_ok()
        };
        assert!(passes("aio:/a", true) && passes("sync:/a", true));
        assert!(!passes("aio:/a", false));
        assert!(!passes("qcow2:/a", true) && !passes("key=/k,luks:/a", true));
    }
}
