// SPDX-License-Identifier: MIT OR Apache-2.0
//! A disk whose image is somebody else's for the time being: its guest is suspended, or has not arrived.
//!
//! It has the node and nothing of the image. What is asked of it waits in the kernel, and that something
//! does is told: the guest goes on here, and the image is wanted again.

use super::{no_node, Session};
use crate::told::describe;
use crate::troubles::wait;
use control::tapdisk::{Open, Reply, Stamp};
use control::{Code, Failure};
use diskio::File;
use rustix::fs::{fstat, FileType};
use std::future::poll_fn;
use std::os::fd::OwnedFd;
use std::task::Poll;

/// What is kept of the image.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Inactive {
    /// How it was left.
    stamp: Option<Stamp>,
}

impl Session {
    /// Lets go of the image of a guest that is suspended. Nothing of its requests is given up: they are
    /// served first, because it may go on with the same ring.
    pub(super) async fn inactivate(&self) -> Result<Reply, Failure> {
        if let Some(inactive) = self.state.borrow().inactive {
            let stamp = inactive.stamp;
            return Ok(Reply::Inactive { stamp });
        }
        let Some(server) = self.state.borrow().server.clone() else {
            return Err(Failure::new(Code::State, "the disk does not run"));
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
        // NBD clients that wait already say once more that they want something.
        for waker in self.waiting.take() {
            waker.wake();
        }
    }

    /// Waits until the disk is inactive and something is asked of it.
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

    /// Is not told any more when something is asked of the disk.
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

/// How an image is now.
pub(super) fn stamp(image: &File) -> Option<Stamp> {
    let file = fstat(image).ok()?;
    // A server of files has times of its own, which come when they come.
    if image.is_remote().unwrap_or(true) {
        return None;
    }
    let is_file = FileType::from_raw_mode(file.st_mode) == FileType::RegularFile;
    is_file.then_some(Stamp {
        // CAST: a size is not negative.
        size: file.st_size as u64,
        modified_s: file.st_mtime,
        modified_ns: file.st_mtime_nsec,
    })
}

/// An image that was left by this disk must be as it was, unless others write it all the time: their guests agree about
/// that among themselves, and look again for what they have in memory. What has one writer has it there, too.
pub(super) fn check(
    open: &Open,
    image: Option<&File>,
    stamp: Option<Stamp>,
) -> Result<(), Failure> {
    let has_others = open.shared && !open.target.driver().has_one_writer();
    match stamp.filter(|_| !has_others) {
        Some(stamp) if image.and_then(self::stamp) != Some(stamp) => Err(Failure::new(
            Code::Image,
            format!(
                "{} was written while the guest was suspended, and what the guest has of it in memory is old: \
                 end the guest, or, if what was written is its own, let it go on with tap-ctl unpause",
                open.target
            ),
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::check;
    use control::tapdisk::{Open, Stamp};

    #[test]
    fn others_may_have_written_what_has_no_tables_and_is_shared() {
        let stamp = Stamp {
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
