// SPDX-License-Identifier: MIT OR Apache-2.0
//! Requests of tap-ctl: a request becomes a call, and its result an answer.

use crate::lifecycle::create::CreatedDisk;
use crate::lifecycle::Lifecycle;
use crate::process::{OPEN, SOON};
use crate::recovery;
use control::supervisor::{Filter, Reply, Request, Row, TopRow, Which};
use control::tapdisk;
use control::Failure;
use std::rc::Rc;
use std::time::Duration;

/// How long a tapdisk may take to tell what it counted, in a display of all of them.
const GLANCE: Duration = Duration::from_secs(1);

/// The limit of an asker in seconds; 0 is the usual one.
fn limit(seconds: u32) -> Duration {
    Duration::from_secs(if seconds == 0 { 120 } else { seconds.into() })
}

/// Answers a question. [`Request::Subscribe`] is the connection's own affair.
///
/// # Errors
/// Says what could not be done and what to do about it.
pub async fn answer(lifecycle: &Rc<Lifecycle>, request: Request) -> Result<Reply, Failure> {
    let registry = &lifecycle.registry;
    let done = |()| Reply::Done;
    match request {
        Request::Ping => Ok(Reply::Process(tapdisk::Process {
            pid: std::process::id(),
            program: format!("blktapctrl {}", env!("CARGO_PKG_VERSION")),
            abi: tapdev::ABI_VERSION,
            notes: true,
            marks: true,
            traces: true,
            shares: true,
        })),
        Request::List(filter) => registry.rows(&filter).map(|disks| Reply::Disks { disks }),
        Request::Allocate(allocate) => {
            let minor = lifecycle.allocate(&allocate)?;
            Ok(Reply::Minor { minor })
        }
        Request::Free { minor } => lifecycle.free(minor).await.map(done),
        Request::Spawn => {
            let pid = lifecycle.spawn().await?.pid();
            Ok(Reply::Pid { pid })
        }
        Request::Attach(which) => lifecycle.attach_idle(&which).await.map(done),
        Request::Detach(which) => lifecycle.detach(&which).await.map(done),
        Request::Open {
            which,
            open,
            mode,
            files,
        } => {
            let disk = registry.find(&which)?;
            let opened = lifecycle.open(&disk, open, mode, files).await;
            opened.map(Reply::Opened)
        }
        Request::Close {
            which,
            force,
            timeout_s,
        } => {
            let disk = registry.find(&which)?;
            let closed = lifecycle.close(&disk, force, limit(timeout_s)).await;
            closed.map(done)
        }
        Request::Pause { which, timeout_s } => {
            let disk = registry.find(&which)?;
            lifecycle.pause(&disk, limit(timeout_s)).await.map(done)
        }
        Request::Unpause {
            which,
            target,
            may_shrink,
            files,
        } => {
            let disk = registry.find(&which)?;
            let unpaused = lifecycle.unpause(&disk, target, files, may_shrink);
            unpaused.await.map(Reply::Opened)
        }
        Request::Handoff {
            which,
            program,
            timeout_s,
        } => {
            let disk = registry.find(&which)?;
            let limit = Duration::from_secs(if timeout_s == 0 { 30 } else { timeout_s.into() });
            let handed = lifecycle.handoff(&disk, program, limit).await;
            handed.map(Reply::HandedOff)
        }
        Request::Snapshot { which, target } => {
            let disk = registry.find(&which)?;
            let taken = lifecycle.snapshot(&disk, target).await;
            taken.map(Reply::Snapshot)
        }
        Request::Resize(which) => {
            let grown = lifecycle.grow(&which, &tapdisk::Request::Resize, SOON);
            grown.await.map(Reply::Opened)
        }
        Request::Grow { which, size } => {
            let how = tapdisk::Request::Grow { size };
            let grown = lifecycle.grow(&which, &how, OPEN);
            grown.await.map(Reply::Opened)
        }
        Request::Snapshots { disks } => {
            let find = |(which, target)| Ok((registry.find(&which)?, target));
            let wanted: Result<Vec<_>, Failure> = disks.into_iter().map(find).collect();
            let taken = lifecycle.snapshots(wanted?).await?;
            Ok(Reply::Snapshots { taken })
        }
        Request::Set { which, changes } => {
            let policy = lifecycle.set(&which, &changes).await?;
            Ok(Reply::Policy(policy))
        }
        Request::SetGroup { name, changes } => {
            let group = lifecycle.set_group(&name, &changes)?;
            let groups = vec![group];
            Ok(Reply::Groups { groups })
        }
        Request::RemoveGroup { name } => lifecycle.remove_group(&name).map(done),
        Request::Groups { name } => {
            let groups = match name {
                Some(name) => vec![lifecycle.tell_group(&name)?],
                None => lifecycle.tell_groups(),
            };
            Ok(Reply::Groups { groups })
        }
        Request::Scrub { which, rate } => {
            let process = registry.find(&which)?.serving()?;
            process.scrub(rate).await.map(done)
        }
        Request::Stream { which, rate } => {
            let disk = registry.find(&which)?;
            let stream = match rate {
                Some(rate) => lifecycle.stream(&disk, rate).await,
                None => lifecycle.streamed(&disk),
            };
            stream.map(Reply::Stream)
        }
        Request::Mirror { which, to } => {
            let disk = registry.find(&which)?;
            let mirror = match to {
                Some(to) => lifecycle.mirror(&disk, to, false).await,
                None => lifecycle.mirrored(&disk),
            };
            mirror.map(Reply::Mirror)
        }
        Request::Commit { which, to } => {
            let disk = registry.find(&which)?;
            lifecycle.mirror(&disk, to, true).await.map(Reply::Mirror)
        }
        Request::EndMirror(which) => {
            let disk = registry.find(&which)?;
            lifecycle.end_mirror(&disk).await.map(Reply::Mirror)
        }
        Request::Mark { which, name } => {
            let disk = registry.find(&which)?;
            let marks = lifecycle.mark(&disk, name).await?;
            Ok(Reply::Marks { marks })
        }
        Request::Unmark { which, name } => {
            let disk = registry.find(&which)?;
            let marks = lifecycle.unmark(&disk, &name).await?;
            Ok(Reply::Marks { marks })
        }
        Request::Marks(which) => {
            let marks = lifecycle.marks(&*registry.find(&which)?);
            Ok(Reply::Marks { marks })
        }
        Request::Changed { which, since, from } => {
            let disk = registry.find(&which)?;
            let changed = lifecycle.changed(&disk, &since, from).await;
            changed.map(Reply::Changed)
        }
        Request::Trace { which, to } => {
            let disk = registry.find(&which)?;
            if let Some(to) = to {
                lifecycle.trace(&disk, to).await?;
            }
            let trace = lifecycle.traced(&disk).await?;
            Ok(Reply::Trace { trace })
        }
        Request::EndTrace(which) => {
            lifecycle.end_trace(&registry.find(&which)?).await?;
            Ok(Reply::Trace { trace: None })
        }
        Request::Stats(which) => {
            let disk = registry.find(&which)?;
            let mut stats = disk.serving()?.stats(SOON).await?;
            stats.direct = registry.counted(&disk).by_itself();
            Ok(Reply::Stats(stats))
        }
        Request::Create(create) => lifecycle.create(*create).await.map(created),
        Request::Destroy {
            which,
            timeout_s,
            of,
        } => {
            let is_toolstack = which.vbd.is_some() && of.is_none();
            let vbd = of.or(which.vbd);
            let which = Which { vbd, ..which };
            recovery::to_end(lifecycle, &which).await?;
            let ended = lifecycle.end(&which, timeout_s, is_toolstack).await;
            ended.map(done)
        }
        Request::Park { timeout_s } => {
            let minors = lifecycle.park(limit(timeout_s)).await?;
            Ok(Reply::Parked { minors })
        }
        Request::Unpark => {
            let minors = lifecycle.unpark().await?;
            Ok(Reply::Parked { minors })
        }
        Request::Adopt { minor } => recovery::unknown(lifecycle, minor).await.map(done),
        Request::Forget { minor } if lifecycle.forget_lease(minor) => Ok(Reply::Done),
        Request::Forget { minor } => registry.forget(minor).map(done),
        Request::Check(check) => lifecycle.admission.check(check).await.map(done),
        Request::Top => top(lifecycle).await,
        Request::Subscribe { .. } => Err(Failure::invalid("subscribing is done once")),
    }
}

fn created(made: CreatedDisk) -> Reply {
    let minor = made.minor;
    match made.served {
        Some((pid, disk)) => Reply::Created { minor, pid, disk },
        None => Reply::Minor { minor },
    }
}

async fn top(lifecycle: &Lifecycle) -> Result<Reply, Failure> {
    let registry = &lifecycle.registry;
    let one = |row: Row| async {
        let disk = row.minor.and_then(|minor| registry.get(minor));
        let process = disk.and_then(|disk| disk.serving().ok());
        let stats = match &process {
            Some(process) => process.stats(GLANCE).await.ok(),
            None => None,
        };
        TopRow {
            row,
            stats,
            resident: process.and_then(|process| process.resident()),
        }
    };
    let rows = registry.rows(&Filter::default())?;
    let rows = futures::future::join_all(rows.into_iter().map(one)).await;
    let counted = Some(registry.counts());
    let groups = lifecycle.tell_groups();
    Ok(Reply::Top {
        rows,
        counted,
        groups,
    })
}
