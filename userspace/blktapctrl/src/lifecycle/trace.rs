// SPDX-License-Identifier: MIT OR Apache-2.0
//! Traces record the requests of a guest.
//!
//! The [file](crate::traces) is on the record before the disk's process opens it, so that each later process continues
//! there. A trace is for who looks for a mistake, and no disk fails for it: where it cannot be had it ends, with an
//! event.

use super::io_errors::until_end;
use super::Lifecycle;
use crate::blocking_io::{blocking_io, LIMIT};
use crate::disk::Disk;
use crate::image::Opened;
use crate::log::tell;
use crate::process::{Process, SOON};
use crate::rpc_client::{unexpected, EVER};
use crate::traces;
use control::supervisor::What;
use control::tapdisk::{Reply, Request, State};
use control::{Code, Failure, TraceTo, Tracing};
use std::convert::Infallible;
use std::rc::Rc;
use std::time::Duration;

/// Time between two answers of a process that says again and again that a trace has ended.
const STEP: Duration = Duration::from_secs(1);
/// How long a process may take to say why one has ended, which it knows.
const MOMENT: Duration = Duration::from_secs(1);

/// Hears of traces of a process that end by themselves, until it ends.
pub(super) async fn watch(lifecycle: Rc<Lifecycle>, process: Rc<Process>) {
    let listen = async || listen(&lifecycle, &process).await;
    until_end(
        &lifecycle,
        &process,
        "say whether a trace has ended",
        listen,
    )
    .await;
}

async fn listen(lifecycle: &Rc<Lifecycle>, process: &Rc<Process>) -> Result<Infallible, Failure> {
    let mut link = process.another_link().await?;
    loop {
        let why = match link.ask(&Request::Untraced, &[], EVER).await? {
            Reply::Untraced { why } => why,
            reply => return Err(unexpected(&reply)),
        };
        if let Some(disk) = lifecycle.registry.of_process(process) {
            lifecycle.untraced(&disk, process, &why).await?;
        }
        tokio::time::sleep(STEP).await;
    }
}

/// Why a process writes no trace though it should.
async fn told_why(process: &Process) -> String {
    let told = async {
        let mut link = process.another_link().await?;
        link.ask(&Request::Untraced, &[], MOMENT).await
    };
    match told.await {
        Ok(Reply::Untraced { why }) => why,
        // It knows of no trace: an earlier supervisor has ended before it sent the question, or the question came too
        // late.
        _ => "its process was not told of it".into(),
    }
}

impl Lifecycle {
    /// Writes down what the guest of a disk asks for.
    ///
    /// # Errors
    /// It cannot be: nothing is left of it.
    pub async fn trace(self: &Rc<Self>, disk: &Rc<Disk>, to: TraceTo) -> Result<(), Failure> {
        let _turn = disk.turn().await?;
        let (process, says) = self.introduced(disk).await?;
        if !says.traces {
            return Err(Failure::unsupported(format!(
                "the process of disk {0} is older, and writes no traces: replace it: `tap-ctl handoff {0}`",
                disk.minor
            )));
        }
        self.settle_trace(disk).await?;
        if let Some(traced) = &disk.record.borrow().trace {
            return Err(Failure::new(
                Code::Exists,
                format!(
                    "disk {0} has a trace already, in {1}: end it first: `tap-ctl trace {0} --end`",
                    disk.minor,
                    traced.path.display()
                ),
            ));
        }
        if !to.path.is_absolute() {
            let why = format!("{} does not begin with /", to.path.display());
            return Err(Failure::invalid(why));
        }
        let size = disk.serves.borrow().as_ref().map_or(0, |disk| disk.size);
        let (path, minor) = (to.path.clone(), disk.minor);
        let traced = blocking_io(&path, LIMIT, move || traces::make(&to, minor, size)).await?;
        let begun = async {
            let (again, its) = (traced.clone(), traced.clone());
            let file = blocking_io(&path, LIMIT, move || traces::open(&again)).await?;
            self.registry
                .change(disk, |record| record.trace = Some(its))?;
            let question = Request::Trace { on: true };
            process.tell(&question, file.fd(), SOON).await
        };
        let begun = disk.unless_doomed(begun).await;
        if begun.is_err() {
            self.registry.change(disk, |record| record.trace = None)?;
            // It may have heard, and say so too late.
            self.tell_end(disk, &process).await;
            let kept = blocking_io(&path, LIMIT, move || traces::remove(&traced)).await;
            if let Err(failure) = kept {
                tell!(
                    error,
                    disk.about().failed(&failure),
                    "disk {minor}: {failure}"
                );
            }
        }
        begun
    }

    /// Ends a trace.
    ///
    /// # Errors
    /// There is none, or the process does not answer: then it continues.
    pub async fn end_trace(self: &Rc<Self>, disk: &Rc<Disk>) -> Result<(), Failure> {
        let _turn = disk.turn().await?;
        self.finish_before(disk).await?;
        if disk.record.borrow().trace.is_none() {
            let why = format!("disk {} has no trace", disk.minor);
            return Err(Failure::new(Code::NotFound, why));
        }
        if let Ok(process) = disk.serving() {
            let question = Request::Trace { on: false };
            let told = disk
                .unless_doomed(process.tell(&question, None, SOON))
                .await;
            match told {
                // The next one does not begin with it.
                Err(failure) if failure.code == Code::Gone => {}
                told => told?,
            }
        }
        self.registry.change(disk, |record| record.trace = None)
    }

    /// Returns the trace of a disk's guest, if there is one.
    ///
    /// # Errors
    /// Its process does not say.
    pub async fn traced(self: &Rc<Self>, disk: &Rc<Disk>) -> Result<Option<Tracing>, Failure> {
        let _turn = disk.turn().await?;
        self.settle_trace(disk).await?;
        let record = disk.record.borrow();
        Ok(record.trace.as_ref().map(|traced| Tracing {
            path: traced.path.clone(),
            data: traced.data,
            size: traced.size,
            at_ms: traced.at_ms,
        }))
    }

    /// The file for the process of a disk.
    pub(super) async fn open_trace(&self, disk: &Disk) -> Result<Opened, Failure> {
        let traced = disk.record.borrow().trace.clone();
        let traced = traced.ok_or_else(|| {
            let why = format!("disk {} has no trace", disk.minor);
            Failure::new(Code::NotFound, why)
        })?;
        let path = traced.path.clone();
        blocking_io(&path, LIMIT, move || traces::open(&traced)).await
    }

    /// To be called before a process is to open the image of a disk: one that does not know of traces writes none.
    pub(super) async fn check_trace(&self, disk: &Disk, process: &Process) -> Result<(), Failure> {
        if disk.record.borrow().trace.is_none() || process.introduce(SOON).await?.traces {
            return Ok(());
        }
        self.lose_trace(disk, "its process is older, and writes no traces")
    }

    /// Ends the recorded trace if the process serves the disk without one, because one of the two ended in the middle.
    /// The caller has the turn.
    async fn settle_trace(&self, disk: &Disk) -> Result<(), Failure> {
        let process = disk.serving();
        let (Some(_), Ok(process)) = (disk.record.borrow().trace.clone(), process) else {
            return Ok(());
        };
        let status = disk.unless_doomed(process.status()).await?;
        let is_on = status.open.is_some_and(|open| open.trace);
        match is_on || status.state != State::Running {
            true => Ok(()),
            false => self.lose_trace(disk, &told_why(&process).await),
        }
    }

    /// Checks the trace in a task, because an earlier supervisor may have ended before it told the process.
    pub fn settle_trace_later(self: &Rc<Self>, disk: &Rc<Disk>) {
        if disk.record.borrow().trace.is_none() {
            return;
        }
        let (lifecycle, disk) = (self.clone(), disk.clone());
        tokio::task::spawn_local(async move {
            let settled = async {
                let _turn = disk.turn().await?;
                lifecycle.settle_trace(&disk).await
            };
            if let Err(failure) = settled.await {
                tell!(
                    warn,
                    disk.about().failed(&failure),
                    "disk {}: {failure}",
                    disk.minor
                );
            }
        });
    }

    /// A process says that its trace has ended.
    async fn untraced(
        &self,
        disk: &Rc<Disk>,
        process: &Rc<Process>,
        why: &str,
    ) -> Result<(), Failure> {
        let _turn = disk.turn().await?;
        let serves = disk.serving().is_ok_and(|its| Rc::ptr_eq(&its, process));
        let status = disk.unless_doomed(process.status()).await?;
        // Another one may have begun since.
        if !serves || status.open.is_some_and(|open| open.trace) {
            return Ok(());
        }
        self.lose_trace(disk, why)?;
        // It need not say so again.
        self.tell_end(disk, process).await;
        Ok(())
    }

    async fn tell_end(&self, disk: &Disk, process: &Process) {
        let question = Request::Trace { on: false };
        let told = disk
            .unless_doomed(process.tell(&question, None, SOON))
            .await;
        if let Err(failure) = told {
            let minor = disk.minor;
            tell!(
                warn,
                disk.about().failed(&failure),
                "disk {minor}: its process was not told that its trace ends: {failure}"
            );
        }
    }

    /// There is no trace any more. Its file stays where it is.
    pub(super) fn lose_trace(&self, disk: &Disk, why: &str) -> Result<(), Failure> {
        let Some(traced) = disk.record.borrow().trace.clone() else {
            return Ok(());
        };
        self.registry.change(disk, |record| record.trace = None)?;
        let (path, why) = (traced.path, why.to_owned());
        let what = What::Untraced { path, why };
        self.registry.events.add(Some(disk.minor), what);
        Ok(())
    }
}
