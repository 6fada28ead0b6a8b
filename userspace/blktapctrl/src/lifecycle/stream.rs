// SPDX-License-Identifier: MIT OR Apache-2.0
//! The image of a disk takes over what it shows of those below it, while its guest goes on, and then needs them no
//! more.
//!
//! It is on the record that this is wanted, and the disk's process is asked for it again and again: each one goes on
//! where another one has ended, and says in its answers how far it is.

use super::Lifecycle;
use crate::disk::{Disk, Fate};
use crate::link::unexpected;
use crate::process::{Process, SOON};
use crate::record::{Role, Streamed, Want};
use control::stats::{Stream, Streaming};
use control::supervisor::What;
use control::tapdisk::{Reply, Request};
use control::{Code, Failure};
use std::rc::Rc;
use std::time::Duration;

/// Time between two questions.
const STEP: Duration = Duration::from_secs(1);

impl Lifecycle {
    /// Has the image of a disk take over what is below it, with `rate` bytes in a second; 0 ends that.
    ///
    /// # Errors
    /// It cannot.
    pub async fn stream(self: &Rc<Self>, disk: &Rc<Disk>, rate: u64) -> Result<Stream, Failure> {
        let _turn = disk.turn().await?;
        if rate == 0 {
            return self.end_stream(disk).await;
        }
        let process = disk.serving()?;
        let target = disk.open()?.target;
        let wanted = Some(Streamed { target, rate });
        self.registry
            .change(disk, |record| record.stream = wanted)?;
        match ask(&process, rate).await {
            Ok(stream) => note(disk, &stream),
            // The next one is asked as well.
            Err(failure) if matches!(failure.code, Code::Gone | Code::Timeout) => {
                note(disk, &Stream::default());
            }
            Err(failure) => {
                self.registry.change(disk, |record| record.stream = None)?;
                return Err(failure);
            }
        }
        self.follow_stream(disk);
        self.streamed(disk)
    }

    async fn end_stream(&self, disk: &Disk) -> Result<Stream, Failure> {
        // Nobody begins it anew.
        self.registry.change(disk, |record| record.stream = None)?;
        if let Ok(process) = disk.serving() {
            ask(&process, 0).await?;
        }
        let mut ended = disk.streamed.borrow().clone().unwrap_or_default();
        if ended.state == Streaming::Running {
            ended.state = Streaming::Ended;
        }
        disk.streamed.replace(Some(ended.clone()));
        Ok(ended)
    }

    /// How far it is, or how the last one has ended, as far as this supervisor knows.
    ///
    /// # Errors
    /// There was none.
    pub fn streamed(&self, disk: &Disk) -> Result<Stream, Failure> {
        let known = disk.streamed.borrow().clone();
        match (known, &disk.record.borrow().stream) {
            (Some(stream), _) => Ok(stream),
            (None, Some(_)) => Ok(Stream::default()),
            (None, None) => Err(Failure::new(
                Code::State,
                format!(
                    "disk {} does not take over what is below its image",
                    disk.minor
                ),
            )),
        }
    }

    /// Asks the disk's process for the stream that is on record, until it is over.
    pub fn follow_stream(self: &Rc<Self>, disk: &Rc<Disk>) {
        if disk.record.borrow().stream.is_none() || disk.streams.replace(true) {
            return;
        }
        let (lifecycle, disk) = (self.clone(), disk.clone());
        tokio::task::spawn_local(async move {
            while disk.fate() == Fate::Stays {
                let Some(wanted) = disk.record.borrow().stream.clone() else {
                    break;
                };
                if let Some(outcome) = look(&disk, &wanted).await {
                    lifecycle.note_outcome(&disk, &wanted, outcome).await;
                }
                tokio::time::sleep(STEP).await;
            }
            disk.streams.set(false);
        });
    }

    /// A stream is over, and leaves the record; should that not be written, this comes again.
    async fn note_outcome(&self, disk: &Disk, wanted: &Streamed, outcome: Streaming) {
        let Ok(_turn) = disk.turn().await else {
            return;
        };
        if disk.record.borrow().stream.as_ref() != Some(wanted) {
            return;
        }
        let is_served = serves(disk, wanted);
        let written = self.registry.change(disk, |record| {
            record.stream = None;
            // What the image needs no more may be others'.
            if is_served && outcome == Streaming::Done {
                record.parts.retain(|part| part.role != Role::Parent);
            }
        });
        if let Err(failure) = written {
            tracing::warn!("disk {}: {failure}", disk.minor);
            return;
        }
        let mut ended = disk.streamed.borrow().clone().unwrap_or_default();
        ended.state = outcome.clone();
        disk.streamed.replace(Some(ended));
        let target = wanted.target.clone();
        let what = What::Streamed { target, outcome };
        self.registry.events.add(Some(disk.minor), what);
    }
}

/// How far it is. That it is over is told when all of it is.
fn note(disk: &Disk, stream: &Stream) {
    disk.streamed.replace(Some(Stream {
        state: Streaming::Running,
        ..stream.clone()
    }));
}

/// The disk has the image for which it is wanted.
fn serves(disk: &Disk, wanted: &Streamed) -> bool {
    let record = disk.record.borrow();
    record
        .open
        .as_ref()
        .is_some_and(|open| open.target == wanted.target)
}

/// Asks for a stream, and says how it has ended, if it has.
async fn look(disk: &Disk, wanted: &Streamed) -> Option<Streaming> {
    if !serves(disk, wanted) {
        return Some(Streaming::Ended);
    }
    let (want, inactive) = {
        let record = disk.record.borrow();
        (record.want, record.inactive.is_some())
    };
    let process = disk.serving().ok()?;
    if want != Want::Served || inactive {
        return None;
    }
    match ask(&process, wanted.rate).await {
        Ok(stream) => {
            note(disk, &stream);
            match stream.state {
                // Its image was closed: the next question begins one anew.
                Streaming::Running | Streaming::Ended => None,
                over => Some(over),
            }
        }
        Err(failure) if may_pass(&failure) => None,
        Err(failure) => Some(Streaming::Failed {
            why: failure.message,
        }),
    }
}

/// It says nothing of the image.
fn may_pass(failure: &Failure) -> bool {
    matches!(failure.code, Code::Gone | Code::State | Code::Timeout)
}

async fn ask(process: &Process, rate: u64) -> Result<Stream, Failure> {
    match process.ask(&Request::Stream { rate }, &[], SOON).await? {
        Reply::Stream(stream) => Ok(stream),
        reply => Err(unexpected(&reply)),
    }
}
