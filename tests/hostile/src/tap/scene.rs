// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! A disk with its process in this program, and a frontend: start and end of most attacks.

use super::server::{answer, DiskData};
use super::{TapDisk, TapNode};
use crate::lab::Lab;
use crate::queue::ANSWER;
use crate::session::{Session, WIDE};
use crate::wait;
use crate::wire::{rw, OKAY};
use anyhow::{bail, ensure, Context, Result};
use ring::abi::OP_WRITE;
use ring::tap::abi::STATE_IDLE;
use std::thread;
use std::time::Instant;

/// The scene.
pub(crate) struct TapScene {
    pub(crate) session: Session,
    pub(crate) store: DiskData,
    pub(crate) node: TapNode,
    pub(crate) disk: TapDisk,
}

impl TapScene {
    /// Connects a frontend to a disk that this program serves.
    pub(crate) fn new(lab: &Lab) -> Result<TapScene> {
        TapScene::on(lab, TapDisk::make()?)
    }

    /// Connects a frontend to an existing disk that this program serves.
    pub(crate) fn on(lab: &Lab, disk: TapDisk) -> Result<TapScene> {
        let (node, store) = (disk.start()?, DiskData::new()?);
        let session = lab.session_on_tap(&disk, WIDE)?;
        Ok(TapScene {
            session,
            store,
            node,
            disk,
        })
    }

    /// Sends writes of the frontend.
    pub(crate) fn send(&mut self, count: u64) -> Result<()> {
        let segs = self.session.segs(1);
        let write = |id| rw(OP_WRITE, id, id * 8, &segs);
        let requests: Vec<_> = (0..count).map(write).collect();
        self.session.spread(&requests)
    }

    /// Sends writes of the frontend, and waits until the process has them all.
    pub(crate) fn take(&mut self, count: u64) -> Result<Vec<u16>> {
        self.send(count)?;
        self.fetch(count as usize)
    }

    /// Waits until the process has `count` requests.
    pub(crate) fn fetch(&self, count: usize) -> Result<Vec<u16>> {
        let mut tags = Vec::new();
        let start = Instant::now();
        while tags.len() < count {
            tags.extend(self.node.exchange(&[])?);
            ensure!(start.elapsed() < ANSWER, "{tags:?} of {count} requests");
        }
        Ok(tags)
    }

    /// Waits for the answers of the frontend's requests.
    pub(crate) fn answered(&mut self, count: usize) -> Result<()> {
        for answer in self.session.answers(count)? {
            ensure!(answer.status == OKAY, "a good request failed: {answer:?}");
        }
        Ok(())
    }

    /// Fetches and answers requests without io_uring.
    pub(crate) fn serve(&self, count: usize) -> Result<()> {
        let mut served = 0;
        while served < count {
            let tags = self.node.read()?;
            answer(&self.node, &self.store, &tags)?;
            served += tags.len();
        }
        Ok(())
    }

    /// Checks the data, then tears everything down.
    pub(crate) fn finish(self) -> Result<()> {
        let TapScene {
            mut session,
            store,
            node,
            disk,
        } = self;
        while_served(&node, &store, || {
            session.exercise(72, 0x5eed)?;
            session.finish()
        })
        .context("after the attack the disk does not serve good requests any more")?;
        drop(node);
        disk.destroy()
    }

    /// The process dies first, and none of its I/O is left; then everything is torn down.
    pub(crate) fn finish_dead(self) -> Result<()> {
        let TapScene {
            session,
            node,
            disk,
            ..
        } = self;
        drop(node);
        session.finish()?;
        disk.wait("the end of the fence", |info| info.state == STATE_IDLE)?;
        disk.destroy()
    }
}

/// Waits until the backend reports this status of a frontend's disk.
pub(crate) fn wait_status(session: &Session, wanted: &str) -> Result<()> {
    let (vbd, mut last) = (&session.vbd, None);
    wait::until("tap-status", crate::vbd::SOON, || {
        last = vbd.store.read(&format!("{}/tap-status", vbd.back))?;
        Ok((last.as_deref() == Some(wanted)).then_some(()))
    })
    .with_context(|| format!("it is {last:?}, not {wanted}"))
}

/// Serves a node in this thread until `enough` returns true.
pub(crate) fn serve_until(
    node: &TapNode,
    store: &DiskData,
    mut enough: impl FnMut() -> bool,
) -> Result<()> {
    while !enough() {
        let tags = node.exchange(&[]).context("an honest fetch is refused")?;
        if tags.is_empty() {
            thread::yield_now();
        }
        answer(node, store, &tags)?;
    }
    Ok(())
}

/// Runs `frontend` while an honest process serves the disk.
pub(crate) fn while_served<T: Send>(
    node: &TapNode,
    store: &DiskData,
    frontend: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    thread::scope(|scope| {
        let guest = scope.spawn(frontend);
        serve_until(node, store, || guest.is_finished())?;
        match guest.join() {
            Ok(result) => result,
            Err(_) => bail!("the frontend's thread died"),
        }
    })
}
