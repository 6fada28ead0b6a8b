// SPDX-License-Identifier: MIT OR Apache-2.0
//! Copies the disk to another image, which then gets the guest's writes, until the disk is paused: then both are equal,
//! and the supervisor may serve the other one. If the other one is the backing image, only the image's own clusters are
//! copied.

use super::{failed, DiskPiece, WalkEnd, Worker, PIECE};
use crate::mirror_target::MirrorTarget;
use crate::{Server, Session};
use control::stats::Mirroring;
use control::{Code, Failure};
use diskio::Data;
use drivers::Content;
use std::rc::Rc;

/// Bytes without data that are looked at at once, and that others may have to wait for.
const HOLE: u64 = 64 << 20;

/// Begins to make `twin` a copy of the disk, with `rate` bytes in a second.
pub(crate) fn begin(session: &Rc<Session>, server: &Rc<Server>, twin: MirrorTarget, rate: u64) {
    let twin = Rc::new(twin);
    server.set_twin(Some(twin.clone()));
    session.jobs().mirror.rate.set(rate);
    let worker = Worker::begin(session, |jobs| &jobs.mirror, twin.clone());
    let runtime = session.runtime();
    runtime.tasks.spawn(twin.clone().watch(runtime.io.clone()));
    session.runtime().clone().tasks.spawn(async move {
        match run(&worker, &twin).await {
            Ok(WalkEnd::Through) => {}
            Ok(WalkEnd::Stopped | WalkEnd::Closed) => twin.end(Mirroring::Ended),
            Err(failure) => twin.end(Mirroring::Failed {
                why: failure.message,
            }),
        }
    });
}

async fn run(
    worker: &Worker<Rc<MirrorTarget>>,
    twin: &Rc<MirrorTarget>,
) -> Result<WalkEnd, Failure> {
    // CAST: it is small.
    let buffer = Data::zeroed(PIECE as usize).map_err(|error| failed("no memory", error))?;
    let step = async |server: &Rc<Server>, at, left| {
        let disk = server.disk();
        let found = twin.look(disk, at, left).await;
        let what = "cannot look at the disk";
        let extent = found.map_err(|error| failed(what, error))?;
        let empty = match extent.content {
            Content::Hole => twin.hole(at, extent.len.min(HOLE)).await,
            Content::Below if twin.is_below() => extent.len.min(HOLE),
            Content::Data | Content::Below => 0,
        };
        let most = if empty > 0 { empty } else { PIECE };
        let len = extent.len.min(most);
        // The job only reads the disk, so the guest may read during that.
        let _claim = server.claim(at, len, false).await;
        let work = twin.copy(disk, &buffer, at, len).await;
        // A mirror that has failed or was paused is over.
        match twin.is_active() {
            true => Ok(DiskPiece { len, work }),
            false => Err(Failure::new(Code::State, "the mirror is over")),
        }
    };
    let end = worker.walk(step).await?;
    if end == WalkEnd::Through {
        twin.clear_rest(worker.size()).await;
        twin.is_same();
    }
    Ok(end)
}
