// SPDX-License-Identifier: MIT OR Apache-2.0
//! The disk is copied to another image, which then takes its place.

use super::image::below;
use super::Session;
use crate::jobs::mirror;
use crate::told::{params, succeeds};
use crate::twin::Twin;
use control::tapdisk::{Open, Reply};
use control::{Code, Driver, Failure, Target};
use drivers::{Disk, Shape};
use formats::Kind;
use std::os::fd::OwnedFd;
use std::rc::Rc;

impl Session {
    /// Begins to copy the disk to the image that came along.
    pub(super) async fn mirror(
        self: &Rc<Self>,
        open: Open,
        image: Option<OwnedFd>,
        rate: u64,
        is_below: bool,
    ) -> Result<Reply, Failure> {
        let server = self.server();
        let Some(server) = server.filter(|server| server.is_fetching()) else {
            return Err(Failure::new(Code::State, "the disk does not run"));
        };
        if server.is_read_only() || open.read_only || rate == 0 {
            return Err(Failure::invalid(
                "a mirror is of a disk that is written, to an image that may be, at some rate",
            ));
        }
        if server.twin().is_some_and(|twin| twin.is_active()) {
            let why = "the disk has a mirror already";
            return Err(Failure::new(Code::State, why));
        }
        if is_below && !self.is_below(&open.target).await? {
            return Err(Failure::invalid(format!(
                "{} is not what the image that is served says is below it, by name and format (see tapimg info)",
                open.target
            )));
        }
        let open = Open {
            // Others would have to be asked for, and belong to the image that is served.
            may_ask: is_below,
            kernel_holds: false,
            // Who reads what is below has it locked already, against everybody who would write it.
            shared: is_below,
            ..open
        };
        let file = self.locked(&open, image).await?;
        let (disk, shape) = self.disk(&open, file).await?;
        if let Err(failure) = self.may_follow(&open, &shape, server.size()) {
            close(disk).await;
            return Err(failure);
        }
        let ban = match self.direct.forbid().await {
            Ok(ban) => ban,
            Err(failure) => {
                close(disk).await;
                return Err(failure);
            }
        };
        let twin = Twin::new(disk, shape.size, is_below, ban);
        mirror::begin(self, &server, twin, rate);
        Ok(Reply::Done)
    }

    /// What is served goes on from this one, by its header.
    async fn is_below(&self, target: &Target) -> Result<bool, Failure> {
        let (open, file) = {
            let state = self.state.borrow();
            match (&state.open, &state.file) {
                (Some(open), Some(file)) => (open.clone(), file.clone()),
                _ => return Err(Failure::new(Code::State, "no image is served")),
            }
        };
        let (Driver::Qcow2, Some(path)) = (open.target.driver(), open.target.path()) else {
            return Err(Failure::unsupported(format!(
                "{} is no qcow2 image: of others nothing is committed while they are served",
                open.target
            )));
        };
        let parent = formats::look(Kind::Qcow2, &file).await?.parent;
        let parent = parent.unwrap_or_default();
        let (Some(name), Some(driver)) = (parent.names.first(), parent.driver) else {
            return Ok(false);
        };
        let place = formats::resolve(name, path)?;
        Ok(target.path() == Some(&*place) && driver.parse() == below(target.driver()))
    }

    /// An image may take the place of the one that is served.
    fn may_follow(&self, open: &Open, shape: &Shape, size: u64) -> Result<(), Failure> {
        if shape.size < size {
            return Err(Failure::new(
                Code::Image,
                format!(
                    "{} has {} bytes, and the disk {size}: make it larger",
                    open.target, shape.size
                ),
            ));
        }
        let known = self.state.borrow().params;
        succeeds(open, known, &params(shape, open))
    }
}

/// It was not used; that it cannot be closed in order harms nobody.
async fn close(disk: Disk) {
    if let Err(error) = disk.close().await {
        eprintln!("tapdisk: the other image was not closed: {error}");
    }
}
