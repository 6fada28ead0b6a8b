// SPDX-License-Identifier: MIT OR Apache-2.0
//! Stream: the image of a disk copies the blocks of its backing images that it shows, while the guest works, and then
//! needs them no more.
//!
//! The record has the request, and the supervisor repeats it to the disk's process at intervals: each process continues
//! where another one has ended, and reports its progress in its answers.

use super::respawn::{is_just_served, says_nothing, AGAIN, STEP};
use super::Lifecycle;
use crate::disk::{Disk, DiskFate};
use crate::log::tell;
use crate::process::{Process, SOON};
use crate::record::{parents, PendingMirror, PendingStream};
use crate::rpc_client::unexpected;
use control::stats::{Stream, Streaming};
use control::supervisor::What;
use control::tapdisk::{Reply, Request};
use control::{Code, Failure};
use std::rc::Rc;

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
        if target.below().is_some() {
            return Err(Failure::unsupported(format!(
                "{target} keeps its writes in memory, and would have all of the image there: it needs that until \
                 the disk ends"
            )));
        }
        let commits = |mirror: &PendingMirror| mirror.below;
        if disk.record.borrow().mirror.as_ref().is_some_and(commits) {
            return Err(Failure::new(
                Code::State,
                format!(
                    "disk {0} gives what it has to the image below: end that first: `tap-ctl commit -m {0} --cancel`",
                    disk.minor
                ),
            ));
        }
        let before = disk.record.borrow().stream.clone();
        let wanted = PendingStream { target, rate };
        self.registry
            .change(disk, |record| record.stream = Some(wanted.clone()))?;
        match ask(&process, rate, true).await {
            Ok(stream) => note(disk, &wanted, &stream),
            // The next process gets the question as well.
            Err(failure) if matches!(failure.code, Code::Gone | Code::Timeout) => {
                note(disk, &wanted, &Stream::default());
            }
            Err(failure) => {
                self.registry
                    .change(disk, |record| record.stream = before)?;
                return Err(failure);
            }
        }
        self.follow_stream(disk);
        self.streamed(disk)
    }

    async fn end_stream(&self, disk: &Disk) -> Result<Stream, Failure> {
        // No later process begins it again.
        self.registry.change(disk, |record| record.stream = None)?;
        let asked = match disk.serving() {
            Ok(process) => ask(&process, 0, false).await,
            Err(_) => Ok(Stream::default()),
        };
        let mut told = disk.streamed.borrow().clone().unwrap_or_default();
        // The moment in which it was ended may have been the last one.
        told.state = match asked?.state {
            Streaming::Done => Streaming::Done,
            _ => Streaming::Ended,
        };
        disk.streamed.replace(Some(told.clone()));
        Ok(told)
    }

    /// How far it is, or how the last one has ended, as far as this supervisor knows.
    ///
    /// # Errors
    /// There was none.
    pub fn streamed(&self, disk: &Disk) -> Result<Stream, Failure> {
        let known = disk.streamed.borrow().clone();
        // The task that follows it has not reported yet how it has ended.
        let runs = disk.record.borrow().stream.is_some() || disk.streams.get();
        match known {
            Some(stream) if !runs && stream.state == Streaming::Running => Ok(Stream {
                state: Streaming::Ended,
                ..stream
            }),
            Some(stream) => Ok(stream),
            None if runs => Ok(Stream::default()),
            None => Err(Failure::new(
                Code::State,
                format!(
                    "disk {} has no stream: `tap-ctl stream GUEST VDEV` begins one",
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
            while disk.fate() == DiskFate::Stays {
                let Some(wanted) = disk.record.borrow().stream.clone() else {
                    break;
                };
                let mut pause = STEP;
                if let Some(outcome) = look(&disk, &wanted).await {
                    let ended = lifecycle.note_outcome(&disk, &wanted, outcome);
                    // It comes again.
                    if let Err(failure) = disk.unless_doomed(ended).await {
                        tell!(
                            warn,
                            disk.about().failed(&failure),
                            "disk {}: {failure}",
                            disk.minor
                        );
                        pause = AGAIN;
                    }
                }
                tokio::time::sleep(pause).await;
            }
            disk.streams.set(false);
        });
    }

    /// A stream is over, and leaves the record.
    async fn note_outcome(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        wanted: &PendingStream,
        outcome: Streaming,
    ) -> Result<(), Failure> {
        let _turn = disk.turn().await?;
        let rests = disk.record.borrow().doing.is_some();
        if rests || disk.record.borrow().stream.as_ref() != Some(wanted) {
            return Ok(());
        }
        let has_parents = parents(&disk.record.borrow().parts).next().is_some();
        if serves(disk, wanted) && outcome == Streaming::Done && has_parents {
            // Its process has them open, whatever it says.
            self.renew(disk, |record| {
                record.stream = None;
                record.parts.retain(|part| !part.is_parent());
            })
            .await?;
        } else {
            self.registry.change(disk, |record| record.stream = None)?;
        }
        let mut ended = disk.streamed.borrow().clone().unwrap_or_default();
        ended.state = outcome.clone();
        disk.streamed.replace(Some(ended));
        let target = wanted.target.clone();
        let what = What::Streamed { target, outcome };
        self.registry.events.add(Some(disk.minor), what);
        Ok(())
    }
}

/// Records the progress, if the stream is still requested. The end is reported when all of the stream is done.
fn note(disk: &Disk, wanted: &PendingStream, stream: &Stream) {
    if disk.record.borrow().stream.as_ref() == Some(wanted) {
        disk.streamed.replace(Some(Stream {
            state: Streaming::Running,
            ..stream.clone()
        }));
    }
}

/// Whether the disk has the image for which the stream was requested.
fn serves(disk: &Disk, wanted: &PendingStream) -> bool {
    let record = disk.record.borrow();
    record
        .open
        .as_ref()
        .is_some_and(|open| open.target == wanted.target)
}

/// Asks for a stream, and says how it has ended, if it has.
async fn look(disk: &Disk, wanted: &PendingStream) -> Option<Streaming> {
    if !serves(disk, wanted) {
        return Some(Streaming::Ended);
    }
    let process = disk.serving().ok()?;
    if !is_just_served(disk) {
        return None;
    }
    match ask(&process, wanted.rate, false).await {
        Ok(stream) => {
            note(disk, wanted, &stream);
            match stream.state {
                // Its image was closed: the next question begins one anew.
                Streaming::Running | Streaming::Ended => None,
                over => Some(over),
            }
        }
        Err(failure) if says_nothing(&failure) => None,
        Err(failure) => Some(Streaming::Failed {
            why: failure.message,
        }),
    }
}

async fn ask(process: &Process, rate: u64, anew: bool) -> Result<Stream, Failure> {
    let question = Request::Stream { rate, anew };
    match process.ask(&question, &[], SOON).await? {
        Reply::Stream(stream) => Ok(stream),
        reply => Err(unexpected(&reply)),
    }
}
