// SPDX-License-Identifier: MIT OR Apache-2.0
//! The end of serving: for a while, or for good.

use super::{inactive, not_running, Inner, Session};
use crate::Server;
use control::tapdisk::Reply;
use control::Failure;
use diskio::Errno;
use std::rc::Rc;
use std::time::Duration;

/// Number of attempts to tell the kernel that nothing is under way, and the time between them.
const RESTS: u32 = 3;
const MOMENT: Duration = Duration::from_millis(1);

impl Session {
    /// Ends serving, and closes the image, which others may use then.
    pub(super) async fn pause(&self) -> Result<Reply, Failure> {
        if self.state.borrow().inactive.is_some() {
            self.stop_watching().await;
            return Ok(Reply::Done);
        }
        let Some(server) = self.server() else {
            return Err(not_running());
        };
        // The kernel would report success to a flush whose error this process has got.
        let _ban = self.direct.forbid().await?;
        // The guest still runs: it waits only for writes that it makes during this flush.
        let early = match server.is_read_only() {
            true => Ok(()),
            false => server.disk().flush().await,
        };
        // A flush of the guest that arrives now reports it.
        if let Err(error) = early {
            self.lose(&server, error);
        }
        if let Some(twin) = server.twin() {
            twin.flush().await;
        }
        server.take_back().await?;
        server.quiesce().await;
        self.let_go(server, early).await.map(|()| Reply::Done)
    }

    /// Closes an image that is not used any more, so that others may use it at once.
    pub(super) async fn let_go(
        &self,
        server: Rc<Server>,
        early: Result<(), Errno>,
    ) -> Result<(), Failure> {
        let inactive = server.disk().inactivate().await;
        if let Err(error) = inactive {
            self.lose(&server, error);
        }
        // Each flush may report an error that the other does not.
        let inactive = match early {
            Err(error) if error != Errno::OPNOTSUPP => Err(error),
            _ => inactive,
        };
        let closed = self.stop(server).await;
        inactive.map_err(|error| {
            Failure::system("not all of the image could be made durable", &error.into())
        })?;
        closed
    }

    /// DirtyBitmap that writes may be lost, which the guest learns with its next flush. If the reason is that another host
    /// has the lease, that flush meets the error itself.
    fn lose(&self, server: &Server, error: Errno) {
        if !server.is_lost_lease(error) {
            self.lost.add(error);
        }
    }

    /// Gives the node back, and closes the image after a flush, most of which happens while the guest runs.
    pub(super) async fn pause_and_close(&self) -> Result<Reply, Failure> {
        let runs = self.state.borrow().server.is_some();
        let paused = match runs {
            true => self.pause().await.map(drop),
            false => Ok(()),
        };
        let closed = self.close().await?;
        paused.map(|()| closed)
    }

    async fn stop(&self, server: Rc<Server>) -> Result<(), Failure> {
        let taken_back = server.take_back().await;
        server.quiesce().await;
        if let Some(twin) = server.twin() {
            twin.close().await;
            self.state.borrow_mut().unsure |= twin.is_unsure();
        }
        let closed = server.disk().close().await;
        if let Err(error) = closed {
            self.lose(&server, error);
        }
        {
            let mut state = self.state.borrow_mut();
            state.server = None;
            state.disk = None;
            // The image stays locked until the server and this file are dropped, so no other process has changed it.
            let file = state.file.take();
            state.parents.clear();
            state.left = file.as_ref().and_then(inactive::stamp);
        }
        self.keep(true);
        // Nothing of ours may hold pages of the arena.
        self.runtime
            .io
            .register(None)
            .map_err(|error| Failure::system("cannot release the arena", &error))?;
        closed
            .map_err(|error| Failure::system("the image was not closed in order", &error.into()))?;
        taken_back
    }

    /// Ends serving and gives the node back, whatever the state.
    pub(super) async fn close(&self) -> Result<Reply, Failure> {
        let server = self.server();
        let stopped = match server {
            Some(server) => self.stop(server).await,
            None => Ok(()),
        };
        if stopped.is_ok() {
            self.rest().await;
        }
        self.stop_watching().await;
        let link = self.state.borrow().link.clone();
        if let Some(link) = link.as_ref().filter(|link| link.is_parked()) {
            // The node is not given back as long as a command waits there.
            self.runtime
                .io
                .close_uring()
                .map_err(|error| Failure::system("cannot close the ring", &error))?;
            link.commands_ended().await;
        }
        *self.state.borrow_mut() = Inner::default();
        self.direct.leave();
        self.change_image(None);
        stopped.map(|()| Reply::Done)
    }

    /// Cleans up after an image could not be opened; `failed` is the number of changing operations that had failed
    /// before. Tells the kernel that another image may be opened and that the next process need not wait, unless an
    /// operation may still be executed.
    pub(super) async fn retreat(&self, failed: u64) {
        if self.state.borrow().started {
            return;
        }
        let io = &self.runtime.io;
        let unsure = io.failed() != failed || io.transfers() > 0;
        self.state.borrow_mut().unsure |= unsure;
        self.rest().await;
    }

    /// Tells the kernel that nothing is under way any more, if it would have to assume otherwise: the next
    /// process need not wait.
    async fn rest(&self) {
        let (tap, link, fence, unsure) = {
            let state = self.state.borrow();
            let (tap, link) = (state.tap.clone(), state.link.clone());
            (tap, link, state.fence, state.unsure)
        };
        let (Some(tap), Some(tapdev::Fence::Session { .. }), false) = (tap, fence, unsure) else {
            return;
        };
        // This process may have given up a failed operation that the storage still executes.
        let io = &self.runtime.io;
        if io.transfers() > 0 || self.troubles.has_any() || self.lost.has_any() {
            return;
        }
        let mut told = tap.rest();
        for _ in 0..RESTS {
            // A request that a command brought after the server stopped goes back to the kernel first.
            let comes = link.as_ref().is_some_and(|link| link.has_commands());
            if told.is_ok() || !comes || io.sleep(MOMENT).await.is_err() {
                break;
            }
            told = tap.rest();
        }
        match told {
            Ok(()) => self.state.borrow_mut().fence = None,
            Err(error) => self.note("the next process waits as if this one had died", &error),
        }
    }

    /// Finishes and commits the requests that it has, gives everything back, and ends the process.
    pub async fn leave(&self) -> Result<(), Failure> {
        let _alone = self.gate.alone().await;
        let closed = self.close().await;
        self.end();
        closed.map(drop)
    }
}
