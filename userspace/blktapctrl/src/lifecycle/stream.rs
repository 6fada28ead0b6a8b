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
use crate::record::{Part, Record, Role, Streamed, Want};
use control::stats::{Stream, Streaming};
use control::supervisor::What;
use control::tapdisk::{Reply, Request};
use control::{Code, Failure};
use std::rc::Rc;
use std::time::Duration;

/// Time between two questions.
const STEP: Duration = Duration::from_secs(1);
/// Time until something is tried again for which a guest has to wait.
pub(super) const AGAIN: Duration = Duration::from_secs(30);
/// How long a process may take to close its images before it is killed.
const PAUSE: Duration = Duration::from_secs(30);

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
        let before = disk.record.borrow().stream.clone();
        let wanted = Streamed { target, rate };
        self.registry
            .change(disk, |record| record.stream = Some(wanted.clone()))?;
        match ask(&process, rate, true).await {
            Ok(stream) => note(disk, &wanted, &stream),
            // The next one is asked as well.
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
        // Nobody begins it anew.
        let ended = self.registry.change(disk, |record| record.stream = None);
        ended?;
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
        // Who sees to it has not told yet how it has ended.
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
                let mut pause = STEP;
                if let Some(outcome) = look(&disk, &wanted).await {
                    let ended = lifecycle.note_outcome(&disk, &wanted, outcome);
                    // It comes again.
                    if let Err(failure) = disk.unless_doomed(ended).await {
                        tracing::warn!("disk {}: {failure}", disk.minor);
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
        wanted: &Streamed,
        outcome: Streaming,
    ) -> Result<(), Failure> {
        let _turn = disk.turn().await?;
        let rests = disk.record.borrow().doing.is_some();
        if rests || disk.record.borrow().stream.as_ref() != Some(wanted) {
            return Ok(());
        }
        let is_parent = |part: &Part| part.role == Role::Parent;
        let has_parents = disk.record.borrow().parts.iter().any(is_parent);
        if serves(disk, wanted) && outcome == Streaming::Done && has_parents {
            // Its process has them open, whatever it says.
            self.renew(disk, |record| {
                record.stream = None;
                record.parts.retain(|part| !is_parent(part));
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

    /// A new process serves the disk, which was given nothing that leaves the record by this change. The caller has
    /// the turn.
    ///
    /// # Errors
    /// The record is as it was; the disk is served, or will be.
    pub(super) async fn renew(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        change: impl FnOnce(&mut Record),
    ) -> Result<(), Failure> {
        let changed = match self.let_process_go(disk).await {
            Ok(()) => self.registry.change(disk, change),
            Err(failure) => Err(failure),
        };
        // Whatever has become of that.
        if disk.record.borrow().want == Want::Served {
            let served = self.serve_again(disk).await;
            self.or_revive(disk, served).await;
        }
        changed
    }
}

impl Lifecycle {
    /// The process of a disk ends, and what it had is over.
    async fn let_process_go(&self, disk: &Disk) -> Result<(), Failure> {
        // What cannot be written afterwards would be done again and again.
        self.registry.change(disk, |_| ())?;
        owes_nothing(disk).await?;
        match self.close_image(disk, PAUSE).await {
            Ok(Some(lost)) => return Err(lost),
            Ok(None) => owes_nothing(disk).await?,
            // Storage hangs. It is killed, and what it had is executed again when that is over.
            Err(failure) if failure.code == Code::Timeout => {}
            Err(failure) => return Err(failure),
        }
        self.end_process(disk).await?;
        self.take_from_kernel(disk, PAUSE).await
    }
}

/// What the guest is still to be told of, it learns from this process alone.
pub(super) async fn owes_nothing(disk: &Disk) -> Result<(), Failure> {
    let Ok(process) = disk.serving() else {
        return Ok(());
    };
    match process.status().await?.owes {
        false => Ok(()),
        true => Err(Failure::new(
            Code::State,
            "something that was written could not be made durable, and the guest has not asked yet: its process \
             stays until it has",
        )),
    }
}

/// How far it is, if it is still wanted. That it is over is told when all of it is.
fn note(disk: &Disk, wanted: &Streamed, stream: &Stream) {
    if disk.record.borrow().stream.as_ref() == Some(wanted) {
        disk.streamed.replace(Some(Stream {
            state: Streaming::Running,
            ..stream.clone()
        }));
    }
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
    let rests = {
        let record = disk.record.borrow();
        record.want != Want::Served || record.inactive.is_some() || record.doing.is_some()
    };
    let process = disk.serving().ok()?;
    if rests {
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
        // It says nothing of the image.
        Err(failure) if matches!(failure.code, Code::Gone | Code::State | Code::Timeout) => None,
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
